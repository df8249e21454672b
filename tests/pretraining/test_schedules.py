"""Schedules of pretraining: equal to the reference's arrays, at the first and the last step too."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dinov2_fast.pretraining.config import PretrainingConfig
from dinov2_fast.pretraining.schedules import cosine, linear, rates_at
from tests.helpers import reference_functions as reference

ROUNDING = 1e-14  # relative to the largest value: cosines of two libraries

CONFIG = PretrainingConfig().updated(
    {
        "teacher": {"momentum": 0.9, "start_temperature": 0.04, "temperature": 0.07, "temperature_warmup_steps": 4},
        "optimizer": {
            "learning_rate": 0.01,
            "min_learning_rate": 1e-3,
            "warmup_steps": 3,
            "weight_decay": 0.1,
            "final_weight_decay": 0.5,
            "freeze_last_layer_steps": 5,
        },
        "run": {"steps": 9, "batch_size": 256},
    }
)


def ours(name: str) -> list[float]:
    base, final, total, warmup, start = reference.SCHEDULES[name]
    if warmup == total:
        return [linear(step, start, final, total) for step in range(total + 1)]
    return [cosine(step, base, final, total, warmup_steps=warmup) for step in range(total + 1)]


@pytest.mark.parametrize("name", reference.SCHEDULES)
def test_schedules_of_the_reference(name: str) -> None:
    expected = reference.load_golden()["schedules"][name]
    assert ours(name) == pytest.approx(expected, rel=0, abs=ROUNDING * max(expected))


@pytest.mark.parametrize("name", reference.SCHEDULES)
def test_schedules_of_the_reference_beside_ours(name: str, request: pytest.FixtureRequest) -> None:
    expected = reference.schedule(reference.reference_file(request, "utils/utils.py"), name)
    assert ours(name) == pytest.approx(expected, rel=0, abs=ROUNDING * max(expected))


def falling_cosine(high: float, low: float, n: int) -> list[float]:
    return list(low + (high - low) * (np.cos(np.arange(n) / n * np.pi) + 1) / 2)


def rates_of(name: str, steps: range = range(11)) -> list[float]:
    return [rates_at(CONFIG, step).to_dict()[name] for step in steps]


def test_learning_rate() -> None:
    """Scaled by the root of 256 / 1024, but not the lowest; 0 first; the highest twice; the lowest after the end."""
    expected = [0, 0.0025, 0.005, *falling_cosine(0.005, 1e-3, 6), 1e-3, 1e-3]
    assert expected[2] == expected[3]
    assert rates_of("learning_rate") == pytest.approx(expected, rel=1e-14)


def test_the_last_layer_waits() -> None:
    free = rates_of("learning_rate")
    assert rates_of("last_layer_learning_rate") == [0] * 5 + free[5:]


def test_weight_decay_and_momentum() -> None:
    assert rates_of("weight_decay") == pytest.approx([*falling_cosine(0.1, 0.5, 9), 0.5, 0.5], rel=1e-14)
    assert rates_of("momentum") == pytest.approx([*falling_cosine(0.9, 1, 9), 1, 1], rel=1e-14)


def test_temperature() -> None:
    expected = [0.04, 0.05, 0.06, *[0.07] * 8]
    assert rates_of("temperature") == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(("steps", "expected"), [(0, [7, 7, 7]), (1, [3, 7, 7]), (2, [3, 7, 7]), (3, [3, 5, 7])])
def test_short_warmups(steps: int, expected: list[float]) -> None:
    assert [linear(step, 3, 7, steps) for step in range(3)] == expected


def test_phases_longer_than_the_run() -> None:
    long = CONFIG.updated(
        {"optimizer": {"warmup_steps": 20, "freeze_last_layer_steps": 20}, "teacher": {"temperature_warmup_steps": 20}}
    )
    last = rates_at(long, 8)
    assert last.learning_rate == pytest.approx(0.005 * 8 / 19)
    assert last.last_layer_learning_rate == 0
    assert last.temperature == pytest.approx(0.04 + 0.03 * 8 / 19)


def test_the_short_recipe_after_its_warmup() -> None:
    angle = math.pi / 10
    expected = {
        "learning_rate": 0.004,
        "last_layer_learning_rate": 0.004,
        "weight_decay": 0.4 - 0.36 * (1 + math.cos(angle)) / 2,
        "momentum": 1 - 0.008 * (1 + math.cos(angle)) / 2,
        "temperature": 0.04 + 0.03 * 12_500 / 37_499,
    }
    assert rates_at(PretrainingConfig(), 12_500).to_dict() == pytest.approx(expected)
