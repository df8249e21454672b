"""Lists of images of different sizes, packed into one sequence.

Images of one size form a batch. The tokens of all batches follow each other in one sequence, (1, total_tokens, hidden),
short images first, without padding. Linears and norms run on all tokens at once, attention within each image. Images of
equal length are neighbours, so that attention can run on them as one batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinov2_fast.errors import InvalidTypeError, InvalidValueError
from dinov2_fast.layers import check_is_tensor, check_masks

Features = dict[str, Tensor]  # each (batch, ...)
Masks = Sequence[Tensor | None]  # one for each entry of a list


class ImageRange(NamedTuple):
    """Images `start` to `stop` of one entry of the list."""

    entry: int
    start: int
    stop: int


def as_batch(images: Any) -> Any:
    """A single image, of three dimensions, as a batch of one; anything else unchanged."""
    return images[None] if isinstance(images, Tensor) and images.ndim == 3 else images


def check_image_list(images: Any) -> None:
    """Checks that `images` is a list of batches.

    Raises:
        TypeError: it is no list, or an entry is no tensor.
        ValueError: it is empty, or an entry is no batch.
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


def check_mask_list(masks: Masks | None, images: Sequence[Tensor], patches: Sequence[int]) -> Masks:
    """The masks, one or None for each batch; `patches` is the number of patches of an image of each batch.

    Raises:
        TypeError, ValueError: the masks do not fit the batches.
    """
    if masks is None:
        return [None] * len(images)
    if len(masks) != len(images):
        raise InvalidValueError(f"Got {len(images)} batches but {len(masks)} masks; give one (or None) for each.")
    for x, mask, count in zip(images, masks, patches, strict=True):
        if mask is not None:
            check_masks(mask, torch.empty(len(x), count, device="meta"))
    return masks


def forward_packed(
    images: Sequence[Tensor],
    masks: Masks,
    seq_lens: Sequence[int],
    max_tokens: int | None,
    forward: Callable[[list[Tensor], list[Tensor | None]], list[Features]],
) -> list[Features]:
    """Calls `forward` for as many images at a time as `max_tokens` allows.

    Args:
        images: batches (batch, channels, height, width).
        masks: one or None for each batch.
        seq_lens: the number of tokens of an image of each batch.
        max_tokens: of one call, or None for a single call.
        forward: takes batches that differ in size, and their masks, and returns the features of each.

    Returns:
        The features of each batch.
    """
    found: list[list[Features]] = [[] for _ in images]
    for run in split_into_runs([len(x) for x in images], seq_lens, max_tokens):
        groups: dict[Any, list[ImageRange]] = {}  # the ranges of each batch of this run
        for selection in sorted(run, key=lambda selection: seq_lens[selection.entry]):
            x = images[selection.entry]
            key = (x.shape[1:], x.dtype, x.device, masks[selection.entry] is None)
            groups.setdefault(key, []).append(selection)
        batches = [_concatenated([images[i][start:stop] for i, start, stop in group]) for group in groups.values()]
        batch_masks = [_concatenated_masks(masks, group) for group in groups.values()]
        for group, features in zip(groups.values(), forward(batches, batch_masks), strict=True):
            for selection, own in zip(group, _features_of_ranges(features, group), strict=True):
                found[selection.entry].append(own)
    return [{key: _concatenated([piece[key] for piece in pieces]) for key in pieces[0]} for pieces in found]


def split_into_runs(batches: Sequence[int], seq_lens: Sequence[int], max_tokens: int | None) -> list[list[ImageRange]]:
    """Which images run together: as many as fit, in their order. An image larger than `max_tokens` runs alone.

    Args:
        batches: the number of images of each entry.
        seq_lens: the number of tokens of an image of each entry.
        max_tokens: of one run, or None for a single run.
    """
    limit = sys.maxsize if max_tokens is None else max_tokens
    runs: list[list[ImageRange]] = [[]]
    room = limit
    for entry, (batch, seq_len) in enumerate(zip(batches, seq_lens, strict=True)):
        stop, remaining = 0, True  # a batch without images has one range, too
        while remaining:
            if batch and room < seq_len and runs[-1]:
                runs.append([])
                room = limit
            start, stop = stop, min(stop + max(room // seq_len, 1), batch)
            runs[-1].append(ImageRange(entry, start, stop))
            room -= (stop - start) * seq_len
            remaining = stop < batch
    return runs


def _concatenated(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _concatenated_masks(masks: Masks, group: list[ImageRange]) -> Tensor | None:
    """The masks of a group, in which all images have masks or none has."""
    found = [None if masks[i] is None else masks[i][start:stop] for i, start, stop in group]  # type: ignore[index]
    return None if found[0] is None else _concatenated(found)  # type: ignore[arg-type]


def _features_of_ranges(features: Features, group: list[ImageRange]) -> Iterator[Features]:
    """Splits the features of a group's images into those of each range."""
    first = 0
    for selection in group:
        last = first + selection.stop - selection.start
        yield {key: value[first:last] for key, value in features.items()}
        first = last
