"""A sheet: strips of images with a line of text under each, on one PNG."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dinov2_fast.errors import InvalidValueError

_GAP, _SEAM, _TEXT_HEIGHT = 16, 4, 24
_TITLE_FONT, _TEXT_FONT = ImageFont.load_default(18), ImageFont.load_default(14)


@dataclass(frozen=True)
class Tile:
    """One image on a sheet and the text under it, which may continue under following tiles without text."""

    image: Image.Image
    text: str = ""
    smooth: bool = True  # False for maps of patches, which stay sharp squares when they are enlarged


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

    Returns:
        The path.

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
    starts = [0]
    for image in images:
        starts.append(starts[-1] + image.width + _SEAM)
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
    kept = len(text)
    shown = text
    while kept > 2 and _TEXT_FONT.getlength(shown) > width:
        kept -= 1
        shown = f"{text[: kept // 2]}...{text[-(kept // 2) :]}"
    return shown
