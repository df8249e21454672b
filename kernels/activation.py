"""GELU and SwiGLU, the activations of a feed-forward network, and the quantisation to e4m3 (see ops/activation.py).

A program computes a tile of rows and columns. A row is `hidden` wide; for SwiGLU its input is twice as wide. The device
functions also serve the epilogues of matrix products.

The polynomial GELU is within 3.1e-6 of the exact one. That is far below the rounding of bf16 and e4m3, but not below
that of fp16 and fp32. So fp16, fp32 and fp64 outputs are computed with the error function.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2_fast.kernels import common
from dinov2_fast.kernels.common import CACHED_CONFIGURATIONS, to_e4m3

TILE = 4096  # elements of a program's tile


@triton.jit
def gelu_erf(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def normal_cdf_polynomial(x):
    """The normal distribution function as the sigmoid of an odd polynomial of degree 9. Finite for every finite x."""
    t = x * x
    p = 2.22435329e-6 * t - 6.09182100e-5
    p = (p * t - 2.51040285e-4) * t + 0.0729400251
    return 1.0 / (1.0 + tl.exp(-x * (p * t + 1.59565507)))


@triton.jit
def gelu_polynomial(x):
    return x * normal_cdf_polynomial(x)


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _activation_forward_kernel(
    x_ptr,  # (rows, hidden); for SwiGLU (rows, 2 * hidden), the gate first
    y_ptr,  # (rows, hidden), out
    rows,
    hidden,
    x_stride,
    inverse_scale,  # 1 / scale of an e4m3 output
    KIND: tl.constexpr,  # "gelu_erf", "gelu_polynomial", "swiglu" or "identity"
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < hidden)[None, :]
    row64 = row.to(tl.int64)[:, None]

    x_ptrs = x_ptr + row64 * x_stride + column[None, :]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(COMPUTE)
    if KIND == "swiglu":
        value = tl.load(x_ptrs + hidden, mask=mask, other=0.0).to(COMPUTE)
        y = silu(x) * value
    elif KIND == "gelu_polynomial":
        y = gelu_polynomial(x)
    elif KIND == "gelu_erf":
        y = gelu_erf(x)
    else:
        y = x
    if y_ptr.dtype.element_ty == tl.float8e4nv:
        y = to_e4m3(y * inverse_scale)
    tl.store(y_ptr + row64 * hidden + column[None, :], y, mask=mask)


@lru_cache(CACHED_CONFIGURATIONS)
def configuration(rows: int, hidden: int, elements: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid and a program's tile. If 256 divides `hidden`, no tile has masked columns."""
    block = next((block for block in (1024, 512, 256) if hidden % block == 0), None)
    block = block or min(triton.next_power_of_2(hidden), 1024)
    tile_rows = max(1, elements // block)
    grid = triton.cdiv(rows, tile_rows), triton.cdiv(hidden, block)
    return grid, {"ROWS": tile_rows, "BLOCK": block, "num_warps": 8}


def activation_forward(x: Tensor, kind: str, scale: float | None = None) -> Tensor:
    """GELU or identity of `x` (..., hidden), or SwiGLU of `x` (..., 2 * hidden) with the gate first.

    The result is (..., hidden) in the dtype of `x`, or with `scale` the e4m3 values of the result divided by `scale`.
    """
    hidden = x.shape[-1] // 2 if kind == "swiglu" else x.shape[-1]
    y = x.new_empty((*x.shape[:-1], hidden), dtype=x.dtype if scale is None else torch.float8_e4m3fn)
    if x.numel():
        x = common.rows(x)
        if kind == "gelu":
            kind = "gelu_polynomial" if y.dtype in (torch.bfloat16, torch.float8_e4m3fn) else "gelu_erf"
        grid, meta = configuration(x.shape[0], hidden, TILE)
        with common.on_device(x):
            _activation_forward_kernel[grid](
                x, y, x.shape[0], hidden, x.stride(0), 1.0 if scale is None else 1.0 / scale,
                KIND=kind, COMPUTE=common.compute_dtype(x), **meta,
            )  # fmt: skip
    return y
