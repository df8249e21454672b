"""Nearest neighbours are those of the largest cosine, whatever the blocks that they are read in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dinov2_fast.retrieval import nearest


def neighbours_by_hand(features: np.ndarray, row: int, count: int) -> list[int]:
    cosines = [
        float(features[row] @ other / np.linalg.norm(features[row]) / np.linalg.norm(other)) for other in features
    ]
    return sorted((i for i in range(len(features)) if i != row), key=lambda i: -cosines[i])[:count]


@pytest.mark.parametrize("block", [7, 50, 1000])
def test_neighbours_are_those_of_the_largest_cosine(block: int) -> None:
    features = np.random.default_rng(0).standard_normal((50, 6)) * np.random.default_rng(1).uniform(0.1, 9, (50, 1))
    indices, cosines = nearest(features, [3, 49, 0], 4, block=block)
    assert indices.tolist() == [neighbours_by_hand(features, row, 4) for row in (3, 49, 0)]
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = np.take_along_axis(units[[3, 49, 0]] @ units.T, indices, 1)
    np.testing.assert_allclose(cosines, expected, atol=1e-6)


def test_equally_near_rows_come_in_order_and_a_row_is_not_its_own_neighbour() -> None:
    features = np.ones((5, 3))
    for block in (1, 2, 5):
        indices, cosines = nearest(features, [2], 3, block=block)
        assert indices.tolist() == [[0, 1, 3]]
        np.testing.assert_allclose(cosines, 1, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_copies_of_a_row_come_in_order_whatever_the_blocks(seed: int) -> None:
    random = np.random.default_rng(seed)
    features = random.standard_normal((997, 384)).astype(np.float32)
    copies = np.sort(random.choice(np.arange(5, 997), 60, replace=False))
    features[copies] = features[0] + 0.3 * features[1]
    for block in (1, 64, 333, 997):
        indices, cosines = nearest(features, [0, 1, 2], 50, block=block)
        assert indices[0].tolist() == copies[:50].tolist()
        assert len(set(cosines[0].tolist())) == 1
        if block == 1:
            expected = indices, cosines
        assert np.array_equal(indices, expected[0])
        assert np.array_equal(cosines, expected[1])


def test_rows_without_features_are_no_neighbours(tmp_path: Path) -> None:
    features = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float16)
    features[[0, 4]] = np.nan
    features[5] = 0  # a vector of zeros has no direction, and is far from all
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
