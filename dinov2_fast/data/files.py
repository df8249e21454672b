"""Reading local files, and URLs such as ``s3://bucket/image.jpg`` by fsspec."""

from __future__ import annotations

import errno
import os
import re
import stat
from typing import IO, Any

from dinov2_fast.errors import Dinov2FastError, InvalidValueError

MAX_BYTES = 1 << 30  # of an image file, and of the images in a row group of Parquet
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_URL = re.compile(rf"{_SCHEME.pattern}[^\s'\"]*")
_SECRETS = re.compile(r"(?<=://)[^/@]*@|\?.*", re.DOTALL)


class ImageError(Dinov2FastError):
    """An image cannot be read or decoded; the message is the reason, without the path."""


class ReadError(ImageError):
    """The bytes of an image cannot be read, or memory ran out: another try may succeed with the same file."""


def is_url(path: str) -> bool:
    """Whether the path has a scheme, as in ``s3://`` or ``https://``."""
    return _SCHEME.match(path) is not None


def ending(path: str) -> str:
    """The ending of a file or URL in lower case, such as ".tar"; "" if it has none."""
    return os.path.splitext(shown(path))[1].lower()


def shown(path: str) -> str:
    """The path for messages: a URL without its query and password, which may hold secrets."""
    return _SECRETS.sub("", path) if is_url(path) else path


def filesystem(url: str) -> Any:
    """fsspec's file system for a URL.

    Raises:
        InvalidValueError: fsspec is not installed, does not know the scheme, or lacks a package for it.
    """
    try:
        import fsspec  # type: ignore[import-untyped]
    except ImportError:
        raise InvalidValueError(
            f"URLs such as {shown(url)!r} need fsspec, which is not installed: pip install fsspec."
        ) from None
    try:
        return fsspec.core.url_to_fs(url)[0]
    except (ImportError, ValueError) as error:
        raise InvalidValueError(f"{shown(url)!r} cannot be opened: {reason(error)}") from error


def open_file(path: str) -> IO[bytes]:
    """Opens a file or URL to read bytes; the result can seek. Errors: OSError, those of `filesystem` and of fsspec."""
    if is_url(path):
        opened: IO[bytes] = filesystem(path).open(path, "rb")
        return opened
    return open(path, "rb")


def read_bytes(path: str, offset: int | None = None, size: int | None = None) -> bytes:
    """All bytes of a file or URL, or `size` bytes from `offset` on.

    Raises:
        ReadError: the file is missing, unreadable or too short.
        ImageError: the path is empty, the file is not a regular one, or the bytes are more than `MAX_BYTES`.
    """
    try:
        content = _read_url(path, offset, size) if is_url(path) else _read_local(path, offset, size)
    except ImageError:
        raise
    except Exception as error:  # the libraries behind fsspec raise errors of their own
        raise ReadError(_with_type(error)) from error
    if size is not None and len(content) < size:
        raise ReadError(f"truncated: {len(content)} of {size} bytes are there")
    if size is not None and len(content) > size:
        raise ReadError(f"the server sends {len(content)} bytes where {size} were asked for")
    return content


def _read_local(path: str, offset: int | None, size: int | None) -> bytes:
    if not path:
        raise ImageError("the list has no path here")
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would block
        raise ImageError("not a regular file")
    _check_size(status.st_size if size is None else size)
    with open(path, "rb") as file:
        file.seek(offset or 0)
        return file.read() if size is None else file.read(size)


def _read_url(url: str, offset: int | None, size: int | None) -> bytes:
    files = filesystem(url)
    if size is not None:
        _check_size(size)
        content: bytes = files.cat_file(url, start=offset, end=(offset or 0) + size)
        return content
    with files.open(url, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    _check_size(len(content))
    return content


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise ImageError(f"too large: {size} bytes, the limit is {MAX_BYTES}")


def reason(error: BaseException) -> str:
    """One line that says what happened, without paths, and without URLs, which may hold secrets."""
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, FileNotFoundError):  # of fsspec: its text is the path, its cause the reason
        return _with_type(error.__cause__) if error.__cause__ else os.strerror(errno.ENOENT)
    text = " ".join(_URL.sub("…", str(error)).split())
    return text if text.strip("…") else type(error).__name__


def _with_type(error: BaseException) -> str:
    """The reason, after the type of the error if the text alone may be unclear."""
    text, name = reason(error), type(error).__name__
    return text if isinstance(error, OSError | MemoryError | Dinov2FastError) or text == name else f"{name}: {text}"
