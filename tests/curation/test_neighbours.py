"""Nearest neighbours are those of the largest cosine, whatever the blocks and shards that they are read in."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dinov2_fast
from dinov2_fast.curation import neighbours
from dinov2_fast.curation.neighbours import nearest
from dinov2_fast.data.decoding import Decoded
from dinov2_fast.data.sources import ImageSource
from dinov2_fast.features.schema import MANIFEST, Feature, Rows
from dinov2_fast.features.shards import open_shards


def neighbours_by_hand(features: np.ndarray, row: int, count: int) -> list[int]:
    cosines = [
        float(features[row] @ other / np.linalg.norm(features[row]) / np.linalg.norm(other)) for other in features
    ]
    return sorted((i for i in range(len(features)) if i != row), key=lambda i: -cosines[i])[:count]


@pytest.mark.parametrize("block", [7, 50, 1000])
def test_neighbours_are_those_of_the_largest_cosine(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", block)
    features = np.random.default_rng(0).standard_normal((50, 6)) * np.random.default_rng(1).uniform(0.1, 9, (50, 1))
    indices, cosines = nearest(features, [3, 49, 0], 4)
    assert indices.tolist() == [neighbours_by_hand(features, row, 4) for row in (3, 49, 0)]
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = np.take_along_axis(units[[3, 49, 0]] @ units.T, indices, 1)
    np.testing.assert_allclose(cosines, expected, atol=1e-6)


def test_equally_near_rows_come_in_order_and_a_row_is_not_its_own_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    features = np.ones((5, 3))
    for block in (1, 2, 5):
        monkeypatch.setattr(neighbours, "BLOCK", block)
        indices, cosines = nearest(features, [2], 3)
        assert indices.tolist() == [[0, 1, 3]]
        np.testing.assert_allclose(cosines, 1, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_equal_rows_come_in_order_for_every_block_size(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(seed)
    features = random.standard_normal((997, 384)).astype(np.float32)
    copies = np.sort(random.choice(np.arange(5, 997), 60, replace=False))
    features[copies] = features[0] + 0.3 * features[1]
    for block in (1, 64, 333, 997):
        monkeypatch.setattr(neighbours, "BLOCK", block)
        indices, cosines = nearest(features, [0, 1, 2], 50)
        assert indices[0].tolist() == copies[:50].tolist()
        assert len(set(cosines[0].tolist())) == 1
        if block == 1:
            expected = indices, cosines
        assert np.array_equal(indices, expected[0])
        assert np.array_equal(cosines, expected[1])


def test_rows_without_features_are_never_neighbours(tmp_path: Path) -> None:
    features = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float16)
    features[[0, 4]] = np.nan
    features[5] = 0  # the cosine of a vector of zeros counts as 0
    np.save(tmp_path / "features.npy", features)
    for given in (features, np.load(tmp_path / "features.npy", mmap_mode="r")):
        indices, cosines = nearest(given, [1, 5], 9)
        assert sorted(indices[0].tolist()) == [2, 3, 5]
        assert np.isfinite(cosines).all()
        assert indices.shape == (2, 3)
    with pytest.raises(ValueError, match="Row 4 has no features"):
        nearest(features, [1, 4])


@pytest.mark.parametrize(
    ("features", "rows", "message"),
    [
        (np.ones((3, 4)), [3], "rows from 0 to 2"),
        (np.ones((3, 4)), [], "rows from 0 to 2"),
        (np.ones((1, 4)), [0], "no other row"),
        (np.ones(4), [0], r"features \(rows, dim\)"),
    ],
)
def test_queries_that_cannot_be_answered_are_errors(features: np.ndarray, rows: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nearest(features, rows)


def store(folder: Path, features: np.ndarray, shard_size: int, format: str = "parquet") -> str:
    """A folder as an extraction writes it; rows with NaN have an error."""
    folder.mkdir()
    kind = Feature("cls", features.shape[1:], str(features.dtype))
    for shard, first in enumerate(range(0, len(features), shard_size)):
        part = features[first : first + shard_size]
        images = [Decoded(error=None if np.isfinite(row).all() else "broken") for row in part]
        rows = Rows(
            range(first, first + len(part)), [f"{first + i}.jpg" for i in range(len(part))], images, {"cls": part}
        )
        open_shards(folder, format, [kind]).write(shard, [rows], {})
    manifest = {"inputs": {"images": len(features)}, "shard_size": shard_size, "format": format}
    manifest |= {"about": {}, "processor": {}, "features": {"cls": {"shape": list(kind.shape), "dtype": kind.dtype}}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return str(folder)


@pytest.mark.parametrize("format", ["parquet", "npy"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_search_compares_every_image_of_every_shard(format: str, dtype: Any, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    features = random.standard_normal((50, 8)).astype(dtype)
    features[[7, 49]] = np.nan
    features[[3, 31]] = features[20]  # equally near
    queries = np.concatenate((features[[20, 48]], random.standard_normal((1, 8)).astype(dtype)))
    found = dinov2_fast.search(store(tmp_path / "store", features, 9, format), queries, k=5)
    wide = features.astype(np.float64)
    cosines = (
        queries @ wide.T / np.linalg.norm(wide, axis=1) / np.linalg.norm(queries.astype(np.float64), axis=1)[:, None]
    )
    expected = np.argsort(-np.round(cosines, 12), axis=1, kind="stable")[:, :5]  # NaN comes last
    assert found.rows.tolist() == expected.tolist()
    assert found.rows[0, :3].tolist() == [3, 20, 31]
    assert found.rows[1, 0] == 48
    np.testing.assert_allclose(found.cosines, np.take_along_axis(cosines, expected, 1), atol=1e-6)
    assert found.paths == [[f"{row}.jpg" for row in rows] for rows in expected.tolist()]
    assert (found.compared, found.skipped) == (48, 2)


def test_one_vector_may_be_searched_and_k_may_exceed_the_images(tmp_path: Path) -> None:
    features = np.eye(3, 4, dtype=np.float32)
    folder = store(tmp_path / "store", features, 2)
    for query in (features[1], torch.from_numpy(features[1]).bfloat16().requires_grad_()):
        found = dinov2_fast.search(dinov2_fast.load_features(folder), query)
        assert found.paths == [["1.jpg", "0.jpg", "2.jpg"]]
        assert found.cosines.tolist() == [[1, 0, 0]]


@pytest.mark.parametrize(("format", "shard_size"), [("parquet", 200), ("npy", 200), ("npy", 8000)])
def test_memory_does_not_grow_with_the_store(
    format: str, shard_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", 200)
    features = np.random.default_rng(0).standard_normal((8000, 640)).astype(np.float16)  # 20 MB in fp32
    loaded = dinov2_fast.load_features(store(tmp_path / "store", features, shard_size, format))
    tracemalloc.start()
    try:
        found = dinov2_fast.search(loaded, features[[5, 7999]], k=3)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.rows[:, 0].tolist() == [5, 7999]
    columns = 600 * shard_size  # bytes of a shard's paths and other columns, at most
    assert peak < 5 * 200 * 640 * 4 + columns


@pytest.mark.parametrize(
    ("queries", "options", "message"),
    [
        (np.ones((1, 5)), {}, r"features \(queries, 4\) or paths of images, got \(1, 5\)"),
        (np.ones((0, 4)), {}, "got \\(0, 4\\)"),
        (np.full((2, 4), np.nan), {}, "contain NaN or infinity: leave out rows without features"),
        (np.ones((1, 4)), {"k": 0}, "k must be at least 1, got 0"),
        (np.ones((1, 4)), {"feature": "patch_mean"}, "There is no feature 'patch_mean' in .*; choose of: cls"),
        ([ImageSource("query.jpg")], {}, "do not say which model made them: give the model"),
    ],
)
def test_searches_that_are_impossible_raise_an_error_that_says_why(
    queries: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = store(tmp_path / "store", np.eye(4, dtype=np.float32), 4)
    with pytest.raises(ValueError, match=message):
        dinov2_fast.search(folder, queries, **options)


def test_stores_without_vectors_are_refused(tmp_path: Path) -> None:
    tokens = store(tmp_path / "tokens", np.ones((2, 9, 4), np.float32), 4)
    with pytest.raises(ValueError, match="'cls' is 9 vectors per image; choose one that is a vector: none"):
        dinov2_fast.search(tokens, np.ones((1, 4)))
    broken = store(tmp_path / "broken", np.full((2, 4), np.nan, np.float32), 4)
    with pytest.raises(ValueError, match=r"No image in .*broken' has features"):
        dinov2_fast.search(broken, np.ones((1, 4)))
    with pytest.raises(FileNotFoundError, match="holds no features"):
        dinov2_fast.search(tmp_path, np.ones((1, 4)))
