"""The main job: images in, a folder of features out, which can be interrupted at any time and goes on."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from dinov2_fast.data.decoding import Decoded
from dinov2_fast.data.failures import Failures, NothingReadError
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.data.images import MAX_PIXELS
from dinov2_fast.data.sources import ImageList, ImageSource
from dinov2_fast.data.workers import MAX_SECONDS, decode_all
from dinov2_fast.errors import InvalidValueError
from dinov2_fast.extraction.additions import begin_addition
from dinov2_fast.extraction.batches import Batch, Pending, run_batches
from dinov2_fast.extraction.compute import DEFAULT, Outputs
from dinov2_fast.features import manifest
from dinov2_fast.features import schema as shards
from dinov2_fast.features.lock import lock
from dinov2_fast.features.store import Section


@dataclass(frozen=True)
class Announcement:
    """What an extraction is going to do, known before its first image.

    Attributes:
        folder: the output folder.
        images, shards: of this process, those that are there already included, but not what is added to.
        done, failures: images that are there already, and those with an error among them.
        bytes: that the features of all `images` take on disk, without the other columns.
        free: bytes on the disk.
    """

    folder: Path
    images: int
    shards: int
    done: int
    failures: int
    bytes: int
    free: int


@dataclass(frozen=True)
class Status:
    """How far an extraction is.

    Attributes:
        done, failures: images, those that were there already included.
        total, resumed: images of this process, and those of them that were there already.
        seconds: since the first image of this run was asked for.
        busy: share of this time in which the device ran the model.
    """

    done: int
    failures: int
    total: int
    resumed: int
    seconds: float
    busy: float


@dataclass(frozen=True)
class Summary:
    """What an extraction did.

    Attributes:
        path: the output folder.
        images, failures: of this process, those that were there already included.
        resumed: images that were there already.
        seconds: that it took, with the model loaded and the images listed.
        busy: share of this time in which the device ran the model.
        reasons: the failures of this run, without those that were there already.
    """

    path: Path
    images: int
    failures: int
    resumed: int
    seconds: float
    busy: float
    reasons: Failures = field(default_factory=Failures)


def extract(
    images: Iterable[str | os.PathLike[str] | ImageSource],
    model: Any,
    out: str | os.PathLike[str],
    *,
    processor: Dinov2ImageProcessor | None = None,
    features: Sequence[str] = DEFAULT,
    dtype: str = "auto",
    batch_size: int = 32,
    shard_size: int | None = None,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
    max_seconds: float = MAX_SECONDS,
    part: tuple[int, int] = (0, 1),
    format: str = "parquet",
    overwrite: bool = False,
    add: bool = False,
    retry_failed: bool = False,
    metadata: Mapping[str, Any] | None = None,
    announce: Callable[[Announcement], None] | None = None,
    progress: Callable[[Status], None] | None = None,
) -> Summary:
    """Writes the features of every image to the folder `out`: one row each, in order, in shards.

    The folder is described in :mod:`dinov2_fast.features.schema`; :func:`dinov2_fast.load_features` reads it. An
    image that cannot be read, or whose features are not finite, is a row with its error. A shard is there whole or
    not at all, and those that are there are not made again: after an interruption the same call does the rest, with the
    same bits. Only a shard for which memory ran out, so that its batches were halved, may differ in rounding; it says
    so. One shard is held in memory at most.

    An error is as final as features are, until `retry_failed`. Where not one image can be read, nothing is written.

    Args:
        images: paths of images, each one row, or what :func:`dinov2_fast.data.sources.find_images` yields.
        model: a :class:`dinov2_fast.DinoVisionTransformer` in eval mode, or an engine made of one by
            :func:`dinov2_fast.optimize_for_inference`; its device and dtype are used. An engine with the processor's
            mean and std gets uint8 images and normalises them itself: a quarter of the bytes from worker processes
            and to the device.
        processor: by default the checkpoints' (224 x 224). Its outputs must have one size, a multiple of the patch.
        features: names, see :mod:`dinov2_fast.extraction.compute`.
        dtype: of the stored features, "fp32" or "fp16"; "auto" is fp32 for single vectors and fp16 for tokens. The
            precision of the computation is the model's; bf16 values fit fp32 exactly, and npy and Parquet have no bf16.
        batch_size: images in one forward pass. A batch is a fixed range of rows, unreadable images included, and
            batches begin anew with each shard.
        shard_size: rows of a shard; by default whole batches of at most 8192 rows or 256 MB.
        workers: processes that decode; 0 decodes in this one, without a limit of time.
        max_pixels: larger images are refused.
        max_seconds: images that take longer to read and decode, twice, are given up.
        part: (index from 0, count): this process does the shards `index`, `index` + `count`, and so on. `count`
            processes with the same arguments write together what one would write.
        format: "parquet" or "npy".
        overwrite: delete the features that are there and begin anew; other files stay.
        add: where the folder holds features of other images, leave them as they are, and put those of images whose
            paths are not there into new shards behind them, in their order.
        retry_failed: decode the images with errors anew, and make shards anew in which one succeeds. With `add`, which
            keeps all shards, images with errors count as new, and get another row.
        metadata: what to record in the manifest, under ``about``.
        announce: called once before the first image.
        progress: called after each batch.

    Raises:
        ValueError: nothing to do, a model in training mode, a processor that does not fit the model, or a setting that
            does not exist.
        ManifestError: the folder holds features that were made otherwise; it names what differs.
        LockedError: another process writes there.
        NothingReadError: no image could be read.
        NotADirectoryError: `out` is a file.
    """
    processor, folder = processor or Dinov2ImageProcessor(), Path(out)
    outputs = Outputs(model, processor, features, dtype)
    _check(batch_size, shard_size, workers, part, overwrite, add)
    size = shard_size or shards.default_shard_size(outputs.features, batch_size)
    stored_as = shards.format_named(format)
    given = iter(images)
    first = next(given, None)
    if first is None:
        raise InvalidValueError("There are no images to extract.")
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    decoding = {"max_pixels": max_pixels, "max_seconds": max_seconds, "workers": workers}
    all_images = map(_as_image, chain([first], given))
    claimed = {**manifest.describe(outputs, processor, max_pixels), "batch_size": batch_size}
    claimed |= {"shard_size": size, "format": format, "about": {**manifest.about(), **(metadata or {})}}
    with lock(folder, part), ExitStack() as stack:
        if add and shards.find_manifest(folder):
            manifest.compare(folder, claimed)
            section, listed = begin_addition(folder, all_images, stack, retry_failed)
        else:
            listed = stack.enter_context(closing(ImageList(all_images, size, part, folder)))
            section = Section(0, listed.count, listed.sha256)
            if overwrite:
                manifest.discard(folder)
            manifest.claim(folder, {**claimed, "inputs": {"images": listed.count, "sha256": listed.sha256}})
        store = _Store(folder, stored_as, outputs.features, section.first_shard, size)
        return _run(store, outputs, listed, batch_size, decoding, retry_failed, announce, progress)


def check_folder(folder: Path) -> None:
    """Raises NotADirectoryError where the folder is a file."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"The output folder {str(folder)!r} is a file.")


