"""Finding pictures: files, folders, globs, lists, tar archives and URLs, as one stream in a fixed order.

What a path may be:

=========================  =========================================================================================
a folder                   searched, with everything below it, for names that end as pictures do (`ENDINGS`)
``*.txt *.csv *.parquet``  a list: the lines of a text, or the column ``path`` of a table. Each entry is one picture,
                           whatever its name; as on the command line, it is relative to the current folder
``*.tar``                  an uncompressed archive, as webdataset writes them: its files whose names end as pictures do
any other file             a picture, whatever its name
a glob                     ``*``, ``?``, ``[…]`` and ``**``, where nothing has that very name: what matches, sorted
``scheme://…``             any of these where fsspec can open it (of wildcards, ``*`` alone)
=========================  =========================================================================================
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import os
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from dinov2_fast.extraction.files import filesystem, is_url, open_file
from dinov2_fast.extraction.images import ENDINGS

COLUMN = "path"


class Picture(NamedTuple):
    """Where a picture is: a file or URL, or `size` bytes from `offset` on in an archive.

    `path` names it for people: the file, or archive/member.
    """

    path: str
    archive: str | None = None
    offset: int | None = None
    size: int | None = None


def find_pictures(paths: Iterable[str | os.PathLike[str]]) -> Iterator[Picture]:
    """The pictures that the paths name, one after the other; see the module's description.

    Folders, lists and archives are read while the result is used. Names that are not UTF-8 keep their bytes as
    `os.fsdecode` does.

    Raises:
        FileNotFoundError: a path that does not exist, at once.
        ValueError: a list without paths, an archive that is compressed or damaged, or a URL that cannot be opened.
        OSError: what cannot be read.
    """
    found = [match for path in paths for match in _matches(os.fsdecode(path))]
    return chain.from_iterable(map(_pictures, found))


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


def _matches(path: str) -> list[str]:
    """The path itself, or what it matches as a glob."""
    if is_url(path):
        return _url_matches(path)
    if os.path.exists(path):
        return [path]
    matches = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else []
    if not matches:
        raise FileNotFoundError(f"There is no file or folder {path!r}.")
    return matches


def _url_matches(url: str) -> list[str]:
    files = filesystem(url)
    matches = sorted(map(files.unstrip_protocol, files.glob(url))) if "*" in url else [url] * files.exists(url)
    if not matches:
        raise FileNotFoundError(f"There is nothing at {url!r}.")
    return matches


def _pictures(path: str) -> Iterator[Picture]:
    """The pictures that one path, which is no glob, names."""
    ending = os.path.splitext(path)[1].lower()
    if not is_url(path) and os.path.isdir(path):
        return map(Picture, _walk(path, set()))
    if ending in _LISTS:
        return map(Picture, _LISTS[ending](path))
    if ending == ".tar":
        return _members(path)
    if is_url(path) and ending not in ENDINGS and filesystem(path).isdir(path):
        return map(Picture, _find_below(path))
    return iter([Picture(path)])


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


def _find_below(url: str) -> Iterator[str]:
    files = filesystem(url)
    return (files.unstrip_protocol(name) for name in sorted(files.find(url)) if name.lower().endswith(ENDINGS))


def _lines(path: str) -> Iterator[str]:
    """The lines of a text that are not empty."""
    with open_file(path) as file:
        for line in file:
            if entry := line.rstrip(b"\r\n"):
                yield os.fsdecode(entry)


def _csv_column(path: str) -> Iterator[str]:
    with open_file(path) as file, io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as text:
        rows = csv.reader(text)
        names = next(rows, [])
        column = _column(path, names)
        yield from (row[column] for row in rows if row)


def _parquet_column(path: str) -> Iterator[str]:
    import pyarrow.parquet as pq

    with open_file(path) as file:
        table = pq.ParquetFile(file)
        _column(path, table.schema_arrow.names)
        for batch in table.iter_batches(columns=[COLUMN]):
            yield from map(str, batch.column(0).to_pylist())


def _column(path: str, names: list[str]) -> int:
    if COLUMN not in names:
        raise ValueError(f"The list {path!r} has no column {COLUMN!r}, but {', '.join(map(repr, names)) or 'none'}.")
    return names.index(COLUMN)


_LISTS = {".txt": _lines, ".csv": _csv_column, ".parquet": _parquet_column}


def _members(archive: str) -> Iterator[Picture]:
    """The pictures in a tar archive, whose headers alone are read."""
    try:
        with open_file(archive) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep all
                if member.isreg() and not member.issparse() and member.name.lower().endswith(ENDINGS):
                    yield Picture(f"{archive}/{member.name}", archive, member.offset_data, member.size)
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a damaged header for the end
                raise tarfile.ReadError("a damaged header")
    except tarfile.TarError as error:
        raise ValueError(f"{archive!r} is damaged, or no uncompressed tar archive ({error}).") from error


class PictureList:
    """The pictures of an extraction, in shards; those that this process needs lie in a temporary file.

    So memory does not grow with their number.

    Args:
        pictures: all of them, iterated once.
        shard_size: pictures in each shard but the last.
        part: (index from 0, count): this process needs the shards `index`, `index` + `count`, and so on.
        folder: where the temporary file goes, which has no name and goes with the process.

    Attributes:
        count: of all pictures.
        sha256: of all paths, with offsets and sizes in archives, in hexadecimal.
    """

    def __init__(self, pictures: Iterable[Picture], shard_size: int, part: tuple[int, int], folder: Path) -> None:
        import pyarrow as pa

        self._shard_size, self._part = shard_size, part
        self._file = tempfile.TemporaryFile(dir=folder, prefix=".pictures-")  # noqa: SIM115  # close() closes it
        digest, self.count, shard = hashlib.sha256(), 0, []
        fields = [("path", pa.binary()), ("archive", pa.binary()), ("offset", pa.int64()), ("size", pa.int64())]
        schema = pa.schema(fields)
        with pa.ipc.new_file(self._file, schema) as kept:
            for picture in pictures:
                row = _encoded(picture)
                digest.update(repr(row).encode())
                if self._is_ours(self.count // shard_size):
                    shard.append(row)
                self.count += 1
                if self.count % shard_size == 0 and shard:
                    kept.write(_record_batch(shard, schema))
                    shard = []
            if shard:
                kept.write(_record_batch(shard, schema))
        self.sha256 = digest.hexdigest()
        self._reader = pa.ipc.open_file(self._file)

    def _is_ours(self, shard: int) -> bool:
        return shard % self._part[1] == self._part[0]

    @property
    def shards(self) -> range:
        """The numbers of this process's shards."""
        return range(self._part[0], -(-self.count // self._shard_size), self._part[1])

    def rows(self, shard: int) -> range:
        """The numbers of the pictures of a shard."""
        first = shard * self._shard_size
        return range(first, min(first + self._shard_size, self.count))

    def shard(self, shard: int) -> list[Picture]:
        """The pictures of one of this process's shards."""
        columns = self._reader.get_batch(shard // self._part[1]).to_pydict()
        return [
            Picture(os.fsdecode(path), archive and os.fsdecode(archive), offset, size)
            for path, archive, offset, size in zip(*columns.values(), strict=True)
        ]

    def close(self) -> None:
        """Frees the temporary file."""
        self._file.close()


def _encoded(picture: Picture) -> tuple[Any, ...]:
    path, archive, offset, size = picture
    return os.fsencode(path), None if archive is None else os.fsencode(archive), offset, size


def _record_batch(rows: list[tuple[Any, ...]], schema: Any) -> Any:
    import pyarrow as pa

    return pa.record_batch([list(column) for column in zip(*rows, strict=True)], schema=schema)
