"""Shards as Parquet files, and as npy files with JSON lines; :mod:`.schema` describes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.features.schema import COLUMNS, Feature, Rows, shard_path
from dinov2_fast.features.whole_files import whole_file

METADATA_KEY = b"dinov2_fast"
ROW_GROUP_BYTES = 1 << 26
_TEXTS = ["path", "sha256", "error"]
_TYPES = {"float32": pa.float32(), "float16": pa.float16()}


class ParquetShards:
    """The shards of a folder, by their numbers. `NpyShards` has the same methods."""

    def __init__(self, folder: Path, features: Sequence[Feature]) -> None:
        self.folder, self.features = folder, features

    def write(self, shard: int, rows: Sequence[Rows], note: Mapping[str, Any]) -> None:
        """Writes a complete shard, with a note in its metadata: an empty one, or ``{"batch_size": n}``."""
        schema = self._schema(note)
        table = pa.Table.from_batches([self._record_batch(part, schema) for part in rows], schema)
        with whole_file(self._path(shard)) as file:
            pq.write_table(
                table,
                file,
                row_group_size=max(1, ROW_GROUP_BYTES // sum(feature.nbytes for feature in self.features)),
                use_dictionary=_TEXTS,
                compression={name: "snappy" if name in _TEXTS else "none" for name in _leaves(schema)},
                write_statistics=["error"],
            )

    def count(self, shard: int) -> tuple[int, int] | None:
        """The number of rows, and of rows with an error; None if the shard is absent, cut off or of other features.

        Reads only the footer, whose statistics count the errors: damage elsewhere in the file is not found.
        """
        try:
            metadata = pq.read_metadata(self._path(shard))
        except (OSError, pa.ArrowInvalid):
            return None
        names = metadata.schema.to_arrow_schema().names
        if names != [*COLUMNS, *(feature.name for feature in self.features)]:
            return None
        error = COLUMNS.index("error")
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        return metadata.num_rows, sum(g.num_rows - g.column(error).statistics.null_count for g in groups)

    def columns(self, shard: int) -> dict[str, list[Any]]:
        """The columns that are not features (`COLUMNS`), with None for null."""
        table: dict[str, list[Any]] = self._read(shard, list(COLUMNS)).to_pydict()
        return table

    def feature(self, shard: int, feature: Feature) -> NDArray[Any]:
        """A feature, (rows, …), NaN in rows with an error."""
        column = self._read(shard, [feature.name])[feature.name]
        values = np.full((len(column), feature.size), np.nan, feature.dtype)
        first = 0
        for chunk in column.chunks:
            valid = chunk.is_valid().to_numpy(zero_copy_only=False)
            values[first : first + len(chunk)][valid] = chunk.flatten().to_numpy().reshape(-1, feature.size)
            first += len(chunk)
        return values.reshape(-1, *feature.shape)

    def _read(self, shard: int, names: list[str]) -> pa.Table:
        return pq.read_table(self._path(shard), columns=names, partitioning=None)

    def _path(self, shard: int) -> Path:
        return shard_path(self.folder, shard, "parquet")

    def _schema(self, note: Mapping[str, Any]) -> pa.Schema:
        fields = [("id", pa.int64()), ("path", pa.string()), ("width", pa.int32()), ("height", pa.int32())]
        fields += [("sha256", pa.string()), ("error", pa.string())]
        fields += [(feature.name, pa.list_(_TYPES[feature.dtype], feature.size)) for feature in self.features]
        return pa.schema(fields, metadata={METADATA_KEY: json.dumps(dict(note))} if note else None)

    def _record_batch(self, rows: Rows, schema: pa.Schema) -> pa.RecordBatch:
        failed = pa.array([image.error is not None for image in rows.images], pa.bool_())
        arrays = [pa.array(values, schema.field(name).type) for name, values in rows.columns().items()]
        for feature in self.features:
            flat = pa.array(np.ascontiguousarray(rows.features[feature.name], feature.dtype).ravel())
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, feature.size, mask=failed))
        return pa.record_batch(arrays, schema=schema)


def _leaves(schema: pa.Schema) -> list[str]:
    """The columns as Parquet counts them: the values of a list are a column of their own."""
    return [
        f"{name}.list.element" if pa.types.is_fixed_size_list(schema.field(name).type) else name
        for name in schema.names
    ]


class NpyShards:
    """The methods of :class:`ParquetShards`, for this format."""

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
        """As `ParquetShards.count`. Reads the JSON lines and the headers of the arrays."""
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
        """As `ParquetShards.feature`, as a read-only memory map."""
        values: NDArray[Any] = np.load(self._array_path(shard, feature), mmap_mode="r", allow_pickle=False)
        return values

    def _array_path(self, shard: int, feature: Feature) -> Path:
        return shard_path(self.folder, shard, f"{feature.name}.npy")

    def _lines_path(self, shard: int) -> Path:
        return shard_path(self.folder, shard, "jsonl")


Shards = ParquetShards | NpyShards
FORMATS: dict[str, type[Shards]] = {"parquet": ParquetShards, "npy": NpyShards}


def open_shards(folder: Path, format: str, features: Sequence[Feature]) -> Shards:
    """The shards of these features in a folder; neither needs to exist. Errors are those of `check_format`."""
    check_format(format)
    return FORMATS[format](folder, features)


def check_format(format: str) -> None:
    """An InvalidValueError for a format other than "parquet" and "npy"."""
    if format not in FORMATS:
        raise InvalidValueError(f"There is no format {format!r}; choose {' or '.join(FORMATS)}.")
