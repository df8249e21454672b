"""Finding images: files, folders, globs, lists, archives and URLs, as one stream in a fixed order.

A path may be:

===================  ===============================================================================================
a folder             it and everything below it is searched for names with the ending of an image (`images.ENDINGS`)
``*.txt``            a list: each line is the path of one image, whatever its name. It is relative to the current
                     folder, as on the command line
``*.csv *.tsv        a list: the column ``path``, ``image``, ``url`` or ``file_name`` of a table, or of JSON objects.
*.jsonl *.parquet``  ``file_name`` is relative to the folder of the list
``*.parquet``        with images in its column ``image``, as Hugging Face's datasets have them: its rows
``*.tar *.zip``      an uncompressed tar archive, as webdataset writes it, or a zip archive: its members with the ending
                     of an image
any other file       an image, whatever its name
a glob               ``*``, ``?``, ``[…]`` and ``**``: all files and folders that match, sorted. What lies in such a
                     folder is found by searching it, and comes once. A file or folder with that very name has priority
``scheme://…``       any of these that fsspec can open; a URL without ``*`` is no glob
===================  ===============================================================================================
"""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

from dinov2_fast.data import parquet_images
from dinov2_fast.data.archives import members
from dinov2_fast.data.files import ending, filesystem, is_url, reason, shown
from dinov2_fast.data.images import ENDINGS, FORMATS
from dinov2_fast.data.lists import READERS, read_list
from dinov2_fast.errors import InvalidValueError

logger = logging.getLogger("dinov2_fast")
_COMPRESSED = (".gz", ".tgz", ".bz2", ".tbz", ".tbz2", ".xz", ".txz", ".zst", ".tzst", ".lz4", ".7z", ".rar")
_UNREAD_TABLES = (".json", ".xls", ".xlsx", ".arrow", ".feather")


class ImageSource(NamedTuple):
    """Where an image is: a file or URL, or a member of an archive at an `offset` (:mod:`.archives`).

    `path` is its name for people: the file, or archive/member.
    """

    path: str
    archive: str | None = None
    offset: int | None = None
    size: int | None = None


Images: TypeAlias = str | os.PathLike[str] | ImageSource | Iterable[str | os.PathLike[str] | ImageSource]


def find_images(images: Images) -> Iterator[ImageSource]:
    """The images that one or more paths name, in order; see the module's description.

    Folders, lists and archives are read while the result is used. Links are followed, but one path enters each folder
    once, so that a loop ends. At the end a warning counts the files in folders and archives that were skipped because
    of their ending. Names that are not UTF-8 keep their bytes, as `os.fsdecode` does it. :class:`ImageSource` objects
    pass as they are. If the first item is one, items are taken one by one, and paths are looked up in their turn.

    Raises:
        FileNotFoundError: a path does not exist; raised by the call.
        InvalidValueError: raised by the call: an archive or list of a kind that is not read, or a URL that cannot be
            opened; raised later: a table without a column of paths, or a damaged list or archive.
        OSError: a file or folder cannot be read.
    """
    given = iter(_as_items(images))
    first = next(given, None)
    items = given if first is None else chain([first], given)
    if isinstance(first, ImageSource):
        return (each for item in items for each in ([item] if isinstance(item, ImageSource) else find_images(item)))
    found: list[str | ImageSource] = []
    paths: list[str] = []
    for item in items:
        if isinstance(item, ImageSource):
            found.append(item)
        else:
            paths.append(os.fsdecode(item))
            found += _matches(paths[-1])
    for match in found:
        if isinstance(match, str):
            _refuse_unread_kinds(match)
    return _find(tuple(paths), found)


def require_images(images: Images) -> Iterator[ImageSource]:
    """As `find_images`, with an InvalidValueError at once if there is no image."""
    items = _as_items(images)
    sources = find_images(items)
    first = next(sources, None)
    if first is None:
        paths = items if isinstance(items, list | tuple) else ()
        where = f" in {', '.join(repr(shown(os.fsdecode(path))) for path in paths)}" if paths else ""
        raise InvalidValueError(
            f"There are no images{where}. Archives and lists in a folder must be named, as in 'folder/*.tar'."
        )
    return chain([first], sources)


