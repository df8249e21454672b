"""Adding images to a folder of features: those whose paths are not there, in shards of their own behind the others.

What is there stays as it is, bit for bit, also rows of images that are no longer given. Where an addition was
interrupted, the same images go on with it. With others, the shards that are there are kept, and all else is new.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from dinov2_fast.data.failures import NothingReadError
from dinov2_fast.data.sources import ImageList, ImageSource
from dinov2_fast.features.manifest import write_sections
from dinov2_fast.features.schema import as_text, format_named, stem
from dinov2_fast.features.store import Section, read_manifest, stored_features, stored_sections


def begin_addition(
    folder: Path, given: Iterable[ImageSource], stack: ExitStack, retry_failed: bool
) -> tuple[Section, ImageList]:
    """The section of the given images that are not there, which the manifest names from now on, and these images.

    Args:
        folder: holds features; nobody else writes there. The paths in it are held in memory.
        given: images, those that are there included.
        stack: closes the list of images, and takes the section out of the manifest where none of them can be read.
        retry_failed: images with errors count as images that are not there.
    """
    stored = _Stored(folder, retry_failed)
    before = stored_sections(stored.manifest)
    finished = [part for section in before[:-1] for part in stored.finished_parts(section)]
    last, parts = before[-1], stored.finished_parts(before[-1])
    listed = stack.enter_context(closing(stored.list_new(given, finished + parts * (parts == [last]))))
    if parts != [last]:
        if (listed.count, listed.sha256) == (last.images, last.sha256):
            return last, listed
        rest = (image for shard in listed.shards for image in listed.shard(shard))
        listed = stack.enter_context(closing(stored.list_new(rest, parts)))
    first = max((section.shards(stored.shard_size).stop for section in (*finished, *parts)), default=0)
    added = Section(first, listed.count, listed.sha256)
    if listed.count:
        write_sections(folder, [*finished, *parts, added])
        stack.push(partial(_take_back, folder, before))
    return added, listed


def _take_back(folder: Path, sections: Sequence[Section], error: type[BaseException] | None, *_: object) -> None:
    """Puts the sections that were there before into the manifest again where no new image could be read."""
    if error is NothingReadError:
        write_sections(folder, sections)


class _Stored:
    """The shards in a folder, and the images in them: all, or those without an error."""

    def __init__(self, folder: Path, without_failed: bool) -> None:
        self.manifest = read_manifest(folder)
        self.shard_size: int = self.manifest["shard_size"]
        self._folder, self._without_failed = folder, without_failed
        self._format, self._features = format_named(self.manifest["format"]), stored_features(self.manifest)

    def finished_parts(self, section: Section) -> list[Section]:
        """The section itself if all its shards are there, otherwise what is between those that are not."""
        parts: list[Section] = []
        for shard in section.shards(self.shard_size):
            rows = section.rows(shard, self.shard_size)
            if not self._is_there(shard, rows):
                continue
            if parts and parts[-1].shards(self.shard_size).stop == shard:
                parts[-1] = Section(parts[-1].first_shard, parts[-1].images + rows)
            else:
                parts.append(Section(shard, rows))
        return [section] if sum(part.images for part in parts) == section.images else parts

    def list_new(self, images: Iterable[ImageSource], sections: Iterable[Section]) -> ImageList:
        """The images whose paths are not in these sections."""
        known = set(self._paths(sections))
        new = (image for image in images if as_text(image.path) not in known)
        return ImageList(new, self.shard_size, (0, 1), self._folder)

    def _is_there(self, shard: int, rows: int) -> bool:
        found = self._format.count(stem(self._folder, shard), self._features)
        return found is not None and found[0] == rows

    def _paths(self, sections: Iterable[Section]) -> Iterator[str]:
        for section in sections:
            for shard in section.shards(self.shard_size):
                columns = self._format.columns(stem(self._folder, shard))
                for path, error in zip(columns["path"], columns["error"], strict=True):
                    if error is None or not self._without_failed:
                        yield path
