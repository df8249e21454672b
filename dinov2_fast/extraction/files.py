"""Opening what a path names: a local file, or by fsspec what a URL such as ``s3://bucket/picture.jpg`` names."""

from __future__ import annotations

import os
import re
import stat
from typing import IO, Any

MAX_BYTES = 1 << 30
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class ImageError(Exception):
    """An image cannot be had; the message is the reason, without the path."""


class ReadError(ImageError):
    """Its bytes could not be read, or memory ran out: another try may succeed, with the same file."""


def is_url(path: str) -> bool:
    """Whether the path has a scheme, as in ``s3://`` or ``https://``."""
    return _SCHEME.match(path) is not None


def filesystem(url: str) -> Any:
    """fsspec's file system for a URL.

    Raises:
        ValueError: no fsspec, or it does not know the scheme, or what it needs for it is not installed.
    """
    try:
        import fsspec  # type: ignore[import-untyped]
    except ImportError:
        raise ValueError(f"URLs such as {url!r} need fsspec, which is not installed: pip install fsspec.") from None
    try:
        return fsspec.core.url_to_fs(url)[0]
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url!r} cannot be opened: {error}") from error


def open_file(path: str) -> IO[bytes]:
    """The file or URL, for reading bytes; it can seek.

    Raises:
        OSError: it cannot be opened.
        ValueError: as `filesystem`.
    """
    if is_url(path):
        opened: IO[bytes] = filesystem(path).open(path, "rb")
        return opened
    return open(path, "rb")


def read_bytes(path: str, offset: int | None = None, size: int | None = None) -> bytes:
    """All bytes of a file or URL, or `size` of them from `offset` on.

    Raises:
        ReadError: missing, unreadable or shorter than that.
        ImageError: not a regular file, or longer than `MAX_BYTES`.
    """
    try:
        content = _read_url(path, offset, size) if is_url(path) else _read_local(path, offset, size)
    except (OSError, MemoryError) as error:
        raise ReadError(reason(error)) from error
    except ImageError:
        raise
    except Exception as error:  # the libraries behind fsspec raise errors of their own
        raise ReadError(f"{type(error).__name__}: {reason(error)}") from error
    if size is not None and len(content) < size:
        raise ReadError(f"truncated: {len(content)} of {size} bytes are there")
    return content


def _read_local(path: str, offset: int | None, size: int | None) -> bytes:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
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
    """One line that says what happened, without the path that the system adds to its errors."""
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
