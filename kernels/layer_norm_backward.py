"""The gradients of layer normalisation, alone or fused with the residual addition before it.

    n = (x - mean) * rstd,    dn = dy * weight                                    x is what was normalised
    dx = (dn - mean(dn) - n * mean(dn * n)) * rstd + dtotal                       means over the last dimension
    dbranch = drop_scale * gamma * dx
    dweight = sum(dy * n),    dbias = sum(dy),    dgamma = sum(drop_scale * dx * branch)      sums over rows

There are at most two programs for each multiprocessor. A program loops over tiles of whole rows and keeps its partial
sums over rows in registers. The partial sums are added afterwards in a fixed order, without atomics. So runs on
one model of GPU give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2_fast.kernels import common

TILE = 2048  # elements of a tile
SUMS = 3  # gradients that are sums over rows: weight, bias, gamma; without a branch only the first two


@triton.jit
def _layer_norm_backward_kernel(
    dy_ptr,  # (rows, hidden)
    dtotal_ptr,  # (rows, hidden), the gradient of the sum, or None
    x_ptr,  # (rows, hidden), the normalised rows
    branch_ptr,  # (rows, hidden) or None
    gamma_ptr,  # (hidden,) or None
    drop_scale_ptr,  # (images,) or None
    weight_ptr,  # (hidden,)
    mean_ptr,  # (rows,)
    rstd_ptr,  # (rows,)
    dx_ptr,  # (rows, hidden), out
    dbranch_ptr,  # (rows, hidden), out, or None
    partial_ptr,  # (programs, SUMS, hidden), out
    rows,
    hidden,
    dy_stride,
    dtotal_stride,
    x_stride,
    branch_stride,
    rows_per_image,
    COMPUTE: tl.constexpr,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    column_mask = column < hidden
    weight = tl.load(weight_ptr + column, mask=column_mask, other=0.0).to(COMPUTE)[None, :]
    dweight = tl.zeros((ROWS, BLOCK), COMPUTE)  # reduced over the tile's rows once, at the end
    dbias = tl.zeros((ROWS, BLOCK), COMPUTE)
    dgamma = tl.zeros((ROWS, BLOCK), COMPUTE)

    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        row_mask = row < rows
        mask = row_mask[:, None] & column_mask[None, :]
        row64 = row.to(tl.int64)[:, None]
        out = row64 * hidden + column[None, :]

        x = tl.load(x_ptr + row64 * x_stride + column[None, :], mask=mask, other=0.0).to(COMPUTE)
        dy = tl.load(dy_ptr + row64 * dy_stride + column[None, :], mask=mask, other=0.0).to(COMPUTE)
        mean = tl.load(mean_ptr + row, mask=row_mask, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=row_mask, other=0.0)[:, None]
        normed = tl.where(mask, (x - mean) * rstd, 0.0)
        dweight += dy * normed
        dbias += dy

        dnormed = dy * weight
        projection = tl.sum(dnormed * normed, axis=1)[:, None] / hidden
        dx = (dnormed - tl.sum(dnormed, axis=1)[:, None] / hidden - normed * projection) * rstd
        if dtotal_ptr is not None:
            dx += tl.load(dtotal_ptr + row64 * dtotal_stride + column[None, :], mask=mask, other=0.0).to(COMPUTE)
        tl.store(dx_ptr + out, dx, mask=mask)

        if branch_ptr is not None:
            dx = tl.where(mask, dx, 0.0)
            if drop_scale_ptr is not None:
                dx *= tl.load(drop_scale_ptr + row // rows_per_image, mask=row_mask, other=0.0).to(COMPUTE)[:, None]
            if gamma_ptr is not None:
                branch = tl.load(branch_ptr + row64 * branch_stride + column[None, :], mask=mask, other=0.0).to(COMPUTE)
                dgamma += dx * branch
                dx *= tl.load(gamma_ptr + column, mask=column_mask, other=0.0).to(COMPUTE)[None, :]
            tl.store(dbranch_ptr + out, dx, mask=mask)

    partial = partial_ptr + tl.program_id(0) * SUMS * hidden + column
    tl.store(partial, tl.sum(dweight, axis=0), mask=column_mask)
    tl.store(partial + hidden, tl.sum(dbias, axis=0), mask=column_mask)
    if branch_ptr is not None:
        tl.store(partial + 2 * hidden, tl.sum(dgamma, axis=0), mask=column_mask)


def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, dtotal: Tensor | None = None,
    branch: Tensor | None = None, gamma: Tensor | None = None, drop_scale: Tensor | None = None,
    dx_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """The gradients, given those of the norm, `dy`, and with a branch also of the sum, `dtotal`.

    `x` (..., hidden) is what was normalised: with a branch, the sum. `mean` and `rstd` (...,) are those of the forward.
    `dx_dtype` is the dtype of the gradient for the forward's `x`, by default that of `x`.

    Returns:
        The gradient for the forward's `x`; the gradient for the branch, or None; and the gradients for weight and bias,
        (2, hidden), with a branch also that for gamma, (3, hidden), which is 0 without gamma. The last is fp32, or fp64
        if any input is.
    """
    hidden = x.shape[-1]
    compute = common.compute_dtype(x, weight, branch, gamma, drop_scale)
    wide = torch.float64 if compute == tl.float64 else torch.float32
    dx = x.new_empty(x.shape, dtype=dx_dtype)
    dbranch = None if branch is None else x.new_empty(x.shape, dtype=branch.dtype)
    sums = 2 if branch is None else SUMS
    if not x.numel():
        return dx, dbranch, x.new_zeros((sums, hidden), dtype=wide)
    per_image = x.numel() // hidden // x.shape[0]
    x, dy = common.rows(x), common.rows(dy)
    dtotal = None if dtotal is None else common.rows(dtotal)
    branch = None if branch is None else common.rows(branch)
    block = triton.next_power_of_2(hidden)
    tile_rows = max(1, TILE // block)
    programs = min(triton.cdiv(x.shape[0], tile_rows), 2 * common.multiprocessors(x.device))
    partial = x.new_empty((programs, sums, hidden), dtype=wide)
    with common.on_device(x):
        _layer_norm_backward_kernel[(programs,)](
            dy, dtotal, x, branch, *common.vectors(gamma, drop_scale, weight), mean, rstd, dx, dbranch, partial,
            x.shape[0], hidden, dy.stride(0), 0 if dtotal is None else dtotal.stride(0), x.stride(0),
            0 if branch is None else branch.stride(0), per_image,
            COMPUTE=compute, SUMS=sums, ROWS=tile_rows, BLOCK=block, num_warps=8,
        )  # fmt: skip
    return dx, dbranch, partial.sum(0)
