"""Sheets: PNGs with strips of images, such as each image beside its PCA colours, attention maps or neighbours."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.visualize.pca import as_array, patch_grid

_GAP, _SEAM, _TEXT_HEIGHT = 16, 4, 24
_TITLE_FONT, _TEXT_FONT = ImageFont.load_default(18), ImageFont.load_default(14)

# The colours of values from 0 to the largest, as red, green and blue: black, violet, red, orange, pale yellow.
_RAMP = np.array([[0, 0, 0], [74, 18, 106], [188, 54, 84], [246, 136, 36], [252, 250, 190]], np.float64)
_TOP_PERCENTILE = 99.5  # is the brightest: single patches with nearly all the attention would hide the rest


@dataclass(frozen=True)
class Tile:
    """One image on a sheet and the text under it, which may continue under following tiles without text."""

    image: Image.Image
    text: str = ""
    smooth: bool = True  # False for maps of patches, which stay sharp squares when they are enlarged


Strips = list[list[Tile]]


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
        ValueError: no patches, a grid that does not hold them, or values that are negative, NaN or infinite.
    """
    values = as_array(weights)
    if not values.ndim or not values.shape[-1] or not (np.isfinite(values) & (values >= 0)).all():
        raise InvalidValueError("Attention weights must be finite and not negative, and there must be some.")
    top = np.percentile(values, _TOP_PERCENTILE, axis=-1, keepdims=True)
    top = np.where(top > 0, top, values.max(axis=-1, keepdims=True))  # nearly all weights are 0
    unit = np.clip(values / np.where(top > 0, top, 1.0), 0.0, 1.0)
    stops = np.linspace(0.0, 1.0, len(_RAMP))
    rgb = np.stack([np.interp(unit, stops, channel) for channel in _RAMP.T], axis=-1)
    rows, columns = patch_grid(values.shape[-1], grid)
    return np.rint(rgb).astype(np.uint8).reshape(*values.shape[:-1], rows, columns, 3)


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


def save_sheet(
    path: str | os.PathLike[str],
    strips: Sequence[Sequence[Tile]],
    *,
    title: str = "",
    note: str = "",
    columns: int = 1,
    height: int = 224,
) -> Path:
    """Draws strips of tiles as a PNG.

    Args:
        path: of the PNG. A file there is replaced; the folder is made.
        strips: tiles that stand side by side, such as an image and its maps.
        title, note: texts on top of the sheet, in large and in small letters.
        columns: strips in one row of the sheet.
        height: of every image on the sheet, in pixels; the width keeps its shape.

    Raises:
        ValueError: no strips, or an empty one.
    """
    if not strips or not all(strips):
        raise InvalidValueError("A sheet needs at least one strip, and every strip at least one image.")
    drawn = [_draw_strip(strip, height) for strip in strips]
    columns = min(columns, len(drawn))
    cell_width, cell_height = max(strip.width for strip in drawn) + _GAP, height + _TEXT_HEIGHT + _GAP
    heading = [(text, font) for text, font in ((title, _TITLE_FONT), (note, _TEXT_FONT)) if text]
    top = _GAP + (_TEXT_HEIGHT * len(heading) + _GAP // 2 if heading else 0)
    longest = max((int(font.getlength(text)) + _GAP for text, font in heading), default=0)
    rows = -(-len(drawn) // columns)
    sheet = Image.new("RGB", (max(columns * cell_width, longest) + _GAP, rows * cell_height + top), "white")
    draw = ImageDraw.Draw(sheet)
    for line, (text, font) in enumerate(heading):
        draw.text((_GAP, _GAP + line * _TEXT_HEIGHT), text, fill="black", font=font)
    for index, strip in enumerate(drawn):
        sheet.paste(strip, (_GAP + index % columns * cell_width, top + index // columns * cell_height))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG")
    return path


def _draw_strip(tiles: Sequence[Tile], height: int) -> Image.Image:
    images = [_scaled(tile, height) for tile in tiles]
    width = sum(image.width for image in images) + _SEAM * (len(images) - 1)
    strip = Image.new("RGB", (width, height + _TEXT_HEIGHT), "white")
    draw = ImageDraw.Draw(strip)
    starts = list(accumulate((image.width + _SEAM for image in images), initial=0))
    written = [i for i, tile in enumerate(tiles) if tile.text]
    for i, (image, start) in enumerate(zip(images, starts, strict=False)):
        strip.paste(image, (start, 0))
        if tiles[i].text:
            following = next((j for j in written if j > i), len(tiles))
            text = _shortened(tiles[i].text, starts[following] - _SEAM - start)
            draw.text((start, height + 4), text, fill="black", font=_TEXT_FONT)
    return strip


def _scaled(tile: Tile, height: int) -> Image.Image:
    image = tile.image.convert("RGB")
    size = max(round(height * image.width / image.height), 1), height
    return image.resize(size, Image.Resampling.LANCZOS if tile.smooth else Image.Resampling.NEAREST)


def _shortened(text: str, width: int) -> str:
    """The text on one line, with its middle left out if it is wider than `width` pixels."""
    text = " ".join(text.split())
    kept, shown = len(text), text
    while kept > 2 and _TEXT_FONT.getlength(shown) > width:
        kept -= 1
        shown = f"{text[: kept // 2]}...{text[-(kept // 2) :]}"
    return shown