def _as_items(images: Any) -> Any:
    """One path or source as a list of one."""
    return [images] if isinstance(images, str | bytes | os.PathLike | ImageSource) else images


class _Skipped(Counter[str]):
    """Counts the files in folders and archives that do not have the ending of an image, by their ending."""

    def accepts(self, name: str) -> bool:
        """Whether the name has the ending of an image; otherwise counts it."""
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


def _find(given: tuple[str, ...], found: list[str | ImageSource]) -> Iterator[ImageSource]:
    skipped = _Skipped()
    for match in found:
        yield from [match] if isinstance(match, ImageSource) else _images(match, skipped)
    if skipped:
        _warn_once(given, str(skipped))


@cache
def _warn_once(paths: tuple[str, ...], text: str) -> None:
    """Logs the text once, even if the same paths are searched several times."""
    logger.warning(text)


def _matches(path: str) -> list[str]:
    """The path itself, or the paths that it matches as a glob."""
    if is_url(path):
        return _url_matches(path)
    if os.path.exists(path):
        return [path]
    matches = glob.glob(path, recursive=True) if glob.has_magic(path) else []
    if not matches:
        raise FileNotFoundError(f"There is no file or folder {path!r}.")
    return _outermost(matches)


def _url_matches(url: str) -> list[str]:
    files = filesystem(url)
    if "*" in url:
        matches = [files.unstrip_protocol(match) for match in _outermost(files.glob(url))]
    else:
        matches = [url] * files.exists(url)
    if not matches:
        raise FileNotFoundError(f"There is nothing at {shown(url)!r}{_why_missing(files, url)}.")
    return matches


def _outermost(matches: list[str]) -> list[str]:
    """The matches of a glob in order, without those inside a folder that matches too: it is searched."""
    names = {match.rstrip("/") for match in matches}

    def is_inside(path: str) -> bool:
        parent = os.path.dirname(path)
        return parent not in ("", path) and (parent in names or is_inside(parent))

    return sorted(match for match in matches if not is_inside(match.rstrip("/")))


def _why_missing(files: Any, url: str) -> str:
    try:
        files.info(url)
    except Exception as error:
        return f" ({reason(error)})"
    return ""


def _refuse_unread_kinds(path: str) -> None:
    """Raises InvalidValueError for an archive or list that would otherwise be taken for one image."""
    if os.path.isdir(path):
        return
    if ending(path) in _COMPRESSED:
        raise InvalidValueError(
            f"{shown(path)!r} is compressed as a whole, so that no image in it can be read by itself. Unpack it, or "
            "pack its files into a .zip or an uncompressed .tar."
        )
    if ending(path) in _UNREAD_TABLES:
        raise InvalidValueError(
            f"{shown(path)!r} is of a kind that is not read. Write the paths of its images to a file that ends in "
            f"{', '.join(READERS)}."
        )


def _images(path: str, skipped: _Skipped) -> Iterator[ImageSource]:
    """The images that one path names; it is not a glob."""
    kind = ending(path)
    if not is_url(path) and os.path.isdir(path):
        return map(ImageSource, _walk(path, skipped))
    if kind == ".parquet" and parquet_images.holds_images(path):
        return (ImageSource(f"{path}/{row}", path, row) for row in parquet_images.rows(path))
    if kind in READERS:
        return map(ImageSource, read_list(path))
    if kind in (".tar", ".zip"):
        accepted = (member for member in members(path) if skipped.accepts(member.name))
        return (ImageSource(f"{path}/{name}", path, offset, size) for name, offset, size in accepted)
    if is_url(path) and kind not in ENDINGS and filesystem(path).isdir(path):
        return map(ImageSource, _walk_url(path, skipped))
    return iter([ImageSource(path)])


def _walk(folder: str, skipped: _Skipped) -> Iterator[str]:
    entered: set[tuple[int, int]] = set()
    waiting = [(folder, True)]  # in reverse order
    while waiting:
        path, is_folder = waiting.pop()
        if not is_folder:
            if skipped.accepts(path):
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


def _walk_url(url: str, skipped: _Skipped) -> Iterator[str]:
    files = filesystem(url)
    return (files.unstrip_protocol(name) for name in sorted(files.find(url)) if skipped.accepts(name))
