"""Finding pictures and reading them safely.

Decided once, for every caller:

- JPEG (MPO included), PNG, WebP, GIF, BMP and TIFF, recognised by content; the name's ending does not matter.
- The size is read from the header and checked before anything is decoded.
- A truncated file is an error, never a half-grey picture.
- The first frame of an animation, the first page of a TIFF.
- EXIF rotation is applied, so the picture is as a viewer shows it.
- Modes become RGB by :func:`dinov2_fast.image_processor.to_rgb`: alpha dropped, 16-bit grey scaled to 8 bits.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterable, Iterator
from typing import IO

from PIL import Image, UnidentifiedImageError

from dinov2_fast.image_processor import to_rgb

MAX_PIXELS = 50_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff")

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


class ImageError(Exception):
    """A picture cannot be read; the message is the reason, without the path."""


def read_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in a file, as an RGB image in memory.

    Args:
        path: a regular file.
        max_pixels: larger pictures are refused. Pillow's own limit (twice ``PIL.Image.MAX_IMAGE_PIXELS``, 179 million)
            holds as well.

    Raises:
        ImageError: missing, unreadable, not a picture of an allowed format, too large, truncated or damaged.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise ImageError("not a regular file")
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about sizes, palettes and EXIF, all of which is decided here
            return _decode(file, max_pixels)
    except OSError as error:
        raise ImageError(_reason(error)) from error


def list_images(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """The files given, and those in the folders given, as paths in a fixed order.

    A file given is taken whatever its name. A folder is searched, with everything below it, for names that end as
    pictures do (`ENDINGS`), in the order of the names. Links are followed, but each folder is entered once, so that a
    loop ends. Names that are not UTF-8 keep their bytes as `os.fsdecode` does.

    Raises:
        FileNotFoundError: a path that does not exist.
        OSError: a folder that cannot be listed.
    """
    given = [os.fsdecode(path) for path in paths]
    for path in given:
        if not os.path.exists(path):
            raise FileNotFoundError(f"There is no file or folder {path!r}.")
    found: list[str] = []
    for path in given:
        found.extend(_walk(path, set()) if os.path.isdir(path) else [path])
    return found


def _walk(folder: str, entered: set[tuple[int, int]]) -> Iterator[str]:
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in entered:
        return
    entered.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        children = sorted((entry.name, _is_folder(entry)) for entry in entries)
    for name, is_folder in children:
        path = os.path.join(folder, name)
        if is_folder:
            yield from _walk(path, entered)
        elif name.lower().endswith(ENDINGS):
            yield path


def _is_folder(entry: os.DirEntry[str]) -> bool:
    if entry.is_symlink():  # DirEntry.is_dir raises for a link to itself
        return os.path.isdir(entry.path)
    return entry.is_dir()


def _decode(file: IO[bytes], max_pixels: int) -> Image.Image:
    """Decodes an open file; whatever Pillow's parsers raise on damaged input becomes an ImageError."""
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise ImageError(_unidentified(file)) from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"too large: {error}") from error
    except Exception as error:
        raise ImageError(f"damaged header: {_reason(error)}") from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"too large: {width} x {height} pixels, the limit is {max_pixels}")
    try:
        image.load()
        return to_rgb(_upright(image))
    except Exception as error:
        raise ImageError(f"cannot be decoded: {_reason(error)}") from error


def _unidentified(file: IO[bytes]) -> str:
    if os.fstat(file.fileno()).st_size == 0:
        return "empty file"
    return f"not a picture of a known format ({', '.join(FORMATS)})"


def _upright(image: Image.Image) -> Image.Image:
    undo = _UNDO_ORIENTATION.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    return image if undo is None else image.transpose(undo)


def _reason(error: BaseException) -> str:
    """One line that says what happened, without the path that the system adds to its errors."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
