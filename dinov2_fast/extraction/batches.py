"""Images through the model in batches: one computes while the next is gathered, smaller where memory ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dinov2_fast.data.decoding import Decoded
from dinov2_fast.extraction.compute import Outputs, Running

NOT_FINITE = "the model's features are not finite"


@dataclass(frozen=True)
class Batch:
    """Consecutive images, without pixels, and their features (images, …), which count where there is no error."""

    images: list[Decoded]
    features: dict[str, NDArray[Any]]
    seconds: float  # that the device worked


class Pending:
    """A batch on its way through the model, in parts of at most `size` images.

    Where memory does not suffice, `size` is halved. Other errors are not retried: after an illegal access, for
    instance, nothing that the device computes can be trusted.

    Raises:
        torch.OutOfMemoryError: for a single image, too.
    """

    def __init__(self, outputs: Outputs, images: list[Decoded], size: int) -> None:
        self.size = size
        self._outputs = outputs
        self._rows = [row for row, image in enumerate(images) if image.pixels is not None]
        pixels = [image.pixels for image in images if image.pixels is not None]
        self._images = [replace(image, pixels=None) for image in images]
        self._parts = self._start(np.stack(pixels)) if pixels else []

    def _start(self, pixels: NDArray[Any]) -> list[Running]:
        while True:
            try:
                return [self._outputs.start(pixels[i : i + self.size]) for i in range(0, len(pixels), self.size)]
            except torch.OutOfMemoryError:
                if self.size == 1:
                    raise
            self.size = max(min(self.size, len(pixels)) // 2, 1)
            torch.cuda.empty_cache()  # does nothing where there is no GPU

    def result(self) -> Batch:
        """Waits for the features; images whose features are not finite get an error."""
        images = list(self._images)
        features = {f.name: np.zeros((len(images), *f.shape), f.dtype) for f in self._outputs.features}
        first, total = 0, 0.0
        small = any(feature.dtype == "float16" for feature in self._outputs.features)
        error = f"{NOT_FINITE}{' or too large for fp16' * small}"
        for part in self._parts:
            found, finite, seconds = part.result()
            rows = self._rows[first : first + len(finite)]
            for name, values in found.items():
                features[name][rows] = values
            for row in np.array(rows)[~finite]:
                images[row] = replace(images[row], error=error)
            first, total = first + len(finite), total + seconds
        return Batch(images, features, total)


def run_batches(outputs: Outputs, decoded: Iterator[Decoded], rows: range, batch_size: int) -> Iterator[Pending]:
    """The batches of a shard, each started when it is yielded.

    A batch is a fixed range of rows, unreadable images included. Where one had to be made smaller, so are those that
    follow in the shard.
    """
    size = batch_size
    for first in range(rows.start, rows.stop, batch_size):
        pending = Pending(outputs, list(islice(decoded, min(batch_size, rows.stop - first))), size)
        size = pending.size
        yield pending
