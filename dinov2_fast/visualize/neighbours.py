"""Nearest neighbours by the cosine of feature vectors, in one pass over features that need not fit in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHUNK = 16384  # rows read at a time


def nearest(
    features: Any, queries: Sequence[int], count: int = 5, *, chunk: int = CHUNK
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """For each of some rows, the other rows with the largest cosine.

    Args:
        features: (rows, dim), an array or memory map, read once from front to back. A row with NaN or infinity is no
            picture and never a neighbour (`dinov2_fast.load_features` gives NaN for pictures without features).
        queries: indices of the rows whose neighbours are wanted.
        count: neighbours of each; fewer if there are not so many other rows.
        chunk: rows read at a time.

    Returns:
        Indices and cosines, both (queries, count), nearest first; of rows that are equally near, the first comes first.

    Raises:
        ValueError: a wrong rank, a row that does not exist or has no features, or nothing to compare with.
    """
    if features.ndim != 2 or count < 1:
        raise ValueError(f"Need features (rows, dim) and a count of at least 1, got {features.shape} and {count}.")
    wanted = np.asarray(queries, np.int64)
    if len(wanted) == 0 or wanted.min() < 0 or wanted.max() >= len(features):
        raise ValueError(f"The queries must be rows from 0 to {len(features) - 1}, got {list(queries)}.")
    units = _unit(features[wanted])
    without = wanted[np.isnan(units).any(axis=1)]
    if len(without):
        raise ValueError(f"Row {without[0]} has no features.")
    indices = np.zeros((len(wanted), 0), np.int64)
    cosines = np.zeros((len(wanted), 0), np.float32)
    for start in range(0, len(features), chunk):
        others = _unit(features[start : start + chunk])
        rows = np.arange(start, start + len(others))
        found = units @ others.T
        found[np.isnan(found) | (rows == wanted[:, None])] = -np.inf
        cosines = np.concatenate((cosines, found), axis=1)
        indices = np.concatenate((indices, np.broadcast_to(rows, found.shape)), axis=1)
        best = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
        cosines, indices = np.take_along_axis(cosines, best, 1), np.take_along_axis(indices, best, 1)
    enough = int(np.isfinite(cosines).sum(axis=1).min())
    if not enough:
        raise ValueError("There is no other row with features to be a neighbour.")
    return indices[:, :enough], cosines[:, :enough]


def _unit(rows: Any) -> NDArray[np.float32]:
    """Rows of length 1 in float32; NaN for a row that is not finite, zeros for one of zeros."""
    values = np.asarray(rows, np.float32)
    values = np.where(np.isfinite(values).all(axis=1, keepdims=True), values, np.nan)
    length = np.linalg.norm(values, axis=1, keepdims=True)
    return values / np.where(length == 0, 1, length)
