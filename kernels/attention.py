"""Attention without writing the matrix of weights (Dao et al., arXiv:2205.14135), and that matrix for a few query rows.

A program takes a tile of query rows of one head and reads the keys tile by tile, keeping for each row the greatest
score so far, the sum of the weights and the weighted sum of the values, all in fp32. Scores are in units of log2, so
that exp2 gives the weights.

What the kernels rely on:
- qkv is (batch, tokens, 3, heads, head_dim), read in place by its strides; head_dim is contiguous and 32, 64 or 128.
- Without cu_seqlens a sequence is a row of the batch; with it, sequence i is the tokens from cu_seqlens[i] up to
  cu_seqlens[i + 1] of a batch of 1.
- The first `tokens % block` tokens, where they are few (the class token and the registers before a square of patches),
  are a narrow tile of their own in front of exact tiles; otherwise the last tile is masked. See `Tiling`.
- Every tile of keys holds one that counts.
- With `inverse_scale` out is e4m3, multiplied by it, and nothing asks for lse; otherwise it is None.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2_fast.kernels import common
from dinov2_fast.kernels.common import to_e4m3

PREFIX_BLOCK = 16  # rows of the narrow tile: the fewest that a matrix product takes


@triton.jit
def find_sequence(index, cu_seqlens_ptr, tokens, VARLEN: tl.constexpr):
    """Row of the batch, first token and length of a sequence."""
    if VARLEN:
        start = tl.load(cu_seqlens_ptr + index)
        length = tl.load(cu_seqlens_ptr + index + 1) - start
        return tl.zeros_like(start).to(tl.int64), start.to(tl.int64), length
    return index.to(tl.int64), tl.zeros_like(index).to(tl.int64), tokens


@triton.jit
def load_rows(
    ptr, start, stop, stride, ROWS: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr
):
    """Rows start, start + 1, ... of a matrix, (ROWS, DIM). If MASKED, those from `stop` on are zeros."""
    rows = start + tl.arange(0, ROWS)
    pointers = ptr + rows.to(tl.int64)[:, None] * stride + tl.arange(0, DIM)[None, :]
    if MASKED:
        x = tl.load(pointers, mask=(rows < stop)[:, None], other=0.0)
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
    """a b in fp32; fp32 operands are not rounded to tf32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _scores(q, k, start, stop, KEYS: tl.constexpr, MASKED: tl.constexpr):
    """q k^T, (queries, keys), before the scale. If MASKED, keys from `stop` on have -inf."""
    scores = dot(q, tl.trans(k))
    if MASKED:
        scores = tl.where((start + tl.arange(0, KEYS) < stop)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def _attend(
    q, k_ptr, v_ptr, start, stop, stride_token, greatest, total, acc,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Takes a tile of keys into each row's greatest score, sum of weights and weighted sum of values."""
    k = load_rows(k_ptr, start, stop, stride_token, KEYS, HEAD_DIM, MASKED, UPCAST)
    scores = _scores(q, k, start, stop, KEYS, MASKED)
    new_greatest = tl.maximum(greatest, tl.max(scores, 1) * SCALE)
    shift = tl.where(new_greatest == float("-inf"), 0.0, new_greatest)  # no -inf from -inf: keys may have such scores
    weights = tl.exp2(scores * SCALE - shift[:, None])
    correction = tl.exp2(greatest - shift)
    total = total * correction + tl.sum(weights, 1)
    v = load_rows(v_ptr, start, stop, stride_token, KEYS, HEAD_DIM, MASKED, UPCAST)
    acc = dot(weights.to(v.dtype), v, acc * correction[:, None])
    return new_greatest, total, acc


@triton.jit
def _forward_rows(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, start, stop, length, prefix_k, stride_token, stride_out, inverse_scale,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PREFIX_K: tl.constexpr,
    RAGGED_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out and lse (unless that is None) of the queries start ... stop - 1 of one head, ROWS of them at most."""
    q = load_rows(q_ptr, start, stop, stride_token, ROWS, HEAD_DIM, True, UPCAST)
    greatest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    if PREFIX_K > 0:
        greatest, total, acc = _attend(
            q, k_ptr, v_ptr, 0, prefix_k, stride_token, greatest, total, acc, SCALE, HEAD_DIM, PREFIX_K, True, UPCAST
        )
    exact = prefix_k + (length - prefix_k) // BLOCK_K * BLOCK_K
    for key in tl.range(prefix_k, exact, BLOCK_K):
        greatest, total, acc = _attend(
            q, k_ptr, v_ptr, key, length, stride_token, greatest, total, acc, SCALE, HEAD_DIM, BLOCK_K, False, UPCAST
        )
    if RAGGED_K:
        for key in tl.range(exact, length, BLOCK_K, num_stages=1):  # at most once
            greatest, total, acc = _attend(
                q, k_ptr, v_ptr, key, length, stride_token, greatest, total, acc, SCALE, HEAD_DIM, BLOCK_K, True, UPCAST
            )
    out = acc / total[:, None]
    if inverse_scale is not None:
        out = to_e4m3(out * inverse_scale)
    store_rows(out_ptr, out, start, stop, stride_out, ROWS, HEAD_DIM)
    if lse_ptr is not None:
        rows = start + tl.arange(0, ROWS)
        tl.store(lse_ptr + rows, greatest + tl.log2(total), mask=rows < stop)


@triton.jit
def _attention_forward_kernel(
    qkv_ptr, out_ptr, lse_ptr, cu_seqlens_ptr, tokens, heads, tiles,
    stride_batch, stride_token, stride_kind, stride_head, prefix_q, prefix_k, inverse_scale,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, PREFIX_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PREFIX_K: tl.constexpr, RAGGED_K: tl.constexpr, VARLEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)  # tiles of one head are neighbours: they share its keys and values in L2
    tile, head = program % tiles, program // tiles % heads
    batch, first, length = find_sequence(program // tiles // heads, cu_seqlens_ptr, tokens, VARLEN)
    q_ptr = qkv_ptr + batch * stride_batch + first * stride_token + head.to(tl.int64) * stride_head
    k_ptr = q_ptr + stride_kind
    v_ptr = k_ptr + stride_kind
    stride_out = heads * HEAD_DIM
    out_ptr += (batch * tokens + first) * stride_out + head * HEAD_DIM
    if lse_ptr is not None:
        lse_ptr += (batch * heads + head) * tokens + first
    if PREFIX_Q > 0:
        if tile == tiles - 1:
            _forward_rows(
                q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, 0, prefix_q, length, prefix_k, stride_token, stride_out,
                inverse_scale, SCALE, HEAD_DIM, PREFIX_Q, BLOCK_K, PREFIX_K, RAGGED_K, UPCAST,
            )  # fmt: skip
    start = prefix_q + tile * BLOCK_Q
    if start < length:  # else it is the program of the prefix, or beyond a short sequence
        _forward_rows(
            q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, start, length, length, prefix_k, stride_token, stride_out,
            inverse_scale, SCALE, HEAD_DIM, BLOCK_Q, BLOCK_K, PREFIX_K, RAGGED_K, UPCAST,
        )  # fmt: skip


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

    greatest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    for key in tl.range(0, tokens, BLOCK_K):
        k = load_rows(k_ptr, key, tokens, stride_token, BLOCK_K, HEAD_DIM, True, UPCAST)
        scores = _scores(q, k, key, tokens, BLOCK_K, True) * SCALE
        new_greatest = tl.maximum(greatest, tl.max(scores, 1))
        shift = tl.where(new_greatest == float("-inf"), 0.0, new_greatest)
        total = total * tl.exp2(greatest - shift) + tl.sum(tl.exp2(scores - shift[:, None]), 1)
        greatest = new_greatest

    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    p_ptr += ((batch * heads + head) * rows + row)[:, None] * tokens
    for key in tl.range(0, tokens, BLOCK_K):
        k = load_rows(k_ptr, key, tokens, stride_token, BLOCK_K, HEAD_DIM, True, UPCAST)
        scores = _scores(q, k, key, tokens, BLOCK_K, True) * SCALE
        p = tl.exp2(scores - greatest[:, None]) / total[:, None]
        column = key + tl.arange(0, BLOCK_K)[None, :]
        tl.store(p_ptr + column, p.to(p_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (column < tokens))


class Tiling(NamedTuple):
    """How the tokens of a sequence, as queries or as keys, are cut into tiles."""

    block: int
    prefix: int  # tokens of the narrow tile in front, 0 for none
    ragged: bool  # whether the last tile is masked

    @classmethod
    def of(cls, seq_len: int, block: int, varlen: bool) -> Tiling:
        rest = seq_len % block
        if varlen or rest > PREFIX_BLOCK:
            return cls(block, 0, True)
        return cls(block, rest, False)

    @property
    def prefix_block(self) -> int:
        return PREFIX_BLOCK if self.prefix else 0

    def tiles(self, seq_len: int) -> int:
        return triton.cdiv(seq_len - self.prefix, self.block) + (self.prefix > 0)

    def room(self, seq_len: int) -> int:
        """Tokens that the tiles have room for, used or not."""
        return self.prefix_block + triton.cdiv(seq_len - self.prefix, self.block) * self.block


def choose_tiling(seq_len: int, blocks: tuple[int, ...], varlen: bool) -> Tiling:
    """The first of `blocks` (largest first) whose tiles need hardly more room than the best."""
    tilings = [Tiling.of(seq_len, block, varlen) for block in blocks]
    least = min(tiling.room(seq_len) for tiling in tilings)
    return next(tiling for tiling in tilings if tiling.room(seq_len) <= 1.05 * least)


def softmax_scale(head_dim: int) -> float:
    """What scores are multiplied by, in units of log2."""
    return head_dim**-0.5 / math.log(2.0)


def rows_in_place(qkv: Tensor) -> Tensor:
    """`qkv`, or a copy if head_dim is not contiguous."""
    return qkv if qkv.stride(-1) == 1 else qkv.contiguous()


def upcast(x: Tensor) -> bool:
    """Whether operands go to fp32 before a product: Triton's interpreter multiplies bf16 wrongly."""
    return common.interpreting() and x.dtype == torch.bfloat16


def _configuration(qkv: Tensor, seq_len: int, varlen: bool) -> tuple[Tiling, Tiling, dict[str, int]]:
    """Tilings of queries and keys, warps and stages."""
    head_dim = qkv.shape[-1]
    if qkv.dtype == torch.float32:  # not on tensor cores; larger tiles spill
        q_blocks, k_blocks = {32: ((64,), (32,)), 64: ((64,), (16,)), 128: ((16,), (16,))}[head_dim]
    else:
        wide = common.capability(qkv.device)[0] in (9, 10) and head_dim <= 64
        q_blocks, k_blocks = (128, 64), (128, 64) if wide else (64,)
    queries, keys = choose_tiling(seq_len, q_blocks, varlen), choose_tiling(seq_len, k_blocks, varlen)
    warps = 4 if qkv.dtype != torch.float32 and queries.block == 64 else 8
    stages = 2 if qkv.dtype == torch.float32 or keys.block * head_dim > 4096 else 3
    return queries, keys, {"num_warps": warps, "num_stages": stages}


def attention_forward(
    qkv: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of each picture of a batch, or with cu_seqlens of each sequence of a batch of 1.

    Args:
        qkv: (batch, tokens, 3, heads, head_dim).
        cu_seqlens: (sequences + 1,) int32, the first token of each sequence, and the number of tokens.
        max_seqlen: the greatest length of a sequence.
        scale: of an e4m3 out; None for one in the dtype of `qkv`.

    Returns:
        out (batch, tokens, heads, head_dim) and lse (batch, heads, tokens), contiguous. lse is fp32: the logarithm,
        to base 2 as the backward reads it, of the sum of the exponentials of the scaled scores; with `scale`, empty.
    """
    qkv = rows_in_place(qkv)
    batch, tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(batch, tokens, heads, head_dim, dtype=qkv.dtype if scale is None else torch.float8_e4m3fn)
    lse = qkv.new_empty((batch, heads, tokens) if scale is None else (0,), dtype=torch.float32)
    varlen = cu_seqlens is not None
    sequences, seq_len = (cu_seqlens.shape[0] - 1, max_seqlen) if varlen else (batch, tokens)
    if out.numel() == 0:
        return out, lse
    queries, keys, options = _configuration(qkv, seq_len, varlen)
    tiles = queries.tiles(seq_len)
    with common.on_device(qkv):
        _attention_forward_kernel[(tiles * heads * sequences,)](
            qkv, out, lse if scale is None else None, cu_seqlens, tokens, heads, tiles, *qkv.stride()[:4],
            queries.prefix, keys.prefix, None if scale is None else 1.0 / scale,
            SCALE=softmax_scale(head_dim), HEAD_DIM=head_dim, BLOCK_Q=queries.block, PREFIX_Q=queries.prefix_block,
            BLOCK_K=keys.block, PREFIX_K=keys.prefix_block, RAGGED_K=keys.ragged, VARLEN=varlen, UPCAST=upcast(qkv),
            **options,
        )  # fmt: skip
    return out, lse


def attention_probabilities_forward(qkv: Tensor, start: int, stop: int, step: int = 1) -> Tensor:
    """The weights of the queries start, start + step, ... below `stop`.

    Args:
        qkv: (batch, tokens, 3, heads, head_dim).

    Returns:
        (batch, heads, rows, tokens) in the dtype of `qkv`, contiguous.
    """
    qkv = rows_in_place(qkv)
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
            SCALE=softmax_scale(head_dim), HEAD_DIM=head_dim, BLOCK_Q=block_q, BLOCK_K=block_k, UPCAST=upcast(qkv),
            num_warps=4, num_stages=2,
        )  # fmt: skip
    return p
