"""Inputs for tests of the op linear, their exact results in all its forms, and how far e4m3 results may be off."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_fast.ops import linear
from tests import reference
from tests.helpers.devices import (
    DEVICE,
    poisoned_memory,
    random,
)

E4M3 = torch.float8_e4m3fn


def random_operands(
    rows: int, out_features: int, in_features: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    x = random(rows, in_features, dtype=dtype)
    weight = random(out_features, in_features, dtype=dtype, scale=in_features**-0.5)
    return x, weight, random(out_features, dtype=dtype)


def random_stream(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A residual stream, the same for the same sizes."""
    generator = torch.Generator().manual_seed(3)
    residual = torch.randn(*x.shape[:-1], weight.shape[0], generator=generator)
    return residual.to(x.device, dtype or x.dtype)


def run_linear(form: str, backend: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if form != "residual":
        return linear(x, weight, bias, epilogue=form, interleaved=form == "swiglu", backend=backend)
    residual = random_stream(x, weight)
    assert linear(x, weight, bias, epilogue=form, residual=residual, backend=backend) is residual
    return residual


def apply_epilogue(form: str, z: Tensor, residual: Tensor | None = None) -> Tensor:
    """The epilogue in plain PyTorch."""
    if form == "gelu":
        return F.gelu(z)
    if form == "swiglu":
        return F.silu(z[..., 0::2]) * z[..., 1::2]
    return z if form == "none" else residual + z


def exact_linear(form: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if form == "swiglu":
        return reference.linear_swiglu(x, weight, bias)
    z = reference.linear(x, weight, bias)
    if form == "residual":
        return random_stream(x, weight).double() + z
    return reference.gelu(z) if form == "gelu" else z


def plain_linear(form: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    stream = random_stream(x, weight) if form == "residual" else None
    return apply_epilogue(form, F.linear(x, weight, bias), stream)


def swish(x: Tensor) -> Tensor:
    return x / (1.0 + torch.exp(-x))


def random_fp8_operands(size: tuple[int, int, int]) -> tuple[Any, ...]:
    """(x, its scale, weight, its scales, bias), and x and weight as the matrices that they stand for."""
    rows, out_features, in_features = size
    x, weight = random(rows, in_features, scale=50).to(E4M3), random(out_features, in_features, scale=50).to(E4M3)
    weight_scale = torch.rand(out_features).add(0.5).div(50 * in_features**0.5).to(DEVICE)
    bias = random(out_features, dtype=torch.bfloat16)
    return (x, 0.02, weight, weight_scale, bias), (
        x.double() * 0.02,
        weight.double() * weight_scale[:, None].double(),
    )


def run_fp8(form: str, backend: str, operands: tuple[Any, ...], dtype: torch.dtype, out_scale: float = 1.0) -> Tensor:
    x, scale, weight, weight_scale, bias = operands
    options = {"epilogue": form, "scale": scale, "weight_scale": weight_scale, "backend": backend}
    options["interleaved"] = form == "swiglu" and backend != "cublas"
    if form == "residual":
        residual = random_stream(x, weight, dtype)
        assert linear(x, weight, bias, residual=residual, **options) is residual
        return residual
    return linear(x, weight, bias, dtype=dtype, out_scale=out_scale, **options)


def exact_fp8(form: str, operands: tuple[Any, ...], x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    if form == "residual":
        return random_stream(operands[0], operands[2], dtype).double() + reference.linear(x, weight, operands[-1])
    return exact_linear(form, x, weight, operands[-1])


def fp8_slack(x: Tensor, weight: Tensor, backend: str) -> Tensor:
    """The error allowed for each element of x @ weight^T, where both are the fp64 values of the e4m3 matrices.

    Only the tensor cores of a GPU add up in less than fp32.
    """
    if DEVICE == "cuda" and backend != "torch":
        return tensor_core_slack(x, weight)
    return 2.0**-22 * (x.abs() @ weight.abs().T)


PRODUCTS = 32  # that one instruction of the tensor cores adds to the sum of an element
SIGNIFICANT_BITS = 14  # kept of the largest of these numbers; the others are truncated at the place of its last bit


def tensor_core_slack(x: Tensor, weight: Tensor) -> Tensor:
    """By how much the sums of Hopper's tensor cores may be off.

    Instruction i loses less than u_i = 2^-13 max(|sum before|, |products|, |sum after|) of each of the two sums and of
    each product (DeepSeek-V3, arXiv:2412.19437, sections 3.3.2 and 3.5.2). In these tests the products have random
    signs, and so have their losses. By Hoeffding's inequality, one element of 2^45 is off by more than

        sum_i 2 u_i + 8 sqrt(sum_i 32 u_i^2)
    """
    total, lost_of_sums, squares = (x.new_zeros(len(x), len(weight)) for _ in range(3))
    for a, b in zip(x.split(PRODUCTS, 1), weight.split(PRODUCTS, 1), strict=True):
        largest = torch.maximum(total.abs(), torch.outer(a.abs().amax(1), b.abs().amax(1)))
        total = total + a @ b.T
        unit = 2.0 ** (1 - SIGNIFICANT_BITS) * torch.maximum(largest, total.abs())
        lost_of_sums += 2 * unit
        squares += PRODUCTS * unit**2
    return lost_of_sums + 8 * squares.sqrt()


def tensor_core_sums(x: Tensor, weight: Tensor, bits: int) -> Tensor:
    """x @ weight^T, added up by tensor cores that keep this many bits of the largest number."""

    def cut_off(numbers: Tensor) -> Tensor:
        unit = torch.exp2(torch.frexp(numbers.abs().amax(-1, keepdim=True)).exponent.double() - bits)
        return (numbers / unit).trunc() * unit

    total = x.new_zeros(len(x), len(weight), 1)
    for a, b in zip(x.split(PRODUCTS, 1), weight.split(PRODUCTS, 1), strict=True):
        total = cut_off(cut_off(torch.cat((total, a[:, None] * b), -1)).sum(-1, keepdim=True))
    return total[..., 0]


def assert_fp8_residual_in_fp32(backend: str) -> None:
    operands, matrices = random_fp8_operands((66, 40, 48))
    y = run_fp8("residual", backend, operands, torch.float32)
    exact = exact_fp8("residual", operands, *matrices, torch.float32)
    rounding = exact.abs().max() * 2.0**-23
    wrong = (y.double() - exact).abs()
    assert y.dtype == torch.float32
    assert (wrong <= fp8_slack(*matrices, backend) + rounding).all()


def assert_e4m3_result(form: str, backend: str, size: tuple[int, int, int]) -> None:
    """Asserts that results are within the slack of the formula. Fewer than 1 % may be outside, by one e4m3 step."""
    operands, matrices = random_fp8_operands(size)
    with poisoned_memory():
        y = run_fp8(form, backend, operands, E4M3, 1 / 300)
    z, slack = reference.linear(*matrices, operands[-1]), fp8_slack(*matrices, backend)
    if form == "gelu":  # whose slope is 1.13 or less, and that of SiLU 1.1
        slack = 1.13 * slack
    else:
        gate, value = F.silu(z[:, 0::2]).abs(), z[:, 1::2].abs()
        slack = 1.1 * slack[:, 0::2] * (value + slack[:, 1::2]) + gate * slack[:, 1::2]
    exact = exact_linear(form, *matrices, operands[-1])
    low, high = (((exact + s) * 300).clamp(-448, 448).to(E4M3) for s in (-slack, slack))
    below = reference.e4m3_position(low) - reference.e4m3_position(y)
    above = reference.e4m3_position(y) - reference.e4m3_position(high)
    steps = torch.maximum(below, above)
    assert steps.max() <= 1
    assert (steps > 0).double().mean() < 0.01
    assert y.float().max() == 448
