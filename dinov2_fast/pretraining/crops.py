"""Crops: random parts of an image, resized, in 8 bits. Their colours are changed later, in batches on the device.

A crop is as torchvision's `RandomResizedCrop` and `RandomHorizontalFlip` make it from a PIL image: a part with a random
share of the image's area and an aspect ratio between 3:4 and 4:3, resized to a square by bicubic interpolation with
antialiasing, and mirrored half of the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinov2_fast.pretraining.config import CropsConfig
from dinov2_fast.pretraining.order import mix

_ASPECT = 3 / 4  # of a crop, and 1 / the largest
_TRIES = 10
_STREAM = 0x63726F70  # keeps these random numbers apart from others with the same seed

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Crops:
    """All crops of an image in one array, for :mod:`dinov2_fast.data.workers`. The number of a task is its seed."""

    config: CropsConfig
    background: str | None = None

    @property
    def output_shape(self) -> tuple[int]:
        """The number of values of all crops, two global and then the local ones, each (3, size, size)."""
        config = self.config
        return (3 * (2 * config.global_size**2 + config.n_local * config.local_size**2),)

    @property
    def output_dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint8)

    def prepare(self, image: Image.Image, number: int) -> NDArray[np.uint8]:
        """The crops of an image in mode RGB."""
        rng, config = Random(mix(_STREAM, number)), self.config
        kinds = [(config.global_size, config.global_scale)] * 2 + [(config.local_size, config.local_scale)] * (
            config.n_local
        )
        return np.concatenate([_crop(image, size, scale, rng).ravel() for size, scale in kinds])

    def split(self, values: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Views of the global crops (…, 2, 3, size, size) and the local ones (…, n_local, 3, size, size)."""
        sizes = self.config.global_size, self.config.local_size
        both = np.split(values, [3 * 2 * sizes[0] ** 2], axis=-1)
        global_crops, local_crops = (
            part.reshape(*values.shape[:-1], count, 3, size, size)
            for part, count, size in zip(both, (2, self.config.n_local), sizes, strict=True)
        )
        return global_crops, local_crops


def _crop(image: Image.Image, size: int, scale: tuple[float, float], rng: Random) -> NDArray[np.uint8]:
    """(3, size, size)."""
    # Not resize(box=...): it would also read pixels around the box.
    crop = image.crop(random_box(*image.size, scale, rng)).resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(crop)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return pixels.transpose(2, 0, 1)


def random_box(width: int, height: int, scale: tuple[float, float], rng: Random) -> Box:
    """A random part of an image of `width` x `height` pixels.

    Args:
        scale: lowest and highest share of the area.
        rng: its state advances.

    Returns:
        Left, top, right, bottom in pixels. If no part of such an area and aspect fits in ten tries, the middle of the
        image, cut to the nearest aspect ratio that is allowed.
    """
    for _ in range(_TRIES):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(_ASPECT), -math.log(_ASPECT)))
        columns, rows = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < columns <= width and 0 < rows <= height:
            left, top = rng.randint(0, width - columns), rng.randint(0, height - rows)
            return left, top, left + columns, top + rows
    columns, rows = width, height
    if width / height < _ASPECT:
        rows = round(width / _ASPECT)
    elif width / height > 1 / _ASPECT:
        columns = round(height / _ASPECT)
    left, top = (width - columns) // 2, (height - rows) // 2
    return left, top, left + columns, top + rows
