"""`CropLoader`: the crops of each step, from images that are found, decoded and limited as in an extraction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinov2_fast.data.batches import Failures, NothingReadError
from dinov2_fast.data.decoding import decode
from dinov2_fast.data.images import MAX_PIXELS
from dinov2_fast.data.workers import MAX_SECONDS, Task, prepare_all
from dinov2_fast.pretraining.colours import Colours, draw_colours
from dinov2_fast.pretraining.config import PretrainingConfig
from dinov2_fast.pretraining.crops import Crops
from dinov2_fast.pretraining.order import image_at, mix
from dinov2_fast.pretraining.sources import ImageTable

MOST_ATTEMPTS = 100  # images in a row that cannot be read


@dataclass(frozen=True)
class CropBatch:
    """The crops of a process in one step, on the CPU.

    Attributes:
        global_crops: uint8 (2, images, 3, size, size).
        local_crops: uint8 (n_local, images, 3, smaller size, smaller size).
        global_colours, local_colours: of each of these crops, the images of the first crop first.
        failures: path and reason of images that could not be read; others took their place.
    """

    global_crops: Tensor
    local_crops: Tensor
    global_colours: list[Colours]
    local_colours: list[Colours]
    failures: list[tuple[str, str]]


class CropLoader:
    """The batches of a process, from a step on without end. Close it to end the worker processes.

    The image at a position of the run, its crops and its colours depend on the seed and the position alone. An image
    that cannot be read is replaced by one that depends on the position too, so no other position changes.

    Args:
        table: the images.
        config: of the run.
        first_step: the step of the first batch.
        rank, size: this process, and the number of processes. Each takes an equal share of consecutive images.
        workers, max_pixels, max_seconds: see :func:`dinov2_fast.data.workers.prepare_all`.
    """

    def __init__(
        self,
        table: ImageTable,
        config: PretrainingConfig,
        *,
        first_step: int = 0,
        rank: int = 0,
        size: int = 1,
        workers: int = 0,
        max_pixels: int = MAX_PIXELS,
        max_seconds: float = MAX_SECONDS,
    ) -> None:
        self._table, self._config, self._crops = table, config, Crops(config.crops)
        self._images = config.run.batch_size // size
        self._max_pixels = max_pixels
        self._positions = self._all_positions(first_step, rank)
        self._prepared = prepare_all(
            (self._task(position) for position in self._all_positions(first_step, rank)),
            self._crops,
            max_pixels=max_pixels,
            max_seconds=max_seconds,
            workers=workers,
            ahead=2 * self._images,
        )

    def _all_positions(self, first_step: int, rank: int) -> Iterator[int]:
        for step in count(first_step):
            first = step * self._config.run.batch_size + rank * self._images
            yield from range(first, first + self._images)

    def _task(self, position: int, attempt: int = 0) -> Task:
        """The image for a position, and the seed of its crops. Attempt 0 is the image in the order of the run."""
        seed, n_images = self._config.run.seed, len(self._table)
        number = image_at(seed, position, n_images) if attempt == 0 else mix(seed, position, attempt) % n_images
        return self._table[number], mix(seed, position)

    def __iter__(self) -> Iterator[CropBatch]:
        return self

    def __next__(self) -> CropBatch:
        """The next batch.

        Raises:
            NothingReadError: no image for a position could be read in 100 attempts.
            InvalidStateError: a worker cannot start.
        """
        failures: list[tuple[str, str]] = []
        positions = list(islice(self._positions, self._images))
        values = np.stack([self._values(position, failures) for position in positions])
        global_crops, local_crops = (
            torch.from_numpy(np.ascontiguousarray(crops.swapaxes(0, 1))) for crops in self._crops.split(values)
        )
        seeds = [mix(self._config.run.seed, position) for position in positions]
        colours = list(zip(*[draw_colours(seed, self._config.crops) for seed in seeds], strict=True))  # by crop
        flat = [each for crop in colours for each in crop]
        n_global = 2 * len(positions)
        return CropBatch(global_crops, local_crops, flat[:n_global], flat[n_global:], failures)

    def _values(self, position: int, failures: list[tuple[str, str]]) -> NDArray[np.uint8]:
        """All crops of the image at a position, or of the first one in its place that can be read."""
        prepared, here = next(self._prepared), Failures()
        for attempt in range(1, MOST_ATTEMPTS + 1):
            if prepared.pixels is not None:
                return prepared.pixels
            source, _ = self._task(position, attempt - 1)
            failures.append((source.path, str(prepared.error)))
            here.add(source.path, str(prepared.error))
            source, seed = self._task(position, attempt)
            prepared = decode(source, self._crops, self._max_pixels, number=seed)
        raise NothingReadError(
            f"{MOST_ATTEMPTS} images in a row could not be read:\n{here}\nSee that their disk or server can be "
            "reached, and run the same command again."
        )

    def close(self) -> None:
        """Ends the worker processes."""
        self._prepared.close()
