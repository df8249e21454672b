"""Making the shards of an extraction: a GPU runs one batch while the results of the one before are collected."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

from dinov2_fast.data.batches import Failures, ImageBatch, NothingReadError, read_batches
from dinov2_fast.data.sources import ImageSource
from dinov2_fast.data.workers import decode_all
from dinov2_fast.extraction.compute import Outputs, Pending
from dinov2_fast.extraction.image_list import ImageList
from dinov2_fast.features.schema import Rows, as_text, remove_leftovers
from dinov2_fast.features.shards import Shards


@dataclass(frozen=True)
class Progress:
    """How far an extraction is: before its first image, after each batch, and at its end.

    Attributes:
        images, shards: of this process, those from an earlier run included. With `add`, those that the folder held
            before are not counted.
        resumed: images whose rows are from an earlier run.
        done: images that have a row, `resumed` included.
        failures: those among them that have an error.
        nbytes: bytes that the features of `images` take on disk, without the other columns.
        free: bytes that were free on the disk before the first image.
        seconds: since the first image was asked for.
        busy: the share of this time in which the device ran the model.
        reasons: the failures of this run.
    """

    folder: Path
    images: int
    shards: int
    resumed: int
    done: int
    failures: int
    nbytes: int
    free: int
    seconds: float = 0.0
    busy: float = 0.0
    reasons: Failures = field(default_factory=Failures)


def make_shards(
    listed: ImageList,
    outputs: Outputs,
    shards: Shards,
    batch_size: int,
    decoding: Mapping[str, Any],
    retry_failed: bool,
    announce: Callable[[Progress], None] | None,
    progress: Callable[[Progress], None] | None,
) -> Progress:
    """Makes the shards of a list that are absent or damaged; with `retry_failed` also those in which an image with an
    error can now be decoded.

    The caller holds the lock of the shards. `decoding` is `workers`, `max_pixels` and `max_seconds` for `decode_all`.

    Raises:
        NothingReadError: no file of the first shard to be made could be read.
    """
    remove_leftovers(shards.folder, listed.shards)
    todo, state = _find_missing(listed, outputs, shards, decoding, retry_failed)
    if announce:
        announce(state)
    begin, worked, any_read, earlier_failures = time.perf_counter(), 0.0, False, state.failures
    sources = (source for shard in todo for source in listed.sources(shard))
    batches = read_batches(sources, outputs.decoder, batch_size=batch_size, group_size=listed.shard_size, **decoding)
    with closing(batches):
        started = _one_ahead(_start_all(outputs, listed, todo, batches, batch_size))
        for shard, rows, pending in _gather(listed, todo, started, batch_size):
            images = rows[-1].images
            any_read = any_read or any(not image.transient for image in images)
            for path, image in zip(rows[-1].paths, images, strict=True):
                if image.error is not None:
                    state.reasons.add(as_text(path), image.error)
            if len(rows) * batch_size >= listed.rows(shard):  # the shard is complete
                if not any_read:
                    raise NothingReadError(
                        f"None of the first {len(state.reasons)} images could be read, and no features were written "
                        f"for them:\n{state.reasons}\nSee that their disk or server can be reached, and run this "
                        "again; leave out images that are gone for good."
                    )
                shards.write(shard, rows, {"batch_size": pending.size} if pending.size < batch_size else {})
                rows.clear()  # memory holds one shard
            worked += pending.seconds()
            failures, seconds = earlier_failures + len(state.reasons), time.perf_counter() - begin
            done = state.done + len(images)
            state = replace(state, done=done, failures=failures, seconds=seconds, busy=worked / seconds)
            if progress:
                progress(state)
    seconds = time.perf_counter() - begin
    return replace(state, seconds=seconds, busy=worked / seconds)


def _find_missing(
    listed: ImageList, outputs: Outputs, shards: Shards, decoding: Mapping[str, Any], retry_failed: bool
) -> tuple[list[int], Progress]:
    """The shards to make, and the progress before the first image."""
    failures = {shard: _count_failures(shards, listed, shard) for shard in listed.shards}
    if retry_failed:
        failed = [shard for shard, count in failures.items() if count]
        failures |= dict.fromkeys(_find_decodable(shards, listed, failed, outputs, decoding))
    todo = [shard for shard, count in failures.items() if count is None]
    images = sum(map(listed.rows, listed.shards))
    resumed = images - sum(map(listed.rows, todo))
    return todo, Progress(
        folder=shards.folder,
        images=images,
        shards=len(failures),
        resumed=resumed,
        done=resumed,
        failures=sum(count or 0 for count in failures.values()),
        nbytes=images * sum(feature.nbytes for feature in outputs.features),
        free=shutil.disk_usage(shards.folder).free,
    )


def _gather(
    listed: ImageList, todo: Sequence[int], started: Iterator[Pending], batch_size: int
) -> Iterator[tuple[int, list[Rows], Pending]]:
    """For each batch: its shard, the rows of the shard so far, and the batch.

    The list of rows is the same for all batches of a shard. The caller may empty it after the last one.
    """
    for shard in todo:
        paths, rows = [source.path for source in listed.sources(shard)], list[Rows]()
        for first in range(0, len(paths), batch_size):
            pending = next(started)
            images, features = pending.result()
            ids = range(shard * listed.shard_size + first, shard * listed.shard_size + first + len(images))
            rows.append(Rows(ids, paths[first : first + len(images)], images, features))
            yield shard, rows, pending


def _start_all(
    outputs: Outputs, listed: ImageList, todo: Sequence[int], batches: Iterator[ImageBatch], batch_size: int
) -> Iterator[Pending]:
    """All batches of the shards, each started when it is asked for.

    If a batch ran in smaller parts because memory ran out, so do the ones that follow it in its shard.
    """
    for shard in todo:
        size = batch_size
        for batch in islice(batches, ceil(listed.rows(shard) / batch_size)):
            pending = outputs.start(batch, size)
            size = pending.size
            yield pending


def _one_ahead(batches: Iterator[Pending]) -> Iterator[Pending]:
    """Yields each batch once the next one has been started, so that a GPU always has work.

    An error or an interrupt while the next one is started is raised after the batch, so that a complete shard is still
    written.
    """
    current = next(batches, None)
    while current is not None:
        try:
            following = next(batches, None)
        except BaseException:
            yield current
            raise
        yield current
        current = following


def _count_failures(shards: Shards, listed: ImageList, shard: int) -> int | None:
    """The number of rows with an error; None if the shard must be made."""
    found = shards.count(shard)
    return found[1] if found is not None and found[0] == listed.rows(shard) else None


def _find_decodable(
    shards: Shards, listed: ImageList, failed: Sequence[int], outputs: Outputs, decoding: Mapping[str, Any]
) -> set[int]:
    """Those of the shards in which an image that failed can be decoded now."""
    tried: list[tuple[int, ImageSource]] = []
    for shard in failed:
        errors = shards.columns(shard)["error"]
        pairs = zip(listed.sources(shard), errors, strict=True)
        tried += [(shard, source) for source, error in pairs if error is not None]
    with closing(decode_all((source for _, source in tried), outputs.decoder, **decoding)) as decoded:
        return {shard for (shard, _), image in zip(tried, decoded, strict=True) if image.error is None}
