"""What only a GPU can show of the op attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinov2_fast import ops
from tests.helpers.attention_cases import (
    each_dtype,
    random_qkv,
)
from tests.helpers.devices import (
    gradients,
    on_gpu,
)


@on_gpu
@pytest.mark.parametrize("seq_len", [50, 257, 1370])
@each_dtype
def test_repeats_are_equal_bit_by_bit_while_the_device_is_busy(dtype: torch.dtype, seq_len: int) -> None:
    qkv = random_qkv(8, seq_len, heads=6, dtype=dtype)
    seq_lens = (seq_len, 1, seq_len - 1) + (2 * seq_len,) * 3
    noise, other = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()

    def run() -> list[Tensor]:
        with torch.cuda.stream(other):
            noise.matmul(noise)
        packed = qkv.flatten(0, 1)
        return [
            *gradients(lambda x: ops.attention(x, backend="triton"), [qkv]),
            *gradients(lambda x: ops.attention(x, seq_lens=seq_lens, backend="triton"), [packed]),
            ops.attention(qkv, backend="triton"),
            ops.attention_probabilities(qkv, slice(0, 17), backend="triton"),
        ]

    first = run()
    for _ in range(50):
        assert all(torch.equal(x, y) for x, y in zip(run(), first, strict=True))


@pytest.mark.gpu_large
@on_gpu
@pytest.mark.parametrize("form", ["dense", "varlen"])
def test_more_than_two_to_the_31_elements(form: str) -> None:
    """The last image of so large a batch has the same result as alone."""
    batch, seq_len = 2750, 257

    def run(qkv: Tensor, dout: Tensor) -> list[Tensor]:
        qkv = qkv.detach().requires_grad_()
        if form == "dense":
            out = ops.attention(qkv, backend="triton")
        else:
            packed = ops.attention(qkv.flatten(0, 1), seq_lens=(seq_len,) * len(qkv), backend="triton")
            out = packed.unflatten(0, (-1, seq_len))
        return [out.detach(), *torch.autograd.grad(out, qkv, dout)]

    qkv = torch.randn(1, seq_len, 3, 16, 64, device="cuda", dtype=torch.bfloat16).repeat(batch, 1, 1, 1, 1)
    assert qkv.numel() > 2**31
    qkv[-1] = torch.randn_like(qkv[-1])
    dout = torch.randn_like(qkv[:1, :, 0])
    for large, alone in zip(run(qkv, dout.expand(batch, -1, -1, -1)), run(qkv[-1:], dout), strict=True):
        assert torch.equal(large[-1:], alone)


@pytest.mark.gpu_large
@on_gpu
def test_more_than_two_to_the_31_weights() -> None:
    qkv = torch.randn(2100, 257, 3, 16, 64, device="cuda", dtype=torch.bfloat16)
    p = ops.attention_probabilities(qkv, backend="triton")
    assert p.numel() > 2**31
    assert torch.equal(p[-1:], ops.attention_probabilities(qkv[-1:], backend="triton"))
