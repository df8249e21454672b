"""The gradients of the residual addition for the branch and for LayerScale, and the gradient of the gather.

    dbranch = scale * drop_scale * gamma * dout,    dgamma = sum over rows of scale * drop_scale * branch * dout

The gradient for the stream is `dout` itself. A program sums dgamma of its columns in registers, over its tiles of rows.
The partial sums are added afterwards in a fixed order, without atomics. So runs on one model of GPU give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2_fast.kernels import common
from dinov2_fast.kernels.residual import configuration, gather_rows_into, positions


@triton.jit
def _add_residual_backward_kernel(
    dout_ptr,  # (images * seq_len, hidden)
    branch_ptr,  # (subset * seq_len, hidden)
    gamma_ptr,  # (hidden,) or None
    drop_scale_ptr,  # (images,) or None
    index_ptr,  # (subset,) images, or None for all images
    dbranch_ptr,  # (subset * seq_len, hidden), out
    partial_ptr,  # (programs, hidden), out, or None without gamma
    rows,
    hidden,
    seq_len,
    dout_stride,
    branch_stride,
    scale,
    scale_rest,  # the rounding error of scale, which is passed in fp32
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column_mask = column < hidden
    dgamma = tl.zeros((ROWS, BLOCK), COMPUTE)  # reduced over the tile's rows once, at the end
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        row_mask = row < rows
        mask = row_mask[:, None] & column_mask[None, :]
        row64 = row.to(tl.int64)
        image, source = row // seq_len, row64
        if index_ptr is not None:
            image = tl.load(index_ptr + image, mask=row_mask, other=0)
            source = image * seq_len + row % seq_len
        dout_ptrs = dout_ptr + source[:, None] * dout_stride + column[None, :]
        dbranch = tl.load(dout_ptrs, mask=mask, other=0.0).to(COMPUTE) * (tl.full((1, 1), scale, COMPUTE) + scale_rest)
        if drop_scale_ptr is not None:
            dbranch *= tl.load(drop_scale_ptr + image, mask=row_mask, other=0.0).to(COMPUTE)[:, None]
        if gamma_ptr is not None:
            branch_ptrs = branch_ptr + row64[:, None] * branch_stride + column[None, :]
            dgamma += dbranch * tl.load(branch_ptrs, mask=mask, other=0.0).to(COMPUTE)
            dbranch *= tl.load(gamma_ptr + column, mask=column_mask, other=0.0).to(COMPUTE)[None, :]
        tl.store(dbranch_ptr + row64[:, None] * hidden + column[None, :], dbranch, mask=mask)
    if partial_ptr is not None:
        partial_ptrs = partial_ptr + tl.program_id(0) * hidden + column
        tl.store(partial_ptrs, tl.sum(dgamma, axis=0), mask=column_mask)


def add_residual_backward(
    dout: Tensor,
    branch: Tensor,
    gamma: Tensor | None = None,
    drop_scale: Tensor | None = None,
    index: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """The gradient for `branch`, in its shape and dtype, and that for `gamma` (hidden,), or None without it.

    `dout` is (images, seq_len, hidden). `branch` has the rows of all images, or of those in `index` (subset,). The
    gradient for `gamma` is in fp32, or in fp64 if any input is.
    """
    _, seq_len, hidden = dout.shape
    compute = common.compute_dtype(dout, branch, gamma, drop_scale)
    wide = torch.float64 if compute == tl.float64 else torch.float32
    dbranch = branch.new_empty(branch.shape)
    if not branch.numel():
        return dbranch, None if gamma is None else gamma.new_zeros((hidden,), dtype=wide)
    dout, branch = common.rows(dout), common.rows(branch)
    meta = configuration(hidden)
    columns = triton.cdiv(hidden, meta["BLOCK"])
    programs = triton.cdiv(branch.shape[0], meta["ROWS"])
    partial = None
    if gamma is not None:
        programs = min(programs, max(1, 8 * common.multiprocessors(dout.device) // columns))
        partial = branch.new_empty((programs, hidden), dtype=wide)
    with common.on_device(dout):
        _add_residual_backward_kernel[(programs, columns)](
            dout, branch, *common.vectors(gamma, drop_scale, index), dbranch, partial, branch.shape[0], hidden, seq_len,
            dout.stride(0), branch.stride(0), *common.split_fp32(scale), COMPUTE=compute, **meta,
        )  # fmt: skip
    return dbranch, None if partial is None else partial.sum(0)


def gather_rows_backward(dout: Tensor, index: Tensor, images: int) -> Tensor:
    """The gradient (images, seq_len, hidden): image ``index[i]`` gets ``dout[i]``, and the other images get zeros."""
    out = dout.new_empty((images, *dout.shape[1:]))
    gather_rows_into(out, dout, positions(index, images))
    return out
