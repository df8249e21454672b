"""Shards as Parquet files; the columns stand in :mod:`.shards`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dinov2_fast.features.schema import COLUMNS, Feature, Rows, columns_of
from dinov2_fast.features.whole_files import whole_file

METADATA_KEY = b"dinov2_fast"
ROW_GROUP_BYTES = 1 << 26


def write(stem: Path, rows: Sequence[Rows], features: Sequence[Feature], note: Mapping[str, Any]) -> None:
    """See :class:`.shards.Format`."""
    schema = _schema(features, note)
    table = pa.Table.from_batches([_batch(part, features, schema) for part in rows], schema)
    group = max(1, ROW_GROUP_BYTES // sum(feature.nbytes for feature in features))
    texts = ["path", "sha256", "error"]
    with whole_file(_path(stem)) as file:
        pq.write_table(
            table,
            file,
            row_group_size=group,
            use_dictionary=texts,
            compression={name: "snappy" if name in texts else "none" for name in _leaves(schema)},
            write_statistics=["error"],
        )


def count(stem: Path, features: Sequence[Feature]) -> tuple[int, int] | None:
    """See :class:`.shards.Format`. Failures are counted by the statistics in the file's footer."""
    try:
        metadata = pq.read_metadata(_path(stem))
    except (OSError, pa.ArrowInvalid):
        return None
    names = metadata.schema.to_arrow_schema().names
    if names != [*COLUMNS, *(feature.name for feature in features)]:
        return None
    error = COLUMNS.index("error")
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    return metadata.num_rows, sum(g.num_rows - g.column(error).statistics.null_count for g in groups)


def columns(stem: Path) -> dict[str, list[Any]]:
    """See :class:`.shards.Format`."""
    table: dict[str, list[Any]] = pq.read_table(_path(stem), columns=list(COLUMNS), partitioning=None).to_pydict()
    return table


def feature(stem: Path, feature: Feature) -> NDArray[Any]:
    """See :class:`.shards.Format`."""
    column = pq.read_table(_path(stem), columns=[feature.name], partitioning=None)[feature.name]
    values = np.full((len(column), feature.size), np.nan, feature.dtype)
    first = 0
    for chunk in column.chunks:
        there = chunk.is_valid().to_numpy(zero_copy_only=False)
        values[first : first + len(chunk)][there] = chunk.flatten().to_numpy().reshape(-1, feature.size)
        first += len(chunk)
    return values.reshape(-1, *feature.shape)


def note(stem: Path) -> dict[str, Any]:
    """What `write` was given as `note`."""
    found: dict[str, Any] = json.loads((pq.read_schema(_path(stem)).metadata or {}).get(METADATA_KEY, "{}"))
    return found


def _path(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.parquet")


def _schema(features: Sequence[Feature], note: Mapping[str, Any]) -> pa.Schema:
    fields = [("id", pa.int64()), ("path", pa.string()), ("width", pa.int32()), ("height", pa.int32())]
    fields += [("sha256", pa.string()), ("error", pa.string())]
    kinds = {"float32": pa.float32(), "float16": pa.float16()}
    fields += [(feature.name, pa.list_(kinds[feature.dtype], feature.size)) for feature in features]
    return pa.schema(fields, metadata={METADATA_KEY: json.dumps(dict(note))} if note else None)


def _leaves(schema: pa.Schema) -> list[str]:
    """The columns as Parquet counts them: the values of a list are one of their own."""
    return [
        f"{name}.list.element" if pa.types.is_fixed_size_list(schema.field(name).type) else name
        for name in schema.names
    ]


def _batch(rows: Rows, features: Sequence[Feature], schema: pa.Schema) -> pa.RecordBatch:
    missing = pa.array([image.error is not None for image in rows.images], pa.bool_())
    arrays = [pa.array(values, schema.field(name).type) for name, values in columns_of(rows).items()]
    for feature in features:
        flat = pa.array(np.ascontiguousarray(rows.features[feature.name], feature.dtype).ravel())
        arrays.append(pa.FixedSizeListArray.from_arrays(flat, feature.size, mask=missing))
    return pa.record_batch(arrays, schema=schema)
