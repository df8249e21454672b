"""Reading pictures safely.

Decided once, for every caller:

- JPEG (MPO included), PNG, WebP, GIF, BMP and TIFF, recognised by content; the name's ending does not matter.
- The size is read from the header and checked before anything is decoded.
- A truncated file is an error, never a half-grey picture.
- The first frame of an animation, the first page of a TIFF.
- EXIF rotation is applied, so the picture is as a viewer shows it.
- Modes become RGB by :func:`dinov2_fast.image_processor.to_rgb`: alpha dropped, 16-bit grey scaled to 8 bits.
"""

from __future__ import annotations

import io
import os
import warnings

from PIL import Image, UnidentifiedImageError

from dinov2_fast.extraction.files import ImageError, ReadError, read_bytes, reason
from dinov2_fast.image_processor import to_rgb

MAX_PIXELS = 50_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

_EXIF_ORIENTATION = 0x0112
_UNDO_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in a file, as an RGB image in memory.

    Args:
        path: a regular file, or a URL that fsspec can open.
        max_pixels: larger pictures are refused. Pillow's own limit (twice ``PIL.Image.MAX_IMAGE_PIXELS``, 179 million)
            holds as well.

    Raises:
        ReadError: missing or unreadable, or memory ran out.
        ImageError: not an image of an allowed format, too large, truncated or damaged.
    """
    return decode_image(read_bytes(os.fspath(path)), max_pixels)


def decode_image(content: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture that a file's bytes hold, as `read_image` gives it.

    Whatever Pillow's parsers raise on damaged input becomes an ImageError, a lack of memory a ReadError.
    """
    if not content:
        raise ImageError("empty file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about sizes, palettes and EXIF, all of which is decided here
        image = _open(content, max_pixels)
        try:
            image.load()
            return to_rgb(_upright(image))
        except MemoryError as error:
            raise ReadError(reason(error)) from error
        except Exception as error:
            raise ImageError(f"cannot be decoded: {reason(error)}") from error


def _open(content: bytes, max_pixels: int) -> Image.Image:
    """The picture with its size known and checked, and nothing decoded."""
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise ImageError(f"not a picture of a known format ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"too large: {error}") from error
    except MemoryError as error:
        raise ReadError(reason(error)) from error
    except Exception as error:
        raise ImageError(f"damaged header: {reason(error)}") from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"too large: {width} x {height} pixels, the limit is {max_pixels}")
    return image


def _upright(image: Image.Image) -> Image.Image:
    undo = _UNDO_ORIENTATION.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    return image if undo is None else image.transpose(undo)
