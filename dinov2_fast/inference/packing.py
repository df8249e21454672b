"""Lists of images of different sizes, packed into one sequence.

Images of one size form a batch. The tokens of all batches follow each other in one sequence, (1, total_tokens, hidden),
short images first, without padding. Linears and norms run on all tokens at once, attention within each image. Images of
equal length are neighbours, so that attention can run on them as one batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
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
    """Checks that `images` is a list of batches."""
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
    """The masks, one or None for each batch; `patches` is the number of patches of an image of each batch."""
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
    """The features of each batch, from calls of `forward` for as many images at a time as `max_tokens` allows.

    `seq_lens` are the numbers of tokens of an image of each batch. `forward` takes batches that differ in size, and
    their masks, and returns the features of each.
    """
    found: list[list[Features]] = [[] for _ in images]
    for run in split_into_runs([len(x) for x in images], seq_lens, max_tokens):
        groups: dict[Any, list[ImageRange]] = {}  # the ranges of each batch of this run
        for selection in sorted(run, key=lambda selection: seq_lens[selection.entry]):
            x = images[selection.entry]
            key = (x.shape[1:], x.dtype, x.device, masks[selection.entry] is None)
            groups.setdefault(key, []).append(selection)
        batches = [_selected(images, group) for group in groups.values()]
        batch_masks = [_selected(masks, group) for group in groups.values()]
        for group, features in zip(groups.values(), forward(batches, batch_masks), strict=True):
            first = 0
            for entry, start, stop in group:
                last = first + stop - start  # slices, since autograd forbids writing in place to the results of split
                found[entry].append({key: value[first:last] for key, value in features.items()})
                first = last
    return [{key: _concatenated([piece[key] for piece in pieces]) for key in pieces[0]} for pieces in found]


def split_into_runs(batches: Sequence[int], seq_lens: Sequence[int], max_tokens: int | None) -> list[list[ImageRange]]:
    """Which images run together: as many as fit, in their order. An image larger than `max_tokens` runs alone.

    `batches` are the numbers of images of the entries, `seq_lens` those of the tokens of one image.
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


def _selected(values: Sequence[Any], group: list[ImageRange]) -> Any:
    """The images of a group, or their masks, as one batch. All images of a group have masks, or none has: None."""
    if values[group[0].entry] is None:
        return None
    return _concatenated([values[i][start:stop] for i, start, stop in group])