def _check(
    batch_size: int, shard_size: int | None, workers: int, part: tuple[int, int], overwrite: bool, add: bool
) -> None:
    if batch_size < 1 or (shard_size is not None and shard_size < 1) or workers < 0:
        raise InvalidValueError(
            f"batch_size and shard_size must be at least 1 and workers at least 0, got {batch_size}, {shard_size} and "
            f"{workers}."
        )
    if not 0 <= part[0] < part[1]:
        raise InvalidValueError(f"part is (index, count) with an index from 0 to count - 1, got {part}.")
    if overwrite and part[1] > 1:
        raise InvalidValueError("overwrite would delete what the other parts have written: delete the folder first.")
    if add and (overwrite or part[1] > 1):
        raise InvalidValueError(
            "add keeps what is there, and one process decides what is new: leave out overwrite and part."
        )


def _as_image(given: str | os.PathLike[str] | ImageSource) -> ImageSource:
    return given if isinstance(given, ImageSource) else ImageSource(os.fsdecode(given))


class _Store:
    """The shards of a folder from the number `first` on, of `size` rows; they are counted from there."""

    def __init__(
        self, folder: Path, format: shards.Format, features: Sequence[shards.Feature], first: int, size: int
    ) -> None:
        self.folder, self.features, self._format = folder, features, format
        self._first, self._size = first, size

    def failures(self, shard: int, rows: int) -> int | None:
        """The failures in a shard of so many rows; None if it must be made."""
        found = self._format.count(self._stem(shard), self.features)
        return found[1] if found is not None and found[0] == rows else None

    def failed_rows(self, shard: int) -> list[int]:
        """The places of the failures in a shard that is there."""
        errors = self._format.columns(self._stem(shard))["error"]
        return [row for row, error in enumerate(errors) if error is not None]

    def write(self, shard: int, rows: Sequence[shards.Rows], note: Mapping[str, Any]) -> None:
        """Puts a shard there, whole."""
        self._format.write(self._stem(shard), rows, self.features, note)

    def first_id(self, shard: int) -> int:
        """Of its rows."""
        return (self._first + shard) * self._size

    def remove_leftovers(self, numbers: range) -> None:
        """Deletes what killed processes left of these shards."""
        shards.remove_leftovers(self.folder, lambda shard: shard - self._first in numbers)

    def _stem(self, shard: int) -> Path:
        return shards.stem(self.folder, self._first + shard)


