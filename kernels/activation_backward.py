"""The gradients of GELU and SwiGLU.

    gelu:     dx = dy * (Phi(x) + x * phi(x))                          phi is the normal density
    swiglu:   dx1 = dy * x2 * silu'(x1),    dx2 = dy * silu(x1)

A program computes a tile of rows and columns. Phi and silu are computed again from the inputs of the forward pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2_fast.kernels import common
from dinov2_fast.kernels.activation import configuration, normal_cdf_polynomial

TILE = 2048  # elements of a program's tile


@triton.jit
def _activation_backward_kernel(
    dy_ptr,  # (rows, hidden)
    x_ptr,  # (rows, hidden); for SwiGLU (rows, 2 * hidden), the gate first
    dx_ptr,  # in the shape of x, out
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
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < hidden)[None, :]
    row64 = row.to(tl.int64)[:, None]
    x_ptrs = x_ptr + row64 * x_stride + column[None, :]
    dx_ptrs = dx_ptr + row64 * width + column[None, :]

    dy = tl.load(dy_ptr + row64 * dy_stride + column[None, :], mask=mask, other=0.0).to(COMPUTE)
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(COMPUTE)
    if SWIGLU:
        value = tl.load(x_ptrs + hidden, mask=mask, other=0.0).to(COMPUTE)
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        dx = dy * value * sigmoid * (1.0 + x * (1.0 - sigmoid))
        tl.store(dx_ptrs + hidden, dy * x * sigmoid, mask=mask)
    else:
        if POLYNOMIAL:
            cdf = normal_cdf_polynomial(x)
        else:
            cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        dx = dy * (cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327)
    tl.store(dx_ptrs, dx, mask=mask)


def activation_backward(dy: Tensor, x: Tensor, kind: str) -> Tensor:
    """The gradient for `x`, given the gradient `dy` (..., hidden) of its "gelu" or "swiglu"."""
    hidden = dy.shape[-1]
    dx = x.new_empty(x.shape)
    if x.numel():
        compute = common.compute_dtype(dy, x)
        x, dy = common.rows(x), common.rows(dy)
        grid, meta = configuration(x.shape[0], hidden, TILE)
        with common.on_device(x):
            _activation_backward_kernel[grid](
                dy, x, dx, x.shape[0], hidden, dy.stride(0), x.stride(0),
                SWIGLU=kind == "swiglu", POLYNOMIAL=x.dtype == torch.bfloat16, COMPUTE=compute, **meta,
            )  # fmt: skip
    return dx
