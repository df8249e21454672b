"""Exact nearest neighbours by the cosine of feature vectors, in one pass over features that need not fit in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinov2_fast.data.sources import require_images
from dinov2_fast.errors import InvalidValueError
from dinov2_fast.features.manifest import stored_features
from dinov2_fast.features.schema import as_text
from dinov2_fast.features.store import Features, load_features

BLOCK = 16384  # rows compared at a time
_QUERIES = 1024  # queries compared at a time


@dataclass(frozen=True)
class Found:
    """What `search` found, nearest first. Among equally near images, the first in the folder comes first.

    Attributes:
        paths, cosines, rows: (queries, k), of images in the folder.
        compared, skipped: the number of images in the folder with and without features.
        queries: the paths of the query images; empty for vectors.
        unreadable: the paths of query images that were skipped, with the reason.
    """

    paths: list[list[str]]
    cosines: NDArray[np.float32]
    rows: NDArray[np.int64]
    compared: int
    skipped: int
    queries: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)


def search(
    features: Features | str | os.PathLike[str],
    queries: Any,
    *,
    k: int = 10,
    feature: str = "cls",
    model: Any = None,
    weights: str | os.PathLike[str] | None = None,
    device: str | None = None,
    skip_unreadable: bool = False,
) -> Found:
    """Finds the images in a folder of features that have the largest cosine with query images.

    A Parquet shard is read whole, one at a time. A shard of npy is memory-mapped and read in blocks.

    Args:
        features: the folder, or what `load_features` returned for it.
        queries: images, as :func:`dinov2_fast.extract` takes them; or vectors, an array or tensor (queries, dim) or
            (dim,), such as ``features["cls"][3]``.
        k: images to find for each query; fewer if the folder has fewer.
        feature: the stored feature that is compared; it must be one vector per image.
        model, weights: for query images, as for :func:`dinov2_fast.load`, or a model in eval mode; by default the model
            that the folder names.
        device: for query images; by default a GPU if there is one.
        skip_unreadable: leave out query images that cannot be read; otherwise they are an error.

    Raises:
        FileNotFoundError: the folder holds no features, or a query does not exist.
        WeightsError: the weights cannot be found or read.
        InvalidValueError: a feature that is not stored, or is several vectors per image; no query, or queries that
            cannot be read, are vectors of another length or not finite; a k below 1; another model than that of
            the folder; a folder in which no image has features.
    """
    if isinstance(features, str | os.PathLike):
        features = load_features(features)
    if k < 1:
        raise InvalidValueError(f"k must be at least 1, got {k}.")
    dim = _vector_size(features, feature)
    paths, unreadable = list[str](), dict[str, str]()
    if not hasattr(queries, "ndim"):
        if weights is not None and model is None:
            raise InvalidValueError("--weights needs --model (weights= needs model=).")
        from dinov2_fast.extraction.provenance import extract_as_stored  # imports torch, which vectors do not need

        images = list(require_images(queries))
        queries, errors = extract_as_stored(features, images, feature, model=model, weights=weights, device=device)
        paths = [as_text(image.path) for image, error in zip(images, errors, strict=True) if error is None]
        unreadable = {as_text(image.path): error for image, error in zip(images, errors, strict=True) if error}
        if not paths or (unreadable and not skip_unreadable):
            path, error = next(iter(unreadable.items()))
            more = f" (and {len(unreadable) - 1} more)" if len(unreadable) > 1 else ""
            which = "" if paths else "None of the queries could be read: "
            raise InvalidValueError(f"{which}{path!r} has no features: {error}{more}.")
        queries = queries[[error is None for error in errors]]
    nearest_rows = _Nearest(_checked(queries, dim), k)
    for shard in features.shards():
        nearest_rows.add(shard[feature])
    rows, cosines = nearest_rows.result()
    if not rows.shape[1]:
        raise InvalidValueError(f"No image in {str(features.folder)!r} has features.")
    path_of = _paths(features, rows)
    found = [[path_of[row] for row in each] for each in rows.tolist()]
    compared = nearest_rows.added - nearest_rows.skipped
    return Found(found, cosines, rows, compared, nearest_rows.skipped, paths, unreadable)


def nearest(features: Any, queries: Sequence[int], count: int = 5) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """For chosen rows, the other rows with the largest cosine.

    Args:
        features: (rows, dim), an array or memory map of floating-point numbers, compared as fp32. A row with NaN or
            infinity is never a neighbour (`dinov2_fast.load_features` returns NaN for images without features).
        queries: indices of the rows whose neighbours are wanted.
        count: of neighbours for each of these rows.

    Returns:
        Indices and cosines, both (queries, count), nearest first; among equally near rows, the first comes first. They
        are fewer if there are fewer other rows.

    Raises:
        InvalidValueError: a wrong rank, a count below 1, a row that does not exist or has no features, or no other row
            with features.
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
    found.add(features)
    indices, cosines = found.result()
    if not indices.shape[1]:
        raise InvalidValueError("There is no other row with features to be a neighbour.")
    return indices, cosines


