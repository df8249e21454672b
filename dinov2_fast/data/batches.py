"""From images to tensors: batches of decoded images, and running a model on them in parts that fit in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from dinov2_fast.data.decoding import Decoded
from dinov2_fast.data.files import shown
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.data.images import MAX_PIXELS
from dinov2_fast.data.sources import ImageSource
from dinov2_fast.data.workers import MAX_SECONDS, decode_all
from dinov2_fast.errors import Dinov2FastError, InvalidValueError

FIRST = 3  # paths in a message
REASONS = 5  # reasons in a message
MOST_REASONS = 1000  # that are counted separately: some name a size, so that each image has its own reason
OTHERS = "other reasons"

T = TypeVar("T")


class NothingReadError(Dinov2FastError, RuntimeError):
    """Not one image could be read: the disk or server is probably missing."""


class Failures:
    """Counts errors by reason, and keeps the paths of the first ones."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self._first: list[tuple[str, str]] = []

    def add(self, path: str, reason: str) -> None:
        """Counts one error."""
        if len(self._first) < FIRST:
            self._first.append((shown(path), reason))
        self.reasons[reason if reason in self.reasons or len(self.reasons) < MOST_REASONS else OTHERS] += 1

    def __len__(self) -> int:
        return self.reasons.total()

    def __str__(self) -> str:
        """The first errors; if there are more, also how often the most common reasons occur."""
        lines = [f"  {path!r}: {reason}" for path, reason in self._first]
        if len(self) > len(lines):
            most = [each for each in self.reasons.most_common(REASONS + 1) if each[0] != OTHERS][:REASONS]
            others = len(self) - sum(count for _, count in most)
            counts = [f"{count} x {reason}" for reason, count in most] + [f"{others} x {OTHERS}"] * (others > 0)
            lines.append(f"  in all {'; '.join(counts)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class ImageBatch:
    """Consecutive images, unreadable ones included, and the pixels of the readable ones.

    Attributes:
        images: size, digest and error of each; `pixels` is None in all of them.
        rows: the indices in `images` of those that have pixels, ascending.
        pixels: (len(rows), 3, height, width) on the CPU: float32, or uint8 where the processor neither rescales nor
            normalizes.
    """

    images: list[Decoded]
    rows: list[int]
    pixels: Tensor


def read_batches(
    sources: Iterable[ImageSource],
    processor: Dinov2ImageProcessor,
    *,
    batch_size: int = 32,
    group_size: int | None = None,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
    max_seconds: float = MAX_SECONDS,
) -> Generator[ImageBatch, None, None]:
    """Decodes images in their order and yields them in batches.

    A batch is a fixed range of images: an image that cannot be read keeps its place, with an error and without pixels.
    To stop early, close the iterator; this ends the worker processes.

    Args:
        sources: taken while the result is used, about two batches ahead with `workers`.
        processor: its outputs must have one size.
        batch_size: images in each batch, except the last one of a group.
        group_size: a new batch begins after every `group_size` images; by default all images are one group.
        workers, max_pixels, max_seconds: see :func:`dinov2_fast.data.workers.prepare_all`.

    Raises:
        InvalidValueError: the processor's outputs differ in size, or batch_size or group_size is below 1.
        InvalidStateError: a worker cannot start.
    """
    if batch_size < 1 or (group_size is not None and group_size < 1):
        raise InvalidValueError(f"batch_size and group_size must be at least 1, got {batch_size} and {group_size}.")
    decoded = decode_all(
        sources,
        processor,
        workers=workers,
        max_pixels=max_pixels,
        max_seconds=max_seconds,
        ahead=max(2 * batch_size, 8),
    )
    with closing(decoded):
        left = group_size  # images until the next group begins
        while images := list(islice(decoded, batch_size if left is None else min(batch_size, left))):
            yield make_batch(images, processor)
            if left is not None:
                left = left - len(images) or group_size


def readable_batches(
    sources: Sequence[ImageSource],
    processor: Dinov2ImageProcessor,
    failures: Failures,
    *,
    batch_size: int = 32,
    workers: int = 0,
) -> Generator[tuple[list[ImageSource], Tensor], None, None]:
    """The sources and the pixels, as in `ImageBatch`, of the images that can be read: at most `batch_size` at a time.

    Images that cannot be read are added to `failures`. Arguments and errors are those of `read_batches`.

    Raises:
        InvalidValueError: not one of the images can be read.
    """
    first, found = 0, False
    with closing(read_batches(sources, processor, batch_size=batch_size, workers=workers)) as batches:
        for batch in batches:
            taken = sources[first : first + len(batch.images)]
            first += len(taken)
            for source, image in zip(taken, batch.images, strict=True):
                if image.error is not None:
                    failures.add(source.path, image.error)
            if batch.rows:
                found = True
                yield [taken[row] for row in batch.rows], batch.pixels
    if not found:
        raise InvalidValueError(f"None of the images can be read:\n{failures}")


def make_batch(images: Sequence[Decoded], processor: Dinov2ImageProcessor) -> ImageBatch:
    """One batch of images that `processor`, whose outputs must have one size, has prepared."""
    rows = [row for row, image in enumerate(images) if image.pixels is not None]
    found = [image.pixels for image in images if image.pixels is not None]
    pixels = np.stack(found) if found else np.empty((0, *processor.output_shape), processor.output_dtype)
    return ImageBatch([replace(image, pixels=None) for image in images], rows, torch.from_numpy(pixels))


def run_in_parts(run: Callable[[Tensor], T], pixels: Tensor, size: int) -> tuple[list[T], int]:
    """Calls `run` on parts of at most `size` images, in order, with smaller parts where memory runs out.

    Each time that memory runs out, `size` is halved and all parts are run again. Other errors are not retried: after an
    illegal access, for instance, nothing that the device computes can be trusted.

    Args:
        run: not called where there are no images.
        pixels: (images, 3, height, width).

    Returns:
        The results in order, and the size that sufficed: use it for the batches that follow.

    Raises:
        torch.OutOfMemoryError: memory does not suffice for a single image.
    """
    while True:
        try:
            return [run(part) for part in pixels.split(size) if len(part)], size
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        size = max(min(size, len(pixels)) // 2, 1)
        torch.cuda.empty_cache()  # does nothing where there is no GPU
