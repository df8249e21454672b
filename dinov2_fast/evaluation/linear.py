"""Linear probes: a grid of linear classifiers on frozen features, as DINOv2 is evaluated.

The protocol is that of facebookresearch/dinov2, dinov2/eval/linear.py, with three differences. The reference trains on
random crops and flips; these probes train on features of the images as they are, computed once. The reference has 128
images in an update on each GPU, and scales the learning rates by that sum; here 128 is the sum. The reference fills a
batch across the end of an epoch; here each epoch drops its incomplete last batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.evaluation.metrics import Accuracy, accuracy_of, checked, class_ranks

BLOCKS = (1, 4)
LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
STEPS = 12500  # the reference's 10 epochs of 1250
BATCH_SIZE = 128

_MOMENTUM = 0.9


@dataclass(frozen=True)
class ProbeInputs:
    """The tokens of images from which linear probes take their inputs."""

    cls: Tensor  # (images, blocks, dim), class tokens of the last blocks after the final norm; the last block is last
    patch_mean: Tensor | None = None  # (images, dim), the mean of the last block's patch tokens

    def concatenated(self, blocks: int, avgpool: bool) -> Tensor:
        """(images, features) fp32: the class tokens of the last `blocks` blocks, then the mean of the patches."""
        parts = [self.cls[:, -blocks:].flatten(1)]
        if avgpool:
            assert self.patch_mean is not None
            parts.append(self.patch_mean)
        return torch.cat(parts, dim=1).float()


@dataclass(frozen=True)
class Probe:
    """A trained linear classifier: its inputs, learning rate, weight (features, classes) and bias (classes,)."""

    blocks: int
    avgpool: bool
    learning_rate: float
    weight: Tensor
    bias: Tensor

    def accuracy(self, tokens: ProbeInputs, labels: Any) -> Accuracy:
        """The accuracy on images with labels, whole numbers below the number of classes."""
        logits = tokens.concatenated(self.blocks, self.avgpool).to(self.weight.device) @ self.weight + self.bias
        return accuracy_of(class_ranks(logits, torch.as_tensor(labels).to(logits.device)))


def linear_probes(
    tokens: ProbeInputs,
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

    The grid has one classifier for each number of last blocks, without and (if there is a `patch_mean`) with the mean
    of the patches, and each learning rate. Training is SGD with momentum 0.9 and no weight decay. The learning rate is
    scaled by batch_size / 256 and decays to 0 along a cosine. Each epoch shuffles the images and drops an incomplete
    last batch.

    Args:
        tokens: of the training images.
        labels: (images,) classes as whole numbers from 0 on.
        blocks: numbers of last blocks, at most those in `tokens`.
        learning_rates: before scaling.
        steps: number of updates.
        batch_size: images in an update, or all images where there are fewer; this number scales the learning rates.
        seed: for the initial weights and the order of the images.
        device: where to compute.
        progress: called after each update with the number of updates done.

    Returns:
        The classifiers: for each of `blocks`, without and with the mean of the patches, for each learning rate.

    Raises:
        ValueError: labels or settings that do not fit, NaN or infinity.
    """
    available = tokens.cls.shape[1]
    if not blocks or min(blocks) < 1 or max(blocks) > available:
        raise InvalidValueError(
            f"The class tokens are of the last {available} blocks; asked for {', '.join(map(str, blocks))}."
        )
    if steps < 1 or batch_size < 1 or not learning_rates or not min(learning_rates) > 0:
        raise InvalidValueError("steps and batch_size must be at least 1, and the learning rates above 0.")
    kinds = [(n, avgpool) for n in blocks for avgpool in (False, True)[: 1 if tokens.patch_mean is None else 2]]
    everything = tokens.concatenated(max(blocks), tokens.patch_mean is not None)
    target = checked("train", everything, labels)[1].to(device)
    batch_size = min(batch_size, len(target))
    inputs = [tokens.concatenated(*kind).to(device) for kind in kinds]
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
    """The classifiers with the same inputs, one for each learning rate, in one weight (features, rates, classes)."""

    def __init__(self, features: int, classes: int, rates: Tensor, generator: torch.Generator) -> None:
        weight = 0.01 * torch.randn(len(rates), features, classes, generator=generator)
        self.weight = weight.to(rates.device).transpose(0, 1).contiguous().requires_grad_()
        self.bias = torch.zeros(len(rates), classes, device=rates.device, requires_grad=True)
        self.rates = rates[:, None]
        self.velocities = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]

    def update(self, x: Tensor, target: Tensor, decay: float) -> None:
        """One step of every classifier. The losses are summed: each classifier gets the gradient of its own loss."""
        logits = (x @ self.weight.flatten(1)).unflatten(1, self.bias.shape) + self.bias  # (batch, rates, classes)
        targets = target.repeat_interleave(len(self.rates))
        loss = cross_entropy(logits.flatten(0, 1), targets, reduction="sum") / len(x)
        gradients = torch.autograd.grad(loss, [self.weight, self.bias])
        with torch.no_grad():
            for parameter, velocity, gradient in zip((self.weight, self.bias), self.velocities, gradients, strict=True):
                velocity.mul_(_MOMENTUM).add_(gradient)
                parameter.sub_(decay * self.rates * velocity)
