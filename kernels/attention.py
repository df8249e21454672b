"""Attention that does not store the attention weights (Dao et al., arXiv:2205.14135), and the weights of some queries.

    p = softmax(q @ k^T / sqrt(head_dim)),    out = p @ v,    lse = log2(sum(exp(scaled scores)))    for each head

A program computes a tile of queries of one head and reads the keys and values tile by tile (online softmax). For each
query it keeps the largest score so far (the row maximum), the sum of the weights and the weighted sum of the values, in
fp32. Scores are in units of log2, so exp2 gives the weights.

Invariants:
- qkv is (batch, tokens, 3, heads, head_dim) and is read in place by its strides. head_dim is contiguous, and is 32, 64
  or 128.
- Without cu_seqlens, a sequence is one row of the batch. With cu_seqlens, the batch is 1 and sequence i holds the
  tokens from cu_seqlens[i] up to cu_seqlens[i + 1].
- The keys after the last whole tile, such as the last one of 257 = 4 * 64 + 1, form a masked tile, the tail, whose
  width `tail_block` gives. The tail is computed first, so that its loads are issued together with those of q. It is
  computed even if it holds no key: in a kernel without a tail, or with the tail after the loop, ptxas serialises all
  matrix products (C7515).
- If `inverse_scale` is not None, out is multiplied by it and stored in e4m3, and there is no lse.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2_fast.kernels import common
from dinov2_fast.kernels.common import CACHED_CONFIGURATIONS, to_e4m3

MIN_BLOCK = 16  # rows of the smallest tile of a matrix product


@triton.jit
def find_sequence(index, cu_seqlens_ptr, tokens, VARLEN: tl.constexpr):
    """The row of the batch, the first token and the length of a sequence."""
    if VARLEN:
        start = tl.load(cu_seqlens_ptr + index)
        length = tl.load(cu_seqlens_ptr + index + 1) - start
        return tl.zeros_like(start).to(tl.int64), start.to(tl.int64), length
    return index.to(tl.int64), tl.zeros_like(index).to(tl.int64), tokens


@triton.jit
def load_rows(
    ptr, start, stop, stride, ROWS: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr
):
    """Rows start, start + 1, ... of a matrix, (ROWS, DIM). If MASKED, the rows from `stop` on are zeros."""
    row = tl.arange(0, ROWS)
    ptr += tl.cast(start, tl.int64) * stride  # the only term that changes in a loop over tiles
    pointers = ptr + row.to(tl.int64)[:, None] * stride + tl.arange(0, DIM)[None, :]
    if MASKED:
        x = tl.load(pointers, mask=(start + row < stop)[:, None], other=0.0)
    else:
        x = tl.load(pointers)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def store_rows(ptr, x, start, stop, stride, ROWS: tl.constexpr, DIM: tl.constexpr):
    rows = start + tl.arange(0, ROWS)
    pointers = ptr + rows.to(tl.int64)[:, None] * stride + tl.arange(0, DIM)[None, :]
    tl.store(pointers, x.to(ptr.dtype.element_ty), mask=(rows < stop)[:, None])


@triton.jit
def dot(a, b, acc=None):
    """a @ b in fp32. fp32 operands are not rounded to tf32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _scores(q, k, start, stop, KEYS: tl.constexpr, MASKED: tl.constexpr):
    """q @ k^T, (queries, keys), not scaled. If MASKED, the scores of the keys from `stop` on are -inf."""
    scores = dot(q, tl.trans(k))
    if MASKED:
        scores = tl.where((start + tl.arange(0, KEYS) < stop)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def _attend(
    q, k_ptr, v_ptr, start, stop, stride_token, row_max, total, acc,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds a tile of keys to the row maximum, the sum of the weights and the weighted sum of the values."""
    k = load_rows(k_ptr, start, stop, stride_token, KEYS, HEAD_DIM, MASKED, UPCAST)
    v = load_rows(v_ptr, start, stop, stride_token, KEYS, HEAD_DIM, MASKED, UPCAST)  # here, so that both loads overlap
    scores = _scores(q, k, start, stop, KEYS, MASKED)
    new_max = tl.maximum(row_max, tl.max(scores, 1) * SCALE)
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # if all scores are -inf, -inf - (-inf) would be NaN
    weights = tl.exp2(scores * SCALE - shift[:, None])
    correction = tl.exp2(row_max - shift)
    total = total * correction + tl.sum(weights, 1)
    acc = dot(weights.to(v.dtype), v, acc * correction[:, None])
    return new_max, total, acc


@triton.jit
def _attention_forward_kernel(
    qkv_ptr, out_ptr, lse_ptr, cu_seqlens_ptr, tokens, heads, tiles,
    stride_batch, stride_token, stride_kind, stride_head, inverse_scale,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TAIL_K: tl.constexpr,
    VARLEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)  # neighbouring programs share keys and values of one head in the L2 cache
    tile, head = program % tiles, program // tiles % heads
    batch, first, length = find_sequence(program // tiles // heads, cu_seqlens_ptr, tokens, VARLEN)
    start = tile * BLOCK_Q
    if start >= length:  # the sequence is shorter than the longest one
        return
    q_ptr = qkv_ptr + batch * stride_batch + first * stride_token + head.to(tl.int64) * stride_head
    k_ptr = q_ptr + stride_kind
    v_ptr = k_ptr + stride_kind

    q = load_rows(q_ptr, start, length, stride_token, BLOCK_Q, HEAD_DIM, True, UPCAST)
    row_max = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, HEAD_DIM), tl.float32)
    tail = length // BLOCK_K * BLOCK_K
    row_max, total, acc = _attend(
        q, k_ptr, v_ptr, tail, length, stride_token, row_max, total, acc, SCALE, HEAD_DIM, TAIL_K, True, UPCAST
    )
    for key in tl.range(0, tail, BLOCK_K):
        row_max, total, acc = _attend(
            q, k_ptr, v_ptr, key, length, stride_token, row_max, total, acc, SCALE, HEAD_DIM, BLOCK_K, False, UPCAST
        )

    out = acc / total[:, None]
    if inverse_scale is not None:
        out = to_e4m3(out * inverse_scale)
    stride_out = heads * HEAD_DIM
    out_ptr += (batch * tokens + first) * stride_out + head * HEAD_DIM
    store_rows(out_ptr, out, start, length, stride_out, BLOCK_Q, HEAD_DIM)
    if lse_ptr is not None:
        lse_ptr += (batch * heads + head) * tokens + first
        rows = start + tl.arange(0, BLOCK_Q)
        tl.store(lse_ptr + rows, row_max + tl.log2(total), mask=rows < length)


@triton.jit
def _attention_probabilities_kernel(
    q_ptr, k_ptr, p_ptr, rows, tokens, heads, tiles, stride_batch, stride_row, stride_token, stride_head,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile, head, batch = program % tiles, program // tiles % heads, (program // tiles // heads).to(tl.int64)
    q_ptr += batch * stride_batch + head.to(tl.int64) * stride_head
    k_ptr += batch * stride_batch + head.to(tl.int64) * stride_head
    q = load_rows(q_ptr, tile * BLOCK_Q, rows, stride_row, BLOCK_Q, HEAD_DIM, True, UPCAST)

    row_max = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    for key in tl.range(0, tokens, BLOCK_K):
        k = load_rows(k_ptr, key, tokens, stride_token, BLOCK_K, HEAD_DIM, True, UPCAST)
        scores = _scores(q, k, key, tokens, BLOCK_K, True) * SCALE
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        total = total * tl.exp2(row_max - shift) + tl.sum(tl.exp2(scores - shift[:, None]), 1)
        row_max = new_max

    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    p_ptr += ((batch * heads + head) * rows + row)[:, None] * tokens
    for key in tl.range(0, tokens, BLOCK_K):
        k = load_rows(k_ptr, key, tokens, stride_token, BLOCK_K, HEAD_DIM, True, UPCAST)
        scores = _scores(q, k, key, tokens, BLOCK_K, True) * SCALE
        p = tl.exp2(scores - row_max[:, None]) / total[:, None]
        column = key + tl.arange(0, BLOCK_K)[None, :]
        tl.store(p_ptr + column, p.to(p_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (column < tokens))


def tail_block(seq_len: int, block: int, varlen: bool) -> int:
    """The width of the masked tile for the tokens after the last whole tile of `block`."""
    if varlen:  # the number of these tokens differs between sequences
        return block
    return max(MIN_BLOCK, triton.next_power_of_2(seq_len % block))


def softmax_scale(head_dim: int) -> float:
    """The factor of the scores: 1 / sqrt(head_dim), in units of log2."""
    return head_dim**-0.5 / math.log(2.0)


@lru_cache(CACHED_CONFIGURATIONS)
def _configuration(seq_len: int, head_dim: int, dtype: torch.dtype, varlen: bool) -> tuple[int, dict[str, Any]]:
    """The number of query tiles, and the constants, warps and stages of a launch."""
    if dtype == torch.float32:  # computed without tensor cores; larger tiles spill registers
        block_q, block_k, warps, stages = 16 if head_dim == 128 else 64, 16, 8, 2
    else:
        padded_128, padded_64 = (triton.cdiv(seq_len, block) * block for block in (128, 64))
        block_q = 128 if padded_128 <= 1.05 * padded_64 else 64  # a tile of 128 reads the keys half as often
        block_k, warps, stages = 64, block_q // 16, 3 if head_dim <= 64 else 2
    tail = tail_block(seq_len, block_k, varlen)
    constants = {"SCALE": softmax_scale(head_dim), "HEAD_DIM": head_dim, "BLOCK_Q": block_q, "BLOCK_K": block_k}
    constants |= {"TAIL_K": tail, "VARLEN": varlen, "UPCAST": common.upcast(dtype)}
    return triton.cdiv(seq_len, block_q), constants | {"num_warps": warps, "num_stages": stages}


def attention_forward(
    qkv: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """out (batch, tokens, heads, head_dim) and lse (batch, heads, tokens), contiguous.

    lse is fp32, and empty with `scale`, the scale of an e4m3 output. `cu_seqlens` (sequences + 1,) is int32, and
    `max_seqlen` is the length of the longest sequence.
    """
    qkv = common.with_contiguous_rows(qkv)
    batch, tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(batch, tokens, heads, head_dim, dtype=qkv.dtype if scale is None else torch.float8_e4m3fn)
    lse = qkv.new_empty((batch, heads, tokens) if scale is None else (0,), dtype=torch.float32)
    varlen = cu_seqlens is not None
    sequences, seq_len = (cu_seqlens.shape[0] - 1, max_seqlen) if varlen else (batch, tokens)
    if out.numel() == 0:
        return out, lse
    tiles, options = _configuration(seq_len, head_dim, qkv.dtype, varlen)
    with common.on_device(qkv):
        _attention_forward_kernel[(tiles * heads * sequences,)](
            qkv, out, lse if scale is None else None, cu_seqlens, tokens, heads, tiles, *qkv.stride()[:4],
            None if scale is None else 1.0 / scale, **options,
        )  # fmt: skip
    return out, lse


def attention_probabilities_forward(qkv: Tensor, start: int, stop: int, step: int) -> Tensor:
    """p (batch, heads, rows, tokens) of the queries ``range(start, stop, step)``, in the dtype of `qkv`."""
    qkv = common.with_contiguous_rows(qkv)
    batch, tokens, _, heads, head_dim = qkv.shape
    rows = len(range(start, stop, step))
    p = qkv.new_empty(batch, heads, rows, tokens)
    if p.numel() == 0:
        return p
    q, k = qkv[:, start:stop:step, 0], qkv[:, :, 1]
    block_q, block_k = 16 if rows <= 16 else 64, 16 if qkv.dtype == torch.float32 else 64
    tiles = triton.cdiv(rows, block_q)
    with common.on_device(qkv):
        _attention_probabilities_kernel[(tiles * heads * batch,)](
            q, k, p, rows, tokens, heads, tiles, q.stride(0), q.stride(1), k.stride(1), k.stride(2),
            SCALE=softmax_scale(head_dim), HEAD_DIM=head_dim, BLOCK_Q=block_q, BLOCK_K=block_k,
            UPCAST=common.upcast(qkv.dtype), num_warps=4, num_stages=2,
        )  # fmt: skip
    return p
