"""Decoding one image: from its source to pixel values, or to an error."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinov2_fast.data.archives import read_member
from dinov2_fast.data.files import ImageError, ReadError, read_bytes, reason
from dinov2_fast.data.images import MAX_PIXELS, decode_image
from dinov2_fast.data.sources import ImageSource


@dataclass(frozen=True)
class Decoded:
    """One image, or its error.

    Attributes:
        width, height: after EXIF rotation; None if the image cannot be read.
        sha256: of the bytes of the file; None if they cannot be read.
        pixels: what was made of the image, (3, height, width) by a processor; None if there is an error.
        error: the reason, without the path.
        transient: another try may succeed with the same file: reading failed, memory or time ran out, or a worker died.
    """

    width: int | None = None
    height: int | None = None
    sha256: str | None = None
    pixels: NDArray[Any] | None = None
    error: str | None = None
    transient: bool = False


class Preparation(Protocol):
    """Makes an array of a decoded image, such as a `Dinov2ImageProcessor`.

    Worker processes need one `output_shape` and `output_dtype` for all arrays.
    """

    background: str | None  # the colour behind transparent pixels; None drops alpha

    @property
    def output_shape(self) -> tuple[int, ...]: ...
    @property
    def output_dtype(self) -> np.dtype[Any]: ...
    def prepare(self, image: Image.Image, number: int) -> NDArray[Any]:
        """The array of an image in mode RGB. `number` is that of the task; random arrays depend on it."""


def decode(source: ImageSource, preparation: Preparation, max_pixels: int = MAX_PIXELS, *, number: int = 0) -> Decoded:
    """Reads and prepares one image. An image that fails gets an `error`; nothing is raised."""
    path, archive, offset, size = source
    try:
        content = read_bytes(path) if archive is None else read_member(archive, offset, size)
    except Exception as error:  # an unexpected error fails this image, not the run
        return Decoded(error=reason(error), transient=isinstance(error, ReadError | MemoryError))
    return decode_bytes(content, preparation, max_pixels, number=number)


def decode_bytes(content: bytes, preparation: Preparation, max_pixels: int = MAX_PIXELS, *, number: int = 0) -> Decoded:
    """As `decode`, from the bytes of a file."""
    sha256 = hashlib.sha256(content).hexdigest()
    try:
        image = decode_image(content, max_pixels, preparation.background)
    except ImageError as error:
        return Decoded(sha256=sha256, error=str(error), transient=isinstance(error, ReadError))
    try:
        return Decoded(*image.size, sha256, preparation.prepare(image, number))
    except Exception as error:  # an unexpected error fails this image, not the run
        transient = isinstance(error, MemoryError)
        return Decoded(*image.size, sha256, error=f"cannot be processed: {reason(error)}", transient=transient)
