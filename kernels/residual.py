"""Adds a branch to the residual stream, for all images or for a subset, and gathers images of a batch.

    add_residual:  out = residual + scale * drop_scale * gamma * branch
    gather_rows:   out = x[index]

A program computes a tile of rows (tokens) and columns. If only a subset of the images has a branch, `position` holds
for each image its row in the subset, or -1. So one pass copies the other images and adds to those of the subset, and
each element of the result is written once, by one program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2_fast.kernels import common

TILE = 4096  # elements of a program's tile


@triton.jit
def _add_residual_kernel(
    residual_ptr,  # (images * seq_len, hidden)
    branch_ptr,  # (subset * seq_len, hidden)
    gamma_ptr,  # (hidden,) or None
    drop_scale_ptr,  # (images,) or None
    position_ptr,  # (images,) row in the subset, or -1; None if every image has a branch
    out_ptr,  # in the shape of residual, out
    rows,
    hidden,
    seq_len,
    residual_stride,
    branch_stride,
    scale,
    scale_rest,  # the rounding error of scale, which is passed in fp32
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row_mask, column_mask = row < rows, column < hidden
    mask = row_mask[:, None] & column_mask[None, :]
    row64 = row.to(tl.int64)
    image = row // seq_len
    source, has_branch = row64, row_mask
    if position_ptr is not None:
        position = tl.load(position_ptr + image, mask=row_mask, other=-1)
        source = position * seq_len + row % seq_len
        has_branch = position >= 0

    residual_ptrs = residual_ptr + row64[:, None] * residual_stride + column[None, :]
    residual = tl.load(residual_ptrs, mask=mask, other=0.0).to(COMPUTE)
    branch_mask = has_branch[:, None] & column_mask[None, :]
    branch_ptrs = branch_ptr + source[:, None] * branch_stride + column[None, :]
    branch = tl.load(branch_ptrs, mask=branch_mask, other=0.0).to(COMPUTE) * (
        tl.full((1, 1), scale, COMPUTE) + scale_rest
    )
    if gamma_ptr is not None:
        branch *= tl.load(gamma_ptr + column, mask=column_mask, other=0.0).to(COMPUTE)[None, :]
    if drop_scale_ptr is not None:
        branch *= tl.load(drop_scale_ptr + image, mask=row_mask, other=0.0).to(COMPUTE)[:, None]
    total = tl.where(branch_mask, residual + branch, residual)
    tl.store(out_ptr + row64[:, None] * hidden + column[None, :], total, mask=mask)


@triton.jit
def _gather_rows_kernel(
    x_ptr,  # (images * seq_len, hidden)
    index_ptr,  # (subset,); a negative index gives zeros
    out_ptr,  # (subset * seq_len, hidden), out
    rows,
    hidden,
    seq_len,
    x_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row_mask, column_mask = row < rows, column < hidden
    row64 = row.to(tl.int64)
    image = tl.load(index_ptr + row // seq_len, mask=row_mask, other=-1)
    source = image * seq_len + row % seq_len
    source_mask = (image >= 0)[:, None] & column_mask[None, :]
    x = tl.load(x_ptr + source[:, None] * x_stride + column[None, :], mask=source_mask, other=0.0)
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(out_ptr + row64[:, None] * hidden + column[None, :], x, mask=mask)


def configuration(hidden: int) -> dict[str, int]:
    """The rows and columns of a program's tile."""
    block = min(triton.next_power_of_2(hidden), 1024 if hidden % 1024 == 0 else 512)
    return {"ROWS": max(1, TILE // block), "BLOCK": block, "num_warps": 8}


def _grid(rows: int, hidden: int, meta: dict[str, int]) -> tuple[int, int]:
    return triton.cdiv(rows, meta["ROWS"]), triton.cdiv(hidden, meta["BLOCK"])


def positions(index: Tensor, images: int) -> Tensor:
    """The position of each image in `index`, or -1."""
    rows = torch.arange(index.shape[0], device=index.device)
    return torch.full((images,), -1, device=index.device).scatter(0, index, rows)


def add_residual_forward(
    residual: Tensor,
    branch: Tensor,
    gamma: Tensor | None = None,
    drop_scale: Tensor | None = None,
    index: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """``residual + scale * drop_scale * gamma * branch`` (images, seq_len, hidden), in the promoted dtype.

    With `index` (subset,), `branch` (subset, seq_len, hidden) holds these images only, and the other images are copied.
    The result then has the dtype of `residual`.
    """
    addends = [t for t in (branch, gamma, drop_scale) if t is not None]
    dtype = residual.dtype
    for addend in addends if index is None else []:
        dtype = torch.promote_types(dtype, addend.dtype)
    out = residual.new_empty(residual.shape, dtype=dtype)
    if residual.numel():
        images, seq_len, hidden = residual.shape
        position = None if index is None else positions(index, images)
        residual_rows, branch_rows = common.rows(residual), common.rows(branch)
        meta = configuration(hidden)
        with common.on_device(residual):
            _add_residual_kernel[_grid(residual_rows.shape[0], hidden, meta)](
                residual_rows, branch_rows, *common.vectors(gamma, drop_scale), position, out,
                residual_rows.shape[0], hidden, seq_len, residual_rows.stride(0), branch_rows.stride(0),
                *common.split_fp32(scale), COMPUTE=common.compute_dtype(residual, *addends), **meta,
            )  # fmt: skip
    return out


def gather_rows_forward(xs: list[Tensor], indices: list[Tensor]) -> Tensor:
    """The images `indices[i]` (subset_i,) of each `xs[i]` (images_i, seq_len_i, hidden), as (total_tokens, hidden)."""
    tokens = [index.shape[0] * x.shape[1] for x, index in zip(xs, indices, strict=True)]
    out = xs[0].new_empty((sum(tokens), xs[0].shape[2]))
    for x, index, part in zip(xs, indices, out.split(tokens), strict=True):
        gather_rows_into(part, x, index)
    return out


def gather_rows_into(out: Tensor, x: Tensor, index: Tensor) -> None:
    """Writes the images `index` (subset,) of `x` (images, seq_len, hidden) to `out`, which is contiguous.

    For a negative index it writes zeros.
    """
    if out.numel():
        _, seq_len, hidden = x.shape
        x = common.rows(x)
        meta = configuration(hidden)
        rows = index.shape[0] * seq_len
        with common.on_device(x):
            _gather_rows_kernel[_grid(rows, hidden, meta)](
                x, index.contiguous(), out, rows, hidden, seq_len, x.stride(0), **meta
            )
