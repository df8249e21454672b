"""Cuts images into patches that do not overlap, one row for each patch (see ops/patches.py).

A program writes a tile of rows and columns. Neighbouring columns are neighbouring pixels in a line of one channel, and
neighbouring rows are neighbouring patches, so neighbouring lanes and programs read whole lines. Images are read in
place by their strides, in both memory formats.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2_fast.kernels import common

# One row of patches of a 224-pixel image, and a fifth of the 588 columns of a 3 x 14 x 14 patch.
TILE = {"ROWS": 16, "BLOCK": 128, "num_warps": 4}


@triton.jit
def _patches_forward_kernel(
    images_ptr,  # (batch, channels, height, width)
    out_ptr,  # (batch, patches, padded), out
    rows,  # batch * patches
    grid_height,  # patches in a column of an image
    grid_width,
    width,  # channels * PATCH * PATCH
    padded,
    batch_stride,
    channel_stride,
    line_stride,
    pixel_stride,
    COMPUTE: tl.constexpr,
    PATCH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column_blocks = tl.cdiv(padded, BLOCK)
    row = (tl.program_id(0) // column_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % column_blocks * BLOCK + tl.arange(0, BLOCK)
    row_mask, column_mask = row < rows, column < width

    image = row // (grid_height * grid_width)
    line = row // grid_width % grid_height * PATCH
    pixel = row % grid_width * PATCH
    channel = column // (PATCH * PATCH)
    corner = image * batch_stride + line * line_stride + pixel * pixel_stride  # of a row's patch
    within = (column // PATCH % PATCH).to(tl.int64) * line_stride + (column % PATCH).to(tl.int64) * pixel_stride
    within += channel.to(tl.int64) * channel_stride
    mask = row_mask[:, None] & column_mask[None, :]
    value = tl.load(images_ptr + corner[:, None] + within[None, :], mask=mask, other=0).to(COMPUTE)

    if images_ptr.dtype.element_ty == tl.uint8:
        value -= 128.0
    value = tl.where(column_mask[None, :], value, 0.0)
    out_mask = row_mask[:, None] & (column < padded)[None, :]
    tl.store(out_ptr + row[:, None] * padded + column[None, :], value, mask=out_mask)


def patches_forward(images: Tensor, patch_size: int, padded_to: int, dtype: torch.dtype) -> Tensor:
    """The rows (batch, patches, padded_to) of `images` (batch, channels, height, width), uint8 or floating point.

    Height and width are multiples of `patch_size`, and `padded_to` is at least channels * patch_size ** 2.
    """
    batch, channels, height, width = images.shape
    grid_height, grid_width = height // patch_size, width // patch_size
    out = images.new_empty(batch, grid_height * grid_width, padded_to, dtype=dtype)
    if out.numel() == 0:
        return out
    rows = batch * grid_height * grid_width
    grid = (triton.cdiv(rows, TILE["ROWS"]) * triton.cdiv(padded_to, TILE["BLOCK"]),)
    with common.on_device(images):
        _patches_forward_kernel[grid](
            images, out, rows, grid_height, grid_width, channels * patch_size**2, padded_to, *images.stride(),
            COMPUTE=common.compute_dtype(out), PATCH=patch_size, **TILE,
        )  # fmt: skip
    return out
