"""The output folder of an extraction: a manifest, and shards, each of which is complete or absent.

::

    DIR/_manifest.json            what the features are and how they were made (:mod:`.manifest`)
    DIR/features-00000.parquet    the first `shard_size` images
    DIR/features-00001.parquet    the next ones, and so on

Images that are added later begin a shard of their own. pandas, pyarrow and DuckDB read the folder as one table. It has
one row for each image, in the order of the images:

====================  =====================  ====================================================================
id                    int64                  `shard_size` x the number of the shard + the row in the shard. If no
                                             images were added, this is the position among all images
path                  string                 as given or found. Bytes that are not UTF-8 are written as ``\\xNN``.
                                             A member of an archive is ``archive.tar/member``
width, height         int32                  of the image, after EXIF rotation; null if it cannot be read
sha256                string                 of the bytes of the file. Null if they could not be read, or if time or
                                             memory ran out or the process died: such an error may pass. An error
                                             with a sha256 comes again with the same file and model
error                 string                 null, or why there are no features
cls, patch_mean, …    fixed_size_list        the features (:mod:`dinov2_fast.extraction.compute`), float or
                                             halffloat; null if there is an error. Features of several tokens are
                                             stored flat; the manifest has their shape
====================  =====================  ====================================================================

In the npy format a shard is ``features-00000.<feature>.npy``, arrays (rows, …) with NaN where there is an error, and
``features-00000.jsonl``, the other columns as one JSON object for each row. The JSON lines are written last.

If memory ran out and the batches of a shard were made smaller, the shard records it: as ``batch_size`` in the metadata
of its Parquet file (key ``dinov2_fast``, JSON), or in each of its JSON lines.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from dinov2_fast.data.decoding import Decoded
from dinov2_fast.features.whole_files import ENDING, is_left_over

MANIFEST = "_manifest.json"  # readers of Parquet folders skip names that begin with an underscore
PREFIX = "features-"
SHARD_ROWS = 8192
SHARD_BYTES = 1 << 28
COLUMNS = ("id", "path", "width", "height", "sha256", "error")
_SHARD_NAME = re.compile(rf"{PREFIX}\d{{5,}}\.(parquet|jsonl|[a-z_]+(@\d+)?\.npy)")


@dataclass(frozen=True)
class Feature:
    """A feature as it is stored: for each image an array of `shape`, of dtype "float32" or "float16"."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Values for each image."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes for each image."""
        return self.size * (2 if self.dtype == "float16" else 4)


@dataclass(frozen=True)
class Rows:
    """The rows of a batch, consecutive in a shard.

    `features` are arrays (rows, …) by name. Their values are not used in rows with an error.
    """

    ids: range
    paths: Sequence[str]
    images: Sequence[Decoded]
    features: Mapping[str, NDArray[Any]]

    def columns(self) -> dict[str, list[Any]]:
        """The columns that are not features (`COLUMNS`)."""
        values: tuple[list[Any], ...] = (
            list(self.ids),
            [as_text(path) for path in self.paths],
            [image.width for image in self.images],
            [image.height for image in self.images],
            [None if image.transient else image.sha256 for image in self.images],
            [image.error for image in self.images],
        )
        return dict(zip(COLUMNS, values, strict=True))


def shard_path(folder: Path, shard: int, ending: str) -> Path:
    """A file of a shard, such as ``features-00000.parquet``."""
    return folder / f"{PREFIX}{shard:05}.{ending}"


def shard_numbers(folder: Path) -> list[int]:
    """The shards that have a file in the folder, in ascending order."""
    return sorted({int(path.name.removeprefix(PREFIX).partition(".")[0]) for path in find_shards(folder)})


def default_shard_size(features: Sequence[Feature], batch_size: int) -> int:
    """The rows of as many whole batches as fit `SHARD_ROWS` rows and `SHARD_BYTES` bytes, and of at least one."""
    rows = min(SHARD_ROWS, SHARD_BYTES // sum(feature.nbytes for feature in features))
    return max(rows // batch_size, 1) * batch_size


def holds_features(folder: Path) -> bool:
    """Whether the folder has a manifest."""
    return (folder / MANIFEST).is_file()


def find_shards(folder: Path) -> Iterator[Path]:
    """The files that have the name of a shard."""
    return (path for path in folder.glob(f"{PREFIX}*") if _SHARD_NAME.fullmatch(path.name) and not path.is_dir())


def remove_leftovers(folder: Path, shards: Container[int]) -> None:
    """Deletes the temporary files of these shards that killed processes left."""
    for path in folder.glob(f".{PREFIX}*{ENDING}"):
        number = path.name.removeprefix(f".{PREFIX}").split(".")[0]
        if number.isdecimal() and int(number) in shards and is_left_over(path):
            path.unlink(missing_ok=True)


def as_text(path: str) -> str:
    """A path, with bytes that are not UTF-8 written as ``\\xNN``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
