"""The log of sums of exponentials of a product of matrices. Both half steps of Sinkhorn-Knopp are of this form.

    lse_i = log sum_j exp(x_i . y_j * scale - offset_j)        x (rows, width), y (columns, width), offset (columns,)

A program reads a tile of rows and goes through a part of the columns. It keeps the largest logit of each row, and the
sum of the exponentials relative to it, as in Milakov & Gimelshein, arXiv:1805.02867. If there are few rows, several
programs share the columns, and each writes the lse of its part. No logit is stored.

Invariants: rows are contiguous; row offsets are int64; sums are in fp32, or in fp64 if x is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2_fast.kernels import common


@triton.jit
def product_tile(
    x_ptr, y_ptr, row, rows, column, columns, width, x_stride, y_stride,
    COMPUTE: tl.constexpr, UPCAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The products of the rows `row` of x and `column` of y, with zeros outside of the matrices."""
    x_rows = x_ptr + row.to(tl.int64)[:, None] * x_stride
    y_rows = y_ptr + column.to(tl.int64)[:, None] * y_stride
    operand = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    acc = tl.zeros((row.shape[0], column.shape[0]), COMPUTE)
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        k_mask = (k < width)[None, :]
        x = tl.load(x_rows + k[None, :], mask=(row < rows)[:, None] & k_mask, other=0.0).to(operand)
        y = tl.load(y_rows + k[None, :], mask=(column < columns)[:, None] & k_mask, other=0.0).to(operand)
        acc = tl.dot(x, tl.trans(y), acc, input_precision="ieee", out_dtype=COMPUTE)
    return acc


# The numbers of samples change from step to step.
@triton.jit(do_not_specialize=["rows", "columns", "columns_of_part"])
def _sinkhorn_lse_kernel(
    x_ptr,  # (rows, width)
    y_ptr,  # (columns, width)
    offset_ptr,  # (columns,) or None
    lse_ptr,  # (parts, rows), out
    rows,
    columns,
    width,
    x_stride,
    y_stride,
    scale,
    scale_error,
    columns_of_part,
    COMPUTE: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tiles = tl.cdiv(rows, ROWS)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(0) // tiles
    first = part * columns_of_part
    scale = tl.cast(scale, COMPUTE) + scale_error
    largest = tl.full((ROWS,), float("-inf"), COMPUTE)
    total = tl.zeros((ROWS,), COMPUTE)
    for start in range(first, tl.minimum(first + columns_of_part, columns), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        logits = scale * product_tile(
            x_ptr, y_ptr, row, rows, column, columns, width, x_stride, y_stride, COMPUTE, UPCAST, BLOCK
        )
        if offset_ptr is not None:
            offset = tl.load(offset_ptr + column, mask=column < columns, other=0.0).to(COMPUTE)
            logits -= offset[None, :]
        logits = tl.where((column < columns)[None, :], logits, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(logits, axis=1))
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(logits - new_largest[:, None]), axis=1)
        largest = new_largest
    lse = largest + tl.log(total)
    tl.store(lse_ptr + part.to(tl.int64) * rows + row, lse, mask=row < rows)


def split_columns(programs: int, columns: int, block: int, device: torch.device) -> int:
    """How many columns a program takes, a multiple of `block`.

    Without parts there would be `programs` of them; with parts there are about two for each multiprocessor.
    """
    blocks = triton.cdiv(columns, block)
    parts = min(max(2 * common.multiprocessors(device) // programs, 1), blocks)
    return triton.cdiv(blocks, parts) * block


def _configuration(dtype: torch.dtype) -> dict[str, int]:
    if dtype.itemsize >= 4:  # computed without tensor cores; larger tiles spill registers
        return {"ROWS": 64, "COLUMNS": 64, "BLOCK": 16, "num_warps": 8, "num_stages": 1}
    return {"ROWS": 128, "COLUMNS": 64, "BLOCK": 64, "num_warps": 8, "num_stages": 3}


def sinkhorn_lse(x: Tensor, y: Tensor, offset: Tensor | None, scale: float) -> Tensor:
    """lse (rows,), in fp32 or fp64, for `x` (rows, width) and `y` (columns, width) of one dtype."""
    x, y = common.with_contiguous_rows(x), common.with_contiguous_rows(y)
    (rows, width), columns = x.shape, y.shape[0]
    wide = torch.promote_types(x.dtype, torch.float32)
    if rows == 0 or columns == 0:
        return x.new_full((rows,), float("-inf"), dtype=wide)
    tiles = _configuration(x.dtype)
    row_tiles = triton.cdiv(rows, tiles["ROWS"])
    columns_of_part = split_columns(row_tiles, columns, tiles["COLUMNS"], x.device)
    parts = triton.cdiv(columns, columns_of_part)
    lse = x.new_empty(parts, rows, dtype=wide)
    with common.on_device(x):
        _sinkhorn_lse_kernel[(row_tiles * parts,)](
            x, y, *common.vectors(offset), lse, rows, columns, width, x.stride(0), y.stride(0),
            *common.split_fp32(scale), columns_of_part,
            COMPUTE=common.compute_dtype(x), UPCAST=common.upcast(x.dtype), **tiles,
        )  # fmt: skip
    return lse[0] if parts == 1 else lse.logsumexp(0)
