"""Multi-head self-attention on packed queries, keys and values.

    p = softmax(q @ k^T / sqrt(head_dim)),  out = p @ v          for each image and head

`qkv` is what the qkv linear writes, read in place; the result is token-major, as the output projection reads it.
Source: Vaswani et al., arXiv:1706.03762.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import groupby, product
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.ops import _attention_cuda, _attention_peers, _backends, _registry
from dinov2_fast.ops._fp8 import E4M3
from dinov2_fast.ops._linear_peers import HAS_AVX512, onednn_is_absent
from dinov2_fast.ops.activation import into_e4m3
from dinov2_fast.ops.dispatch import Op, refuse_gradient
from dinov2_fast.ops.implementation import Implementation, records_gradient
from dinov2_fast.torch_private import fused_by_onednn, is_in_dispatch_mode, is_plain, is_traced, softmax_backward

HEAD_DIMS = (32, 64, 128)  # those of the kernels
ONEDNN_LEAST = 1 << 16  # scores from which oneDNN's attention is faster than torch's
ONEDNN_MOST = 1 << 25  # scores at once, of one head at least: the first call for a shape writes them out thrice


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
        qkv: (batch, seq_len, 3, heads, head_dim), or with `seq_lens` (total_tokens, 3, heads, head_dim).
        seq_lens: tokens of each sequence in order; they sum to total_tokens.
        dropout_p: probability of dropping an attention weight; 0 outside training.
        scale: of a result in e4m3, which is to be multiplied by it. Values beyond ±448 times `scale` saturate.
        backend: the implementation to use instead of the default.

    Returns:
        (batch, seq_len, heads, head_dim), or with `seq_lens` (total_tokens, heads, head_dim); contiguous, in the dtype
        of `qkv` (under autocast: its dtype), with `scale` in e4m3.

    Raises:
        ValueError: the sequences and `qkv` differ in their number of tokens.
        BackendError: `scale` is given, and gradients are recorded.
    """
    if seq_lens is not None and sum(seq_lens) != qkv.shape[0]:
        raise InvalidValueError(f"seq_lens sum to {sum(seq_lens)}, but qkv has {qkv.shape[0]} tokens.")
    args = qkv, seq_lens, dropout_p, scale
    if scale is not None:
        refuse_gradient("attention with a scale", args)
    return ATTENTION.choose("batch" if seq_lens is None else "varlen", args, backend).function(*args)


def attention_probabilities(qkv: Tensor, rows: slice = slice(None), *, backend: str | None = None) -> Tensor:
    """The attention weights p of chosen query rows, which `attention` never writes out.

    Args:
        qkv: (batch, seq_len, 3, heads, head_dim).
        rows: the queries asked for; ``slice(0, 1)`` is the CLS token's attention map.
        backend: the implementation to use instead of the default.

    Returns:
        (batch, heads, len(rows), seq_len), rows summing to 1, in the dtype of `qkv`.
    """
    return ATTENTION.choose("probabilities", (qkv, rows), backend).function(qkv, rows)


def attention_torch(qkv: Tensor, seq_lens: None, dropout_p: float, scale: float | None) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # each (batch, heads, seq_len, head_dim)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p).transpose(1, 2).contiguous()
    return into_e4m3(out, scale)


def attention_varlen_torch(qkv: Tensor, seq_lens: tuple[int, ...], dropout_p: float, scale: float | None) -> Tensor:
    runs = [(seq_len, len(list(run))) for seq_len, run in groupby(seq_lens)]  # neighbours of one length are one batch
    parts = qkv.split([seq_len * batch for seq_len, batch in runs])
    outputs = [
        attention_torch(part.unflatten(0, (batch, seq_len)), None, dropout_p, None).flatten(0, 1)
        for part, (seq_len, batch) in zip(parts, runs, strict=True)
    ]
    out = torch.cat(outputs)
    return into_e4m3(out, scale)


