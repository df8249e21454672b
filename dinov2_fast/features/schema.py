"""The output folder of an extraction: a manifest and shards, each of which is there whole or not at all.

::

    DIR/_manifest.json            of what the features are and how they were made (:mod:`.manifest`)
    DIR/features-00000.parquet    the first `shard_size` images
    DIR/features-00001.parquet    the next, and so on

Images that are added later (:mod:`.additions`) begin with a shard of their own. pandas, pyarrow and DuckDB read the
folder as one table. There is one row for each image, in the order of the images:

====================  =====================  ====================================================================
id                    int64                  position in its shard + `shard_size` x the shard's number: the position
                                             among all images, where none were added
path                  string                 as given, or found; bytes that are not UTF-8 are written as ``\\xNN``.
                                             ``archive.tar/member`` for a member of a tar archive
width, height         int32                  of the image, EXIF rotation applied; null where it cannot be read
sha256                string                 of the file's bytes; null where they could not be read, or time or memory
                                             ran out: such an error may pass, one beside a sha256 is in the file
error                 string                 null, or why there are no features
cls, patch_mean, …    fixed_size_list        the features that were asked for (:mod:`.outputs`), in float or halffloat;
                                             null where there is an error. Those of several tokens lie flat, their
                                             shape stands in the manifest
====================  =====================  ====================================================================

As npy files a shard is ``features-00000.<feature>.npy``, arrays (rows, …) with NaN where there is an error, and
``features-00000.jsonl``, the other columns as one JSON object in each line, which is written last.

A shard whose batches were made smaller because memory ran out says so: ``batch_size`` in the metadata of its Parquet
file (key ``dinov2_fast``, JSON), or in each line of its JSON.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from dinov2_fast.data.decoding import Decoded
from dinov2_fast.errors import InvalidValueError
from dinov2_fast.features.whole_files import ENDING, is_left_over

MANIFEST = "_manifest.json"  # readers of Parquet folders pass over names that begin so
OLD_MANIFEST = "manifest.json"
PREFIX = "features-"
SHARD_ROWS = 8192
SHARD_BYTES = 1 << 28
COLUMNS = ("id", "path", "width", "height", "sha256", "error")
_SHARD_NAME = re.compile(rf"{PREFIX}\d{{5,}}\.(parquet|jsonl|[a-z_]+(@\d+)?\.npy)")


@dataclass(frozen=True)
class Feature:
    """One feature as it is stored: of each image an array of `shape`, of dtype "float32" or "float16"."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Values of one image."""
        size = 1
        for side in self.shape:
            size *= side
        return size

    @property
    def nbytes(self) -> int:
        """Bytes of one image."""
        return self.size * (2 if self.dtype == "float16" else 4)


@dataclass(frozen=True)
class Rows:
    """Consecutive rows from id `first` on; what `features` (rows, …) has where there is an error does not count."""

    first: int
    paths: Sequence[str]
    images: Sequence[Decoded]
    features: Mapping[str, NDArray[Any]]


class Format(Protocol):
    """How shards are stored: the modules `parquet_shards` and `npy_shards`."""

    def write(self, stem: Path, rows: Sequence[Rows], features: Sequence[Feature], note: Mapping[str, Any]) -> None:
        """Writes a shard; `note` is what is special about it, empty as a rule."""

    def count(self, stem: Path, features: Sequence[Feature]) -> tuple[int, int] | None:
        """The rows and failures of a shard; None where it is not there, or damaged."""

    def columns(self, stem: Path) -> dict[str, list[Any]]:
        """The columns that are no features (`COLUMNS`), None where there is nothing."""

    def feature(self, stem: Path, feature: Feature) -> NDArray[Any]:
        """A feature of all rows, (rows, …), NaN where there is none."""


def format_named(name: str) -> Format:
    """The format "parquet" or "npy".

    Raises:
        ValueError: there is no such format.
    """
    if name == "parquet":
        from dinov2_fast.features import parquet as parquet_shards

        return parquet_shards
    if name == "npy":
        from dinov2_fast.features import npy as npy_shards

        return npy_shards
    raise InvalidValueError(f"There is no format {name!r}; choose parquet or npy.")


def stem(folder: Path, shard: int) -> Path:
    """What the names of a shard's files begin with."""
    return folder / f"{PREFIX}{shard:05}"


def shard_numbers(folder: Path) -> list[int]:
    """The shards that have a file in the folder, in ascending order."""
    numbers = (path.name.removeprefix(PREFIX).split(".")[0] for path in folder.glob(f"{PREFIX}[0-9]*.*"))
    return sorted({int(number) for number in numbers if number.isdecimal() and len(number) < 20})


def default_shard_size(features: Sequence[Feature], batch_size: int) -> int:
    """As many rows as `SHARD_BYTES` hold, at most `SHARD_ROWS`: whole batches, at least one."""
    rows = min(SHARD_ROWS, SHARD_BYTES // sum(feature.nbytes for feature in features))
    return max(rows // batch_size, 1) * batch_size


def find_manifest(folder: Path) -> Path | None:
    """The manifest of a folder of features; None where there is none, or one of its old name is another program's."""
    if (folder / MANIFEST).is_file():
        return folder / MANIFEST
    with suppress(OSError, ValueError, TypeError):
        if "shard_size" in json.loads((folder / OLD_MANIFEST).read_bytes()):
            return folder / OLD_MANIFEST
    return None


def find_shards(folder: Path) -> Iterator[Path]:
    """The files whose names are those of shards."""
    return (path for path in folder.glob(f"{PREFIX}*") if _SHARD_NAME.fullmatch(path.name) and not path.is_dir())


def remove_leftovers(folder: Path, is_ours: Callable[[int], bool]) -> None:
    """Deletes the temporary files that killed processes left, of the shards for which `is_ours(shard)` is true."""
    for path in folder.glob(f".{PREFIX}*{ENDING}"):
        number = path.name.removeprefix(f".{PREFIX}").split(".")[0]
        if number.isdecimal() and is_ours(int(number)) and is_left_over(path):
            path.unlink(missing_ok=True)


def columns_of(rows: Rows) -> dict[str, list[Any]]:
    """The columns that are no features (`COLUMNS`)."""
    images = rows.images
    values: tuple[list[Any], ...] = (
        list(range(rows.first, rows.first + len(images))),
        [as_text(path) for path in rows.paths],
        [image.width for image in images],
        [image.height for image in images],
        [None if image.transient else image.sha256 for image in images],
        [image.error for image in images],
    )
    return dict(zip(COLUMNS, values, strict=True))


def as_text(path: str) -> str:
    """A path with what is not UTF-8 written as ``\\xNN``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
