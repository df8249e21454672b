"""Finding images: files, folders, globs, lists, archives and URLs, as one stream in a fixed order.

What a path may be:

===================  ===============================================================================================
a folder             searched, with everything below it, for names that end as images do (`images.ENDINGS`)
``*.txt``            a list: each line is the path of one image, whatever its name; as on the command line, it is
                     relative to the current folder
``*.csv *.tsv        a list: the column ``path``, ``image``, ``url`` or ``file_name`` of a table, or of objects of JSON;
*.jsonl *.parquet``  ``file_name`` is relative to the list's folder
``*.parquet``        with images in its column ``image``, as Hugging Face's datasets have them: its rows
``*.tar *.zip``      an uncompressed archive, as webdataset writes them, or one whose members are compressed: its files
                     whose names end as images do
any other file       an image, whatever its name
a glob               ``*``, ``?``, ``[…]`` and ``**``, where nothing has that very name: what matches, sorted
``scheme://…``       any of these where fsspec can open it (of wildcards, ``*`` alone)
===================  ===============================================================================================
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from dinov2_fast.data import archives, lists, parquet_images
from dinov2_fast.data.files import ending, filesystem, is_url, reason, shown
from dinov2_fast.data.images import ENDINGS, FORMATS
from dinov2_fast.errors import InvalidValueError

logger = logging.getLogger("dinov2_fast")
_COMPRESSED = (".gz", ".tgz", ".bz2", ".tbz", ".tbz2", ".xz", ".txz", ".zst", ".tzst", ".lz4", ".7z", ".rar")
_OTHER_LISTS = (".json", ".xls", ".xlsx", ".arrow", ".feather")


class ImageSource(NamedTuple):
    """Where an image is: a file or URL, or a member of an archive, at its `offset` (:mod:`.archives`).

    `path` names it for people: the file, or archive/member.
    """

    path: str
    archive: str | None = None
    offset: int | None = None
    size: int | None = None


class _LeftOut(Counter[str]):
    """How many files in folders and archives do not end as images do, by ending."""

    def takes(self, name: str) -> bool:
        """Whether a file's name ends as images' do; counts it where not."""
        if name.lower().endswith(ENDINGS):
            return True
        self[os.path.splitext(name)[1].lower()] += 1
        return False

    def __str__(self) -> str:
        total, kinds = self.total(), self.most_common(6)
        files = "1 file with another ending was" if total == 1 else f"{total} files with other endings were"
        counts = ", ".join(f"{ending or 'none'} {count}" for ending, count in kinds)
        more = ", …" if len(self) > len(kinds) else ""
        text = f"{files} left out ({counts}{more})."
        needs_plugin = "HEIF" not in FORMATS and {".heic", ".heif"} & self.keys()
        return f"{text} HEIC needs: pip install pillow_heif." if needs_plugin else text


def find_images(paths: Iterable[str | os.PathLike[str]]) -> Iterator[ImageSource]:
    """The images that the paths name, one after the other; see the module's description.

    Folders, lists and archives are read while the result is used. At its end, a warning is logged about files in them
    that do not end as images do. Names that are not UTF-8 keep their bytes as `os.fsdecode` does.

    Raises:
        FileNotFoundError: a path that does not exist, at once.
        ValueError: an archive or list of a kind that is not read, at once; a list without paths, one or an archive that
            is damaged, or a URL that cannot be opened.
        OSError: what cannot be read.
    """
    given = tuple(map(os.fsdecode, paths))
    found = [match for path in given for match in _matches(path)]
    for path in found:
        _refuse_other_kinds(path)
    return _find(given, found)


def list_images(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """The files given, and those in the folders given, as paths in a fixed order.

    A file given is taken whatever its name. A folder is searched, with everything below it, for names that end as
    images do (`ENDINGS`), in the order of the names; a warning is logged about the others. Links are followed, but each
    folder is entered once, so that a loop ends. Names that are not UTF-8 keep their bytes as `os.fsdecode` does.

    Raises:
        FileNotFoundError: a path that does not exist.
        OSError: a folder that cannot be listed.
    """
    given = tuple(map(os.fsdecode, paths))
    for path in given:
        if not os.path.exists(path):
            raise FileNotFoundError(f"There is no file or folder {path!r}.")
    found: list[str] = []
    left_out = _LeftOut()
    for path in given:
        found.extend(_walk(path, left_out) if os.path.isdir(path) else [path])
    _report(given, left_out)
    return found


def _find(given: tuple[str, ...], found: list[str]) -> Iterator[ImageSource]:
    left_out = _LeftOut()
    for path in found:
        yield from _images(path, left_out)
    _report(given, left_out)


def _report(paths: tuple[str, ...], left_out: _LeftOut) -> None:
    if left_out:
        _warn_once(paths, str(left_out))


@cache
def _warn_once(paths: tuple[str, ...], text: str) -> None:
    """Logs the text, where the same paths may be gone through several times."""
    logger.warning(text)


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
        raise FileNotFoundError(f"There is nothing at {shown(url)!r}{_why_missing(files, url)}.")
    return matches


def _why_missing(files: Any, url: str) -> str:
    try:
        files.info(url)
    except Exception as error:
        return f" ({reason(error)})"
    return ""


def _refuse_other_kinds(path: str) -> None:
    """Raises ValueError for an archive or list that would otherwise be taken for one image."""
    if os.path.isdir(path):
        return
    if ending(path) in _COMPRESSED:
        raise InvalidValueError(
            f"{shown(path)!r} is compressed as a whole, so that no image in it can be read by itself. Unpack it, or "
            "pack its files into a .zip or an uncompressed .tar."
        )
    if ending(path) in _OTHER_LISTS:
        raise InvalidValueError(
            f"{shown(path)!r} is of a kind that is not read. Write the paths of its images to a file that ends in "
            f"{', '.join(lists.READERS)}."
        )


def _images(path: str, left_out: _LeftOut) -> Iterator[ImageSource]:
    """The images that one path, which is no glob, names."""
    kind = ending(path)
    if not is_url(path) and os.path.isdir(path):
        return map(ImageSource, _walk(path, left_out))
    if kind == ".parquet" and parquet_images.holds_images(path):
        return (ImageSource(f"{path}/{row}", path, row) for row in parquet_images.rows(path))
    if kind in lists.READERS:
        return map(ImageSource, lists.read_list(path))
    if kind in (".tar", ".zip"):
        members = (member for member in archives.members(path) if left_out.takes(member.name))
        return (ImageSource(f"{path}/{name}", path, offset, size) for name, offset, size in members)
    if is_url(path) and kind not in ENDINGS and filesystem(path).isdir(path):
        return map(ImageSource, _find_below(path, left_out))
    return iter([ImageSource(path)])


def _walk(folder: str, left_out: _LeftOut) -> Iterator[str]:
    entered: set[tuple[int, int]] = set()
    waiting = [(folder, True)]  # the next one last
    while waiting:
        path, is_folder = waiting.pop()
        if not is_folder:
            if left_out.takes(path):
                yield path
            continue
        status = os.stat(path)
        if (status.st_dev, status.st_ino) not in entered:
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                waiting += sorted(((entry.path, _is_folder(entry)) for entry in entries), reverse=True)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    if entry.is_symlink():  # DirEntry.is_dir raises for a link to itself
        return os.path.isdir(entry.path)
    return entry.is_dir()


def _find_below(url: str, left_out: _LeftOut) -> Iterator[str]:
    files = filesystem(url)
    return (files.unstrip_protocol(name) for name in sorted(files.find(url)) if left_out.takes(name))


class ImageList:
    """The images of an extraction, in shards; those that this process needs lie in a temporary file.

    So memory does not grow with their number.

    Args:
        images: all of them, iterated once.
        shard_size: images in each shard but the last.
        part: (index from 0, count): this process needs the shards `index`, `index` + `count`, and so on.
        folder: where the temporary file goes, which has no name and goes with the process.

    Attributes:
        count: of all images.
        sha256: of all paths, with offsets and sizes in archives, in hexadecimal.
    """

    def __init__(self, images: Iterable[ImageSource], shard_size: int, part: tuple[int, int], folder: Path) -> None:
        import pyarrow as pa

        self._shard_size, self._part = shard_size, part
        self._file = tempfile.TemporaryFile(dir=folder, prefix=".images-")  # noqa: SIM115  # close() closes it
        digest, self.count, shard = hashlib.sha256(), 0, []
        fields = [("path", pa.binary()), ("archive", pa.binary()), ("offset", pa.int64()), ("size", pa.int64())]
        schema = pa.schema(fields)
        with pa.ipc.new_file(self._file, schema) as kept:
            for image in images:
                row = _encoded(image)
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
        """The numbers of the images of a shard."""
        first = shard * self._shard_size
        return range(first, min(first + self._shard_size, self.count))

    def shard(self, shard: int) -> list[ImageSource]:
        """The images of one of this process's shards."""
        columns = self._reader.get_batch(shard // self._part[1]).to_pydict()
        return [
            ImageSource(os.fsdecode(path), archive and os.fsdecode(archive), offset, size)
            for path, archive, offset, size in zip(*columns.values(), strict=True)
        ]

    def close(self) -> None:
        """Frees the temporary file."""
        self._file.close()


def _encoded(image: ImageSource) -> tuple[Any, ...]:
    path, archive, offset, size = image
    return os.fsencode(path), None if archive is None else os.fsencode(archive), offset, size


def _record_batch(rows: list[tuple[Any, ...]], schema: Any) -> Any:
    import pyarrow as pa

    return pa.record_batch([list(column) for column in zip(*rows, strict=True)], schema=schema)