def attention_probabilities_torch(qkv: Tensor, rows: slice) -> Tensor:
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind()
    return ((q[:, :, rows] * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1)


# oneDNN


def attention_onednn(qkv: Tensor, seq_lens: None, dropout_p: float, scale: float | None) -> Tensor:
    """By oneDNN's fused attention in fp32; by torch's in other dtypes, for few scores, and if anything follows the ops.

    torch's attention takes its products from MKL. oneDNN adds up p @ v one key after another, which for values with a
    mean has more than twice the error of torch's. So it gets v without its mean, which is added at the end: p leaves it
    as it is.
    """
    followed = is_traced() or is_in_dispatch_mode() or torch.is_autocast_enabled(qkv.device.type) or not is_plain(qkv)
    if followed or dropout_p or scale is not None or qkv.dtype != torch.float32 or records_gradient([qkv]):
        return attention_torch(qkv, seq_lens, dropout_p, scale)
    batch, seq_len, _, heads, head_dim = qkv.shape
    scores = heads * seq_len**2
    if batch * scores < ONEDNN_LEAST:
        return attention_torch(qkv, seq_lens, dropout_p, scale)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # each (batch, heads, seq_len, head_dim)
    mean = v.mean(2, keepdim=True)
    v = v - mean
    out = qkv.new_empty(batch, seq_len, heads, head_dim)
    images = max(1, ONEDNN_MOST // scores)
    heads_at_once = min(heads, max(1, ONEDNN_MOST // seq_len**2))
    for image, head in product(range(0, batch, images), range(0, heads, heads_at_once)):
        part = slice(image, image + images), slice(head, head + heads_at_once)
        operands = q[part], k[part], v[part]
        fused = _fused(*((x.shape, x.stride()) for x in operands), threads=torch.get_num_threads())
        if fused is None:
            return attention_torch(qkv, seq_lens, dropout_p, scale)
        torch.add(fused(*operands), mean[part], out=out.transpose(1, 2)[part])
    return out


@lru_cache(maxsize=256)
def _fused(*layouts: tuple[torch.Size, tuple[int, ...]], threads: int) -> Callable[..., Tensor] | None:
    """oneDNN's attention for q, k and v of these sizes and strides, and for so many threads; None if it has none."""
    root = layouts[0][0][-1] ** 0.5

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) / root).softmax(-1) @ v

    with torch.inference_mode(False):
        return fused_by_onednn(formula, *(torch.empty_strided(*layout, device="cpu").zero_() for layout in layouts))


def _onednn() -> Implementation:
    # Its time as a share of that of torch's, whose products are MKL's (AMD EPYC of family 26 with AVX-512, 2 threads,
    # torch 2.11, heads of 64; AVX2 by ONEDNN_MAX_CPU_ISA and its like):
    #   batch x heads    1 x 6    8 x 6    1 x 6     2 x 12    1 x 6
    #   tokens             257      257     1370       1370     5477
    #   AVX-512           0.54     0.49     0.53       0.50     0.58
    #   AVX2              0.98     0.98     1.03
    return Implementation(
        "onednn",
        attention_onednn,
        devices=("cpu",) if HAS_AVX512 else ("cpu with AVX-512",),
        forms=("batch",),
        unavailable=onednn_is_absent,
        elsewhere=lambda device: device.type == "cpu",
        why="takes 0.5 to 0.6 of the time of torch's on a CPU with AVX-512",
    )


# The kernels


def _kernels() -> ModuleType:
    from dinov2_fast.kernels import attention

    return attention


def _backward_kernels() -> ModuleType:
    from dinov2_fast.kernels import attention_backward

    return attention_backward


class _Attention(torch.autograd.Function):
    """The forward is Triton's, or csrc's with `by_cuda`; the backward is Triton's, which reads the same lse."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cu_seqlens: Any, max_seqlen: Any, by_cuda: bool) -> tuple[Tensor, Tensor]:
        out, lse = _cuda(qkv, True) if by_cuda else _attention(qkv, cu_seqlens, max_seqlen, None)
        ctx.save_for_backward(qkv, out, lse, cu_seqlens)
        ctx.max_seqlen = max_seqlen
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)  # no zeros for lse
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
        qkv, p = ctx.saved_tensors  # p is there in full, so plain products need no more memory than a kernel would
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


def _fake_cuda(qkv: Tensor, with_lse: bool) -> tuple[Tensor, Tensor]:
    batch, tokens, _, heads, head_dim = qkv.shape
    lse = qkv.new_empty((batch, heads, tokens) if with_lse else (0,), dtype=torch.float32)
    return qkv.new_empty((batch, tokens, heads, head_dim)), lse


def _fake_probabilities(qkv: Tensor, start: int, stop: int, step: int) -> Tensor:
    batch, tokens, _, heads, _ = qkv.shape
    return qkv.new_empty((batch, heads, max(0, (stop - start + step - 1) // step), tokens))


_PACKING = "Tensor? cu_seqlens, SymInt? max_seqlen"  # None for a batch; packed sequences are a batch of 1

_attention = _registry.register(
    f"attention(Tensor qkv, {_PACKING}, float? scale) -> (Tensor out, Tensor lse)",
    lambda *args: _kernels().attention_forward(*args),
    _fake,
    _record,
    autocast=torch.get_autocast_dtype,
)
_backward = _registry.register(
    f"attention_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, {_PACKING}) -> Tensor",
    lambda *args: _backward_kernels().attention_backward(*args),
    lambda dout, qkv, *rest: qkv.new_empty(qkv.shape),
)
_cuda = _registry.register(
    "attention_cuda(Tensor qkv, bool with_lse) -> (Tensor out, Tensor lse)",
    _attention_cuda.attention_forward,
    _fake_cuda,
    lambda qkv, with_lse: _Attention.apply(qkv, None, None, True),
    autocast=torch.get_autocast_dtype,
)
_probabilities = _registry.register(
    "attention_probabilities(Tensor qkv, SymInt start, SymInt stop, SymInt step) -> Tensor",
    lambda *args: _kernels().attention_probabilities_forward(*args),
    _fake_probabilities,
    _AttentionProbabilities.apply,
    autocast=lambda device: torch.float32 if device == "cuda" else torch.get_autocast_dtype(device),  # softmax's
)


def attention_triton(qkv: Tensor, seq_lens: tuple[int, ...] | None, dropout_p: float, scale: float | None) -> Tensor:
    if seq_lens is None:
        return _attention(qkv, None, None, scale)[0]
    return _attention(qkv[None], *_attention_peers.packing(qkv, seq_lens), scale)[0][0]


def attention_cuda(qkv: Tensor, seq_lens: None, dropout_p: float, scale: float | None) -> Tensor:
    return into_e4m3(_cuda(qkv, False)[0], scale)


def attention_probabilities_triton(qkv: Tensor, rows: slice) -> Tensor:
    tokens = qkv.shape[1]  # a symbol in compiled code with dynamic sizes, which `range(tokens)[rows]` would fix

    def place(index: int | None, default: int) -> int:
        if index is None:
            return default
        return max(index + tokens, 0) if index < 0 else min(index, tokens)

    step = 1 if rows.step is None else rows.step
    return _probabilities(qkv, place(rows.start, 0), place(rows.stop, tokens), step)


def _refuses(qkv: Tensor, which: object, dropout_p: float = 0.0, scale: float | None = None) -> str | None:
    if qkv.shape[-1] not in HEAD_DIMS:
        return f"takes a head_dim of {', '.join(map(str, HEAD_DIMS))}, got {qkv.shape[-1]}"
    if dropout_p > 0:
        return f"has no dropout, asked for with p = {dropout_p}"
    return None if scale is None else _backends.refuses_e4m3(qkv)


def _sample(device: torch.device, dtype: torch.dtype, seq_lens: tuple[int, ...] | None = None) -> tuple[Any, ...]:
    qkv_dtype, scale = (torch.bfloat16, 0.0625) if dtype == E4M3 else (dtype, None)
    qkv = torch.empty(1, 257, 3, 6, 64, device=device, dtype=qkv_dtype)
    return qkv if seq_lens is None else qkv[0], seq_lens, 0.0, scale


_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# On a GPU torch stands first: none of these kernels has been measured there yet. The arguments of the form
# "probabilities" are (qkv, rows), those of the others (qkv, seq_lens, dropout_p, scale).
ATTENTION = Op(
    "attention",
    (
        _onednn(),
        Implementation("torch", attention_torch, forms=("batch",), why=_backends.UNMEASURED),
        Implementation("torch", attention_varlen_torch, forms=("varlen",), why=_backends.UNMEASURED),
        Implementation("torch", attention_probabilities_torch, forms=("probabilities",), why=_backends.UNMEASURED),
        _backends.triton(attention_triton, _refuses, dtypes=_KERNEL_DTYPES, forms=("batch", "varlen")),
        _backends.triton(attention_probabilities_triton, _refuses, dtypes=_KERNEL_DTYPES, forms=("probabilities",)),
        _backends.cuda(
            attention_cuda, _attention_cuda.refuses, dtypes=(torch.float16, torch.bfloat16), forms=("batch",)
        ),
        _attention_peers.VARLEN_ATTN,
        _attention_peers.XFORMERS,
    ),
    {
        "batch": _sample,
        "varlen": lambda device, dtype: _sample(device, dtype, (200, 57)),
        "probabilities": lambda device, dtype: None if dtype == E4M3 else (_sample(device, dtype)[0], slice(None)),
    },
)
