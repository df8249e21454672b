"""The gradient of attention. With p the weights, delta_i = sum_d dout_id out_id and * elementwise:

    dv = p^T dout,    ds = p * (dout v^T - delta),    dq = scale ds k,    dk = scale ds^T q

Three kernels: delta; dk and dv, where a program owns a tile of keys and reads all queries; dq, where a program owns a
tile of queries and reads all keys. Each computes p anew from lse, and each element of the gradient is written once, by
one program, so that results repeat bit by bit. The gradient is packed as qkv is, contiguous. What the kernels rely on
is said in `attention`. Source: Dao et al., arXiv:2205.14135.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2_fast.kernels import common
from dinov2_fast.kernels.attention import (
    dot,
    find_sequence,
    load_rows,
    rows_in_place,
    softmax_scale,
    store_rows,
    tail_block,
    upcast,
)

LN2 = tl.constexpr(math.log(2.0))


@triton.jit
def _attention_delta_kernel(
    out_ptr, dout_ptr, lse_ptr, lse_delta_ptr, tokens, heads, tiles, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """lse and delta (batch, heads, tokens, 2) from lse and from out and dout, (batch, tokens, heads, head_dim)."""
    program = tl.program_id(0)
    head, batch = program // tiles % heads, (program // tiles // heads).to(tl.int64)
    token = program % tiles * BLOCK + tl.arange(0, BLOCK)
    kept = token < tokens
    offsets = ((batch * tokens + token) * heads + head)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    out = tl.load(out_ptr + offsets, mask=kept[:, None], other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + offsets, mask=kept[:, None], other=0.0).to(tl.float32)
    rows = (batch * heads + head) * tokens + token
    lse = tl.load(lse_ptr + rows, mask=kept, other=0.0)
    pairs = lse_delta_ptr + rows[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(pairs, tl.join(lse, tl.sum(out * dout, 1)), mask=kept[:, None])


@triton.jit
def _load_lse_delta(lse_delta_ptr, start, stop, ROWS: tl.constexpr, MASKED: tl.constexpr):
    """lse and delta, (ROWS,) each, of the rows start, start + 1, ... If MASKED, those from `stop` on are zeros.

    Both in one load: if it has as many elements as the program has threads, each thread loads its own, and shared
    memory spreads them. A smaller load Triton repeats in every thread, for all rows that the thread needs.
    """
    rows = start + tl.arange(0, ROWS)
    pairs = lse_delta_ptr + rows[:, None] * 2 + tl.arange(0, 2)[None, :]
    if MASKED:
        return tl.split(tl.load(pairs, mask=(rows < stop)[:, None], other=0.0))
    return tl.split(tl.load(pairs))


@triton.jit
def _take_queries(
    k, v, q_ptr, dout_ptr, lse_delta_ptr, start, stop, stride_token, stride_out, dk, dv,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds what a tile of queries gives to dk, before the scale, and dv.

    If MASKED, q, dout, lse and delta are 0 for the queries that do not count, so these add nothing.
    """
    q = load_rows(q_ptr, start, stop, stride_token, QUERIES, HEAD_DIM, MASKED, UPCAST)
    dout = load_rows(dout_ptr, start, stop, stride_out, QUERIES, HEAD_DIM, MASKED, UPCAST)
    lse, delta = _load_lse_delta(lse_delta_ptr, start, stop, QUERIES, MASKED)
    p = tl.exp2(dot(k, tl.trans(q)) * SCALE - lse[None, :])  # (keys, queries)
    dv = dot(p.to(dout.dtype), dout, dv)
    ds = p * (dot(v, tl.trans(dout)) - delta[None, :])
    dk = dot(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit
def _key_rows(
    q_ptr, dout_ptr, lse_delta_ptr, dq_ptr, start, length, stride_token, stride_kind, stride_out,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, TAIL_Q: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dk and dv of the keys start, start + 1, ... of one head, ROWS of them at most."""
    k = load_rows(q_ptr + stride_kind, start, length, stride_token, ROWS, HEAD_DIM, True, UPCAST)
    v = load_rows(q_ptr + 2 * stride_kind, start, length, stride_token, ROWS, HEAD_DIM, True, UPCAST)
    dk = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    dv = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    tail = length // BLOCK_Q * BLOCK_Q
    dk, dv = _take_queries(
        k, v, q_ptr, dout_ptr, lse_delta_ptr, tail, length, stride_token, stride_out, dk, dv,
        SCALE, HEAD_DIM, TAIL_Q, True, UPCAST,
    )  # fmt: skip
    for query in tl.range(0, tail, BLOCK_Q):
        dk, dv = _take_queries(
            k, v, q_ptr, dout_ptr, lse_delta_ptr, query, length, stride_token, stride_out, dk, dv,
            SCALE, HEAD_DIM, BLOCK_Q, False, UPCAST,
        )  # fmt: skip
    stride_grad = 3 * stride_out
    store_rows(dq_ptr + stride_out, dk * (SCALE * LN2), start, length, stride_grad, ROWS, HEAD_DIM)
    store_rows(dq_ptr + 2 * stride_out, dv, start, length, stride_grad, ROWS, HEAD_DIM)


@triton.jit
def _take_keys(
    q, dout, lse, delta, k_ptr, v_ptr, start, stop, stride_token, dq,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds what a tile of keys gives to dq, before the scale."""
    k = load_rows(k_ptr, start, stop, stride_token, KEYS, HEAD_DIM, MASKED, UPCAST)
    v = load_rows(v_ptr, start, stop, stride_token, KEYS, HEAD_DIM, MASKED, UPCAST)
    p = tl.exp2(dot(q, tl.trans(k)) * SCALE - lse[:, None])  # (queries, keys)
    if MASKED:
        p = tl.where((start + tl.arange(0, KEYS) < stop)[None, :], p, 0.0)
    ds = p * (dot(dout, tl.trans(v)) - delta[:, None])
    return dot(ds.to(k.dtype), k, dq)


@triton.jit
def _query_rows(
    q_ptr, dout_ptr, lse_delta_ptr, dq_ptr, start, length, stride_token, stride_kind, stride_out,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, TAIL_K: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dq of the queries start, start + 1, ... of one head, ROWS of them at most."""
    lse, delta = _load_lse_delta(lse_delta_ptr, start, length, ROWS, True)
    q = load_rows(q_ptr, start, length, stride_token, ROWS, HEAD_DIM, True, UPCAST)
    dout = load_rows(dout_ptr, start, length, stride_out, ROWS, HEAD_DIM, True, UPCAST)
    k_ptr = q_ptr + stride_kind
    v_ptr = k_ptr + stride_kind
    dq = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    tail = length // BLOCK_K * BLOCK_K
    dq = _take_keys(
        q, dout, lse, delta, k_ptr, v_ptr, tail, length, stride_token, dq, SCALE, HEAD_DIM, TAIL_K, True, UPCAST
    )
    for key in tl.range(0, tail, BLOCK_K):
        dq = _take_keys(
            q, dout, lse, delta, k_ptr, v_ptr, key, length, stride_token, dq, SCALE, HEAD_DIM, BLOCK_K, False, UPCAST
        )
    store_rows(dq_ptr, dq * (SCALE * LN2), start, length, 3 * stride_out, ROWS, HEAD_DIM)


@triton.jit
def _attention_backward_kernel(
    qkv_ptr, dout_ptr, lse_delta_ptr, dqkv_ptr, cu_seqlens_ptr, tokens, heads, tiles,
    stride_batch, stride_token, stride_kind, stride_head,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_INNER: tl.constexpr,
    TAIL_INNER: tl.constexpr, OF_KEYS: tl.constexpr, VARLEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of dk and dv (OF_KEYS) or of dq; what it loops over is called inner."""
    program = tl.program_id(0)
    tile, head = program % tiles, program // tiles % heads
    batch, first, length = find_sequence(program // tiles // heads, cu_seqlens_ptr, tokens, VARLEN)
    start = tile * BLOCK
    if start >= length:  # beyond a short sequence
        return
    qkv_ptr += batch * stride_batch + first * stride_token + head.to(tl.int64) * stride_head
    stride_out = heads * HEAD_DIM
    dout_ptr += (batch * tokens + first) * stride_out + head * HEAD_DIM
    dqkv_ptr += (batch * tokens + first) * 3 * stride_out + head * HEAD_DIM
    lse_delta_ptr += ((batch * heads + head) * tokens + first) * 2
    gradient: tl.constexpr = _key_rows if OF_KEYS else _query_rows
    gradient(
        qkv_ptr, dout_ptr, lse_delta_ptr, dqkv_ptr, start, length, stride_token, stride_kind, stride_out,
        SCALE, HEAD_DIM, BLOCK, BLOCK_INNER, TAIL_INNER, UPCAST,
    )  # fmt: skip


def _configuration(qkv: Tensor) -> tuple[int, int, dict[str, int]]:
    """Tiles of what programs own and of what they loop over, warps and stages."""
    head_dim = qkv.shape[-1]
    if qkv.dtype == torch.float32:  # not on tensor cores; larger tiles spill
        return 16 if head_dim == 128 else 64, 16, {"num_warps": 8, "num_stages": 2}
    wide = common.capability(qkv.device)[0] in (9, 10)
    block = 64 if wide or head_dim <= 64 else 32
    inner = 64 if wide and head_dim <= 64 else 32
    return block, inner, {"num_warps": 4, "num_stages": 3 if head_dim <= 64 else 2}


def attention_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """The gradient of `attention_forward` for qkv: arguments as it takes and returns them, `dout` as `out`.

    Returns:
        dqkv (batch, tokens, 3, heads, head_dim), contiguous.
    """
    qkv, dout = rows_in_place(qkv), dout.contiguous()
    batch, tokens, _, heads, head_dim = qkv.shape
    dqkv = qkv.new_empty(qkv.shape)
    lse_delta = lse.new_empty(*lse.shape, 2)
    varlen = cu_seqlens is not None
    sequences, seq_len = (cu_seqlens.shape[0] - 1, max_seqlen) if varlen else (batch, tokens)
    if dqkv.numel() == 0:
        return dqkv
    block, inner, options = _configuration(qkv)
    with common.on_device(qkv):
        tiles = triton.cdiv(tokens, 64)
        _attention_delta_kernel[(tiles * heads * batch,)](
            out, dout, lse, lse_delta, tokens, heads, tiles, HEAD_DIM=head_dim, BLOCK=64, num_warps=4
        )
        tiles = triton.cdiv(seq_len, block)
        for of_keys in (True, False):
            _attention_backward_kernel[(tiles * heads * sequences,)](
                qkv, dout, lse_delta, dqkv, cu_seqlens, tokens, heads, tiles, *qkv.stride()[:4],
                SCALE=softmax_scale(head_dim), HEAD_DIM=head_dim, BLOCK=block, BLOCK_INNER=inner,
                TAIL_INNER=tail_block(seq_len, inner, varlen), OF_KEYS=of_keys, VARLEN=varlen, UPCAST=upcast(qkv.dtype),
                **options,
            )  # fmt: skip
    return dqkv
