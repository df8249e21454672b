"""Multi-head self-attention on packed queries, keys and values.

    p = softmax(q @ k^T / sqrt(head_dim)),  out = p @ v          for each picture and head

`qkv` is what the qkv linear writes, (batch, seq_len, 3, heads, head_dim), read in place; the result is token-major,
(batch, seq_len, heads, head_dim), as the output projection reads it. `attention_varlen` takes pictures of different
sizes packed along one token axis. `attention_probabilities` is p itself, which the fast forms never write out. The
`_fp8` forms return e4m3 values, divided by a given scale, for a projection of e4m3 operands.
Source: Vaswani et al., arXiv:1706.03762.
"""

from __future__ import annotations

from itertools import groupby
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinov2_fast.backends import Implementation, Op
from dinov2_fast.ops import _attention_peers, _fp8
from dinov2_fast.ops import _registry_old as _registry

HEAD_DIMS = (32, 64, 128)  # those of the kernels


def attention(qkv: Tensor, dropout_p: float = 0.0, *, backend: str | None = None) -> Tensor:
    """Attention within each picture.

    Args:
        qkv: (batch, seq_len, 3, heads, head_dim).
        dropout_p: probability of dropping an attention weight; 0 outside training.
        backend: the implementation to use instead of the default.

    Returns:
        (batch, seq_len, heads, head_dim), contiguous, in the dtype of `qkv`.
    """
    return _ATTENTION(qkv, dropout_p, backend=backend)


def attention_varlen(
    qkv: Tensor, seq_lens: tuple[int, ...], dropout_p: float = 0.0, *, backend: str | None = None
) -> Tensor:
    """Attention within each of several sequences packed along one axis.

    Args:
        qkv: (total_tokens, 3, heads, head_dim).
        seq_lens: tokens of each sequence in order; they sum to total_tokens.
        dropout_p: probability of dropping an attention weight; 0 outside training.
        backend: the implementation to use instead of the default.

    Returns:
        (total_tokens, heads, head_dim), contiguous, in the dtype of `qkv`.

    Raises:
        ValueError: the sequences and `qkv` differ in their number of tokens.
    """
    _check_lengths(qkv, seq_lens)
    return _ATTENTION_VARLEN(qkv, seq_lens, dropout_p, backend=backend)


def attention_fp8(qkv: Tensor, scale: float, *, backend: str | None = None) -> Tensor:
    """:func:`attention` as e4m3 values (batch, seq_len, heads, head_dim), to be multiplied by `scale`.

    Values beyond ±448 times `scale` saturate. For inference only.
    """
    return _ATTENTION_FP8(qkv, scale, backend=backend)


def attention_varlen_fp8(qkv: Tensor, seq_lens: tuple[int, ...], scale: float, *, backend: str | None = None) -> Tensor:
    """:func:`attention_varlen` as e4m3 values (total_tokens, heads, head_dim), to be multiplied by `scale`.

    Values beyond ±448 times `scale` saturate. For inference only.

    Raises:
        ValueError: the sequences and `qkv` differ in their number of tokens.
    """
    _check_lengths(qkv, seq_lens)
    return _ATTENTION_VARLEN_FP8(qkv, seq_lens, scale, backend=backend)


def attention_probabilities(qkv: Tensor, rows: slice = slice(None), *, backend: str | None = None) -> Tensor:
    """The attention weights of chosen query rows.

    Args:
        qkv: (batch, seq_len, 3, heads, head_dim).
        rows: the queries asked for; ``slice(0, 1)`` is the CLS token's attention map.
        backend: the implementation to use instead of the default.

    Returns:
        (batch, heads, len(rows), seq_len), rows summing to 1, in the dtype of `qkv`.
    """
    return _ATTENTION_PROBABILITIES(qkv, rows, backend=backend)


def _check_lengths(qkv: Tensor, seq_lens: tuple[int, ...]) -> None:
    if sum(seq_lens) != qkv.shape[0]:
        raise ValueError(f"seq_lens sum to {sum(seq_lens)}, but qkv has {qkv.shape[0]} tokens.")


def attention_torch(qkv: Tensor, dropout_p: float = 0.0) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, seq_len, head_dim)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p).transpose(1, 2).contiguous()


def attention_varlen_torch(qkv: Tensor, seq_lens: tuple[int, ...], dropout_p: float = 0.0) -> Tensor:
    outputs, start = [], 0
    for seq_len, run in groupby(seq_lens):  # neighbours of one length are one batch
        batch = len(list(run))
        packed = qkv[start : start + batch * seq_len].unflatten(0, (batch, seq_len))
        outputs.append(attention_torch(packed, dropout_p).flatten(0, 1))
        start += batch * seq_len
    return torch.cat(outputs)


def attention_fp8_torch(qkv: Tensor, scale: float) -> Tensor:
    return _fp8.quantize(attention_torch(qkv).float(), scale)


