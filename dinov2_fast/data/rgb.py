"""Images as RGB: PIL images, arrays and tensors.

PIL images become RGB images of 8 bits:

- Alpha is dropped, not composited, as ``Image.convert("RGB")`` does in the reference's, timm's and transformers'
  pipelines (in transformers until 5.17 at least). A background colour composites instead; transformers 5.23 does this
  with white.
- Palettes are resolved, grey is repeated, CMYK is converted by Pillow without a colour profile.
- 16-bit grey is scaled to 8 bits (65535 becomes 255). Pillow's own conversion clips everything above 255 to white.
- Floats, and integers outside 0 to 65535, have no agreed range and are refused.

Arrays and tensors are (H, W) grey, (H, W, C) or (C, H, W) with 1, 3 or 4 channels. If both readings fit, 1 or 3
channels win over 4, and otherwise channels come first. Values are uint8, uint16 (scaled like 16-bit grey), or floats,
all in range. A float image for 0 to 255 with no value above 1 is refused unless it is black: it was scaled before.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

from dinov2_fast.errors import InvalidTypeError, InvalidValueError

DATA_FORMATS = ("channels_first", "channels_last", None)


def to_rgb(image: Image.Image, background: str | None = None) -> Image.Image:
    """The image in mode RGB; see the module's description. `background` is a colour behind transparent pixels.

    Raises:
        InvalidValueError: floating-point pixels, integers outside 0 to 65535, or an unknown colour as `background`.
        ValueError: Pillow cannot convert the mode.
    """
    if image.mode == "F":
        raise InvalidValueError("An image of floating-point pixels has no agreed range; convert it to 8 bits first.")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise InvalidValueError(
                "An image of integers outside 0 to 65535 has no agreed range; convert it to 8 or 16 bits first."
            )
        return Image.fromarray(to_8_bits(values)).convert("RGB")
    if background is not None and image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, parse_colour(background))
        return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    if image.mode == "RGB":
        return image
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def parse_colour(colour: str) -> tuple[int, ...]:
    """Red, green and blue, 0 to 255, from a name or code; an InvalidValueError if Pillow does not know it."""
    try:
        return ImageColor.getrgb(colour)[:3]
    except ValueError:
        raise InvalidValueError(f"background must be a colour such as white or #ffffff, got {colour!r}.") from None


def to_8_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Scales 0 to 65535 to 0 to 255, rounded."""
    return ((values.astype(np.int64) + 128) // 257).astype(np.uint8)


def channels_last(image: Any, data_format: str | None, top: int) -> NDArray[Any]:
    """An image as an array (height, width, 1, 3 or 4): uint8, or float32 from 0 to `top`.

    Args:
        data_format: "channels_first", "channels_last", or None to guess.
        top: the largest float value, 255 or 1.

    Raises:
        InvalidTypeError: it is neither an array nor a tensor.
        InvalidValueError: its rank, channels, dtype or range do not fit.
    """
    array = _move_channels(_to_numpy(image), data_format)
    if array.dtype == np.uint16:
        array = to_8_bits(array)
    return array if array.dtype == np.uint8 else _check_floats(array, top)


def _to_numpy(image: Any) -> NDArray[Any]:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    if not isinstance(image, np.ndarray):
        raise InvalidTypeError(
            f"An image must be a PIL image, a numpy array or a torch tensor, got {type(image).__name__}."
        )
    return image


def _move_channels(array: NDArray[Any], data_format: str | None) -> NDArray[Any]:
    """(height, width, channels) with 1, 3 or 4 channels."""
    if array.ndim not in (2, 3) or not array.size:
        raise InvalidValueError(
            f"An image must be (H, W), (H, W, C) or (C, H, W) and not empty, got shape {array.shape}."
        )
    if array.ndim == 2:
        return array[:, :, None]
    if data_format not in DATA_FORMATS:
        raise InvalidValueError(f'input_data_format must be "channels_first" or "channels_last", got {data_format!r}.')
    for channels in ((1, 3), (4,)):  # four is the less likely reading, so it comes second
        if data_format != "channels_last" and array.shape[0] in channels:
            return array.transpose(1, 2, 0)
        if data_format != "channels_first" and array.shape[2] in channels:
            return array
    where = "first or last" if data_format is None else data_format.removeprefix("channels_")
    raise InvalidValueError(f"An image must have 1, 3 or 4 channels, {where}, got shape {array.shape}.")


def _check_floats(array: NDArray[Any], top: int) -> NDArray[np.float32]:
    if not np.issubdtype(array.dtype, np.floating):
        raise InvalidValueError(
            f"An array must be uint8, uint16 or floating-point, got {array.dtype}; convert it to one of these."
        )
    low, high = float(array.min()), float(array.max())  # NaN carries through both
    if not (low >= 0 and high <= top):
        other = "" if top == 255 else " (do_rescale=False)"
        raise InvalidValueError(f"A float image must lie between 0 and {top}{other}, got values from {low} to {high}.")
    if top == 255 and 0 < high <= 1:
        raise InvalidValueError(
            f"A float image with values from {low} to {high} looks scaled already; pass do_rescale=False for 0 to 1, "
            "or uint8."
        )
    return array.astype(np.float32)
