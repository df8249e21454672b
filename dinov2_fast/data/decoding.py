"""Decoding one image: from its source to pixel values, or to an error."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from dinov2_fast.data.archives import read_member
from dinov2_fast.data.files import ImageError, ReadError, read_bytes, reason
from dinov2_fast.data.image_processor import Dinov2ImageProcessor, Pixels
from dinov2_fast.data.images import MAX_PIXELS, decode_image
from dinov2_fast.data.sources import ImageSource


@dataclass(frozen=True)
class Decoded:
    """One image, or its error.

    Attributes:
        width, height: after EXIF rotation; None if the image cannot be read.
        sha256: of the bytes of the file; None if they cannot be read.
        pixels: (3, height, width) of the processor; None if there is an error.
        error: the reason, without the path.
        transient: another try may succeed with the same file: reading failed, memory or time ran out, or a worker died.
    """

    width: int | None = None
    height: int | None = None
    sha256: str | None = None
    pixels: Pixels | None = None
    error: str | None = None
    transient: bool = False


def decode(source: ImageSource, processor: Dinov2ImageProcessor, max_pixels: int = MAX_PIXELS) -> Decoded:
    """Reads and processes one image. An image that fails gets an `error`; nothing is raised."""
    path, archive, offset, size = source
    try:
        content = read_bytes(path) if archive is None else read_member(archive, offset, size)
    except Exception as error:  # an unexpected error fails this image, not the run
        return Decoded(error=reason(error), transient=isinstance(error, ReadError | MemoryError))
    return decode_bytes(content, processor, max_pixels)


def decode_bytes(content: bytes, processor: Dinov2ImageProcessor, max_pixels: int = MAX_PIXELS) -> Decoded:
    """As `decode`, from the bytes of a file."""
    sha256 = hashlib.sha256(content).hexdigest()
    try:
        image = decode_image(content, max_pixels, processor.background)
    except ImageError as error:
        return Decoded(sha256=sha256, error=str(error), transient=isinstance(error, ReadError))
    try:
        return Decoded(*image.size, sha256, processor(image, return_tensors=None).pixel_values[0])
    except Exception as error:  # an unexpected error fails this image, not the run
        transient = isinstance(error, MemoryError)
        return Decoded(*image.size, sha256, error=f"cannot be processed: {reason(error)}", transient=transient)
