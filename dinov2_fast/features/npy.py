"""Shards as npy files and a file of JSON lines; see :mod:`.shards`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinov2_fast.features.schema import COLUMNS, Feature, Rows, columns_of
from dinov2_fast.features.whole_files import whole_file


def write(stem: Path, rows: Sequence[Rows], features: Sequence[Feature], note: Mapping[str, Any]) -> None:
    """See :class:`.shards.Format`. The lines come last: a shard that has them is whole."""
    bad = np.array([image.error is not None for part in rows for image in part.images])
    for feature in features:
        values = np.concatenate([part.features[feature.name] for part in rows]).astype(feature.dtype, copy=False)
        values[bad] = np.nan
        with whole_file(_array_path(stem, feature)) as file:
            np.save(file, values, allow_pickle=False)
    with whole_file(_lines_path(stem)) as file:
        for line in _lines(rows, note):
            file.write(json.dumps(line).encode() + b"\n")


def count(stem: Path, features: Sequence[Feature]) -> tuple[int, int] | None:
    """See :class:`.shards.Format`."""
    try:
        errors = columns(stem)["error"]
        shapes = [np.load(_array_path(stem, feature), mmap_mode="r", allow_pickle=False).shape for feature in features]
    except (OSError, ValueError, KeyError):
        return None
    if shapes != [(len(errors), *feature.shape) for feature in features]:
        return None
    return len(errors), len(errors) - errors.count(None)


def columns(stem: Path) -> dict[str, list[Any]]:
    """See :class:`.shards.Format`."""
    with open(_lines_path(stem), "rb") as file:
        lines = [json.loads(line) for line in file]
    return {name: [line[name] for line in lines] for name in COLUMNS}


def feature(stem: Path, feature: Feature) -> NDArray[Any]:
    """See :class:`.shards.Format`; memory-mapped."""
    values: NDArray[Any] = np.load(_array_path(stem, feature), mmap_mode="r", allow_pickle=False)
    return values


def _array_path(stem: Path, feature: Feature) -> Path:
    return stem.with_name(f"{stem.name}.{feature.name}.npy")


def _lines_path(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.jsonl")


def _lines(rows: Sequence[Rows], note: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for part in rows:
        for values in zip(*columns_of(part).values(), strict=True):
            yield {**dict(zip(COLUMNS, values, strict=True)), **note}
