"""The order of the images, and the seeds."""

from __future__ import annotations

import numpy as np
import pytest

from dinov2_fast.pretraining.order import image_at, mix


@pytest.mark.parametrize("n_images", [1, 2, 3, 4, 5, 10, 1000, 1024, 1025])
def test_each_pass_shows_every_image_once(n_images: int) -> None:
    passes = [[image_at(7, number * n_images + i, n_images) for i in range(n_images)] for number in range(3)]
    assert all(sorted(each) == list(range(n_images)) for each in passes)
    if n_images >= 10:
        assert len({tuple(each) for each in passes}) == 3


def test_seeds_give_different_orders() -> None:
    assert [image_at(0, i, 100) for i in range(100)] != [image_at(1, i, 100) for i in range(100)]


def test_any_image_may_follow_any_other() -> None:
    """Over many passes, each place has each of five images about equally often, and so has each pair of neighbours."""
    passes = np.array([[image_at(3, number * 5 + i, 5) for i in range(5)] for number in range(2000)])
    places = np.array([np.bincount(passes[:, place], minlength=5) for place in range(5)])
    assert np.abs(places - 400).max() < 90
    pairs = np.bincount(passes[:, 0] * 5 + passes[:, 1], minlength=25).reshape(5, 5)
    assert np.abs(pairs[~np.eye(5, dtype=bool)] - 100).max() < 60


def test_a_position_far_away_needs_no_state() -> None:
    assert 0 <= image_at(0, 10**15, 10**9) < 10**9


def test_every_number_and_their_order_change_a_seed() -> None:
    seeds = {mix(), mix(0), mix(1), mix(0, 0), mix(0, 1), mix(1, 0), mix(2**64 - 1)}
    assert len(seeds) == 7
    changed = [bin(mix(5, 1 << bit) ^ mix(5, 0)).count("1") for bit in range(64)]
    assert 24 < np.mean(changed) < 40
    assert min(changed) > 10
