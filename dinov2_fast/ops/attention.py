"""Multi-head self-attention on packed queries, keys and values.

    p = softmax(q @ k^T / sqrt(head_dim)),  out = p @ v          for each image and head

`qkv` (batch, seq_len, 3, heads, head_dim) is the output of the qkv linear, read in place. `out` (batch, seq_len, heads,
head_dim) is the input of the output projection. Sequences of different lengths can be packed along one axis.
Source: Vaswani et al., arXiv:1706.03762.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.ops import _attention_cuda, _attention_peers, _backends, _registry
from dinov2_fast.ops._fp8 import E4M3
from dinov2_fast.ops.activation import into_e4m3
from dinov2_fast.ops.dispatch import Op, refuse_gradient
from dinov2_fast.ops.implementation import Implementation, records_gradient
from dinov2_fast.torch_private import is_traced, softmax_backward

HEAD_DIMS = (32, 64, 128)  # of the Triton kernels


def attention(
    qkv: Tensor,
    *,
    seq_lens: tuple[int, ...] | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention within each image of a batch, or within each of several sequences packed along one axis.

    Args:
        qkv: (batch, seq_len, 3, heads, head_dim), or with `seq_lens` (total_tokens, 3, heads, head_dim). fp16, bf16,
            fp32 or fp64.
        seq_lens: the number of tokens of each sequence, in order. They sum to total_tokens.
        dropout_p: the probability of dropping an attention weight; 0 outside training.
        scale: return e4m3 values; the real value is the e4m3 value times `scale`, and beyond ±448 times `scale` it
            saturates. For inference only.
        backend: the backend to use instead of the default.

    Returns:
        (batch, seq_len, heads, head_dim), or with `seq_lens` (total_tokens, heads, head_dim); contiguous, in the dtype
        of `qkv` (under autocast in its dtype), or in e4m3.

    Raises:
        ValueError: `seq_lens` do not sum to the number of tokens.
        BackendError: `backend` cannot take `qkv`, or gradients are recorded with `scale`.
    """
    if seq_lens is not None and sum(seq_lens) != qkv.shape[0]:
        raise InvalidValueError(f"seq_lens sum to {sum(seq_lens)}, but qkv has {qkv.shape[0]} tokens.")
    args = qkv, seq_lens, dropout_p, scale
    if scale is not None:
        refuse_gradient("attention with a scale", args)
    return ATTENTION.choose("batch" if seq_lens is None else "varlen", args, backend).function(*args)


def attention_probabilities(qkv: Tensor, rows: slice = slice(None), *, backend: str | None = None) -> Tensor:
    """The attention weights p of some queries, which `attention` does not store.

    Args:
        qkv: (batch, seq_len, 3, heads, head_dim).
        rows: the queries; ``slice(0, 1)`` gives the attention map of the CLS token.
        backend: the backend to use instead of the default.

    Returns:
        (batch, heads, queries, seq_len), in the dtype of `qkv`, under autocast in that of softmax. Rows sum to 1.
    """
    return ATTENTION.choose("probabilities", (qkv, rows), backend).function(qkv, rows)


def attention_torch(qkv: Tensor, seq_lens: None, dropout_p: float, scale: float | None) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # each (batch, heads, seq_len, head_dim)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p).transpose(1, 2).contiguous()
    return into_e4m3(out, scale)


def attention_varlen_torch(qkv: Tensor, seq_lens: tuple[int, ...], dropout_p: float, scale: float | None) -> Tensor:
    runs = [(seq_len, len(list(run))) for seq_len, run in groupby(seq_lens or (0,))]  # equal neighbours: one batch
    parts = qkv.split([seq_len * batch for seq_len, batch in runs])
    outputs = [
        attention_torch(part.unflatten(0, (batch, seq_len)), None, dropout_p, None).flatten(0, 1)
        for part, (seq_len, batch) in zip(parts, runs, strict=True)
    ]
    return into_e4m3(torch.cat(outputs), scale)


