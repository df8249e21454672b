"""Batches of the images that can be read, for callers that leave out the others: show, verify and export."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing

from torch import Tensor

from dinov2_fast.data.batches import read_batches
from dinov2_fast.data.failures import Failures
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.data.sources import ImageSource
from dinov2_fast.errors import InvalidValueError


def readable_batches(
    sources: Sequence[ImageSource],
    processor: Dinov2ImageProcessor,
    failures: Failures,
    *,
    batch_size: int = 32,
    workers: int = 0,
) -> Generator[tuple[list[ImageSource], Tensor], None, None]:
    """The images that can be read, in batches of at most `batch_size`: their sources, and their pixels.

    Args:
        sources: where the images are.
        processor: its outputs must have one size.
        failures: images that cannot be read are added to it.
        batch_size, workers: see :func:`dinov2_fast.data.batches.read_batches`, which also says what the pixels are.

    Raises:
        ValueError: not one of the images can be read.
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
