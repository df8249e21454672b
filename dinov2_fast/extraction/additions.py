"""Adding images to a folder of features: images with new paths go into new shards after the others.

The rows that are there stay as they are, bit for bit, even if their images are no longer given. An interrupted addition
is continued if the same images are given again. If others are given, its complete shards are kept, and the images that
these shards lack are added.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from dinov2_fast.data.batches import NothingReadError
from dinov2_fast.data.sources import ImageSource
from dinov2_fast.extraction.image_list import ImageList
from dinov2_fast.features.manifest import Section, read_manifest, stored_sections, write_sections
from dinov2_fast.features.schema import as_text
from dinov2_fast.features.shards import Shards


def begin_addition(
    folder: Path, given: Iterable[ImageSource], shards: Shards, stack: ExitStack, *, retry_failed: bool
) -> ImageList:
    """Lists the given images that the folder lacks, and records them in its manifest.

    No other process may write to the folder. All paths in it are held in memory. With `retry_failed`, an image that
    failed counts as lacking. `stack` closes the list, and restores the manifest if `NothingReadError` is raised.
    """
    manifest = read_manifest(folder)
    size: int = manifest["shard_size"]
    before = stored_sections(manifest)
    last, complete_of_last = before[-1], _complete(before[-1], shards, size)
    complete = [section for earlier in before[:-1] for section in _complete(earlier, shards, size)]
    known = _paths(complete, shards, size, without_failed=retry_failed)
    if complete_of_last != [last]:  # the last addition was interrupted
        listed = ImageList(_without(known, given), size, folder, first_shard=last.first_shard)
        stack.callback(listed.close)
        if listed.section == last:
            return listed
        given = (image for shard in listed.shards for image in listed.sources(shard))
    known |= _paths(complete_of_last, shards, size, without_failed=retry_failed)
    complete += complete_of_last
    first = max((section.shards(size).stop for section in complete), default=0)
    listed = ImageList(_without(known, given), size, folder, first_shard=first)
    stack.callback(listed.close)
    if listed.section.images:
        write_sections(folder, [*complete, listed.section])
        stack.push(partial(_restore_if_nothing_was_read, folder, before))
    return listed


def _restore_if_nothing_was_read(
    folder: Path, sections: Sequence[Section], error: type[BaseException] | None, *_: object
) -> None:
    if error is NothingReadError:
        write_sections(folder, sections)


def _complete(section: Section, shards: Shards, shard_size: int) -> list[Section]:
    """The section itself if all its shards are complete; otherwise a section for each sequence of complete shards."""
    runs: list[Section] = []
    for shard in section.shards(shard_size):
        rows = section.rows(shard, shard_size)
        found = shards.count(shard)
        if found is None or found[0] != rows:
            continue
        if runs and runs[-1].shards(shard_size).stop == shard:
            runs[-1] = Section(runs[-1].first_shard, runs[-1].images + rows)
        else:
            runs.append(Section(shard, rows))
    return [section] if sum(run.images for run in runs) == section.images else runs


def _paths(sections: Iterable[Section], shards: Shards, shard_size: int, *, without_failed: bool) -> set[str]:
    """The paths in these sections, of all images or of those that have features."""
    found: set[str] = set()
    for section in sections:
        for shard in section.shards(shard_size):
            columns = shards.columns(shard)
            found.update(
                path
                for path, error in zip(columns["path"], columns["error"], strict=True)
                if error is None or not without_failed
            )
    return found


def _without(known: set[str], images: Iterable[ImageSource]) -> Iterator[ImageSource]:
    return (image for image in images if as_text(image.path) not in known)
