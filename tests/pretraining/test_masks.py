"""Masks of pretraining: single ones as in the reference, and those of a batch."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dinov2_fast.pretraining import masks
from dinov2_fast.pretraining.config import PretrainingConfig
from dinov2_fast.pretraining.masks import batch_masks, block_mask
from tests.helpers import reference_functions as reference


def make_mask(n_masked: int, grid: int, seed: int) -> NDArray[np.bool_]:
    return block_mask(n_masked, grid, grid, Random(seed))


def config(grid: int = 16, **settings: Any) -> PretrainingConfig:
    return PretrainingConfig().updated({"crops": {"global_size": 14 * grid}, "masks": settings})


def all_masks(settings: PretrainingConfig, batch_size: int, *, seed: int = 0, step: int = 0) -> NDArray[np.bool_]:
    return batch_masks(settings, seed, step, batch_size=batch_size, first=0, count=batch_size)


def test_one_mask_of_the_reference() -> None:
    rows = ["".join(".#"[int(patch)] for patch in row) for row in make_mask(24, 7, 3)]
    assert rows == reference.load_golden()["mask"]


@pytest.mark.parametrize("grid", reference.GRIDS)
def test_a_hundred_masks_of_the_reference(grid: int) -> None:
    assert reference.mask_digest(grid, make_mask) == reference.load_golden()["masks"][str(grid)]


@pytest.mark.parametrize("grid", [1, *reference.GRIDS])
def test_masks_of_the_reference_beside_ours(grid: int, request: pytest.FixtureRequest) -> None:
    masking = reference.reference_file(request, "data/masking.py")
    for seed in range(200):
        n_masked = seed * grid**2 // 199
        assert np.array_equal(make_mask(n_masked, grid, seed), reference.mask(masking, n_masked, grid, seed))


@pytest.mark.parametrize("grid", [7, 16, 37])
def test_a_mask_has_at_most_as_many_patches_as_asked_for(grid: int) -> None:
    wanted = [seed * grid**2 // 199 for seed in range(200)]
    found = [int(make_mask(n_masked, grid, seed).sum()) for seed, n_masked in enumerate(wanted)]
    assert all(few <= many for few, many in zip(found, wanted, strict=True))
    assert sum(found) > 0.95 * sum(wanted)


def test_equal_random_states_give_equal_masks_and_advance() -> None:
    rng, same = Random(5), Random(5)
    first, second = block_mask(30, 16, 16, rng), block_mask(30, 16, 16, rng)
    assert np.array_equal(first, block_mask(30, 16, 16, same))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (1, 1), (1, 8)])
def test_a_grid_without_room_has_no_masks(rows: int, columns: int) -> None:
    assert block_mask(4, rows, columns, Random(0)).sum() == 0


@pytest.mark.parametrize(("probability", "batch_size", "masked"), [(0.5, 20, 20), (0.3, 5, 3), (1, 4, 8), (0, 4, 0)])
def test_the_counts_of_a_batch_fill_the_strata(
    probability: float, batch_size: int, masked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_patches(n_masked: int, rows: int, columns: int, rng: Random) -> NDArray[np.bool_]:
        return (np.arange(rows * columns) < n_masked).reshape(rows, columns)

    monkeypatch.setattr(masks, "block_mask", first_patches)
    counts = all_masks(config(probability=probability, ratio=(0.2, 0.6)), batch_size).sum(axis=2)
    assert counts.shape == (2, batch_size)
    edges = [256 * (0.2 + 0.4 * stratum / max(masked, 1)) for stratum in range(masked + 1)]
    drawn = sorted(counts[counts > 0])
    assert len(drawn) == masked
    for count, low, high in zip(drawn, edges, edges[1:], strict=False):
        assert int(low) <= count <= int(high)


def test_masked_crops_and_strata_are_spread_over_the_batch() -> None:
    counts = np.stack([all_masks(config(), 16, step=step).sum(axis=2) for step in range(100)])  # (steps, crops, images)
    share = (counts > 0).mean(axis=0)
    assert np.abs(share - 0.5).max() < 5 * (0.25 / 100) ** 0.5
    mean = counts.sum(axis=0) / (counts > 0).sum(axis=0)
    assert mean == pytest.approx(256 * 0.3, rel=0.25)


def test_a_process_makes_the_masks_of_its_own_images() -> None:
    whole = all_masks(config(grid=7), 12, seed=3, step=4)
    parts = [
        batch_masks(config(grid=7), 3, 4, batch_size=12, first=first, count=count) for first, count in ((0, 5), (5, 7))
    ]
    assert whole.dtype == bool
    assert whole.shape == (2, 12, 49)
    assert np.array_equal(np.concatenate(parts, axis=1), whole)


def test_masks_depend_on_seed_and_step() -> None:
    made = [all_masks(config(grid=7), 8, seed=seed, step=step) for seed in (0, 1) for step in (0, 1)]
    for index, each in enumerate(made):
        assert not any(np.array_equal(each, other) for other in made[:index])
