"""How good features are at telling classes apart: weighted k-NN and linear probes, as DINOv2 is evaluated.

The protocols are those of the reference (facebookresearch/dinov2, dinov2/eval/knn.py and linear.py), with one
difference: both work on features of images as they are at evaluation, while the reference trains its linear probes on
random crops and flips. Figures of linear probes are therefore not comparable with published ones to the last digit.

Accuracies are fractions. An image is right in the top k if fewer than k other classes score as high or higher: ties,
among them those of classes without a vote, count against.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from dinov2_fast.errors import InvalidValueError

NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07
BLOCKS = (1, 4)
LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
STEPS = 12500  # the reference's 10 epochs of 1250
BATCH_SIZE = 128

_MOMENTUM = 0.9
_SIMILARITIES = 2**27  # held at a time, half a gigabyte


class Accuracy(NamedTuple):
    """Fractions of images whose class is the best, and among the best five."""

    top1: float
    top5: float


def knn(
    train: Any,
    train_labels: Any,
    val: Any = None,
    val_labels: Any = None,
    *,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    n_per_class: int | None = None,
    n_tries: int = 1,
    device: str | torch.device = "cpu",
) -> dict[int, Accuracy]:
    """Weighted k-NN: the k nearest training images by cosine vote for their classes, each with exp(cosine / T).

    Wu et al., "Unsupervised feature learning via non-parametric instance discrimination" (2018), section 3.4.

    With `n_per_class` few training images vote: so many of each class, or all of a smaller one, chosen at random. The
    values of k are then that number and those of `neighbours` below it.

    Args:
        train, val: features (images, dim), array or tensor, normalised here. Without `val` each training image is
            classified by the others (leave-one-out).
        train_labels, val_labels: (images,) classes as whole numbers from 0 on.
        neighbours: the values of k.
        temperature: T.
        n_per_class: training images of each class; default all. Needs `val`.
        n_tries: choices of them, the accuracies' mean is taken; number t, from 0 on, is made with the seed t.
        device: where to compute.

    Returns:
        The accuracies by k.

    Raises:
        ValueError: shapes, labels or settings that do not fit, more neighbours or images of a class than there are,
            NaN or infinity.
    """
    train, train_labels = _checked("train", train, train_labels)
    alone = val is None
    val, val_labels = (train, train_labels) if alone else _checked("val", val, val_labels)
    if train.shape[1] != val.shape[1]:
        raise InvalidValueError(f"train has features of {train.shape[1]} dimensions, val of {val.shape[1]}.")
    neighbours = _checked_neighbours(neighbours, len(train) - alone, n_per_class)
    if n_per_class is not None:
        _check_few(train_labels, alone, n_per_class, n_tries)
    if not 0 < temperature < math.inf:
        raise InvalidValueError(f"The temperature must be positive, got {temperature}.")
    classes = int(max(train_labels.max(), val_labels.max())) + 1
    train, train_labels = normalize(train.to(device), dim=1), train_labels.to(device)
    val, val_labels = normalize(val.to(device), dim=1), val_labels.to(device)
    tries = [
        _knn_ranks(train[rows], train_labels[rows], val, val_labels, neighbours, temperature, classes, alone)
        for rows in _choices(train_labels, n_per_class, n_tries)
    ]
    return {k: _accuracy(torch.cat([ranks[k] for ranks in tries])) for k in neighbours}


def _checked_neighbours(neighbours: Sequence[int], most: int, n_per_class: int | None) -> Sequence[int]:
    """The values of k that are evaluated."""
    if not neighbours or min(neighbours) < 1 or (n_per_class is None and max(neighbours) > most):
        raise InvalidValueError(
            f"k must be between 1 and the {most} training images, got {', '.join(map(str, neighbours))}."
        )
    if n_per_class is None:
        return neighbours
    return sorted({n_per_class, *(k for k in neighbours if k < n_per_class)})


def _check_few(labels: Tensor, alone: bool, n_per_class: int, n_tries: int) -> None:
    if alone:
        raise InvalidValueError("n_per_class needs val, the images that the few of each class classify.")
    largest = int(labels.bincount().max())
    if not 1 <= n_per_class <= largest:
        raise InvalidValueError(
            f"n_per_class must be between 1 and {largest}, the size of the largest training class, got {n_per_class}."
        )
    if n_tries < 1:
        raise InvalidValueError(f"There must be a try, got {n_tries}.")


def _choices(labels: Tensor, n_per_class: int | None, n_tries: int) -> Iterator[Tensor | slice]:
    """The rows of training images that vote in each try; of few of each class, those that the reference chooses."""
    if n_per_class is None:
        yield slice(None)
        return
    labels = labels.cpu()
    by_class = labels.argsort(stable=True).split(labels.bincount().tolist())
    for seed in range(n_tries):
        generator = torch.Generator().manual_seed(seed)
        yield torch.cat([rows[torch.randperm(len(rows), generator=generator)[:n_per_class]] for rows in by_class])


def _knn_ranks(
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    val_labels: Tensor,
    neighbours: Sequence[int],
    temperature: float,
    classes: int,
    alone: bool,
) -> dict[int, Tensor]:
    """By k, how many other classes score as high as each image's own or higher; features of length 1."""
    found: dict[int, list[Tensor]] = {k: [] for k in neighbours}
    chunk = max(1, _SIMILARITIES // len(train))
    for start in range(0, len(val), chunk):
        similarity = val[start : start + chunk] @ train.T  # (chunk, train)
        if alone:
            similarity.diagonal(start).fill_(-torch.inf)
        nearest = similarity.topk(max(neighbours), dim=1)
        weights = (nearest.values / temperature).softmax(dim=1)  # the scale of a row does not change its order
        voters = train_labels[nearest.indices]
        for k in neighbours:
            votes = weights.new_zeros(len(weights), classes).scatter_add_(1, voters[:, :k], weights[:, :k])
            found[k].append(_ranks(votes, val_labels[start : start + chunk]))
    return {k: torch.cat(ranks) for k, ranks in found.items()}


@dataclass(frozen=True)
class Tokens:
    """What linear probes see of images.

    Args:
        cls: (images, blocks, dim) class tokens after the last blocks, the last block last, the final norm applied.
        patch_mean: (images, dim) mean of the last block's patch tokens, or None.
    """

    cls: Tensor
    patch_mean: Tensor | None = None

    def joined(self, blocks: int, avgpool: bool) -> Tensor:
        """(images, features) fp32: the class tokens of the last `blocks` side by side, then the patches' mean."""
        parts = [self.cls[:, -blocks:].flatten(1)]
        if avgpool:
            assert self.patch_mean is not None
            parts.append(self.patch_mean)
        return torch.cat(parts, dim=1).float()


@dataclass(frozen=True)
class Probe:
    """A linear classifier, and what it was trained on and with; weight (features, classes), bias (classes,)."""

    blocks: int
    avgpool: bool
    learning_rate: float
    weight: Tensor
    bias: Tensor

    def accuracy(self, tokens: Tokens, labels: Any) -> Accuracy:
        """On images with labels, whole numbers below the number of classes."""
        logits = tokens.joined(self.blocks, self.avgpool).to(self.weight.device) @ self.weight + self.bias
        return _accuracy(_ranks(logits, torch.as_tensor(labels).to(logits.device)))


def linear_probes(
    tokens: Tokens,
    labels: Any,
    *,
    blocks: Sequence[int] = BLOCKS,
    learning_rates: Sequence[float] = LEARNING_RATES,
    steps: int = STEPS,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Callable[[int], None] | None = None,
) -> list[Probe]:
    """Trains the reference's grid of linear classifiers, all on the same batches.

    One for each number of last blocks, without and (if there is a `patch_mean`) with the mean of the patches, and each
    learning rate. SGD with momentum 0.9 and no weight decay, the rate times batch_size / 256, down to 0 as a cosine.
    Training images are shuffled anew whenever all were seen; a rest smaller than a batch is left out.

    Args:
        tokens: of the training images.
        labels: (images,) classes as whole numbers from 0 on.
        blocks: numbers of last blocks, at most those in `tokens`.
        learning_rates: before scaling.
        steps: updates.
        batch_size: images in an update, or all of them where there are fewer; the scale of the rates follows.
        seed: of initial weights and order.
        device: where to compute.
        progress: called after each update with the number of updates so far.

    Returns:
        The classifiers, by number of blocks, mean of patches, and learning rate.

    Raises:
        ValueError: labels or settings that do not fit, NaN or infinity.
    """
    available = tokens.cls.shape[1]
    if not blocks or min(blocks) < 1 or max(blocks) > available:
        raise InvalidValueError(
            f"There are the class tokens of {available} last blocks, asked for {', '.join(map(str, blocks))}."
        )
    if steps < 1 or batch_size < 1 or not learning_rates or not min(learning_rates) > 0:
        raise InvalidValueError("There must be a step, an image in each batch, and learning rates above 0.")
    kinds = [(n, avgpool) for n in blocks for avgpool in (False, True)[: 1 if tokens.patch_mean is None else 2]]
    target = _checked("train", tokens.joined(*kinds[-1]), labels)[1].to(device)
    batch_size = min(batch_size, len(target))
    inputs = [tokens.joined(*kind).to(device) for kind in kinds]
    rates = torch.tensor(learning_rates, device=device) * (batch_size / 256)
    generator = torch.Generator().manual_seed(seed)
    grids = [_Grid(x.shape[1], int(target.max()) + 1, rates, generator) for x in inputs]
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(len(target), generator=generator)
        batch, order = order[:batch_size].to(device), order[batch_size:]
        decay = (1 + math.cos(math.pi * step / steps)) / 2
        for grid, x in zip(grids, inputs, strict=True):
            grid.update(x[batch], target[batch], decay)
        if progress:
            progress(step + 1)
    return [
        Probe(*kind, rate, weight.detach(), bias.detach())
        for kind, grid in zip(kinds, grids, strict=True)
        for rate, weight, bias in zip(learning_rates, grid.weight.unbind(1), grid.bias, strict=True)
    ]


class _Grid:
    """The classifiers on one input, one for each learning rate, as one weight (features, rates, classes)."""

    def __init__(self, features: int, classes: int, rates: Tensor, generator: torch.Generator) -> None:
        weight = 0.01 * torch.randn(len(rates), features, classes, generator=generator)
        self.weight = weight.to(rates.device).transpose(0, 1).contiguous().requires_grad_()
        self.bias = torch.zeros(len(rates), classes, device=rates.device, requires_grad=True)
        self.rates = rates[:, None]
        self.velocities = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]

    def update(self, x: Tensor, target: Tensor, decay: float) -> None:
        """One step of every classifier; the sum of their losses gives each its own gradient."""
        logits = (x @ self.weight.flatten(1)).unflatten(1, self.bias.shape) + self.bias  # (batch, rates, classes)
        targets = target.repeat_interleave(len(self.rates))
        loss = cross_entropy(logits.flatten(0, 1), targets, reduction="sum") / len(x)
        gradients = torch.autograd.grad(loss, [self.weight, self.bias])
        with torch.no_grad():
            for parameter, velocity, gradient in zip((self.weight, self.bias), self.velocities, gradients, strict=True):
                velocity.mul_(_MOMENTUM).add_(gradient)
                parameter.sub_(decay * self.rates * velocity)


def _checked(name: str, features: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Features (images, dim) in fp32 and labels in int64."""
    features, labels = torch.as_tensor(features).float(), torch.as_tensor(labels)
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise InvalidValueError(
            f"{name} must be features (images, dim) and labels (images,), got {tuple(features.shape)} and "
            f"{tuple(labels.shape)}."
        )
    if labels.is_floating_point() or labels.min() < 0:
        raise InvalidValueError(f"The labels of {name} must be whole numbers from 0 on.")
    if not features.isfinite().all():
        raise InvalidValueError(f"The features of {name} contain NaN or infinity.")
    return features, labels.long()


def _ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """How many other classes score as high as an image's own, or higher; too many for any top if that is NaN."""
    own = scores.gather(1, labels[:, None])
    ranks = (scores >= own).sum(dim=1) - 1
    return torch.where(own.squeeze(1).isnan(), scores.shape[1] + 5, ranks)


def _accuracy(ranks: Tensor) -> Accuracy:
    return Accuracy(*((ranks < k).double().mean().item() for k in (1, 5)))
