"""The gradient of attention.

    delta_i = sum_d dout_id * out_id
    dv = p^T @ dout,    ds = p * (dout @ v^T - delta),    dq = scale * ds @ k,    dk = scale * ds^T @ q

p are the attention weights, and * is elementwise. There are three kernels:
- delta: a program computes a tile of tokens of one head;
- dk and dv: a program computes a tile of keys of one head and reads all queries;
- dq: a program computes a tile of queries of one head and reads all keys.

The last two compute p again from lse. Each element of the gradient is written once, by one program, so results are
equal bit by bit in every run. The gradient is packed as qkv is, and contiguous. The invariants are those of
kernels/attention.py. Source: Dao et al., arXiv:2205.14135.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2_fast.kernels import common
from dinov2_fast.kernels.attention import dot, find_sequence, load_rows, softmax_scale, store_rows, tail_block

LN2 = tl.constexpr(math.log(2.0))


@triton.jit
def _attention_delta_kernel(
    out_ptr, dout_ptr, lse_ptr, lse_delta_ptr, tokens, heads, tiles, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """Writes lse and delta side by side, (batch, heads, tokens, 2). out, dout: (batch, tokens, heads, head_dim)."""
    program = tl.program_id(0)
    head, batch = program // tiles % heads, (program // tiles // heads).to(tl.int64)
    token = program % tiles * BLOCK + tl.arange(0, BLOCK)
    token_mask = token < tokens
    offsets = ((batch * tokens + token) * heads + head)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    out = tl.load(out_ptr + offsets, mask=token_mask[:, None], other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + offsets, mask=token_mask[:, None], other=0.0).to(tl.float32)
    rows = (batch * heads + head) * tokens + token
    lse = tl.load(lse_ptr + rows, mask=token_mask, other=0.0)
    pairs = lse_delta_ptr + rows[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(pairs, tl.join(lse, tl.sum(out * dout, 1)), mask=token_mask[:, None])


@triton.jit
def _load_lse_delta(lse_delta_ptr, start, stop, ROWS: tl.constexpr, MASKED: tl.constexpr):
    """lse and delta, (ROWS,) each, of the rows start, start + 1, ... If MASKED, the rows from `stop` on are zeros.

    One load reads both. If the load has as many elements as the program has threads, each thread loads one element, and
    shared memory distributes them. Triton repeats a smaller load in every thread, for all rows that the thread needs.
    """
    rows = start + tl.arange(0, ROWS)
    pairs = lse_delta_ptr + rows[:, None] * 2 + tl.arange(0, 2)[None, :]
    if MASKED:
        return tl.split(tl.load(pairs, mask=(rows < stop)[:, None], other=0.0))
    return tl.split(tl.load(pairs))


@triton.jit
def _add_queries(
    k, v, q_ptr, dout_ptr, lse_delta_ptr, start, stop, stride_token, stride_out, dk, dv,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds the contribution of a tile of queries to dk, not yet scaled, and to dv.

    If MASKED, q, dout, lse and delta are 0 for the queries from `stop` on, so these contribute nothing.
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
def _key_gradients(
    q_ptr, dout_ptr, lse_delta_ptr, dq_ptr, start, length, stride_token, stride_kind, stride_out,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, TAIL_Q: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dk and dv of at most ROWS keys of one head, from `start` on."""
    k = load_rows(q_ptr + stride_kind, start, length, stride_token, ROWS, HEAD_DIM, True, UPCAST)
    v = load_rows(q_ptr + 2 * stride_kind, start, length, stride_token, ROWS, HEAD_DIM, True, UPCAST)
    dk = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    dv = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    tail = length // BLOCK_Q * BLOCK_Q
    dk, dv = _add_queries(
        k, v, q_ptr, dout_ptr, lse_delta_ptr, tail, length, stride_token, stride_out, dk, dv,
        SCALE, HEAD_DIM, TAIL_Q, True, UPCAST,
    )  # fmt: skip
    for query in tl.range(0, tail, BLOCK_Q):
        dk, dv = _add_queries(
            k, v, q_ptr, dout_ptr, lse_delta_ptr, query, length, stride_token, stride_out, dk, dv,
            SCALE, HEAD_DIM, BLOCK_Q, False, UPCAST,
        )  # fmt: skip
    stride_grad = 3 * stride_out
    store_rows(dq_ptr + stride_out, dk * (SCALE * LN2), start, length, stride_grad, ROWS, HEAD_DIM)
    store_rows(dq_ptr + 2 * stride_out, dv, start, length, stride_grad, ROWS, HEAD_DIM)


