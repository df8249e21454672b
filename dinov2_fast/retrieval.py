"""Nearest neighbours by the cosine of feature vectors: exact, in one pass over features that need not fit in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 16384  # rows compared at a time
_QUERIES = 1024  # queries compared at a time


def nearest(
    features: Any, queries: Sequence[int], count: int = 5, *, block: int = BLOCK
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """For each of some rows, the other rows with the largest cosine.

    Args:
        features: (rows, dim), an array or memory map, read once from front to back. A row with NaN or infinity is no
            image and never a neighbour (`dinov2_fast.load_features` gives NaN for images without features).
        queries: indices of the rows whose neighbours are wanted.
        count: neighbours of each; fewer if there are not so many other rows.
        block: rows read at a time.

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
    vectors = np.asarray(features[wanted])
    without = wanted[~np.isfinite(vectors).all(axis=1)]
    if len(without):
        raise ValueError(f"Row {without[0]} has no features.")
    found = _Nearest(vectors, count, without=wanted)
    for start in range(0, len(features), block):
        found.add(features[start : start + block])
    indices, cosines = found.result()
    if not indices.shape[1]:
        raise ValueError("There is no other row with features to be a neighbour.")
    return indices, cosines


class _Nearest:
    """The rows nearest to each query among those added so far.

    Products in fp32 choose the candidates, with room for their rounding; cosines in fp64 decide, rounded to fp32 at the
    end. So the result does not depend on how rows were cut into blocks, and of equal rows the first comes first.

    Args:
        queries: (queries, dim), finite.
        count: rows to keep for each.
        without: for each query a row that does not count, or None.
    """

    def __init__(self, queries: NDArray[Any], count: int, without: NDArray[np.int64] | None = None) -> None:
        self._queries = _unit(queries.astype(np.float64))
        self._rounded = self._queries.astype(np.float32)
        self._count, self._without = count, without
        self._slack = 4 * queries.shape[1] * 2.0**-24  # twice what rounding changes the cosine of two fp32 vectors by
        self._rows = [np.zeros(0, np.int64)] * len(queries)
        self._cosines = [np.zeros(0, np.float32)] * len(queries)
        self.added = self.skipped = 0

    def add(self, block: Any) -> None:
        """The next rows (rows, dim). Those with NaN or infinity are skipped."""
        values = np.asarray(block, np.float32)
        bad = ~np.isfinite(values).all(axis=1)
        if bad.any():
            values = np.where(bad[:, None], np.float32(0), values)
        length = np.sqrt(np.einsum("rd,rd->r", values, values))
        for first in range(0, len(self._queries), _QUERIES):
            scores = self._rounded[first : first + _QUERIES] @ values.T / np.where(length == 0, 1, length)
            scores[:, bad] = -np.inf
            for query, score in enumerate(scores, first):
                self._merge(query, score, values)
        self.added += len(values)
        self.skipped += int(np.count_nonzero(bad))

    def _merge(self, query: int, score: NDArray[np.float32], values: NDArray[np.float32]) -> None:
        """Takes from a block what is nearer than what there is; `score` (rows,) are its cosines, nearly."""
        if self._without is not None and 0 <= self._without[query] - self.added < len(score):
            score[self._without[query] - self.added] = -np.inf
        there = self._cosines[query]
        near = np.flatnonzero(score >= (there[-1] - self._slack if len(there) == self._count else -2))
        if len(near) > self._count:
            near = near[score[near] >= np.partition(score[near], -self._count)[-self._count] - self._slack]
        exact = (_unit(values[near].astype(np.float64)) * self._queries[query]).sum(axis=1)  # the same for equal rows
        cosines = np.concatenate((there, exact.astype(np.float32)))
        rows = np.concatenate((self._rows[query], near + self.added))
        best = np.argsort(-cosines, kind="stable")[: self._count]
        self._cosines[query], self._rows[query] = cosines[best], rows[best]

    def result(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Rows and cosines, (queries, count), or fewer if a query has not so many, nearest first."""
        enough = min(map(len, self._rows))
        rows, cosines = ([each[:enough] for each in found] for found in (self._rows, self._cosines))
        return np.stack(rows), np.stack(cosines)


def _unit(rows: NDArray[Any]) -> NDArray[Any]:
    """Rows of length 1; zeros for one of zeros."""
    length = np.sqrt((rows * rows).sum(axis=1, keepdims=True))
    return rows / np.where(length == 0, 1, length)
