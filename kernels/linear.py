"""GEMM with a fused epilogue, forward only.

    y = x @ weight^T * scale * weight_scale + bias,    followed by GELU, SwiGLU or the residual addition

One kernel computes every form. It is persistent: with n programs, a program computes every n-th tile of the result.
Tiles are ordered in groups of rows whose operands stay in the L2 cache. The loads of a program's next tile overlap the
epilogue of the one before. On sm_90 and sm_100, operands are read with TMA through descriptors that the launcher makes.
On other devices, and where the 16-byte alignment of TMA is not met, they are read with masked loads.

Invariants:
- The rows of `x`, `weight` and the output are contiguous. `weight` holds one output feature per row, for SwiGLU with
  gate and value rows in turn.
- Row offsets are int64.
- The sum over in_features is in fp32. For e4m3 operands it is as precise as the tensor cores (fast accumulation, see
  ops/linear.py).
- e4m3 scales are dequantisation factors: real value = e4m3 value * scale.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dinov2_fast.kernels import common
from dinov2_fast.kernels.activation import gelu_erf, gelu_polynomial, silu
from dinov2_fast.kernels.common import CACHED_CONFIGURATIONS, to_e4m3
from dinov2_fast.torch_private import is_fake

E4M3 = torch.float8_e4m3fn
TMA_ALIGNMENT = 16  # bytes


@triton.jit
def _tile_position(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """The row and column of a tile. A group of GROUP rows of tiles is ordered column by column, to share operands."""
    in_group = GROUP * column_tiles
    first = tile // in_group * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    return first + tile % in_group % height, tile % in_group // height


@triton.jit
def _load_block(
    matrix, start, rows, stride, column, columns,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A block of a matrix (rows, columns), with zeros outside. EVEN: columns is a multiple of BLOCK_COLUMNS."""
    if TMA:
        block = matrix.load([start, column])
    else:
        i = start + tl.arange(0, BLOCK_ROWS)
        j = column + tl.arange(0, BLOCK_COLUMNS)
        mask = (i < rows)[:, None]
        if not EVEN:
            mask = mask & (j < columns)[None, :]
        block = tl.load(matrix + i.to(tl.int64)[:, None] * stride + j[None, :], mask=mask, other=0.0)
    return block


