"""Reading images safely.

- Formats: JPEG (MPO included), PNG, WebP, GIF, BMP, TIFF; AVIF if Pillow is built with it, HEIC if the package
  pillow_heif is installed. The content decides, not the ending of the name.
- The size is read from the header and checked before anything is decoded.
- A truncated file is an error, never a half-grey image. A JPEG that lacks only its end marker (FF D9) cannot be told
  from one that lacks pixels; a caller who knows that all pixels are there can append the marker.
- Animations give their first frame, TIFF files their first page.
- EXIF rotation is applied, so the image is as a viewer shows it.
- Every mode whose values have an agreed range becomes RGB; see :mod:`.rgb`.
"""

from __future__ import annotations

import io
import logging
import re
import warnings

from PIL import Image, ImageFile, features

from dinov2_fast.data.files import ImageError, ReadError, reason
from dinov2_fast.data.rgb import to_rgb

MAX_PIXELS = 50_000_000
MAX_SIDE = 1_000_000  # Pillow keeps a pointer for each row
MAX_SCANS = 100  # of a progressive JPEG, which has some ten; each costs a pass over all pixels
JPEG_PIXELS_PER_BYTE = 512  # a block of 8 x 8 takes one bit at least
PIXELS_PER_BYTE = 1 << 17  # of the other formats: images of one colour reach a third of this

_ENDINGS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif", ".hif"),
}


def _formats() -> tuple[str, ...]:
    """The formats that can be read here, by Pillow's names."""
    missing = set() if "avif" in features.get_supported_modules() else {"AVIF"}
    try:
        import pillow_heif  # type: ignore[import-not-found]

        pillow_heif.register_heif_opener()
    except ImportError:
        missing.add("HEIF")
    return tuple(format for format in _ENDINGS if format not in missing)


FORMATS = _formats()
ENDINGS = tuple(ending for format in FORMATS for ending in _ENDINGS[format])
logging.getLogger("PIL").addHandler(logging.NullHandler())  # without a handler, its errors would go to stderr

_HEIC = (b"ftypheic", b"ftypheix", b"ftypmif1")  # what follows the first four bytes
_JPEG = ("JPEG", "MPO")
_SCAN = re.compile(rb"\xff\xda\x00[\x08\x0a\x0c\x0e][\x01-\x04]")
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


def decode_image(content: bytes, max_pixels: int = MAX_PIXELS, background: str | None = None) -> Image.Image:
    """The image in the bytes of a file, in mode RGB; transparent pixels are composited on a `background`.

    Raises:
        ReadError: memory ran out.
        ImageError: not an image of a known format or mode, truncated, damaged, or above a limit such as `max_pixels`.
    """
    if not content:
        raise ImageError("empty file")
    try:
        return to_rgb(_upright(_load(content, max_pixels)), background)
    except ImageError:
        raise
    except MemoryError as error:
        raise ReadError(reason(error)) from error
    except Image.DecompressionBombError as error:  # of large WebP canvases and TIFF tiles
        raise ImageError(f"too large: {reason(error)} PIL.Image.MAX_IMAGE_PIXELS sets this limit.") from error
    except Exception as error:
        raise ImageError(f"cannot be decoded: {reason(error)}") from error


def disable_pillow_limits() -> None:
    """Switches off Pillow's own limit and warnings in this process, which decodes for this package only."""
    Image.MAX_IMAGE_PIXELS = None
    warnings.filterwarnings("ignore", module="PIL")


def _load(content: bytes, max_pixels: int) -> Image.Image:
    image = _open(content)
    _check(image, content, max_pixels)
    try:
        image.load()
    except OSError as error:
        if image.format in _JPEG and not content.endswith(b"\xff\xd9"):
            raise ImageError(f"cannot be decoded: {reason(error)}; a JPEG ends in FF D9, this one does not") from error
        raise
    return image


def _open(content: bytes) -> ImageFile.ImageFile:
    """The image, with only its header read.

    `Image.open` would also apply Pillow's own limit, which belongs to the whole process, and hide why it fails.
    """
    failure = ImageError(f"not an image of a known format ({', '.join(FORMATS)})")
    if "HEIF" not in FORMATS and content[4:12] in _HEIC:
        failure = ImageError("HEIC, which is read where the package pillow_heif is installed")
    Image.preinit()
    for format in FORMATS:
        if format not in Image.OPEN:
            Image.init()
        make, accepts = Image.OPEN[format]
        if accepts is None or accepts(content[:16]):
            try:
                return make(io.BytesIO(content), "")
            except (MemoryError, Image.DecompressionBombError):
                raise
            except Exception as error:
                failure = ImageError(f"{format} that cannot be opened: {reason(error)}")
    raise failure


def check_pixels(image: Image.Image, max_pixels: int) -> None:
    """Raises `ImageError` for an image of more pixels."""
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"too large: {width} x {height} pixels, the limit is {max_pixels}")


def _check(image: Image.Image, content: bytes, max_pixels: int) -> None:
    """Refuses images that would take too much memory or time, and files too short for their pixels."""
    check_pixels(image, max_pixels)
    width, height = image.size
    if max(width, height) > MAX_SIDE:
        raise ImageError(f"too long: {width} x {height} pixels, the limit of a side is {MAX_SIDE}")
    is_jpeg = image.format in _JPEG
    if width * height > (JPEG_PIXELS_PER_BYTE if is_jpeg else PIXELS_PER_BYTE) * len(content):
        raise ImageError(f"truncated: {len(content)} bytes cannot hold {width} x {height} pixels")
    if is_jpeg and content.count(b"\xff\xda") > MAX_SCANS and len(_SCAN.findall(content)) > MAX_SCANS:
        raise ImageError(f"too many progressive scans: the limit is {MAX_SCANS}")


def _upright(image: Image.Image) -> Image.Image:
    undo = _UNDO_ORIENTATION.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    return image if undo is None else image.transpose(undo)