def attention_varlen_fp8_torch(qkv: Tensor, seq_lens: tuple[int, ...], scale: float) -> Tensor:
    return _fp8.quantize(attention_varlen_torch(qkv, seq_lens).float(), scale)


def attention_probabilities_torch(qkv: Tensor, rows: slice = slice(None)) -> Tensor:
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    return ((q[:, :, rows] * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1)


# The kernels


def _forward_kernels() -> ModuleType:
    from dinov2_fast.kernels import attention

    return attention


def _backward_kernels() -> ModuleType:
    from dinov2_fast.kernels import attention_backward

    return attention_backward


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor) -> Tensor:
        out, lse = _forward(qkv)
        ctx.save_for_backward(qkv, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        return _backward(dout, *ctx.saved_tensors)


class _AttentionVarlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        out, lse = _varlen_forward(qkv, cu_seqlens, max_seqlen)
        ctx.save_for_backward(qkv, out, lse, cu_seqlens)
        ctx.max_seqlen = max_seqlen
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return _varlen_backward(dout, *ctx.saved_tensors, ctx.max_seqlen), None, None


class _AttentionProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, start: int, stop: int, step: int) -> Tensor:
        p = _probabilities_forward(qkv, start, stop, step)
        ctx.save_for_backward(qkv, p)
        ctx.rows = slice(start, stop, step)
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dp: Tensor) -> tuple[Tensor | None, ...]:
        qkv, p = ctx.saved_tensors  # p is there in full, so plain products need no more memory than a kernel would
        q, k = qkv[:, ctx.rows, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)
        dscores = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype) * qkv.shape[-1] ** -0.5
        dqkv = qkv.new_zeros(qkv.shape)
        dqkv[:, ctx.rows, 0] = (dscores @ k).transpose(1, 2)
        dqkv[:, :, 1] = (dscores.transpose(-2, -1) @ q).transpose(1, 2)
        return dqkv, None, None, None


