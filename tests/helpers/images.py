"""Reading one image as the package does."""

from __future__ import annotations

import os

from PIL import Image

from dinov2_fast.data.files import read_bytes
from dinov2_fast.data.images import MAX_PIXELS, decode_image


def read_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in a file or at a URL, in mode RGB."""
    return decode_image(read_bytes(os.fspath(path)), max_pixels)
