"""The gradients of GELU and SwiGLU, recomputed from what went in.

A program keeps the bias gradient of its columns in registers while it walks over row tiles; the partial sums are added
afterwards, in one order, so that no atomics are needed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2_fast.kernels import common
from dinov2_fast.kernels.activation import configuration, normal_cdf_polynomial

TILE = 2048  # elements in flight in one program


@triton.jit
def _activation_backward_kernel(
    dy_ptr,  # (rows, hidden)
    x_ptr,  # (rows, hidden); for SwiGLU (rows, 2 * hidden), the gate first
    bias_ptr,  # (hidden,) or (2 * hidden,), or None
    dx_ptr,  # as x, out
    partial_ptr,  # (programs, hidden) or (programs, 2 * hidden), out, or None
    rows,
    hidden,
    dy_stride,
    x_stride,
    SWIGLU: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    width = 2 * hidden if SWIGLU else hidden
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column_mask = column < hidden
    bias = tl.zeros((BLOCK,), COMPUTE)
    value_bias = tl.zeros((BLOCK,), COMPUTE)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(COMPUTE)
        if SWIGLU:
            value_bias = tl.load(bias_ptr + hidden + column, mask=column_mask, other=0.0).to(COMPUTE)
    dbias = tl.zeros((ROWS, BLOCK), COMPUTE)  # added up over a tile's rows once, at the end
    dvalue_bias = tl.zeros((ROWS, BLOCK), COMPUTE)

    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & column_mask[None, :]
        row64 = row.to(tl.int64)[:, None]
        dy = tl.load(dy_ptr + row64 * dy_stride + column[None, :], mask=mask, other=0.0).to(COMPUTE)
        x_ptrs = x_ptr + row64 * x_stride + column[None, :]
        dx_ptrs = dx_ptr + row64 * width + column[None, :]
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(COMPUTE) + bias[None, :]
        if SWIGLU:
            value = tl.load(x_ptrs + hidden, mask=mask, other=0.0).to(COMPUTE) + value_bias[None, :]
            sigmoid = 1.0 / (1.0 + tl.exp(-x))
            dvalue = dy * x * sigmoid
            dx = dy * value * sigmoid * (1.0 + x * (1.0 - sigmoid))
            tl.store(dx_ptrs + hidden, dvalue, mask=mask)
            dvalue_bias += dvalue
        else:
            if POLYNOMIAL:
                cdf = normal_cdf_polynomial(x)
            else:
                cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
            dx = dy * (cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327)
        tl.store(dx_ptrs, dx, mask=mask)
        dbias += dx

    if partial_ptr is not None:
        partial_ptrs = partial_ptr + tl.program_id(0) * width + column
        tl.store(partial_ptrs, tl.sum(dbias, axis=0), mask=column_mask)
        if SWIGLU:
            tl.store(partial_ptrs + hidden, tl.sum(dvalue_bias, axis=0), mask=column_mask)


def activation_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None = None, *, swiglu: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `x` and of `bias` (in fp32, fp64 if anything is), for `dy` (..., hidden)."""
    hidden = dy.shape[-1]
    compute = common.compute_dtype(dy, x, bias)
    wide = torch.float64 if compute == tl.float64 else torch.float32
    dx = x.new_empty(x.shape)
    if not x.numel():
        return dx, None if bias is None else x.new_zeros(bias.shape, dtype=wide)
    x, dy = common.rows(x), common.rows(dy)
    meta = configuration(hidden, TILE)
    columns = triton.cdiv(hidden, meta["BLOCK"])
    programs = triton.cdiv(x.shape[0], meta["ROWS"])
    partial = None
    if bias is not None:
        programs = min(programs, max(1, 8 * common.multiprocessors(x.device) // columns))
        partial = x.new_empty((programs, x.shape[1]), dtype=wide)
    with common.on_device(x):
        _activation_backward_kernel[(programs, columns)](
            dy,
            x,
            common.vector(bias),
            dx,
            partial,
            x.shape[0],
            hidden,
            dy.stride(0),
            x.stride(0),
            SWIGLU=swiglu,
            POLYNOMIAL=x.dtype == torch.bfloat16 and (bias is None or bias.dtype == torch.bfloat16),
            COMPUTE=compute,
            **meta,
        )
    return dx, None if partial is None else partial.sum(0)
