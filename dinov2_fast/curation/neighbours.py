"""Nearest neighbours by the cosine of feature vectors: exact, in one pass over features that need not fit in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinov2_fast.errors import InvalidValueError

if TYPE_CHECKING:
    from dinov2_fast.features.store import Features

BLOCK = 16384  # rows compared at a time
_QUERIES = 1024  # queries compared at a time


@dataclass(frozen=True)
class Found:
    """What `search` found, nearest first; of images that are equally near, the first in the store comes first.

    Attributes:
        paths: (queries, k), of images, as the store has them.
        cosines: (queries, k) float32.
        rows: (queries, k), the images' numbers in the store.
        compared, skipped: images of the store with and without features.
    """

    paths: list[list[str]]
    cosines: NDArray[np.float32]
    rows: NDArray[np.int64]
    compared: int
    skipped: int


def search(
    features: Features | str | os.PathLike[str],
    queries: Any,
    k: int = 10,
    *,
    feature: str = "cls",
    model: Any = None,
    weights: str | os.PathLike[str] | None = None,
    device: str | None = None,
) -> Found:
    """The images of a store whose features have the largest cosine with those of query images.

    Every image is compared, shard by shard: memory holds one shard, which is read as a memory map where it is npy.

    Args:
        features: what `dinov2_fast.load_features` gives, or the folder.
        queries: paths of images, or vectors, an array or tensor (queries, dim) such as ``features["cls"][[3]]``.
        k: images to find for each query; fewer if there are not so many.
        feature: which of the stored features is compared, one vector an image.
        model, weights, device: for query images, see :func:`dinov2_fast.extraction.as_stored.extract_as_stored`; by
            default the model that the store names.

    Raises:
        FileNotFoundError: the folder holds no features.
        WeightsError: the model cannot be had.
        ValueError: a feature that is not stored, or of several vectors; queries that cannot be read, that have another
            number of dimensions or are not finite; a k below 1; another model than that of the store; a store in which
            no image has features.
    """
    from dinov2_fast.features.store import load_features

    if isinstance(features, str | os.PathLike):
        features = load_features(features)
    if k < 1:
        raise InvalidValueError(f"k must be at least 1, got {k}.")
    dim = vector_size(features, feature)
    if not hasattr(queries, "ndim"):
        queries = _of_images(features, queries, feature, {"model": model, "weights": weights, "device": device})
    found = _Nearest(_checked(queries, dim), k)
    for block in _blocks(features, feature):
        found.add(block)
    rows, cosines = found.result()
    if not rows.shape[1]:
        raise InvalidValueError(f"No image in {str(features.folder)!r} has features.")
    paths = _paths(features, rows)
    listed = [[paths[row] for row in each] for each in rows.tolist()]
    return Found(listed, cosines, rows, found.added - found.skipped, found.skipped)


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
        raise InvalidValueError(
            f"Need features (rows, dim) and a count of at least 1, got {features.shape} and {count}."
        )
    wanted = np.asarray(queries, np.int64)
    if len(wanted) == 0 or wanted.min() < 0 or wanted.max() >= len(features):
        raise InvalidValueError(f"The queries must be rows from 0 to {len(features) - 1}, got {list(queries)}.")
    vectors = np.asarray(features[wanted])
    without = wanted[~np.isfinite(vectors).all(axis=1)]
    if len(without):
        raise InvalidValueError(f"Row {without[0]} has no features.")
    found = _Nearest(vectors, count, without=wanted)
    for start in range(0, len(features), block):
        found.add(features[start : start + block])
    indices, cosines = found.result()
    if not indices.shape[1]:
        raise InvalidValueError("There is no other row with features to be a neighbour.")
    return indices, cosines


def vector_size(features: Features, name: str) -> int:
    """The dimensions of a feature that is one vector an image.

    Raises:
        ValueError: it is not stored, or is several vectors an image.
    """
    from dinov2_fast.features.store import stored_features

    shapes = {feature.name: feature.shape for feature in stored_features(features.manifest)}
    vectors = ", ".join(name for name, shape in shapes.items() if len(shape) == 1) or "none"
    if name not in shapes:
        raise InvalidValueError(f"There is no feature {name!r} in {str(features.folder)!r}; choose of: {vectors}.")
    if len(shapes[name]) != 1:
        raise InvalidValueError(
            f"{name!r} is {shapes[name][0]} vectors an image; choose one that is a vector: {vectors}."
        )
    return shapes[name][0]


def _of_images(features: Features, paths: Any, name: str, source: Mapping[str, Any]) -> NDArray[np.float32]:
    """The feature of images, as those of the store were made, (images, dim)."""
    from dinov2_fast.data.sources import ImageSource
    from dinov2_fast.extraction.as_stored import extract_as_stored

    images = [ImageSource(os.fsdecode(path)) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
    vectors, errors = extract_as_stored(features, images, name, **source)
    for image, error in zip(images, errors, strict=True):
        if error is not None:
            raise InvalidValueError(f"{image.path!r} has no features: {error}.")
    return vectors


def _checked(queries: Any, dim: int) -> NDArray[Any]:
    if hasattr(queries, "detach"):
        queries = queries.detach().cpu().float().numpy()
    vectors = np.atleast_2d(np.asarray(queries))
    if vectors.ndim != 2 or vectors.shape[1] != dim or not len(vectors):
        raise InvalidValueError(
            f"The queries must be features (queries, {dim}) or paths of images, got {vectors.shape}."
        )
    if not np.isfinite(vectors).all():
        raise InvalidValueError("The queries contain NaN or infinity: leave out rows without features.")
    return vectors


def _blocks(features: Features, name: str) -> Iterator[NDArray[Any]]:
    for shard in features.shards():
        values = shard[name]
        for first in range(0, len(values), BLOCK):
            yield values[first : first + BLOCK]


def _paths(features: Features, rows: NDArray[np.int64]) -> dict[int, str]:
    """The paths of some rows; of the other columns only those shards are read in which these rows are."""
    wanted, first = np.unique(rows), 0
    found: dict[int, str] = {}
    for shard in features.shards():
        inside = wanted[slice(*np.searchsorted(wanted, (first, first + len(shard))))].tolist()
        if inside:
            paths = shard.path
            found |= {row: paths[row - first] for row in inside}
        first += len(shard)
    return found


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
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(bad):
            values = values.copy()
            values[bad] = 0
        length = np.sqrt(np.einsum("rd,rd->r", values, values))
        for first in range(0, len(self._queries), _QUERIES):
            scores = self._rounded[first : first + _QUERIES] @ values.T / np.where(length == 0, 1, length)
            scores[:, bad] = -np.inf
            for query, score in enumerate(scores, first):
                self._merge(query, score, values)
        self.added += len(values)
        self.skipped += len(bad)

    def _merge(self, query: int, score: NDArray[np.float32], values: NDArray[np.float32]) -> None:
        """Takes from a block what is nearer than what there is; `score` (rows,) are its cosines, nearly."""
        if self._without is not None and 0 <= self._without[query] - self.added < len(score):
            score[self._without[query] - self.added] = -np.inf
        there = self._cosines[query]
        floor = there[-1] - self._slack if len(there) == self._count else np.float32(-2)
        near = np.flatnonzero(score >= floor)
        if len(near) > self._count:
            floor = np.partition(score[near], -self._count)[-self._count] - self._slack
            near = near[score[near] >= floor]
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
