"""`compare_weights` of values that are not finite; tests/cli/test_verify.py has the rest."""

from __future__ import annotations

import pytest

from dinov2_fast.weights.architecture import plan_weights
from dinov2_fast.weights.compare import compare_weights
from tests.helpers import golden


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_the_same_infinite_or_undefined_values_are_the_same(value: str) -> None:
    """Otherwise a checkpoint that has one would be refused after its conversion."""
    _, weights, _ = golden.load_case("facebook_mlp")
    broken = {**weights, "norm.bias": weights["norm.bias"].clone()}
    broken["norm.bias"][1] = float(value)
    copied = {key: tensor.clone() for key, tensor in broken.items()}
    assert compare_weights(plan_weights(broken), plan_weights(copied)).different == ()
    assert compare_weights(plan_weights(broken), plan_weights(weights)).different == ("norm.bias",)
