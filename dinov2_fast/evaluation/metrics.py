"""Top-1 and top-5 accuracy, and the checks of features and labels that both evaluations share.

An image is right in the top k if fewer than k other classes score as high as its own or higher. Ties count against it,
also with classes that got no vote.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinov2_fast.errors import InvalidValueError


class Accuracy(NamedTuple):
    """The fraction of images whose class scores best, and the fraction whose class is among the best five."""

    top1: float
    top5: float


def checked(name: str, features: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Features (images, dim) in fp32 and labels (images,) in int64, or `ValueError` if they are not valid."""
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


def class_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """(images,): how many other classes score as high as an image's own or higher, by `scores` (images, classes)."""
    own = scores.gather(1, labels[:, None])
    ranks = (scores >= own).sum(dim=1) - 1
    return torch.where(own.squeeze(1).isnan(), scores.shape[1] + 5, ranks)  # NaN is right in no top k


def accuracy_of(ranks: Tensor) -> Accuracy:
    """The accuracy from `class_ranks`."""
    return Accuracy(*((ranks < k).double().mean().item() for k in (1, 5)))
