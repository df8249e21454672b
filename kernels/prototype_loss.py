"""Sums of vectors, weighted with exponentials of a product of matrices: the expected prototypes, and both gradients.

    out_i = sum_j exp(x_i . y_j * scale - row_offset_i - column_offset_j) v_j

x (rows, width), y (columns, width), v (columns, value_width). The weights are at most 1: an offset is the lse of the
logits, in rows or in columns. ops/prototype_loss.py says which rows and columns are samples and which prototypes.

A program computes a tile of rows and a block of value_width, and goes through a part of the columns. If there are few
rows, several programs share the columns, and each writes the sum over its part. No weight is stored. The invariants
are those of kernels/sinkhorn.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2_fast.kernels import common
from dinov2_fast.kernels.sinkhorn import product_tile, split_columns


# The numbers of samples change from step to step.
@triton.jit(do_not_specialize=["rows", "columns", "columns_of_part"])
def _prototype_sum_kernel(
    x_ptr,  # (rows, width)
    y_ptr,  # (columns, width)
    v_ptr,  # (columns, value_width)
    row_offset_ptr,  # (rows,) or None
    column_offset_ptr,  # (columns,) or None
    out_ptr,  # (parts, rows, value_width), out
    rows,
    columns,
    width,
    value_width,
    x_stride,
    y_stride,
    v_stride,
    scale,
    scale_error,
    columns_of_part,
    COMPUTE: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUES: tl.constexpr,
):
    tiles, blocks = tl.cdiv(rows, ROWS), tl.cdiv(value_width, VALUES)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    value = tl.program_id(0) // tiles % blocks * VALUES + tl.arange(0, VALUES)
    part = tl.program_id(0) // tiles // blocks
    first = part * columns_of_part
    scale = tl.cast(scale, COMPUTE) + scale_error
    row_mask, value_mask = row < rows, value < value_width
    operand = tl.float32 if UPCAST else v_ptr.dtype.element_ty
    acc = tl.zeros((ROWS, VALUES), COMPUTE)
    for start in range(first, tl.minimum(first + columns_of_part, columns), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        column_mask = column < columns
        logits = scale * product_tile(
            x_ptr, y_ptr, row, rows, column, columns, width, x_stride, y_stride, COMPUTE, UPCAST, BLOCK
        )
        if row_offset_ptr is not None:
            offset = tl.load(row_offset_ptr + row, mask=row_mask, other=0.0).to(COMPUTE)
            logits -= offset[:, None]
        if column_offset_ptr is not None:
            offset = tl.load(column_offset_ptr + column, mask=column_mask, other=0.0).to(COMPUTE)
            logits -= offset[None, :]
        weight = tl.where(column_mask[None, :], tl.exp(logits), 0.0).to(v_ptr.dtype.element_ty).to(operand)
        v_rows = v_ptr + column.to(tl.int64)[:, None] * v_stride
        v = tl.load(v_rows + value[None, :], mask=column_mask[:, None] & value_mask[None, :], other=0.0).to(operand)
        acc = tl.dot(weight, v, acc, input_precision="ieee", out_dtype=COMPUTE)
    out_rows = out_ptr + (part.to(tl.int64) * rows + row)[:, None] * value_width
    tl.store(out_rows + value[None, :], acc, mask=row_mask[:, None] & value_mask[None, :])


def _configuration(x: Tensor) -> dict[str, int]:
    if x.dtype.itemsize >= 4:  # computed without tensor cores; larger tiles spill registers
        return {"ROWS": 32, "COLUMNS": 32, "BLOCK": 16, "VALUES": 128, "num_warps": 8, "num_stages": 1}
    return {"ROWS": 64, "COLUMNS": 64, "BLOCK": 64, "VALUES": 256, "num_warps": 8, "num_stages": 2}


def prototype_sum(
    x: Tensor, y: Tensor, v: Tensor, row_offset: Tensor | None, column_offset: Tensor | None, scale: float
) -> Tensor:
    """out (rows, value_width), in fp32 or fp64, for `x`, `y` and `v` of one dtype."""
    x, y, v = (common.with_contiguous_rows(tensor) for tensor in (x, y, v))
    (rows, width), (columns, value_width) = x.shape, v.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    if rows == 0 or columns == 0:
        return x.new_zeros(rows, value_width, dtype=wide)
    tiles = _configuration(x)
    programs = triton.cdiv(rows, tiles["ROWS"]) * triton.cdiv(value_width, tiles["VALUES"])
    columns_of_part = split_columns(programs, columns, tiles["COLUMNS"], x.device)
    parts = triton.cdiv(columns, columns_of_part)
    out = x.new_empty(parts, rows, value_width, dtype=wide)
    with common.on_device(x):
        _prototype_sum_kernel[(programs * parts,)](
            x, y, v, *common.vectors(row_offset, column_offset), out, rows, columns, width, value_width,
            x.stride(0), y.stride(0), v.stride(0), *common.split_fp32(scale), columns_of_part,
            COMPUTE=common.compute_dtype(x), UPCAST=common.upcast(x.dtype), **tiles,
        )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0)