def _run(
    store: _Store,
    outputs: Outputs,
    listed: ImageList,
    batch_size: int,
    decoding: Mapping[str, Any],
    retry_failed: bool,
    announce: Callable[[Announcement], None] | None,
    progress: Callable[[Status], None] | None,
) -> Summary:
    store.remove_leftovers(listed.shards)
    known = {shard: store.failures(shard, len(listed.rows(shard))) for shard in listed.shards}
    if retry_failed:
        failed = [shard for shard, failures in known.items() if failures]
        known |= dict.fromkeys(_improved(store, listed, failed, outputs.decoder, decoding))
    todo = [shard for shard, failures in known.items() if failures is None]
    total = sum(len(listed.rows(shard)) for shard in listed.shards)
    resumed = total - sum(len(listed.rows(shard)) for shard in todo)
    failures = sum(failures or 0 for failures in known.values())
    if announce:
        size = total * sum(feature.nbytes for feature in outputs.features)
        free = shutil.disk_usage(store.folder).free
        announce(Announcement(store.folder, total, len(known), resumed, failures, size, free))
    begin, done, worked, reasons, read = time.perf_counter(), resumed, 0.0, Failures(), False
    stream = (image for shard in todo for image in listed.shard(shard))
    growing: _Growing | None = None
    with closing(decode_all(stream, outputs.decoder, ahead=max(2 * batch_size, 8), **decoding)) as decoded:
        for shard, pending in _lagging(_batches(outputs, listed, todo, decoded, batch_size)):
            growing = growing or _Growing(listed.shard(shard), store.first_id(shard), batch_size)
            batch = pending.result()
            read = read or any(not image.transient for image in batch.images)
            if growing.add(batch, pending.size, reasons):
                if not read:
                    raise NothingReadError(_nothing_read(reasons))
                store.write(shard, growing.rows, growing.note)
                growing = None
            done, worked = done + len(batch.images), worked + batch.seconds
            if progress:
                seconds = time.perf_counter() - begin
                progress(Status(done, failures + len(reasons), total, resumed, seconds, worked / seconds))
    seconds = time.perf_counter() - begin
    return Summary(store.folder, total, failures + len(reasons), resumed, seconds, worked / seconds, reasons)


def _improved(
    store: _Store,
    listed: ImageList,
    failed: Sequence[int],
    processor: Dinov2ImageProcessor,
    decoding: Mapping[str, Any],
) -> set[int]:
    """Those of these shards in which an image that failed can be decoded now."""
    pairs: list[tuple[int, ImageSource]] = []
    for shard in failed:
        images = listed.shard(shard)
        pairs += [(shard, images[row]) for row in store.failed_rows(shard)]
    with closing(decode_all((image for _, image in pairs), processor, **decoding)) as decoded:
        return {shard for (shard, _), each in zip(pairs, decoded, strict=True) if each.error is None}


def _nothing_read(reasons: Failures) -> str:
    return (
        f"None of the first {len(reasons)} images could be read, and no features were written for them:\n{reasons}\n"
        "See that their disk or server can be reached, and run this again; leave out images that are gone for good."
    )


class _Growing:
    """The shard whose batches are coming."""

    def __init__(self, images: Sequence[ImageSource], first_id: int, batch_size: int) -> None:
        self.rows: list[shards.Rows] = []
        self.note: dict[str, Any] = {}
        self._paths = [image.path for image in images]
        self._first, self._count, self._batch_size = first_id, 0, batch_size

    def add(self, batch: Batch, size: int, failures: Failures) -> bool:
        """Takes the next batch, which ran in parts of `size`; adds to `failures`; whether it was the last."""
        paths = self._paths[self._count : self._count + len(batch.images)]
        self.rows.append(shards.Rows(self._first + self._count, paths, batch.images, batch.features))
        self._count += len(paths)
        for path, image in zip(paths, batch.images, strict=True):
            if image.error is not None:
                failures.add(shards.as_text(path), image.error)
        if size < self._batch_size:
            self.note = {"batch_size": size}
        return self._count == len(self._paths)


def _batches(
    outputs: Outputs, listed: ImageList, todo: Sequence[int], decoded: Iterator[Decoded], batch_size: int
) -> Iterator[tuple[int, Pending]]:
    """All batches of the shards, started one after the other."""
    for shard in todo:
        for pending in run_batches(outputs, decoded, listed.rows(shard), batch_size):
            yield shard, pending


def _lagging(batches: Iterator[tuple[int, Pending]]) -> Iterator[tuple[int, Pending]]:
    """The same, each handed out when the next has been started, so that a GPU is never without work.

    What stops the next one, an interrupt or an error, comes after it, so that a shard that is complete gets written.
    """
    before = next(batches, None)
    while before is not None:
        try:
            after = next(batches, None)
        except BaseException:
            yield before
            raise
        yield before
        before = after
