"""Weighted k-nearest-neighbour classification, as DINOv2 is evaluated (facebookresearch/dinov2, dinov2/eval/knn.py)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.evaluation.metrics import Accuracy, accuracy_of, checked, class_ranks

NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07

_SIMILARITIES = 2**27  # computed at a time: 512 MiB of fp32


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

    With `n_per_class`, only that many training images of each class vote (all of a smaller class), chosen at random.
    The values of k are then that number and those of `neighbours` below it.

    Args:
        train, val: features (images, dim), array or tensor; they are normalised here. Without `val`, each training
            image is classified by the others (leave-one-out).
        train_labels, val_labels: (images,) classes as whole numbers from 0 on.
        neighbours: the values of k.
        temperature: T.
        n_per_class: training images of each class that vote; default all. Needs `val`.
        n_tries: how many times they are chosen; the mean accuracy is returned. Choice t, from 0 on, uses the seed t.
        device: where to compute.

    Returns:
        The accuracies by k.

    Raises:
        ValueError: shapes, labels or settings that do not fit; more neighbours, or more images of a class, than there
            are; NaN or infinity.
    """
    train, train_labels = checked("train", train, train_labels)
    leave_one_out = val is None
    val, val_labels = (train, train_labels) if leave_one_out else checked("val", val, val_labels)
    if train.shape[1] != val.shape[1]:
        raise InvalidValueError(f"train has features of {train.shape[1]} dimensions, val of {val.shape[1]}.")
    most = len(train) - leave_one_out
    if not neighbours or min(neighbours) < 1 or (n_per_class is None and max(neighbours) > most):
        raise InvalidValueError(
            f"k must be between 1 and the {most} training images, got {', '.join(map(str, neighbours))}."
        )
    if n_per_class is not None:
        _check_n_per_class(train_labels, leave_one_out, n_per_class, n_tries)
        neighbours = sorted({n_per_class, *(k for k in neighbours if k < n_per_class)})
    if not 0 < temperature < math.inf:
        raise InvalidValueError(f"The temperature must be positive, got {temperature}.")
    classes = int(max(train_labels.max(), val_labels.max())) + 1
    train, train_labels = normalize(train.to(device), dim=1), train_labels.to(device)
    val, val_labels = normalize(val.to(device), dim=1), val_labels.to(device)
    tries = [
        _knn_ranks(train[rows], train_labels[rows], val, val_labels, neighbours, temperature, classes, leave_one_out)
        for rows in _choices(train_labels, n_per_class, n_tries)
    ]
    return {k: accuracy_of(torch.cat([ranks[k] for ranks in tries])) for k in neighbours}


def _check_n_per_class(labels: Tensor, leave_one_out: bool, n_per_class: int, n_tries: int) -> None:
    if leave_one_out:
        raise InvalidValueError("n_per_class needs val: images other than those that vote.")
    largest = int(labels.bincount().max())
    if not 1 <= n_per_class <= largest:
        raise InvalidValueError(
            f"n_per_class must be between 1 and {largest}, the size of the largest training class, got {n_per_class}."
        )
    if n_tries < 1:
        raise InvalidValueError(f"n_tries must be at least 1, got {n_tries}.")


def _choices(labels: Tensor, n_per_class: int | None, n_tries: int) -> Iterator[Tensor | slice]:
    """The rows of the training images that vote in each try; the same ones as the reference chooses."""
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
    leave_one_out: bool,
) -> dict[int, Tensor]:
    """The `class_ranks` of the validation images for each k; the features have length 1."""
    found: dict[int, list[Tensor]] = {k: [] for k in neighbours}
    chunk = max(1, _SIMILARITIES // len(train))
    for start in range(0, len(val), chunk):
        similarity = val[start : start + chunk] @ train.T  # (chunk, train)
        if leave_one_out:
            similarity.diagonal(start).fill_(-torch.inf)
        nearest = similarity.topk(max(neighbours), dim=1)
        weights = (nearest.values / temperature).softmax(dim=1)  # scaling a row does not change its order
        voters = train_labels[nearest.indices]
        for k in neighbours:
            votes = weights.new_zeros(len(weights), classes).scatter_add_(1, voters[:, :k], weights[:, :k])
            found[k].append(class_ranks(votes, val_labels[start : start + chunk]))
    return {k: torch.cat(ranks) for k, ranks in found.items()}