@triton.jit
def _write_tile(
    y, start_m, start_n, bias_ptr, weight_scale_ptr, out_ptr, rows, out_features, out_stride, scale, inverse_out_scale,
    EPILOGUE: tl.constexpr,
):  # fmt: skip
    """Applies the epilogue to a tile of x @ weight^T, whose first element is (start_m, start_n), and stores it."""
    BLOCK_M: tl.constexpr = y.shape[0]
    BLOCK_N: tl.constexpr = y.shape[1]
    m = start_m + tl.arange(0, BLOCK_M)
    n = start_n + tl.arange(0, BLOCK_N)
    if weight_scale_ptr is not None:
        y *= tl.load(weight_scale_ptr + n, mask=n < out_features, other=0.0)[None, :] * scale
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < out_features, other=0.0).to(tl.float32)[None, :]
    if EPILOGUE == "gelu_erf":
        y = gelu_erf(y)
    elif EPILOGUE == "gelu_polynomial":
        y = gelu_polynomial(y)
    elif EPILOGUE == "swiglu":
        gate, value = tl.split(tl.reshape(y, (BLOCK_M, BLOCK_N // 2, 2)))
        y = silu(gate) * value
        n = start_n // 2 + tl.arange(0, BLOCK_N // 2)
        out_features = out_features // 2
    at = out_ptr + m.to(tl.int64)[:, None] * out_stride + n[None, :]
    mask = (m < rows)[:, None] & (n < out_features)[None, :]
    if EPILOGUE == "residual":
        y += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if out_ptr.dtype.element_ty == tl.float8e4nv:
        tl.store(at, to_e4m3(y * inverse_out_scale), mask=mask)
    else:
        tl.store(at, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _linear_forward_kernel(
    x,  # (rows, in_features), pointer or descriptor
    weight,  # (out_features, in_features), pointer or descriptor
    bias_ptr,  # (out_features,) or None
    weight_scale_ptr,  # (out_features,) fp32 or None
    out_ptr,  # (rows, out_features), for "swiglu" (rows, out_features / 2); for "residual" the stream
    rows,
    out_features,
    in_features,
    x_stride,
    weight_stride,
    out_stride,
    scale,  # dequantisation factor of all of x
    inverse_out_scale,
    EPILOGUE: tl.constexpr,  # "none", "gelu_erf", "gelu_polynomial", "swiglu" or "residual"
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tiles = tl.cdiv(rows, BLOCK_M)
    column_tiles = tl.cdiv(out_features, BLOCK_N)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=True):
        tile_m, tile_n = _tile_position(tile, row_tiles, column_tiles, GROUP)
        m, n = tile_m * BLOCK_M, tile_n * BLOCK_N
        y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, in_features, BLOCK_K):
            a = _load_block(x, m, rows, x_stride, k, in_features, BLOCK_M, BLOCK_K, TMA, EVEN_K)
            b = _load_block(weight, n, out_features, weight_stride, k, in_features, BLOCK_N, BLOCK_K, TMA, EVEN_K)
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            y = tl.dot(a, b.T, y, input_precision="ieee")
        # Half a tile at a time takes fewer registers, so the loaded residual does not spill.
        halves = tl.split(tl.permute(tl.reshape(y, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        for half in tl.static_range(2):
            _write_tile(
                halves[half], m, n + half * (BLOCK_N // 2), bias_ptr, weight_scale_ptr, out_ptr, rows, out_features,
                out_stride, scale, inverse_out_scale, EPILOGUE,
            )  # fmt: skip


class _Tile(NamedTuple):
    """The sizes of a tile of the result, and how many programs with such tiles a multiprocessor should hold."""

    m: int
    n: int
    num_warps: int
    num_stages: int
    programs: int


def _tiles(dtype: torch.dtype, tma: bool, capability: tuple[int, int]) -> tuple[_Tile, ...]:
    """The tiles to choose from, largest first.

    The tensor cores of sm_90 are fastest with 256 columns, but then a multiprocessor holds one program only. Of two
    programs with 128 columns, one runs its epilogue while the other multiplies.
    """
    small = _Tile(64, 64, 4, 4, 3)
    if dtype == torch.float32:
        return (_Tile(64, 64, 8, 3, 2),)
    if tma:
        return _Tile(128, 256, 8, 3, 1), _Tile(128, 128, 4, 3, 2), small
    if capability >= (9, 0):
        return _Tile(128, 128, 8, 3, 1), small
    return _Tile(128, 128, 4, 4 if capability == (8, 0) else 3, 2), small


@lru_cache(CACHED_CONFIGURATIONS)
def _configuration(
    rows: int, in_features: int, out_features: int, dtype: torch.dtype, epilogue: str, tma: bool,
    capability: tuple[int, int], multiprocessors: int,
) -> tuple[int, dict[str, Any]]:  # fmt: skip
    """Programs and options of a launch. The tile is the largest that occupies every multiprocessor, or the smallest."""
    # From 1024 in_features on (2048 in e4m3, whose products take half the time) the products take so long that the
    # epilogue need not be hidden.
    light = epilogue in ("none", "residual") or in_features * dtype.itemsize >= 2048
    for tile in _tiles(dtype, tma, capability):
        tiles = triton.cdiv(rows, tile.m) * triton.cdiv(out_features, tile.n)
        if tiles >= multiprocessors and (tile.n < 256 or (out_features % 256 == 0 and light)):
            break
    block_k = (128 if tma and dtype != torch.float32 else 64) // dtype.itemsize
    options = {
        "EPILOGUE": epilogue,
        "TMA": tma,
        "EVEN_K": in_features % block_k == 0,
        "UPCAST": common.upcast(dtype),
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": block_k,
        "GROUP": 8,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    return min(tiles, multiprocessors * tile.programs), options


def _can_use_tma(matrix: Tensor) -> bool:
    """Whether TMA can read a matrix, whose base and rows must start at multiples of 16 bytes.

    sm_120 has TMA as well, but its tensor cores are those of sm_80, which do not read the layout that TMA writes.
    """
    plain = type(matrix) is Tensor or not is_fake(matrix)  # `is_fake` is slow, so only subclasses are asked
    start = matrix.data_ptr() if plain else matrix.storage_offset() * matrix.itemsize
    row = matrix.stride(0) * matrix.itemsize
    aligned = row > 0 and row % TMA_ALIGNMENT == 0 and start % TMA_ALIGNMENT == 0
    return aligned and matrix.stride(1) == 1 and common.capability(matrix.device)[0] in (9, 10)


def _launch(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str, scale: float,
    weight_scale: Tensor | None, out_scale: float = 1.0,
) -> None:  # fmt: skip
    out, x, weight = out.view(-1, out.shape[-1]), common.rows(x), common.rows(weight)
    (rows, in_features), out_features = x.shape, weight.shape[0]
    if rows == 0:
        return
    tma = _can_use_tma(x) and _can_use_tma(weight)
    if epilogue == "gelu":
        epilogue = "gelu_polynomial" if out.dtype in (torch.bfloat16, E4M3) else "gelu_erf"
    programs, options = _configuration(
        rows, in_features, out_features, x.dtype, epilogue, tma, common.capability(x.device),
        common.multiprocessors(x.device),
    )  # fmt: skip
    m, n, k = options["BLOCK_M"], options["BLOCK_N"], options["BLOCK_K"]
    with common.on_device(x):
        _linear_forward_kernel[(programs,)](
            TensorDescriptor.from_tensor(x, [m, k]) if tma else x,
            TensorDescriptor.from_tensor(weight, [n, k]) if tma else weight,
            *common.vectors(bias, weight_scale), out, rows, out_features, in_features,
            x.stride(0), weight.stride(0), out.stride(0), scale, 1.0 / out_scale, **options,
        )  # fmt: skip


def linear_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str, scale: float = 1.0,
    weight_scale: Tensor | None = None, dtype: torch.dtype | None = None, out_scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """`x` (..., in_features) @ `weight`^T + `bias`, through "none", "gelu" or "swiglu", in `dtype` or that of `x`.

    For e4m3 operands, `scale` is the scale of `x`, and `weight_scale` (out_features,) holds the scales of the rows of
    `weight`. An e4m3 result holds the values divided by `out_scale`.
    """
    width = weight.shape[0] // 2 if epilogue == "swiglu" else weight.shape[0]
    out = x.new_empty((*x.shape[:-1], width), dtype=dtype or x.dtype)
    _launch(out, x, weight, bias, epilogue, scale, weight_scale, out_scale)
    return out


def linear_residual_forward_(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float = 1.0,
    weight_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Adds `x` @ `weight`^T + `bias` to `residual` (..., out_features), whose rows are evenly spaced, in place."""
    _launch(residual, x, weight, bias, "residual", scale, weight_scale)