def attention_probabilities_torch(qkv: Tensor, rows: slice) -> Tensor:
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind()
    return ((q[:, :, rows] * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1)


def attention_cpu(qkv: Tensor, seq_lens: Any, dropout_p: float, scale: float | None) -> Tensor:
    """Torch's attention; in half precision, if a gradient is recorded, in fp32."""
    function: Any = attention_torch if seq_lens is None else attention_varlen_torch
    if qkv.dtype not in _backends.HALF or is_traced() or not records_gradient([qkv]):
        return function(qkv, seq_lens, dropout_p, scale)
    with torch.autocast("cpu", enabled=False):
        return function(qkv.float(), seq_lens, dropout_p, scale).to(qkv.dtype)


def attention_onednn(qkv: Tensor, seq_lens: None, dropout_p: float, scale: float | None) -> Tensor:
    """oneDNN's attention if it is faster, without dropout and e4m3; or else torch's."""
    out = None if dropout_p or scale is not None else _attention_peers.onednn_attention(qkv)
    return attention_cpu(qkv, seq_lens, dropout_p, scale) if out is None else out


# The kernels


class _Attention(torch.autograd.Function):
    """The forward kernel is Triton's, or with `by_cuda` csrc's. The backward kernel is Triton's; it reads their lse."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cu_seqlens: Any, max_seqlen: Any, by_cuda: bool) -> tuple[Tensor, Tensor]:
        out, lse = _cuda(qkv, True) if by_cuda else _attention(qkv, cu_seqlens, max_seqlen, None)
        ctx.save_for_backward(qkv, out, lse, cu_seqlens)
        ctx.max_seqlen = max_seqlen
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)  # or backward would get zeros for lse
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(dout, *ctx.saved_tensors, ctx.max_seqlen), None, None, None


class _AttentionProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, start: int, stop: int, step: int) -> Tensor:
        p = _probabilities(qkv, start, stop, step)
        ctx.save_for_backward(qkv, p)
        ctx.rows = slice(start, stop, step)
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dp: Tensor) -> tuple[Tensor | None, ...]:
        qkv, p = ctx.saved_tensors  # p is stored in full, so plain products need no more memory than a kernel would
        q, k = qkv[:, ctx.rows, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)
        dscores = softmax_backward(dp, p) * qkv.shape[-1] ** -0.5
        dqkv = qkv.new_zeros(qkv.shape)
        dqkv[:, ctx.rows, 0] = (dscores @ k).transpose(1, 2)
        dqkv[:, :, 1] = (dscores.transpose(-2, -1) @ q).transpose(1, 2)
        return dqkv, None, None, None


def _record(qkv: Tensor, cu_seqlens: Any, max_seqlen: Any, scale: None) -> Any:
    assert scale is None, "e4m3 is for inference only"
    return _Attention.apply(qkv, cu_seqlens, max_seqlen, False)


def _fake(qkv: Tensor, cu_seqlens: Any, max_seqlen: Any, scale: float | None) -> tuple[Tensor, Tensor]:
    batch, tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty((batch, tokens, heads, head_dim), dtype=qkv.dtype if scale is None else E4M3)
    return out, qkv.new_empty((batch, heads, tokens) if scale is None else (0,), dtype=torch.float32)


def _fake_probabilities(qkv: Tensor, start: int, stop: int, step: int) -> Tensor:
    batch, tokens, _, heads, _ = qkv.shape
    return qkv.new_empty((batch, heads, max(0, (stop - start + step - 1) // step), tokens))


_LENGTHS = "Tensor? cu_seqlens, SymInt? max_seqlen"  # of packed sequences, a batch of 1; None for a plain batch

_attention = _registry.register(
    f"attention(Tensor qkv, {_LENGTHS}, float? scale) -> (Tensor out, Tensor lse)",
    _registry.launcher("attention", "attention_forward"),
    _fake,
    _record,
    autocast=torch.get_autocast_dtype,
)
_backward = _registry.register(
    f"attention_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, {_LENGTHS}) -> Tensor",
    _registry.launcher("attention_backward", "attention_backward"),
    lambda dout, qkv, *rest: qkv.new_empty(qkv.shape),
)
_cuda = _registry.register(
    "attention_cuda(Tensor qkv, bool with_lse) -> (Tensor out, Tensor lse)",
    _attention_cuda.attention_forward,
    _attention_cuda.attention_forward_fake,
    lambda qkv, with_lse: _Attention.apply(qkv, None, None, True),
    autocast=torch.get_autocast_dtype,
)
_probabilities = _registry.register(
    "attention_probabilities(Tensor qkv, SymInt start, SymInt stop, SymInt step) -> Tensor",
    _registry.launcher("attention", "attention_probabilities_forward"),
    _fake_probabilities,
    _AttentionProbabilities.apply,
    autocast=lambda device: torch.float32 if device == "cuda" else torch.get_autocast_dtype(device),  # as softmax
)


def attention_triton(qkv: Tensor, seq_lens: tuple[int, ...] | None, dropout_p: float, scale: float | None) -> Tensor:
    if seq_lens is None:
        return _attention(qkv, None, None, scale)[0]
    return _attention(qkv[None], *_attention_peers.packed_lengths(qkv, seq_lens), scale)[0][0]


def attention_cuda(qkv: Tensor, seq_lens: None, dropout_p: float, scale: float | None) -> Tensor:
    return into_e4m3(_cuda(qkv, False)[0], scale)


def attention_probabilities_triton(qkv: Tensor, rows: slice) -> Tensor:
    tokens = qkv.shape[1]  # in compiled code with dynamic sizes a symbol, which `range(tokens)[rows]` would fix

    def position(index: int | None, default: int) -> int:
        if index is None:
            return default
        return max(index + tokens, 0) if index < 0 else min(index, tokens)

    step = 1 if rows.step is None else rows.step
    return _probabilities(qkv, position(rows.start, 0), position(rows.stop, tokens), step)


def _refuses(qkv: Tensor, rows_or_seq_lens: object, dropout_p: float = 0.0, scale: float | None = None) -> str | None:
    if qkv.shape[-1] not in HEAD_DIMS:
        return f"takes a head_dim of {', '.join(map(str, HEAD_DIMS))}, got {qkv.shape[-1]}"
    if dropout_p > 0:
        return f"has no dropout, got dropout_p = {dropout_p}"
    return None if scale is None else _backends.refuses_e4m3(qkv)


def _sample(device: torch.device, dtype: torch.dtype, seq_lens: tuple[int, ...] | None = None) -> tuple[Any, ...]:
    qkv_dtype, scale = (torch.bfloat16, 0.0625) if dtype == E4M3 else (dtype, None)
    qkv = torch.empty(1, 257, 3, 6, 64, device=device, dtype=qkv_dtype)
    return qkv if seq_lens is None else qkv[0], seq_lens, 0.0, scale


# The time of torch's bf16 attention with its gradient, as a multiple of that in fp32 with the casts (Intel Xeon with
# AMX, 1 thread, torch 2.11, head_dim 64):
#   batch x heads    256 x 3    128 x 3    128 x 3    16 x 3    4 x 3
#   tokens                10         26         50       257      785
#                        6.6        2.7        2.5       1.3      1.0
_CPU_WHY = "torch's gradient in half precision takes up to 6 times as long on a CPU"
_KERNEL_DTYPES = (*_backends.HALF, torch.float32)
# On a GPU torch is first because none of the kernels has been measured there yet. The arguments of the form
# "probabilities" are (qkv, rows), those of the other forms (qkv, seq_lens, dropout_p, scale).
ATTENTION = Op(
    "attention",
    (
        _backends.onednn(attention_onednn, forms=("batch",), why=_attention_peers.ONEDNN_WHY),
        Implementation("cpu", attention_cpu, devices=("cpu",), forms=("batch", "varlen"), why=_CPU_WHY),
        Implementation("torch", attention_torch, forms=("batch",), why=_backends.UNMEASURED),
        Implementation("torch", attention_varlen_torch, forms=("varlen",), why=_backends.UNMEASURED),
        Implementation("torch", attention_probabilities_torch, forms=("probabilities",), why=_backends.UNMEASURED),
        _backends.triton(attention_triton, _refuses, dtypes=_KERNEL_DTYPES, forms=("batch", "varlen")),
        _backends.triton(attention_probabilities_triton, _refuses, dtypes=_KERNEL_DTYPES, forms=("probabilities",)),
        _backends.cuda(attention_cuda, _attention_cuda.refuses, dtypes=_backends.HALF, forms=("batch",)),
        _attention_peers.VARLEN_ATTN,
        _attention_peers.XFORMERS,
    ),
    {
        "batch": _sample,
        "varlen": lambda device, dtype: _sample(device, dtype, (200, 57)),
        "probabilities": lambda device, dtype: None if dtype == E4M3 else (_sample(device, dtype)[0], slice(None)),
    },
)
