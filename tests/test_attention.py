"""The op attention: dense, packed sequences of different lengths, and the weights themselves."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dinov2_fast import ops
from tests import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def _qkv(batch: int, seq_len: int, heads: int = 2, head_dim: int = 64, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(batch, seq_len, 3, heads, head_dim).to(dtype)


def _plain(qkv: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    return ((q @ k.transpose(-2, -1) * qkv.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("seq_len", [1, 5, 257, 261])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_obeys_the_rule(dtype: torch.dtype, seq_len: int) -> None:
    qkv = _qkv(2, seq_len, dtype=dtype)
    out = ops.attention(qkv)
    assert out.is_contiguous()
    reference.assert_obeys_rule(out, reference.attention(qkv), _plain(qkv))


@pytest.mark.parametrize("seq_len", [1370, 2000])
def test_long_sequences(seq_len: int) -> None:
    qkv = _qkv(1, seq_len, heads=1)
    reference.assert_obeys_rule(ops.attention(qkv), reference.attention(qkv), _plain(qkv))


def test_equal_keys_average_the_values_and_one_sharp_key_wins() -> None:
    qkv = _qkv(1, 7, dtype=torch.float64)
    qkv[:, :, 1] = 1.0
    mean = qkv[:, :, 2].mean(1, keepdim=True).expand(-1, 7, -1, -1)
    torch.testing.assert_close(ops.attention(qkv), mean, atol=1e-12, rtol=0)
    qkv[:, :, 0] = 1.0
    qkv[:, :, 1] = 0.0
    qkv[:, 3, 1] = 100.0
    winner = qkv[:, 3:4, 2].expand(-1, 7, -1, -1)
    torch.testing.assert_close(ops.attention(qkv), winner, atol=1e-12, rtol=0)


@pytest.mark.parametrize("seq_lens", [(5,), (5, 5, 9), (1, 257, 1, 30, 30)], ids=str)
def test_varlen_keeps_sequences_apart(seq_lens: tuple[int, ...]) -> None:
    qkv = torch.randn(sum(seq_lens), 3, 2, 64)
    out = ops.attention_varlen(qkv, seq_lens)
    each = [ops.attention(part[None])[0] for part in qkv.split(list(seq_lens))]
    torch.testing.assert_close(out, torch.cat(each), atol=2e-6, rtol=0)
    assert out.is_contiguous()


@pytest.mark.parametrize("rows", [slice(None), slice(0, 1), slice(2, 5)], ids=str)
def test_probabilities_are_the_weights_of_the_rows_asked_for(rows: slice) -> None:
    qkv = _qkv(2, 9, dtype=torch.float64)
    weights = ops.attention_probabilities(qkv, rows)
    torch.testing.assert_close(weights, reference.attention_probabilities(qkv)[:, :, rows], atol=1e-13, rtol=0)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), atol=1e-13, rtol=0)


def test_gradients_in_fp64() -> None:
    qkv = _qkv(1, 4, heads=2, head_dim=3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(ops.attention, (qkv,))
    assert torch.autograd.gradcheck(lambda x: ops.attention_varlen(x[0], (1, 3)), (qkv,))
    assert torch.autograd.gradcheck(ops.attention_probabilities, (qkv,))


def test_dropout_drops_weights_and_keeps_their_mean() -> None:
    qkv = _qkv(1, 64, heads=8)
    qkv[:, :, 2] = 1.0
    out = torch.stack([ops.attention(qkv, 0.5) for _ in range(20)])
    assert out.std() > 0.01
    torch.testing.assert_close(out.mean(), torch.tensor(1.0), atol=0.02, rtol=0)


def test_the_result_is_contiguous_with_every_kernel_of_torch() -> None:
    for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(kernel):
            assert ops.attention(_qkv(2, 9)).is_contiguous()


def test_strides_and_nan() -> None:
    qkv = _qkv(3, 9)
    assert torch.equal(ops.attention(qkv[1:, 2:]), ops.attention(qkv[1:, 2:].contiguous()))
    qkv[0, 4, 2, 0, 0] = float("nan")
    out = ops.attention(qkv)
    assert out[0, :, 0].isnan().any()
    assert out[1:].isfinite().all()
    assert out[0, :, 1].isfinite().all()
