"""Strips of tiles for `save_sheet`: each image beside its PCA colours, its attention maps or its neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinov2_fast.visualize.attention import attention_rgb
from dinov2_fast.visualize.sheet import Tile

Strips = list[list[Tile]]


def pca_strips(names: Sequence[str], images: Sequence[Image.Image], colours: Mapping[int, NDArray[np.uint8]]) -> Strips:
    """Each image and its colours.

    Args:
        names, images: one for each strip.
        colours: block -> (images, rows, columns, 3) from `pca_rgb`. Several blocks are labelled.
    """
    strips = []
    for i, (name, image) in enumerate(zip(names, images, strict=True)):
        maps = [
            Tile(Image.fromarray(rgb[i]), f"block {block}" if len(colours) > 1 else "", smooth=False)
            for block, rgb in colours.items()
        ]
        strips.append([Tile(image, name), *maps])
    return strips


def attention_strips(
    names: Sequence[str],
    images: Sequence[Image.Image],
    attention: Mapping[int, Sequence[Any] | NDArray[Any]],
    grid: tuple[int, int],
    heads: Sequence[int],
) -> Strips:
    """Each image, the mean attention map of all heads, and the maps of chosen heads; one strip for each block.

    Args:
        names, images: one for each image.
        attention: block -> for each image an array (all heads, patches).
        grid: (rows, columns) of patches.
        heads: indices of the heads whose maps are drawn.
    """
    strips = []
    texts = ["mean of all heads", *(f"head {head}" for head in heads)]
    for i, (name, image) in enumerate(zip(names, images, strict=True)):
        for block, of_images in attention.items():
            weights = np.asarray(of_images[i])
            maps = attention_rgb(np.concatenate((weights.mean(axis=0, keepdims=True), weights[list(heads)])), grid)
            tiles = [Tile(Image.fromarray(rgb), text, smooth=False) for rgb, text in zip(maps, texts, strict=True)]
            strips.append([Tile(image, name if len(attention) == 1 else f"{name}, block {block}"), *tiles])
    return strips


def neighbour_strips(
    names: Mapping[int, str],
    images: Mapping[int, Image.Image],
    rows: Sequence[int],
    neighbours: NDArray[np.int64],
    cosines: NDArray[np.float32],
) -> Strips:
    """Each chosen image and its neighbours, with their cosines.

    Args:
        names, images: by row.
        rows: the images whose neighbours are shown.
        neighbours, cosines: (rows, count) from `dinov2_fast.curation.neighbours.nearest`.
    """
    strips = []
    for row, found, near in zip(rows, neighbours.tolist(), cosines.tolist(), strict=True):
        tiles = [Tile(images[i], f"{cosine:.3f} {names[i]}") for i, cosine in zip(found, near, strict=True)]
        strips.append([Tile(images[row], names[row]), *tiles])
    return strips
