"""The formats in which shards are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.features.npy import NpyShards
from dinov2_fast.features.parquet import ParquetShards
from dinov2_fast.features.schema import Feature, Rows


class Shards(Protocol):
    """The shards of a folder, by their numbers."""

    folder: Path
    features: Sequence[Feature]

    def write(self, shard: int, rows: Sequence[Rows], note: Mapping[str, Any]) -> None:
        """Writes a complete shard, with a note about it, which is empty as a rule."""

    def count(self, shard: int) -> tuple[int, int] | None:
        """The number of rows, and of rows with an error; None if the shard is absent, damaged or of other features."""

    def columns(self, shard: int) -> dict[str, list[Any]]:
        """The columns that are not features (`COLUMNS`), with None for null."""

    def feature(self, shard: int, feature: Feature) -> NDArray[Any]:
        """A feature, (rows, …), NaN in rows with an error."""


FORMATS: dict[str, type[ParquetShards] | type[NpyShards]] = {"parquet": ParquetShards, "npy": NpyShards}


def open_shards(folder: Path, format: str, features: Sequence[Feature]) -> Shards:
    """The shards of these features in a folder, which need not exist yet.

    Raises:
        InvalidValueError: there is no such format.
    """
    if format not in FORMATS:
        raise InvalidValueError(f"There is no format {format!r}; choose {' or '.join(FORMATS)}.")
    return FORMATS[format](folder, features)
