"""The op residual: adding a branch for all pictures, or for a subset of them."""

from __future__ import annotations

import pytest
import torch

from dinov2_fast import ops
from tests import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def _stream(dtype: torch.dtype, pictures: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    residual, branch = torch.randn(2, pictures, 9, 64).to(dtype).unbind(0)
    return residual, branch, torch.rand(64).to(dtype)


@pytest.mark.parametrize("with_gamma", [True, False])
@pytest.mark.parametrize("with_drop_scale", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_obeys_the_rule(dtype: torch.dtype, with_drop_scale: bool, with_gamma: bool) -> None:
    residual, branch, gamma = _stream(dtype)
    gamma = gamma if with_gamma else None
    drop_scale = torch.tensor([0.0, 1.5, 1.5, 0.0], dtype=dtype) if with_drop_scale else None
    before = residual.clone()
    plain = branch if gamma is None else branch * gamma
    plain = residual + (plain if drop_scale is None else plain * drop_scale[:, None, None])
    out = ops.add_residual(residual, branch, gamma, drop_scale)
    reference.assert_obeys_rule(out, reference.add_residual(residual, branch, gamma, drop_scale), plain)
    assert torch.equal(residual, before)


@pytest.mark.parametrize("index", [[2], [3, 0], [1, 3, 0, 2]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scatter_add_obeys_the_rule_and_leaves_other_pictures(dtype: torch.dtype, index: list[int]) -> None:
    residual, branch, gamma = _stream(dtype)
    rows, scale = torch.tensor(index), 4 / len(index)
    before = residual.clone()
    out = ops.scatter_add_residual(residual, rows, branch[: len(index)], gamma, scale)
    plain = residual.clone()
    plain[rows] += branch[: len(index)] * gamma * scale
    ref = reference.scatter_add_residual(residual, rows, branch[: len(index)], gamma, scale)
    reference.assert_obeys_rule(out, ref, plain)
    others = [i for i in range(4) if i not in index]
    assert torch.equal(out[others], residual[others])
    assert torch.equal(residual, before)


def test_gather_takes_the_pictures_in_order() -> None:
    x = torch.randn(4, 9, 8)
    assert torch.equal(ops.gather_rows(x, torch.tensor([3, 1])), torch.stack([x[3], x[1]]))


def test_gradients_in_fp64() -> None:
    residual, branch = torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True).unbind(0)
    gamma = torch.randn(4, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.0, 2.0, 2.0], dtype=torch.float64)
    index = torch.tensor([2, 0])
    assert torch.autograd.gradcheck(lambda r, b, g: ops.add_residual(r, b, g, scale), (residual, branch, gamma))
    assert torch.autograd.gradcheck(
        lambda r, b, g: ops.scatter_add_residual(r, index, ops.gather_rows(b, index), g, 1.5),
        (residual, branch, gamma),
    )


def test_autocast_keeps_the_stream_in_fp32() -> None:
    residual, branch, gamma = _stream(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.add_residual(residual, branch.bfloat16(), gamma, None).dtype == torch.float32
        index = torch.tensor([1])
        assert ops.scatter_add_residual(residual, index, branch[:1].bfloat16(), gamma, 4.0).dtype == torch.float32
