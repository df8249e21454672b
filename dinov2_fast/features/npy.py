"""Shards as npy files and a file of JSON lines; :mod:`.schema` describes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinov2_fast.features.schema import COLUMNS, Feature, Rows, shard_path
from dinov2_fast.features.whole_files import whole_file


class NpyShards:
    """The methods of :class:`.parquet.ParquetShards`, for this format."""

    def __init__(self, folder: Path, features: Sequence[Feature]) -> None:
        self.folder, self.features = folder, features

    def write(self, shard: int, rows: Sequence[Rows], note: Mapping[str, Any]) -> None:
        """Writes the JSON lines last: a shard that has them is complete."""
        failed = np.array([image.error is not None for part in rows for image in part.images])
        for feature in self.features:
            values = np.concatenate([part.features[feature.name] for part in rows]).astype(feature.dtype, copy=False)
            values[failed] = np.nan
            with whole_file(self._array_path(shard, feature)) as file:
                np.save(file, values, allow_pickle=False)
        with whole_file(self._lines_path(shard)) as file:
            for part in rows:
                for values_of_row in zip(*part.columns().values(), strict=True):
                    line = {**dict(zip(COLUMNS, values_of_row, strict=True)), **note}
                    file.write(json.dumps(line).encode() + b"\n")

    def count(self, shard: int) -> tuple[int, int] | None:
        """Reads the JSON lines, and of the arrays their headers."""
        try:
            errors = self.columns(shard)["error"]
            shapes = [self.feature(shard, feature).shape for feature in self.features]
        except (OSError, ValueError, KeyError):
            return None
        if shapes != [(len(errors), *feature.shape) for feature in self.features]:
            return None
        return len(errors), len(errors) - errors.count(None)

    def columns(self, shard: int) -> dict[str, list[Any]]:
        """As `ParquetShards.columns`."""
        with open(self._lines_path(shard), "rb") as file:
            lines = [json.loads(line) for line in file]
        return {name: [line[name] for line in lines] for name in COLUMNS}

    def feature(self, shard: int, feature: Feature) -> NDArray[Any]:
        """A read-only memory map."""
        values: NDArray[Any] = np.load(self._array_path(shard, feature), mmap_mode="r", allow_pickle=False)
        return values

    def _array_path(self, shard: int, feature: Feature) -> Path:
        return shard_path(self.folder, shard, f"{feature.name}.npy")

    def _lines_path(self, shard: int) -> Path:
        return shard_path(self.folder, shard, "jsonl")