@triton.jit
def _add_keys(
    q, dout, lse, delta, k_ptr, v_ptr, start, stop, stride_token, dq,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds the contribution of a tile of keys to dq, not yet scaled."""
    k = load_rows(k_ptr, start, stop, stride_token, KEYS, HEAD_DIM, MASKED, UPCAST)
    v = load_rows(v_ptr, start, stop, stride_token, KEYS, HEAD_DIM, MASKED, UPCAST)
    p = tl.exp2(dot(q, tl.trans(k)) * SCALE - lse[:, None])  # (queries, keys)
    if MASKED:
        p = tl.where((start + tl.arange(0, KEYS) < stop)[None, :], p, 0.0)
    ds = p * (dot(dout, tl.trans(v)) - delta[:, None])
    return dot(ds.to(k.dtype), k, dq)


@triton.jit
def _query_gradients(
    q_ptr, dout_ptr, lse_delta_ptr, dq_ptr, start, length, stride_token, stride_kind, stride_out,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, TAIL_K: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dq of at most ROWS queries of one head, from `start` on."""
    lse, delta = _load_lse_delta(lse_delta_ptr, start, length, ROWS, True)
    q = load_rows(q_ptr, start, length, stride_token, ROWS, HEAD_DIM, True, UPCAST)
    dout = load_rows(dout_ptr, start, length, stride_out, ROWS, HEAD_DIM, True, UPCAST)
    k_ptr = q_ptr + stride_kind
    v_ptr = k_ptr + stride_kind
    dq = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    tail = length // BLOCK_K * BLOCK_K
    dq = _add_keys(
        q, dout, lse, delta, k_ptr, v_ptr, tail, length, stride_token, dq, SCALE, HEAD_DIM, TAIL_K, True, UPCAST
    )
    for key in tl.range(0, tail, BLOCK_K):
        dq = _add_keys(
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
    """Computes a tile of dk and dv (OF_KEYS) or of dq. "Inner" are the queries or keys that it loops over."""
    program = tl.program_id(0)
    tile, head = program % tiles, program // tiles % heads
    batch, first, length = find_sequence(program // tiles // heads, cu_seqlens_ptr, tokens, VARLEN)
    start = tile * BLOCK
    if start >= length:  # the sequence is shorter than the longest one
        return
    qkv_ptr += batch * stride_batch + first * stride_token + head.to(tl.int64) * stride_head
    stride_out = heads * HEAD_DIM
    dout_ptr += (batch * tokens + first) * stride_out + head * HEAD_DIM
    dqkv_ptr += (batch * tokens + first) * 3 * stride_out + head * HEAD_DIM
    lse_delta_ptr += ((batch * heads + head) * tokens + first) * 2
    gradient: tl.constexpr = _key_gradients if OF_KEYS else _query_gradients
    gradient(
        qkv_ptr, dout_ptr, lse_delta_ptr, dqkv_ptr, start, length, stride_token, stride_kind, stride_out,
        SCALE, HEAD_DIM, BLOCK, BLOCK_INNER, TAIL_INNER, UPCAST,
    )  # fmt: skip


def _configuration(qkv: Tensor) -> tuple[int, int, dict[str, int]]:
    """Rows of a program's tile, rows of the tiles that it loops over, and its warps and stages."""
    head_dim = qkv.shape[-1]
    if qkv.dtype == torch.float32:  # computed without tensor cores; larger tiles spill registers
        return 16 if head_dim == 128 else 64, 16, {"num_warps": 8, "num_stages": 2}
    wide = common.capability(qkv.device)[0] in (9, 10)
    block = 64 if wide or head_dim <= 64 else 32
    inner = 64 if wide and head_dim <= 64 else 32
    return block, inner, {"num_warps": 4, "num_stages": 3 if head_dim <= 64 else 2}


def attention_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None
) -> Tensor:
    """The gradient for qkv, contiguous, given `dout`, and the arguments and results of `attention_forward`."""
    qkv, dout = common.with_contiguous_rows(qkv), dout.contiguous()
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
                TAIL_INNER=tail_block(seq_len, inner, varlen), OF_KEYS=of_keys, VARLEN=varlen,
                UPCAST=common.upcast(qkv.dtype), **options,
            )  # fmt: skip
    return dqkv
