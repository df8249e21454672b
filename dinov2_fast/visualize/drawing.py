"""Attention maps, and strips of tiles for `save_sheet`: an image beside its PCA colours, maps or neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.visualize.pca import patch_grid
from dinov2_fast.visualize.sheet import Tile

Strips = list[list[Tile]]

# The colours of values from 0 to the largest, as red, green and blue: black, violet, red, orange, pale yellow.
_RAMP = np.array([[0, 0, 0], [74, 18, 106], [188, 54, 84], [246, 136, 36], [252, 250, 190]], np.float64)
_TOP_PERCENTILE = 99.5  # is the brightest: single patches with nearly all the attention would hide the rest


def pca_strips(names: Sequence[str], images: Sequence[Image.Image], colours: Mapping[int, NDArray[np.uint8]]) -> Strips:
    """Each image and its `colours` from `pca_rgb`: block -> (images, rows, columns, 3). Several blocks are labelled."""
    strips = []
    for i, (name, image) in enumerate(zip(names, images, strict=True)):
        maps = [
            Tile(Image.fromarray(rgb[i]), f"block {block}" if len(colours) > 1 else "", smooth=False)
            for block, rgb in colours.items()
        ]
        strips.append([Tile(image, name), *maps])
    return strips


def attention_rgb(weights: Any, grid: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Attention weights as a heat map, from black over violet, red and orange to pale yellow.

    Each map is scaled on its own: 0 is black and its 99.5th percentile the brightest colour. So brightness cannot be
    compared between maps.

    Args:
        weights: tensor or array (..., patches) without CLS token and registers; not negative.
        grid: (height, width) in patches where the image is not square.

    Returns:
        (..., height, width, 3) uint8.

    Raises:
        ValueError: a grid that does not hold the patches, or values that are negative, NaN or infinite.
    """
    if hasattr(weights, "detach"):
        weights = weights.detach().cpu().double().numpy()
    values = np.asarray(weights, np.float64)
    if values.ndim < 1 or not (np.isfinite(values) & (values >= 0)).all():
        raise InvalidValueError("Attention weights must be finite and not negative, and there must be some.")
    top = np.percentile(values, _TOP_PERCENTILE, axis=-1, keepdims=True)
    top = np.where(top > 0, top, values.max(axis=-1, keepdims=True))  # a map of a few patches
    unit = np.clip(values / np.where(top > 0, top, 1.0), 0.0, 1.0)
    stops = np.linspace(0.0, 1.0, len(_RAMP))
    rgb = np.stack([np.interp(unit, stops, channel) for channel in _RAMP.T], axis=-1)
    rows, columns = patch_grid(values.shape[-1], grid)
    return np.rint(rgb).astype(np.uint8).reshape(*values.shape[:-1], rows, columns, 3)


def attention_strips(
    names: Sequence[str],
    images: Sequence[Image.Image],
    attention: Mapping[int, Sequence[Any] | NDArray[Any]],
    grid: tuple[int, int],
    heads: Sequence[int],
) -> Strips:
    """Each image, the mean attention map of all heads, and the maps of chosen `heads`; one strip for each block.

    `attention` is block -> for each image an array (all heads, patches), `grid` (rows, columns) of patches.
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
    """The images in `rows` and their neighbours: (rows, count) from `dinov2_fast.curation.neighbours.nearest`."""
    strips = []
    for row, found, near in zip(rows, neighbours.tolist(), cosines.tolist(), strict=True):
        tiles = [Tile(images[i], f"{cosine:.3f} {names[i]}") for i, cosine in zip(found, near, strict=True)]
        strips.append([Tile(images[row], names[row]), *tiles])
    return strips
