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
    Tiling,
    choose_tiling,
    dot,
    find_sequence,
    load_rows,
    rows_in_place,
    softmax_scale,
    store_rows,
    upcast,
)

LN2 = tl.constexpr(math.log(2.0))


@triton.jit
def _attention_delta_kernel(
    out_ptr, dout_ptr, delta_ptr, tokens, heads, tiles, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """delta (batch, heads, tokens) from out and dout, (batch, tokens, heads, head_dim)."""
    program = tl.program_id(0)
    head, batch = program // tiles % heads, (program // tiles // heads).to(tl.int64)
    token = program % tiles * BLOCK + tl.arange(0, BLOCK)
    kept = token < tokens
    offsets = ((batch * tokens + token) * heads + head)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    out = tl.load(out_ptr + offsets, mask=kept[:, None], other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + offsets, mask=kept[:, None], other=0.0).to(tl.float32)
    tl.store(delta_ptr + (batch * heads + head) * tokens + token, tl.sum(out * dout, 1), mask=kept)


@triton.jit
def _take_queries(
    k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, start, stop, stride_token, stride_out, dk, dv,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds what a tile of queries gives to dk, before the scale, and dv."""
    rows = start + tl.arange(0, QUERIES)
    if MASKED:  # all is 0 for the queries that do not count, so they add nothing
        lse = tl.load(lse_ptr + rows, mask=rows < stop, other=0.0)
        delta = tl.load(delta_ptr + rows, mask=rows < stop, other=0.0)
    else:
        lse, delta = tl.load(lse_ptr + rows), tl.load(delta_ptr + rows)
    q = load_rows(q_ptr, start, stop, stride_token, QUERIES, HEAD_DIM, MASKED, UPCAST)
    p = tl.exp2(dot(k, tl.trans(q)) * SCALE - lse[None, :])  # (keys, queries)
    dout = load_rows(dout_ptr, start, stop, stride_out, QUERIES, HEAD_DIM, MASKED, UPCAST)
    dv = dot(p.to(dout.dtype), dout, dv)
    ds = p * (dot(v, tl.trans(dout)) - delta[None, :])
    dk = dot(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit
def _key_rows(
    q_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, start, stop, length, prefix_q, stride_token, stride_kind, stride_out,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, PREFIX_Q: tl.constexpr,
    RAGGED_Q: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk and dv of the keys start ... stop - 1 of one head, ROWS of them at most."""
    k = load_rows(q_ptr + stride_kind, start, stop, stride_token, ROWS, HEAD_DIM, True, UPCAST)
    v = load_rows(q_ptr + 2 * stride_kind, start, stop, stride_token, ROWS, HEAD_DIM, True, UPCAST)
    dk = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    dv = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    if PREFIX_Q > 0:
        dk, dv = _take_queries(
            k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, 0, prefix_q, stride_token, stride_out, dk, dv,
            SCALE, HEAD_DIM, PREFIX_Q, True, UPCAST,
        )  # fmt: skip
    exact = prefix_q + (length - prefix_q) // BLOCK_Q * BLOCK_Q
    for query in tl.range(prefix_q, exact, BLOCK_Q):
        dk, dv = _take_queries(
            k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, query, length, stride_token, stride_out, dk, dv,
            SCALE, HEAD_DIM, BLOCK_Q, False, UPCAST,
        )  # fmt: skip
    if RAGGED_Q:
        for query in tl.range(exact, length, BLOCK_Q, num_stages=1):  # at most once
            dk, dv = _take_queries(
                k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, query, length, stride_token, stride_out, dk, dv,
                SCALE, HEAD_DIM, BLOCK_Q, True, UPCAST,
            )  # fmt: skip
    stride_grad = 3 * stride_out
    store_rows(dq_ptr + stride_out, dk * (SCALE * LN2), start, stop, stride_grad, ROWS, HEAD_DIM)
    store_rows(dq_ptr + 2 * stride_out, dv, start, stop, stride_grad, ROWS, HEAD_DIM)


@triton.jit
def _take_keys(
    q, dout, lse, delta, k_ptr, v_ptr, start, stop, stride_token, dq,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds what a tile of keys gives to dq, before the scale."""
    k = load_rows(k_ptr, start, stop, stride_token, KEYS, HEAD_DIM, MASKED, UPCAST)
    p = tl.exp2(dot(q, tl.trans(k)) * SCALE - lse[:, None])  # (queries, keys)
    if MASKED:
        p = tl.where((start + tl.arange(0, KEYS) < stop)[None, :], p, 0.0)
    v = load_rows(v_ptr, start, stop, stride_token, KEYS, HEAD_DIM, MASKED, UPCAST)
    ds = p * (dot(dout, tl.trans(v)) - delta[:, None])
    return dot(ds.to(k.dtype), k, dq)


@triton.jit
def _query_rows(
    q_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, start, stop, length, prefix_k, stride_token, stride_kind, stride_out,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PREFIX_K: tl.constexpr,
    RAGGED_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq of the queries start ... stop - 1 of one head, ROWS of them at most."""
    rows = start + tl.arange(0, ROWS)
    lse = tl.load(lse_ptr + rows, mask=rows < stop, other=0.0)
    delta = tl.load(delta_ptr + rows, mask=rows < stop, other=0.0)
    q = load_rows(q_ptr, start, stop, stride_token, ROWS, HEAD_DIM, True, UPCAST)
    dout = load_rows(dout_ptr, start, stop, stride_out, ROWS, HEAD_DIM, True, UPCAST)
    k_ptr = q_ptr + stride_kind
    v_ptr = k_ptr + stride_kind
    dq = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    if PREFIX_K > 0:
        dq = _take_keys(
            q, dout, lse, delta, k_ptr, v_ptr, 0, prefix_k, stride_token, dq, SCALE, HEAD_DIM, PREFIX_K, True, UPCAST
        )
    exact = prefix_k + (length - prefix_k) // BLOCK_K * BLOCK_K
    for key in tl.range(prefix_k, exact, BLOCK_K):
        dq = _take_keys(
            q, dout, lse, delta, k_ptr, v_ptr, key, length, stride_token, dq, SCALE, HEAD_DIM, BLOCK_K, False, UPCAST
        )
    if RAGGED_K:
        for key in tl.range(exact, length, BLOCK_K, num_stages=1):  # at most once
            dq = _take_keys(
                q, dout, lse, delta, k_ptr, v_ptr, key, length, stride_token, dq, SCALE, HEAD_DIM, BLOCK_K, True, UPCAST
            )
    store_rows(dq_ptr, dq * (SCALE * LN2), start, stop, 3 * stride_out, ROWS, HEAD_DIM)


@triton.jit
def _attention_backward_kernel(
    qkv_ptr, dout_ptr, lse_ptr, delta_ptr, dqkv_ptr, cu_seqlens_ptr, tokens, heads, tiles,
    stride_batch, stride_token, stride_kind, stride_head, prefix, prefix_inner,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, PREFIX: tl.constexpr,
    BLOCK_INNER: tl.constexpr, PREFIX_INNER: tl.constexpr, RAGGED_INNER: tl.constexpr, OF_KEYS: tl.constexpr,
    VARLEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of dk and dv (OF_KEYS) or of dq; what it loops over is called inner."""
    program = tl.program_id(0)
    tile, head = program % tiles, program // tiles % heads
    batch, first, length = find_sequence(program // tiles // heads, cu_seqlens_ptr, tokens, VARLEN)
    qkv_ptr += batch * stride_batch + first * stride_token + head.to(tl.int64) * stride_head
    stride_out = heads * HEAD_DIM
    dout_ptr += (batch * tokens + first) * stride_out + head * HEAD_DIM
    dqkv_ptr += (batch * tokens + first) * 3 * stride_out + head * HEAD_DIM
    lse_ptr += (batch * heads + head) * tokens + first
    delta_ptr += (batch * heads + head) * tokens + first
    gradient: tl.constexpr = _key_rows if OF_KEYS else _query_rows
    if PREFIX > 0:
        if tile == tiles - 1:
            gradient(
                qkv_ptr, dout_ptr, lse_ptr, delta_ptr, dqkv_ptr, 0, prefix, length, prefix_inner,
                stride_token, stride_kind, stride_out,
                SCALE, HEAD_DIM, PREFIX, BLOCK_INNER, PREFIX_INNER, RAGGED_INNER, UPCAST,
            )  # fmt: skip
    start = prefix + tile * BLOCK
    if start < length:  # else it is the program of the prefix, or beyond a short sequence
        gradient(
            qkv_ptr, dout_ptr, lse_ptr, delta_ptr, dqkv_ptr, start, length, length, prefix_inner,
            stride_token, stride_kind, stride_out,
            SCALE, HEAD_DIM, BLOCK, BLOCK_INNER, PREFIX_INNER, RAGGED_INNER, UPCAST,
        )  # fmt: skip


def _configuration(qkv: Tensor, seq_len: int, varlen: bool) -> tuple[Tiling, Tiling, dict[str, int]]:
    """Tiling of what programs own and of what they loop over, warps and stages."""
    head_dim = qkv.shape[-1]
    if qkv.dtype == torch.float32:  # not on tensor cores; larger tiles spill
        own_blocks, inner_block = (16,) if head_dim == 128 else (64,), 16
    else:
        wide = common.capability(qkv.device)[0] in (9, 10)
        own_blocks = (128, 64) if head_dim <= 64 else (64,) if wide else (32,)
        inner_block = 64 if wide else 32
    own, inner = choose_tiling(seq_len, own_blocks, varlen), choose_tiling(seq_len, (inner_block,), varlen)
    few = qkv.dtype != torch.float32 and own.block * max(head_dim, 64) <= 4096
    return own, inner, {"num_warps": 4 if few else 8, "num_stages": 2}


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
    delta = lse.new_empty(lse.shape)
    varlen = cu_seqlens is not None
    sequences, seq_len = (cu_seqlens.shape[0] - 1, max_seqlen) if varlen else (batch, tokens)
    if dqkv.numel() == 0:
        return dqkv
    with common.on_device(qkv):
        tiles = triton.cdiv(tokens, 64)
        _attention_delta_kernel[(tiles * delta.numel() // tokens,)](
            out, dout, delta, tokens, heads, tiles, HEAD_DIM=head_dim, BLOCK=64, num_warps=4
        )
        own, inner, options = _configuration(qkv, seq_len, varlen)
        tiles = own.tiles(seq_len)
        for of_keys in (True, False):
            _attention_backward_kernel[(tiles * heads * sequences,)](
                qkv, dout, lse, delta, dqkv, cu_seqlens, tokens, heads, tiles, *qkv.stride()[:4],
                own.prefix, inner.prefix,
                SCALE=softmax_scale(head_dim), HEAD_DIM=head_dim, BLOCK=own.block, PREFIX=own.prefix_block,
                BLOCK_INNER=inner.block, PREFIX_INNER=inner.prefix_block, RAGGED_INNER=inner.ragged, OF_KEYS=of_keys,
                VARLEN=varlen, UPCAST=upcast(qkv), **options,
            )  # fmt: skip
    return dqkv
