"""PIL images of every mode as RGB images of 8 bits.

- Alpha is dropped, not composited, as ``Image.convert("RGB")`` does in the reference's, timm's and transformers'
  pipelines (in transformers until 5.17 at least). A background colour composites instead; transformers 5.23 does this
  with white.
- Palettes are resolved, grey is repeated, CMYK is converted by Pillow without a colour profile.
- 16-bit grey is scaled to 8 bits (65535 becomes 255). Pillow's own conversion clips everything above 255 to white.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

from dinov2_fast.errors import InvalidValueError


def to_rgb(image: Image.Image, background: str | None = None) -> Image.Image:
    """The image in mode RGB; see the module's description.

    Args:
        image: of any mode.
        background: a colour on which transparent pixels are composited; by default alpha is dropped.

    Raises:
        InvalidValueError: pixels are floating-point or 32-bit integers, which have no agreed range.
        ValueError: Pillow cannot convert the mode.
    """
    if image.mode == "F":
        raise InvalidValueError("An image of floating-point pixels has no agreed range; convert it to 8 bits first.")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise InvalidValueError(
                "An image of 32-bit integers has no agreed range; convert it to 8 or 16 bits first."
            )
        return Image.fromarray(to_8_bits(values)).convert("RGB")
    if background is not None and image.has_transparency_data:
        behind = Image.new("RGBA", image.size, parse_colour(background))
        return Image.alpha_composite(behind, image.convert("RGBA")).convert("RGB")
    if image.mode == "RGB":
        return image
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def parse_colour(colour: str) -> tuple[int, ...]:
    """Red, green and blue, 0 to 255, from a name or code that Pillow knows.

    Raises:
        InvalidValueError: Pillow does not know it.
    """
    try:
        return ImageColor.getrgb(colour)[:3]
    except ValueError:
        raise InvalidValueError(f"background must be a colour such as white or #ffffff, got {colour!r}.") from None


def to_8_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Scales 0 to 65535 to 0 to 255, rounded."""
    return ((values.astype(np.int64) + 128) // 257).astype(np.uint8)
