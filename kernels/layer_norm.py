"""Layer normalisation, alone or fused with the residual addition before it.

    total = x + drop_scale * gamma * branch        or total = x + deferred_bias, or total = x
    y = (total - mean) * rstd * weight + bias,     rstd = 1 / sqrt(var + eps),     over the last dimension

A program computes whole rows and holds them in registers. So the mean and the variance are computed in two passes, but
the rows are read once.

The sum with a branch is stored, and the stored, rounded sum is normalised: the backward reads it and computes with the
same numbers. The sum with a deferred bias is neither stored nor rounded.
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
def _layer_norm_forward_kernel(
    x_ptr,  # (rows, hidden); with a branch, the residual stream
    branch_ptr,  # (rows, hidden) or None
    gamma_ptr,  # (hidden,) or None
    drop_scale_ptr,  # (images,) or None
    deferred_bias_ptr,  # (hidden,) or None; None with a branch
    weight_ptr,  # (hidden,)
    bias_ptr,  # (hidden,)
    total_ptr,  # (rows, hidden), out: the sum; None without a branch
    y_ptr,  # (rows, hidden), out
    mean_ptr,  # (rows,), out, or None
    rstd_ptr,  # (rows,), out, or None
    rows,
    hidden,
    x_stride,
    branch_stride,
    rows_per_image,
    inverse_scale,  # 1 / scale of an e4m3 output
    EPS: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    row_mask, column_mask = row < rows, column < hidden
    mask = row_mask[:, None] & column_mask[None, :]
    row64 = row.to(tl.int64)[:, None]
    out = row64 * hidden + column[None, :]

    x = tl.load(x_ptr + row64 * x_stride + column[None, :], mask=mask, other=0.0).to(COMPUTE)
    if branch_ptr is not None:
        branch = tl.load(branch_ptr + row64 * branch_stride + column[None, :], mask=mask, other=0.0).to(COMPUTE)
        if gamma_ptr is not None:
            branch *= tl.load(gamma_ptr + column, mask=column_mask, other=0.0).to(COMPUTE)[None, :]
        if drop_scale_ptr is not None:
            image = row // rows_per_image
            branch *= tl.load(drop_scale_ptr + image, mask=row_mask, other=0.0).to(COMPUTE)[:, None]
        x += branch
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + out, total, mask=mask)
        x = total.to(COMPUTE)
    if deferred_bias_ptr is not None:
        x += tl.load(deferred_bias_ptr + column, mask=column_mask, other=0.0).to(COMPUTE)[None, :]

    mean = tl.sum(x, axis=1) / hidden
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / hidden + EPS)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean, mask=row_mask)
        tl.store(rstd_ptr + row, rstd, mask=row_mask)

    weight = tl.load(weight_ptr + column, mask=column_mask, other=0.0).to(COMPUTE)
    bias = tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(COMPUTE)
    y = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    if y_ptr.dtype.element_ty == tl.float8e4nv:
        y = to_e4m3(y * inverse_scale)
    tl.store(y_ptr + out, y, mask=mask)


@lru_cache(CACHED_CONFIGURATIONS)
def _configuration(rows: int, hidden: int, multiprocessors: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid and a program's tile. A tile has fewer rows if otherwise the programs would not occupy the device."""
    block = triton.next_power_of_2(hidden)
    tile_rows = max(1, TILE // block)
    while tile_rows > 1 and triton.cdiv(rows, tile_rows) < 2 * multiprocessors:
        tile_rows //= 2
    warps = 4 if tile_rows * block < TILE else 8
    return (triton.cdiv(rows, tile_rows),), {"ROWS": tile_rows, "BLOCK": block, "num_warps": warps}


def layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, branch: Tensor | None = None, gamma: Tensor | None = None,
    drop_scale: Tensor | None = None, deferred_bias: Tensor | None = None, statistics: bool = False,
    scale: float | None = None,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The norm of `x` (..., hidden), of `x` + `deferred_bias`, or of the sum of `x` and a branch.

    Returns:
        The sum with the branch (None without a branch), the norm, the mean and rstd (both None without `statistics`).
        Sum and norm have the promoted dtype of `x` and the branch's tensors. With `scale`, the norm is the e4m3 values
        of the norm divided by `scale`.
    """
    hidden = x.shape[-1]
    addends = [t for t in (branch, gamma, drop_scale) if t is not None]
    dtype = x.dtype
    for addend in addends:
        dtype = torch.promote_types(dtype, addend.dtype)
    compute = common.compute_dtype(x, weight, deferred_bias, *addends)
    shape, lead = x.shape, x.shape[:-1]
    wide = torch.float64 if compute == tl.float64 else torch.float32
    total = x.new_empty(shape, dtype=dtype) if branch is not None else None
    y = x.new_empty(shape, dtype=dtype if scale is None else torch.float8_e4m3fn)
    mean = x.new_empty(lead, dtype=wide) if statistics else None
    rstd = x.new_empty(lead, dtype=wide) if statistics else None
    if x.numel():
        per_image = x.numel() // hidden // shape[0]
        x, branch = common.rows(x), None if branch is None else common.rows(branch)
        grid, configuration = _configuration(x.shape[0], hidden, common.multiprocessors(x.device))
        with common.on_device(x):
            _layer_norm_forward_kernel[grid](
                x, branch, *common.vectors(gamma, drop_scale, deferred_bias, weight, bias), total, y, mean, rstd,
                x.shape[0], hidden, x.stride(0), 0 if branch is None else branch.stride(0), per_image,
                1.0 if scale is None else 1.0 / scale, EPS=eps, COMPUTE=compute, **configuration,
            )  # fmt: skip
    return total, y, mean, rstd