def _fake_forward(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *batch, tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty((*batch, tokens, heads, head_dim))
    return out, qkv.new_empty((*batch, heads, tokens), dtype=torch.float32)


def _fake_fp8(qkv: Tensor, *rest: Any) -> Tensor:
    return qkv.new_empty((*qkv.shape[:-3], *qkv.shape[-2:]), dtype=torch.float8_e4m3fn)


def _fake_backward(dout: Tensor, qkv: Tensor, *rest: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _fake_probabilities(qkv: Tensor, start: int, stop: int, step: int) -> Tensor:
    batch, tokens, _, heads, _ = qkv.shape
    return qkv.new_empty((batch, heads, max(0, (stop - start + step - 1) // step), tokens))


_FORWARD = "(Tensor qkv) ->"
_PACKED = "Tensor qkv, Tensor cu_seqlens, SymInt max_seqlen"
_VARLEN = f"({_PACKED}) ->"
_PROBABILITIES = "(Tensor qkv, SymInt start, SymInt stop, SymInt step) -> Tensor"
_SAVED = "Tensor dout, Tensor qkv, Tensor out, Tensor lse"

_attention = _registry.register(
    f"attention{_FORWARD} Tensor",
    lambda qkv: _forward_kernels().attention_forward(qkv)[0],
    lambda qkv: _fake_forward(qkv)[0],
    _Attention.apply,
    autocast=torch.get_autocast_dtype,
)
_forward = _registry.register(
    f"attention_forward{_FORWARD} (Tensor, Tensor)",
    lambda qkv: _forward_kernels().attention_forward(qkv),
    _fake_forward,
)
_backward = _registry.register(
    f"attention_backward({_SAVED}) -> Tensor",
    lambda *args: _backward_kernels().attention_backward(*args),
    _fake_backward,
)
_varlen = _registry.register(
    f"attention_varlen{_VARLEN} Tensor",
    lambda *args: _forward_kernels().attention_varlen_forward(*args)[0],
    lambda *args: _fake_forward(*args)[0],
    _AttentionVarlen.apply,
    autocast=torch.get_autocast_dtype,
)
_varlen_forward = _registry.register(
    f"attention_varlen_forward{_VARLEN} (Tensor, Tensor)",
    lambda *args: _forward_kernels().attention_varlen_forward(*args),
    _fake_forward,
)
_varlen_backward = _registry.register(
    f"attention_varlen_backward({_SAVED}, Tensor cu_seqlens, SymInt max_seqlen) -> Tensor",
    lambda *args: _backward_kernels().attention_varlen_backward(*args),
    _fake_backward,
)
_fp8_forward = _registry.register(
    "attention_fp8(Tensor qkv, float scale) -> Tensor",
    lambda qkv, scale: _forward_kernels().attention_forward(qkv, scale=scale)[0],
    _fake_fp8,
)
_varlen_fp8_forward = _registry.register(
    f"attention_varlen_fp8({_PACKED}, float scale) -> Tensor",
    lambda *args: _forward_kernels().attention_varlen_forward(*args[:-1], scale=args[-1])[0],
    _fake_fp8,
)
_probabilities = _registry.register(
    f"attention_probabilities{_PROBABILITIES}",
    lambda *args: _forward_kernels().attention_probabilities_forward(*args),
    _fake_probabilities,
    _AttentionProbabilities.apply,
    autocast=lambda device: torch.float32 if device == "cuda" else torch.get_autocast_dtype(device),  # softmax's
)
_probabilities_forward = _registry.register(
    f"attention_probabilities_forward{_PROBABILITIES}",
    lambda *args: _forward_kernels().attention_probabilities_forward(*args),
    _fake_probabilities,
)


def attention_triton(qkv: Tensor, dropout_p: float = 0.0) -> Tensor:
    return _attention(qkv)


def attention_varlen_triton(qkv: Tensor, seq_lens: tuple[int, ...], dropout_p: float = 0.0) -> Tensor:
    return _varlen(qkv, *_packing(qkv, seq_lens))


def attention_varlen_fp8_triton(qkv: Tensor, seq_lens: tuple[int, ...], scale: float) -> Tensor:
    return _varlen_fp8_forward(qkv, *_packing(qkv, seq_lens), scale)


def _packing(qkv: Tensor, seq_lens: tuple[int, ...]) -> tuple[Tensor, int]:
    """cu_seqlens and max_seqlen."""
    return _attention_peers.cu_seqlens(tuple(seq_lens), qkv.device), max(seq_lens, default=0)


def attention_probabilities_triton(qkv: Tensor, rows: slice = slice(None)) -> Tensor:
    tokens = qkv.shape[1]  # a symbol in compiled code with dynamic sizes, which `range(tokens)[rows]` would fix

    def place(index: int | None, default: int) -> int:
        if index is None:
            return default
        return max(index + tokens, 0) if index < 0 else min(index, tokens)

    step = 1 if rows.step is None else rows.step
    return _probabilities(qkv, place(rows.start, 0), place(rows.stop, tokens), step)


def _refuses(qkv: Tensor, dropout_p: float = 0.0) -> str | None:
    if qkv.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"takes fp16, bf16 and fp32, got {qkv.dtype}"
    if qkv.shape[-1] not in HEAD_DIMS:
        return f"takes a head_dim of {', '.join(map(str, HEAD_DIMS))}, got {qkv.shape[-1]}"
    return f"has no dropout, asked for with p = {dropout_p}" if dropout_p > 0 else None


def _refuses_varlen(qkv: Tensor, seq_lens: tuple[int, ...], dropout_p: float = 0.0) -> str | None:
    return _refuses(qkv, dropout_p)


def _refuses_fp8(qkv: Tensor, scale: float) -> str | None:
    return _registry.refuses_e4m3(qkv) or _refuses(qkv)


def _refuses_varlen_fp8(qkv: Tensor, seq_lens: tuple[int, ...], scale: float) -> str | None:
    return _refuses_fp8(qkv, scale)


def _refuses_probabilities(qkv: Tensor, rows: slice = slice(None)) -> str | None:
    return _refuses(qkv)


def _sample(device: torch.device, dtype: torch.dtype) -> tuple[Tensor]:
    return (torch.empty(1, 257, 3, 6, 64, device=device, dtype=dtype),)


def _sample_varlen(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, tuple[int, ...]]:
    return _sample(device, dtype)[0][0], (200, 57)


# torch stands first: none of these kernels has run on a GPU yet.
_ATTENTION = Op(
    "attention",
    "attention",
    (
        Implementation("torch", attention_torch),
        _registry.triton(attention_triton, _refuses),
        *_attention_peers.sdpa(attention_torch),
        _attention_peers.XFORMERS,
    ),
    _sample,
)
_ATTENTION_VARLEN = Op(
    "attention_varlen",
    "attention",
    (
        Implementation("torch", attention_varlen_torch),
        _registry.triton(attention_varlen_triton, _refuses_varlen),
        _attention_peers.VARLEN_ATTN,
        *_attention_peers.sdpa(attention_varlen_torch),
        _attention_peers.XFORMERS_VARLEN,
    ),
    _sample_varlen,
)
_ATTENTION_FP8 = Op(
    "attention_fp8",
    "attention",
    _registry.torch_and_triton(attention_fp8_torch, _fp8_forward, _refuses_fp8, trains=False),
    lambda device, dtype: (*_sample(device, dtype), 0.0625),
)
_ATTENTION_VARLEN_FP8 = Op(
    "attention_varlen_fp8",
    "attention",
    _registry.torch_and_triton(
        attention_varlen_fp8_torch, attention_varlen_fp8_triton, _refuses_varlen_fp8, trains=False
    ),
    lambda device, dtype: (*_sample_varlen(device, dtype), 0.0625),
)
_ATTENTION_PROBABILITIES = Op(
    "attention_probabilities",
    "attention",
    _registry.torch_and_triton(attention_probabilities_torch, attention_probabilities_triton, _refuses_probabilities),
    _sample,
)
