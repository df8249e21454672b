"""`ImageList`: the images of an extraction, in a temporary file, so that memory does not grow with their number."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from dinov2_fast.data.sources import ImageSource
from dinov2_fast.features.manifest import Section

_SCHEMA = pa.schema([("path", pa.binary()), ("archive", pa.binary()), ("offset", pa.int64()), ("size", pa.int64())])


class ImageList:
    """The images of an extraction, in shards. Those of this process lie in a temporary file.

    Args:
        images: of all processes, iterated once.
        shard_size: images in a shard.
        folder: where the temporary file goes. It has no name, and the system deletes it with the process.
        part: (number from 1, count): this process gets every `count`-th shard, beginning with the `number`-th.
        first_shard: the number of the first shard of all processes.

    Attributes:
        section: of all images; its SHA-256 is that of their paths, with offsets and sizes in archives.
        shards: the numbers of the shards of this process.
    """

    def __init__(
        self,
        images: Iterable[ImageSource],
        shard_size: int,
        folder: Path,
        *,
        part: tuple[int, int] = (1, 1),
        first_shard: int = 0,
    ) -> None:
        number, parts = part
        self._file = tempfile.TemporaryFile(dir=folder, prefix=".images-")  # noqa: SIM115  # close() closes it
        digest, count, rows = hashlib.sha256(), 0, list[tuple[Any, ...]]()
        with pa.ipc.new_file(self._file, _SCHEMA) as file:
            for image in images:
                row = to_row(image)
                digest.update(repr(row).encode())
                if count // shard_size % parts == number - 1:
                    rows.append(row)
                count += 1
                if count % shard_size == 0 and rows:
                    file.write(record_batch(rows))
                    rows = []
            if rows:
                file.write(record_batch(rows))
        self._reader = pa.ipc.open_file(self._file)
        self.shard_size = shard_size
        self.section = Section(first_shard, count, digest.hexdigest())
        self.shards = self.section.shards(shard_size)[number - 1 :: parts]

    def rows(self, shard: int) -> int:
        """The number of images in a shard."""
        return self.section.rows(shard, self.shard_size)

    def sources(self, shard: int) -> list[ImageSource]:
        """The images of one of the shards of this process."""
        columns = self._reader.get_batch(self.shards.index(shard)).to_pydict()
        return [from_row(row) for row in zip(*columns.values(), strict=True)]

    def close(self) -> None:
        """Deletes the temporary file."""
        self._file.close()


def to_row(image: ImageSource) -> tuple[Any, ...]:
    """The image as a row of a table; its paths are bytes."""
    path, archive, offset, size = image
    return os.fsencode(path), None if archive is None else os.fsencode(archive), offset, size


def from_row(row: Iterable[Any]) -> ImageSource:
    """The image of a row of `to_row`."""
    path, archive, offset, size = row
    return ImageSource(os.fsdecode(path), archive and os.fsdecode(archive), offset, size)


def record_batch(rows: list[tuple[Any, ...]]) -> pa.RecordBatch:
    """A table of rows of `to_row`."""
    return pa.record_batch([list(column) for column in zip(*rows, strict=True)], schema=_SCHEMA)
