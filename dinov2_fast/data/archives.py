"""Archives of images: where each member is, so that it can be read alone, and reading it.

The offset and size of a member mean:

- in an uncompressed ``.tar``, as webdataset writes it: the offset and size of the content;
- in a ``.zip``, whose members may be deflated: the offset of the member's header, and the compressed size;
- in a ``.parquet`` with images (:mod:`.parquet_images`): the number of the row, and no size.
"""

from __future__ import annotations

import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, NamedTuple

from dinov2_fast.data import parquet_images
from dinov2_fast.data.files import MAX_BYTES, ImageError, ReadError, ending, open_file, read_bytes, reason, shown
from dinov2_fast.errors import InvalidValueError

_ZIP_HEADER = struct.Struct("<4s2xHH16xHH")  # of a member: magic, flags, method, lengths of name and extra field
_STORED, _DEFLATED, _ENCRYPTED = 0, 8, 1


class Member(NamedTuple):
    """A file in an archive; without an offset if its bytes cannot be read alone."""

    name: str
    offset: int | None = None
    size: int | None = None


def members(archive: str) -> Iterator[Member]:
    """The files in a tar or zip archive, without reading their content.

    Raises:
        InvalidValueError: the archive is damaged, truncated or of another kind.
        OSError: it cannot be read.
    """
    kind = ending(archive)
    try:
        with open_file(archive) as file:
            yield from _MEMBERS[kind](file)
    except OSError as error:
        raise OSError(f"{shown(archive)!r} cannot be read: {reason(error)}.") from error
    except Exception as error:  # tarfile raises other errors than its own on damaged archives
        name = "uncompressed tar" if kind == ".tar" else "zip"
        raise InvalidValueError(f"{shown(archive)!r} is damaged, or no {name} archive ({reason(error)}).") from error


def read_member(archive: str, offset: int | None, size: int | None) -> bytes:
    """The bytes of an image at the place where `members` or `parquet_images.rows` found it.

    Raises:
        ReadError: the archive is missing, unreadable or too short.
        ImageError: the member is damaged, encrypted, or stored in a way that is not supported.
    """
    if offset is None:
        raise ImageError("a link or sparse file in the archive, which is not read: unpack the archive")
    if ending(archive) == ".zip":
        return _read_zip_member(archive, offset, size)
    if ending(archive) == ".parquet":
        return parquet_images.read_row(archive, offset)
    return read_bytes(archive, offset, size)


def _tar_members(file: IO[bytes]) -> Iterator[Member]:
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # keeps memory flat
            if tar.offset < member.offset_data:
                raise tarfile.ReadError("a size below zero")
            if member.isreg() and not member.issparse():
                yield Member(member.name, member.offset_data, member.size)
            elif not member.isdir():
                yield Member(member.name)
        file.seek(tar.offset)
        _check_end(file)


def _check_end(file: IO[bytes]) -> None:
    """Refuses an archive that was cut off, or goes on where tarfile stopped, as it does at a damaged header."""
    block = file.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0"):
        raise tarfile.ReadError("a damaged header")
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("no end marker, it was cut off")
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            raise tarfile.ReadError("it goes on after its end marker")


def _zip_members(file: IO[bytes]) -> Iterator[Member]:
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if not member.is_dir():
                yield Member(member.filename, member.header_offset, member.compress_size)


_MEMBERS = {".tar": _tar_members, ".zip": _zip_members}


def _read_zip_member(archive: str, offset: int, size: int | None) -> bytes:
    header = read_bytes(archive, offset, _ZIP_HEADER.size)
    magic, flags, method, name, extra = _ZIP_HEADER.unpack(header)
    if magic != b"PK\3\4":
        raise ReadError("the zip archive has changed, or is damaged")
    if flags & _ENCRYPTED or method not in (_STORED, _DEFLATED):
        how = "encrypted" if flags & _ENCRYPTED else f"compressed by method {method}"
        raise ImageError(f"{how} in the zip archive, which is not read: unpack the archive")
    content = read_bytes(archive, offset + len(header) + name + extra, size)
    return _inflated(content) if method == _DEFLATED else content


def _inflated(content: bytes) -> bytes:
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        found = stream.decompress(content, MAX_BYTES)
    except zlib.error as error:
        raise ImageError(f"damaged in the zip archive: {error}") from error
    if not stream.eof:
        raise ImageError(f"damaged in the zip archive, or larger than {MAX_BYTES} bytes")
    return found
