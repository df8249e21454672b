"""Attention of one query per head over the norm of the residual stream. The formula is that of ops/attention_pool.py.

There are two kernels. In the first, a program computes the statistics of a tile of tokens and their scores for all
heads. In the second, a program computes the softmax, and the sum for a block of the hidden size, for all heads of an
image. Programs share nothing.

y is never stored. The norm's bias shifts all scores of a head alike, so the softmax ignores it, and the norm's weight
is multiplied into the absorbed query. So the kernels need only x_hat = (x - mean) * rstd, and apply weight and bias to
the result.

The first kernel reads each tile twice, for the statistics and for the scores. The second kernel reads the stream once
more, from the L2 cache if a batch fits into it. A kernel that reads it once would
hold (heads, hidden) sums and a tile of whole tokens in the registers of one program. Then only one program fits on a
multiprocessor, and registers spill at hidden size 1536 and in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2_fast.kernels import common

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attention_pool_scores_kernel(
    x_ptr,  # (batch, seq_len, hidden)
    absorbed_ptr,  # (batch, num_heads, hidden)
    weight_ptr,  # (hidden,) of the norm
    scores_ptr,  # (batch, num_heads, seq_len), out
    mean_ptr,  # (batch, seq_len), out
    rstd_ptr,  # (batch, seq_len), out
    seq_len,
    hidden,
    num_heads,
    x_batch_stride,
    x_token_stride,
    EPS: tl.constexpr,
    COMPUTE: tl.constexpr,
    UPCAST: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token_blocks = tl.cdiv(seq_len, TOKENS)
    image = (tl.program_id(0) // token_blocks).to(tl.int64)
    token = tl.program_id(0) % token_blocks * TOKENS + tl.arange(0, TOKENS)
    head = tl.arange(0, HEADS)
    token_mask, head_mask = token < seq_len, head < num_heads
    x_rows = x_ptr + image * x_batch_stride + token.to(tl.int64)[:, None] * x_token_stride
    queries = absorbed_ptr + (image * num_heads + head[:, None]) * hidden
    dtype = x_ptr.dtype.element_ty
    operand = tl.float32 if UPCAST else dtype

    # The statistics are computed block by block and combined as in Chan, Golub & LeVeque, "Updating Formulae ... for
    # Computing Sample Variances" (1979): the sum of squares of a block is taken about the mean of that block.
    mean = tl.zeros((TOKENS,), COMPUTE)
    squares = tl.zeros((TOKENS,), COMPUTE)
    for start in range(0, hidden, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = token_mask[:, None] & (column < hidden)[None, :]
        x = tl.load(x_rows + column[None, :], mask=mask, other=0.0).to(COMPUTE)
        count = tl.minimum(hidden - start, BLOCK)
        block_mean = tl.sum(x, axis=1) / count
        centred = tl.where(mask, x - block_mean[:, None], 0.0)
        step = block_mean - mean
        share = count / (start + count).to(COMPUTE)
        mean += step * share
        squares += tl.sum(centred * centred, axis=1) + step * step * (start * share)
    rstd = tl.rsqrt(squares / hidden + EPS)

    scores = tl.zeros((HEADS, TOKENS), COMPUTE)
    for start in range(0, hidden, BLOCK):
        column = start + tl.arange(0, BLOCK)
        column_mask = column < hidden
        mask = token_mask[:, None] & column_mask[None, :]
        x = tl.load(x_rows + column[None, :], mask=mask, other=0.0).to(COMPUTE)
        x_hat = ((x - mean[:, None]) * rstd[:, None]).to(dtype).to(operand)
        query = tl.load(queries + column[None, :], mask=head_mask[:, None] & column_mask[None, :], other=0.0)
        weight = tl.load(weight_ptr + column, mask=column_mask, other=0.0).to(COMPUTE)
        query = (query.to(COMPUTE) * weight[None, :]).to(dtype).to(operand)
        scores = tl.dot(query, tl.trans(x_hat), scores, input_precision="ieee", out_dtype=COMPUTE)

    statistic = image * seq_len + token
    tl.store(mean_ptr + statistic, mean, mask=token_mask)
    tl.store(rstd_ptr + statistic, rstd, mask=token_mask)
    score_row = (image * num_heads + head[:, None]) * seq_len
    tl.store(scores_ptr + score_row + token[None, :], scores, mask=head_mask[:, None] & token_mask[None, :])


@triton.jit
def _attention_pool_sum_kernel(
    x_ptr,  # (batch, seq_len, hidden)
    scores_ptr,  # (batch, num_heads, seq_len)
    mean_ptr,  # (batch, seq_len)
    rstd_ptr,  # (batch, seq_len)
    weight_ptr,  # (hidden,) of the norm
    bias_ptr,  # (hidden,)
    pooled_ptr,  # (batch, num_heads, hidden), out
    seq_len,
    hidden,
    num_heads,
    x_batch_stride,
    x_token_stride,
    COMPUTE: tl.constexpr,
    UPCAST: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    blocks = tl.cdiv(hidden, BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    head = tl.arange(0, HEADS)
    column_mask, head_mask = column < hidden, head < num_heads
    dtype = x_ptr.dtype.element_ty
    operand = tl.float32 if UPCAST else dtype

    row_max = tl.full((HEADS,), float("-inf"), COMPUTE)
    total = tl.zeros((HEADS,), COMPUTE)
    acc = tl.zeros((HEADS, BLOCK), COMPUTE)
    for start in tl.range(0, seq_len, TOKENS, num_stages=STAGES):
        token = start + tl.arange(0, TOKENS)
        token_mask = token < seq_len
        x_rows = x_ptr + image * x_batch_stride + token.to(tl.int64)[:, None] * x_token_stride
        x = tl.load(x_rows + column[None, :], mask=token_mask[:, None] & column_mask[None, :], other=0.0).to(COMPUTE)
        mean = tl.load(mean_ptr + image * seq_len + token, mask=token_mask, other=0.0)
        rstd = tl.load(rstd_ptr + image * seq_len + token, mask=token_mask, other=0.0)
        x_hat = ((x - mean[:, None]) * rstd[:, None]).to(dtype).to(operand)

        score_row = scores_ptr + (image * num_heads + head[:, None]) * seq_len
        scores = tl.load(score_row + token[None, :], mask=head_mask[:, None] & token_mask[None, :], other=0.0)
        scores = tl.where(token_mask[None, :], scores * LOG2E, float("-inf"))  # (HEADS, TOKENS), in units of log2
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        correction = tl.exp2(row_max - new_max)
        p = tl.exp2(scores - new_max[:, None])
        total = total * correction + tl.sum(p, axis=1)
        p = p.to(dtype).to(operand)
        acc = tl.dot(p, x_hat, acc * correction[:, None], input_precision="ieee", out_dtype=COMPUTE)
        row_max = new_max

    weight = tl.load(weight_ptr + column, mask=column_mask, other=0.0).to(COMPUTE)
    bias = tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(COMPUTE)
    pooled = acc / total[:, None] * weight[None, :] + bias[None, :]
    row = (image * num_heads + head[:, None]) * hidden
    tl.store(pooled_ptr + row + column[None, :], pooled, mask=head_mask[:, None] & column_mask[None, :])


def _configuration(batch: int, hidden: int, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, int], ...]:
    """The tiles of the two kernels. The blocks of the second are narrow if wide ones would not occupy the device."""
    if dtype.itemsize >= 4:  # products of fp32 and fp64 read registers, which leaves no room for loads ahead
        sums = {"BLOCK": 32, "STAGES": 1}
    elif batch * triton.cdiv(hidden, 128) < 2 * common.multiprocessors(device):
        sums = {"BLOCK": 32, "STAGES": 3}
    else:
        sums = {"BLOCK": 128, "STAGES": 3}
    scores = {"TOKENS": 32, "BLOCK": 32 if dtype.itemsize >= 4 else 64, "num_warps": 4}
    return scores, {"TOKENS": 32, **sums, "num_warps": 4}


def attention_pool_forward(x: Tensor, absorbed: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`pooled` (batch, num_heads, hidden) for `x` (batch, seq_len, hidden) and `absorbed` (batch, num_heads, hidden).

    There are at most 32 heads and at least one token. The result has the dtype of `x`.
    """
    batch, seq_len, hidden = x.shape
    num_heads = absorbed.shape[1]
    pooled = x.new_empty(batch, num_heads, hidden)
    if pooled.numel() == 0:
        return pooled
    x, weight, bias = common.with_contiguous_rows(x), weight.contiguous(), bias.contiguous()
    compute = common.compute_dtype(x)
    wide = torch.float64 if compute == tl.float64 else torch.float32
    scores = x.new_empty(batch, num_heads, seq_len, dtype=wide)
    mean, rstd = x.new_empty(2, batch, seq_len, dtype=wide)
    heads = max(16, triton.next_power_of_2(num_heads))
    options = {"COMPUTE": compute, "UPCAST": common.upcast(x.dtype), "HEADS": heads}
    sizes = (seq_len, hidden, num_heads, x.stride(0), x.stride(1))
    tiles, sum_tiles = _configuration(batch, hidden, x.dtype, x.device)
    with common.on_device(x):
        grid = (batch * triton.cdiv(seq_len, tiles["TOKENS"]),)
        _attention_pool_scores_kernel[grid](
            x, absorbed.contiguous(), weight, scores, mean, rstd, *sizes, EPS=eps, **options, **tiles
        )
        grid = (batch * triton.cdiv(hidden, sum_tiles["BLOCK"]),)
        _attention_pool_sum_kernel[grid](x, scores, mean, rstd, weight, bias, pooled, *sizes, **options, **sum_tiles)
    return pooled
