"""Inputs for tests of the op attention, plain PyTorch's results for them, and assertions about both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.helpers.devices import (
    DEVICE,
    gradients,
    random,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
E4M3 = torch.float8_e4m3fn
PACKED_LENGTHS = (1, 57, 1, 16, 1, 16)


def random_qkv(
    batch: int, seq_len: int, heads: int = 2, head_dim: int = 64, dtype: torch.dtype = torch.float32
) -> Tensor:
    return random(batch, seq_len, 3, heads, head_dim, dtype=dtype)


def plain_scores(qkv: Tensor) -> Tensor:
    q, k, _ = (t.transpose(1, 2) for t in qkv.unbind(2))
    return q @ k.transpose(-2, -1) * qkv.shape[-1] ** -0.5


def plain_attention(qkv: Tensor) -> Tensor:
    return (plain_scores(qkv).softmax(-1) @ qkv[:, :, 2].transpose(1, 2)).transpose(1, 2)


def each_sequence(function: Callable[[Tensor], Tensor], qkv: Tensor, seq_lens: tuple[int, ...]) -> Tensor:
    """The results of a function of a batch for each packed sequence."""
    return torch.cat([function(part[None])[0] for part in qkv.split(list(seq_lens))])


def assert_gradient_obeys_the_rule(ours: Tensor, ref: Tensor, usual: Tensor) -> None:
    """Compares the gradient as a whole and for q, k and v by themselves, which are dimension -3."""
    reference.assert_obeys_rule(ours, ref, usual)
    for parts in zip(*(x.unbind(-3) for x in (ours, ref, usual)), strict=True):
        reference.assert_obeys_rule(*parts)


def exact_gradient(function: Callable[[Tensor], Tensor], qkv: Tensor) -> Tensor:
    return gradients(function, [qkv.double()])[0]


def assert_one_token_passes_its_gradient_to_its_value(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    qkv = random_qkv(2, 1, dtype=dtype)
    dq, dk, dv = gradients(function, [qkv])[0].unbind(2)
    exact = exact_gradient(reference.attention, qkv)[:, :, 2]
    torch.testing.assert_close(dv.double(), exact, atol=0, rtol=torch.finfo(dtype).eps)
    # 0 except for the rounding of two sums of 64 products, which cancel
    assert max(dq.abs().max(), dk.abs().max()) <= 64 * torch.finfo(torch.float32).eps * qkv.abs().max() ** 2


STRIDES = {
    "transposed": lambda x: x[:, :9].transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda x: x[:, ::2],
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1, -1),
    "offset": lambda x: x[1:, 2:],
    "heads": lambda x: x[:, :, :, 1:],
    "heads first": lambda x: x.permute(0, 1, 3, 2, 4).contiguous().permute(0, 1, 3, 2, 4),
    "columns": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "misaligned": lambda x: x.flatten()[1 : 1 + 2 * 9 * 3 * 2 * 64].view(2, 9, 3, 2, 64),
}


def qkv_of_all_sizes(batch: int, seq_len: int, dtype: torch.dtype, head_dim: int = 64) -> Tensor:
    """qkv with values of one sign and size in a channel: no sum cancels, so that the errors of a dtype are far below a
    step of e4m3, and results saturate in some channels and are subnormal in others."""
    qkv = random_qkv(batch, seq_len, head_dim=head_dim)
    sizes = torch.logspace(-4, 2, head_dim, device=DEVICE) * torch.tensor([1.0, -1.0], device=DEVICE).repeat(
        head_dim // 2
    )
    qkv[:, :, 2] = qkv[:, :, 2].abs() * sizes
    return qkv.to(dtype)


def quantized(exact: Tensor, scale: float) -> Tensor:
    return (exact / scale).clamp(-448, 448).to(E4M3)


def assert_one_step(y: Tensor, exact: Tensor, usual: Tensor, scale: float) -> None:
    """Asserts that `y` is at most one e4m3 step from the exact result, saturated and quantised.

    It may differ at most twice as often, and 0.5 % more, as `usual`, plain PyTorch's result in the same dtype, does.
    """
    assert y.dtype == E4M3
    assert y.is_contiguous()
    expected = quantized(exact, scale)
    differs, usually_differs = (reference.e4m3_steps(x, expected) > 0 for x in (y, quantized(usual.double(), scale)))
    assert reference.e4m3_steps(y, expected).max() <= 1
    assert differs.double().mean() <= 2 * usually_differs.double().mean() + 0.005
    assert {y.float().max().item(), y.float().min().item()} == {448.0, -448.0}
    assert ((y.float() != 0) & (y.float().abs() < 2**-6)).any(), "none is subnormal"