def _vector_size(features: Features, name: str) -> int:
    """The number of dimensions of a stored feature, which must be one vector per image."""
    shapes = {feature.name: feature.shape for feature in stored_features(features.manifest)}
    vectors = ", ".join(name for name, shape in shapes.items() if len(shape) == 1) or "none"
    if name not in shapes:
        raise InvalidValueError(f"There is no feature {name!r} in {str(features.folder)!r}; choose of: {vectors}.")
    if len(shapes[name]) != 1:
        raise InvalidValueError(
            f"{name!r} is {shapes[name][0]} vectors per image; choose one that is a vector: {vectors}."
        )
    return shapes[name][0]


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


def _paths(features: Features, rows: NDArray[np.int64]) -> dict[int, str]:
    """The paths of chosen rows; only the shards that hold these rows are read."""
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
    """The `count` rows nearest to each query among those added so far. Query i is not compared with row `without[i]`.

    Products in fp32 choose the candidates, with a margin for their rounding; cosines in fp64, rounded to fp32 at the
    end, decide. So the result does not depend on the size of the blocks, and among equal rows the first comes first.
    """

    def __init__(self, queries: NDArray[Any], count: int, without: NDArray[np.int64] | None = None) -> None:
        self._queries = _unit(queries.astype(np.float64))
        self._rounded = self._queries.astype(np.float32)
        self._count, self._without = count, without
        self._margin = 4 * queries.shape[1] * 2.0**-24  # twice the rounding error of the cosine of two fp32 vectors
        self._rows = [np.zeros(0, np.int64)] * len(queries)
        self._cosines = [np.zeros(0, np.float32)] * len(queries)
        self.added = self.skipped = 0

    def add(self, rows: Any) -> None:
        """Adds the next rows (rows, dim), read block by block, and skips those with NaN or infinity."""
        for first in range(0, len(rows), BLOCK):
            self._add_block(np.asarray(rows[first : first + BLOCK], np.float32))

    def _add_block(self, values: NDArray[np.float32]) -> None:
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
        """Keeps the rows of a block that are nearer than the kept ones; `score` (rows,) are cosines in fp32."""
        if self._without is not None and 0 <= self._without[query] - self.added < len(score):
            score[self._without[query] - self.added] = -np.inf
        kept = self._cosines[query]
        lowest = kept[-1] - self._margin if len(kept) == self._count else np.float32(-2)
        near = np.flatnonzero(score >= lowest)
        if len(near) > self._count:
            lowest = np.partition(score[near], -self._count)[-self._count] - self._margin
            near = near[score[near] >= lowest]
        # A product and a sum, since a matrix product may give equal rows different cosines.
        exact = (_unit(values[near].astype(np.float64)) * self._queries[query]).sum(axis=1)
        cosines = np.concatenate((kept, exact.astype(np.float32)))
        rows = np.concatenate((self._rows[query], near + self.added))
        best = np.argsort(-cosines, kind="stable")[: self._count]
        self._cosines[query], self._rows[query] = cosines[best], rows[best]

    def result(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Rows and cosines, (queries, count), nearest first; fewer if a query has fewer."""
        enough = min(map(len, self._rows))
        rows, cosines = ([each[:enough] for each in found] for found in (self._rows, self._cosines))
        return np.stack(rows), np.stack(cosines)


def _unit(rows: NDArray[Any]) -> NDArray[Any]:
    """The rows, scaled to length 1; a row of zeros stays."""
    length = np.sqrt((rows * rows).sum(axis=1, keepdims=True))
    return rows / np.where(length == 0, 1, length)
