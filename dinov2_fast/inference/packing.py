"""Images of different sizes, run together as packed sequences.

Images of one size are one batch. The tokens of all batches lie one after another, (1, total_tokens, hidden), the
short sequences first: linears and norms run on all of them at once, attention within each image, and sequences of one
length are neighbours, for which it runs as one batch. No token is padding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from dinov2_fast.errors import InvalidTypeError, InvalidValueError
from dinov2_fast.layers import check_is_tensor, check_masks
from dinov2_fast.model import BackboneFeatures

if TYPE_CHECKING:
    from dinov2_fast.inference.backbone import FoldedBackbone

Features = dict[str, Tensor]  # each (batch, ...)


class Part(NamedTuple):
    """Images `start` to `stop` of an entry of the list."""

    entry: int
    start: int
    stop: int


def as_batch(images: Any) -> Any:
    """A single image, of three dimensions, as a batch of one; anything else as it is."""
    return images[None] if isinstance(images, Tensor) and images.ndim == 3 else images


def forward_features_list(
    backbone: FoldedBackbone, images: Sequence[Tensor], masks: Sequence[Tensor | None] | None
) -> list[BackboneFeatures]:
    """`DinoVisionTransformer.forward_features_list`."""

    def forward(batches: list[Tensor], masks: list[Tensor | None]) -> list[Features]:
        tokens = [backbone.prepare_tokens_with_masks(x, mask) for x, mask in zip(batches, masks, strict=True)]
        found = [backbone._split_tokens(x, None) for x in backbone._run_blocks(tokens)]
        return [{key: value for key, value in features.items() if isinstance(value, Tensor)} for features in found]

    masks = _checked(backbone, images, masks)
    features = _in_runs(backbone, images, masks, forward)
    return [cast(BackboneFeatures, {**found, "masks": mask}) for found, mask in zip(features, masks, strict=True)]


def cls_tokens(backbone: FoldedBackbone, images: Sequence[Tensor]) -> list[Tensor]:
    """The normalised CLS tokens of each batch, (batch, hidden); unless `outputs` is "all" nothing else is computed."""
    if backbone.plan.outputs == "all":
        features = forward_features_list(backbone, images, None)
        return [found["x_norm_clstoken"] for found in features]

    def forward(batches: list[Tensor], masks: list[Tensor | None]) -> list[Features]:
        tokens = [backbone.prepare_tokens_with_masks(x) for x in batches]
        return [{"cls": x} for x in backbone.norm(backbone._run_list_for_cls(tokens)).split([len(x) for x in batches])]

    masks = _checked(backbone, images, None)
    return [found["cls"] for found in _in_runs(backbone, images, masks, forward)]


def _checked(
    backbone: FoldedBackbone, images: Sequence[Tensor], masks: Sequence[Tensor | None] | None
) -> Sequence[Tensor | None]:
    """The masks, one or None for each batch.

    Raises:
        TypeError, ValueError: no list of batches, or masks that do not fit them.
    """
    if not isinstance(images, list):
        raise InvalidTypeError(f"Got a {type(images).__name__} where a list of batches or of images is needed.")
    if not images:
        raise InvalidValueError("The list of batches is empty.")
    for i, x in enumerate(images):
        check_is_tensor(x)
        if x.ndim != 4:
            raise InvalidValueError(
                f"A list holds batches (batch, channels, height, width) or images of three dimensions; entry {i} has "
                f"shape {tuple(x.shape)}."
            )
    if masks is None:
        return [None] * len(images)
    if len(masks) != len(images):
        raise InvalidValueError(f"Got {len(images)} batches but {len(masks)} masks; give one (or None) for each.")
    for x, mask in zip(images, masks, strict=True):
        if mask is not None:
            check_masks(mask, torch.empty(len(x), _patches(backbone, x), device="meta"))
    return masks


def _patches(backbone: FoldedBackbone, x: Tensor) -> int:
    rows, columns = backbone.grid(x)
    return rows * columns


def _in_runs(
    backbone: FoldedBackbone,
    images: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    forward: Callable[[list[Tensor], list[Tensor | None]], list[Features]],
) -> list[Features]:
    """`forward` of batches that differ in size, called for as many images at a time as `max_tokens` allows.

    Returns:
        What it gives for the images of each entry of the list.
    """
    seq_lens = [1 + backbone.num_register_tokens + _patches(backbone, x) for x in images]
    found: list[list[Features]] = [[] for _ in images]
    for run in split([len(x) for x in images], seq_lens, backbone.plan.max_tokens):
        groups: dict[Any, list[Part]] = {}  # by what one batch has in common
        for part in sorted(run, key=lambda part: seq_lens[part.entry]):
            x = images[part.entry]
            key = (x.shape[1:], x.dtype, x.device, masks[part.entry] is None)
            groups.setdefault(key, []).append(part)
        batches = [_joined([images[i][start:stop] for i, start, stop in group]) for group in groups.values()]
        masked = [_joined_masks(masks, group) for group in groups.values()]
        for group, features in zip(groups.values(), forward(batches, masked), strict=True):
            for part, own in zip(group, _shared_out(group, features), strict=True):
                found[part.entry].append(own)
    return [{key: _joined([piece[key] for piece in pieces]) for key in pieces[0]} for pieces in found]


def split(batches: Sequence[int], seq_lens: Sequence[int], max_tokens: int | None) -> list[list[Part]]:
    """Which images run together: in order, as many as fit; one that is larger than `max_tokens` runs alone.

    Args:
        batches: the number of images of each entry.
        seq_lens: tokens of each of them.
        max_tokens: of one run, or None for one run.
    """
    limit = sys.maxsize if max_tokens is None else max_tokens
    runs: list[list[Part]] = [[]]
    room = limit
    for entry, (batch, seq_len) in enumerate(zip(batches, seq_lens, strict=True)):
        stop, remaining = 0, True  # a batch of no images is a part as well
        while remaining:
            if batch and room < seq_len and runs[-1]:
                runs.append([])
                room = limit
            start, stop = stop, min(stop + max(room // seq_len, 1), batch)
            runs[-1].append(Part(entry, start, stop))
            room -= (stop - start) * seq_len
            remaining = stop < batch
    return runs


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _joined_masks(masks: Sequence[Tensor | None], group: list[Part]) -> Tensor | None:
    """All parts of a group have masks, or none has."""
    parts = [None if masks[i] is None else masks[i][start:stop] for i, start, stop in group]  # type: ignore[index]
    return None if parts[0] is None else _joined(parts)  # type: ignore[arg-type]


def _shared_out(group: list[Part], features: Features) -> Iterator[Features]:
    """The features of each part of a group, from those of all its images."""
    first = 0
    for part in group:
        last = first + part.stop - part.start
        yield {key: value[first:last] for key, value in features.items()}
        first = last
