"""Linears that read the raw residual stream: launchers of the kernel in `linear.py`, and the statistics of a stream.

The statistics of a stream are described there; the linear that writes a stream takes them in its epilogue, so the
kernel below is for the first stream alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2_fast.kernels import common
from dinov2_fast.kernels.linear import PART, linear_forward, linear_residual_forward_, write_statistics

ROWS = 64  # of a program


@triton.jit
def _row_statistics_kernel(
    x_ptr,  # (rows, hidden)
    statistics_ptr,  # (2, parts, rows), out
    rows,
    hidden,
    x_stride,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS
    first = tl.program_id(1) * PART
    m, column = row + tl.arange(0, ROWS), first + tl.arange(0, PART)
    mask = (m < rows)[:, None] & (column < hidden)[None, :]
    x = tl.load(x_ptr + m.to(tl.int64)[:, None] * x_stride + column[None, :], mask=mask, other=0.0)
    write_statistics(x.to(tl.float32), row, first, statistics_ptr, rows, hidden)


def row_statistics_forward(x: Tensor) -> Tensor:
    """The statistics (2, parts, ...) of `x` (..., hidden), fp32."""
    hidden = x.shape[-1]
    parts = triton.cdiv(hidden, PART.value)
    statistics = x.new_empty((2, parts, *x.shape[:-1]), dtype=torch.float32)
    if x.numel():
        x = common.rows(x)
        with common.on_device(x):
            _row_statistics_kernel[(triton.cdiv(x.shape[0], ROWS), parts)](
                x, statistics, x.shape[0], hidden, x.stride(0), ROWS=ROWS
            )
    return statistics


def norm_linear_forward(
    x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor | None, eps: float, epilogue: str = "linear"
) -> Tensor:
    """`linear_forward` with each row of the product over its standard deviation, from the statistics of `x`."""
    return linear_forward(x, weight, bias, epilogue, statistics=statistics, eps=eps)


def linear_residual_statistics_forward_(
    residual: Tensor, statistics: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None
) -> None:
    """`linear_residual_forward_` that writes the statistics (2, parts, ...) of the sum, as it is stored."""
    linear_residual_forward_(residual, x, weight, bias, gamma, statistics=statistics)
