"""The op layer_norm, alone and with the residual addition before it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dinov2_fast import ops
from tests import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
ROWS = [0, 1, 257]
HIDDEN = [384, 768, 1024, 1536, 383, 1, 8192]
EPS = 1e-6


def _parameters(hidden: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(hidden).add(0.5).to(dtype), torch.randn(hidden).to(dtype)


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_obeys_the_rule(dtype: torch.dtype, rows: int, hidden: int) -> None:
    x = (3 * torch.randn(rows, hidden) + 1).to(dtype)
    weight, bias = _parameters(hidden, dtype)
    y = ops.layer_norm(x, weight, bias, EPS)
    plain = F.layer_norm(x, (hidden,), weight, bias, EPS)
    reference.assert_obeys_rule(y, reference.layer_norm(x, weight, bias, EPS), plain)


def test_fp64_equals_the_formula() -> None:
    x = torch.randn(5, 384, dtype=torch.float64)
    weight, bias = _parameters(384, torch.float64)
    torch.testing.assert_close(
        ops.layer_norm(x, weight, bias, EPS), reference.layer_norm(x, weight, bias, EPS), rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("with_gamma", [True, False])
@pytest.mark.parametrize("with_drop_scale", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_add_layer_norm_equals_its_parts(dtype: torch.dtype, with_drop_scale: bool, with_gamma: bool) -> None:
    residual, branch = torch.randn(2, 3, 17, 64, dtype=dtype)
    gamma = torch.rand(64, dtype=dtype) if with_gamma else None
    drop_scale = torch.tensor([0.0, 1.25, 1.25], dtype=dtype) if with_drop_scale else None
    weight, bias = _parameters(64, dtype)
    total, y = ops.add_layer_norm(residual, branch, gamma, drop_scale, weight, bias, EPS)
    expected = reference.add_residual(residual, branch, gamma, drop_scale)
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(total.double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(
        y.double(), reference.layer_norm(expected, weight, bias, EPS), rtol=0, atol=4 * tolerance
    )


def test_gradients_in_fp64() -> None:
    residual, branch = torch.randn(2, 2, 3, 5, dtype=torch.float64, requires_grad=True).unbind(0)
    gamma, weight, bias = torch.randn(3, 5, dtype=torch.float64, requires_grad=True).unbind(0)
    scale = torch.tensor([0.0, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda r, b, g, w, c: ops.add_layer_norm(r, b, g, scale, w, c, EPS), (residual, branch, gamma, weight, bias)
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2],
        lambda x: x[:1].expand(4, -1, -1),
        lambda x: x[1:, 1:],
    ],
    ids=["transposed", "strided", "expanded", "offset"],
)
def test_strided_input_gives_what_a_copy_gives(make) -> None:
    x = make(torch.randn(4, 6, 64))
    weight, bias = _parameters(64, torch.float32)
    assert torch.equal(ops.layer_norm(x, weight, bias, EPS), ops.layer_norm(x.contiguous(), weight, bias, EPS))


def test_nan_and_inf_stay_in_their_row_and_constant_rows_give_the_bias() -> None:
    x = torch.randn(4, 64)
    x[1, 3], x[2, 5], x[3] = float("nan"), float("inf"), 7.0
    weight, bias = _parameters(64, torch.float32)
    y = ops.layer_norm(x, weight, bias, EPS)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    assert y[2].isnan().all()
    torch.testing.assert_close(y[3], bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_gives_the_dtype_torch_gives(dtype: torch.dtype) -> None:
    x, (weight, bias) = torch.randn(2, 8, dtype=dtype), _parameters(8, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.layer_norm(x, weight, bias, EPS).dtype == F.layer_norm(x, (8,), weight, bias, EPS).dtype
