"""The op activation: GELU and SwiGLU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dinov2_fast import ops
from tests import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("shape", [(0, 384), (1, 1), (257, 1536), (3, 5, 383)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_obeys_the_rule(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (3 * torch.randn(shape)).to(dtype)
    reference.assert_obeys_rule(ops.gelu(x), reference.gelu(x), F.gelu(x))


@pytest.mark.parametrize("shape", [(0, 768), (1, 2), (257, 1024), (3, 5, 766)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_obeys_the_rule(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (3 * torch.randn(shape)).to(dtype)
    gate, value = x.tensor_split(2, dim=-1)
    reference.assert_obeys_rule(ops.swiglu(x), reference.swiglu(x), F.silu(gate) * value)


def test_gelu_is_the_exact_one() -> None:
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    assert (ops.gelu(x) - reference.gelu(x)).abs().max() < 1e-15
    assert (F.gelu(x, approximate="tanh") - reference.gelu(x)).abs().max() > 1e-4  # so the bound above tells them apart


def test_swiglu_gates_with_the_first_half() -> None:
    x = torch.tensor([[-30.0, 30.0, 2.0, 3.0]], dtype=torch.float64)
    torch.testing.assert_close(ops.swiglu(x), torch.tensor([[0.0, 90.0]], dtype=torch.float64), atol=1e-10, rtol=0)


def test_gradients_in_fp64() -> None:
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.gelu, (x,))
    assert torch.autograd.gradcheck(ops.swiglu, (x,))


def test_gelu_may_overwrite_its_input() -> None:
    x = torch.randn(9, 64)
    expected = ops.gelu(x)
    assert not torch.equal(x, expected)
    out = ops.gelu(x, overwrite=True)
    assert out.data_ptr() == x.data_ptr()
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("op", [ops.gelu, ops.swiglu])
def test_strides_nan_and_huge_values(op) -> None:
    x = torch.randn(6, 4, 32)
    # torch takes another code path for strided input, which differs by single roundings
    torch.testing.assert_close(op(x.transpose(0, 1)), op(x.transpose(0, 1).contiguous()), atol=2e-6, rtol=0)
    extreme = torch.tensor([[float("nan"), 6e4, -6e4, 0.0]])
    assert op(extreme).isnan().sum() == 1
    assert not op(extreme).isinf().any()
