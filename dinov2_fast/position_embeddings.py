"""Bicubic resampling of the position table to an image's grid of patches, as two small matrix products.

DINOv2's table is trained for a grid of 37 x 37 patches (518 px). For other sizes it is resampled, and the libraries do
that in three ways, which agree only at the trained size:

    "offset"     the reference's models without registers: scale factor (n + 0.1) / 37, no antialiasing
    "size"       transformers' Dinov2 since 4.45: the output size, no antialiasing
    "antialias"  all models with registers, and all of timm's: the output size, with antialiasing

Bicubic resampling is separable and linear, so the new table is ``W_h @ table @ W_w^T``, with one row of weights for
each output position (:func:`_resample_matrix`). This is exact and differentiable, exports to every format as standard
operators, and runs where torch has no bicubic kernel.

Kernels: Keys, "Cubic convolution interpolation for digital image processing" (1981), a = -0.75 without and a = -0.5
with antialiasing, as in torch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.torch_private import is_traced


class PositionInterpolation(NamedTuple):
    """A way to resample the table. `offset` is added to the output size before the step is computed."""

    offset: float
    antialias: bool


POSITION_INTERPOLATIONS = {
    "offset": PositionInterpolation(0.1, False),
    "size": PositionInterpolation(0.0, False),
    "antialias": PositionInterpolation(0.0, True),
}


def position_interpolation(name: str) -> PositionInterpolation:
    """The interpolation called `name`."""
    if name not in POSITION_INTERPOLATIONS:
        raise InvalidValueError(
            f"There is no position interpolation {name!r}; choose one of {', '.join(POSITION_INTERPOLATIONS)}."
        )
    return POSITION_INTERPOLATIONS[name]


Grid = tuple[int, int]  # rows and columns of positions


def resample_position_embeddings(
    table: Tensor, height: int, width: int, interpolation: PositionInterpolation, grid: Grid | None = None
) -> Tensor:
    """Resamples the table to `height` x `width` patches.

    Args:
        table: (positions, hidden) in row-major order.
        height, width: the new grid, in patches. They may be symbolic under tracing.
        interpolation: the way to resample.
        grid: the grid of the table; None if it is square.

    Returns:
        (height * width, hidden) in float32, or in float64 if the table is. At the native grid, the table itself.

    Raises:
        ValueError: `grid` is None, and the table is not square.
    """
    grid = grid or square_grid(table)
    table = table if table.dtype == torch.float64 else table.float()
    if is_native(height, width, grid):
        return table
    make = _matrices if is_traced() or type(table) is not torch.Tensor else _cached_matrices
    rows, columns = make(height, width, grid, interpolation, table.device)
    compute_dtype = torch.float64 if table.is_cuda else table.dtype  # CUDA may run a float32 product as TF32
    return _apply(rows.to(compute_dtype), columns.to(compute_dtype), table.to(compute_dtype)).to(table.dtype)


def square_grid(table: Tensor) -> Grid:
    """The grid of a square table (positions, hidden)."""
    side = round(int(table.shape[0]) ** 0.5)
    if side * side != table.shape[0]:
        raise InvalidValueError(f"The position table has {table.shape[0]} positions, which is not a square grid.")
    return side, side


def position_grid(table: Tensor, expected: Grid) -> Grid:
    """The grid of a table (positions, hidden): `expected` if the number of positions fits, otherwise a square."""
    rows, columns = expected
    return expected if rows * columns == int(table.shape[0]) else square_grid(table)


def is_native(height: int, width: int, grid: Grid) -> bool:
    """Whether `height` x `width` is the table's own grid. False under tracing, where a graph must serve every size."""
    return not is_traced() and (height, width) == grid


def _apply(rows: Tensor, columns: Tensor, table: Tensor) -> Tensor:
    """``rows @ table @ columns^T`` for a table of vectors, in the dtype of the table even under autocast."""
    if table.device.type != "meta" and torch.is_autocast_enabled(table.device.type):
        with torch.autocast(table.device.type, enabled=False):
            return _apply(rows, columns, table)
    hidden = table.shape[1]
    partial = rows @ table.reshape(rows.shape[1], -1)  # (height, columns of the grid * hidden)
    return (columns @ partial.reshape(-1, columns.shape[1], hidden)).reshape(-1, hidden)


@lru_cache(maxsize=256)
def _cached_matrices(
    height: int, width: int, grid: Grid, interpolation: PositionInterpolation, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`_matrices`, cached for each size and device. An entry takes 10 kB for images of 224 px."""
    with torch.inference_mode(False):  # tensors made in inference mode cannot be used in training
        return _matrices(height, width, grid, interpolation, device)


def _matrices(
    height: int, width: int, grid: Grid, interpolation: PositionInterpolation, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The matrices of both axes, (height, rows of the grid) and (width, columns of the grid).

    At the native grid no interpolation changes the table, so the offset is not added there. The decision is made with
    tensor operations, so that a traced graph makes it for each size.
    """
    dtype = torch.float32 if device.type == "mps" else torch.float64  # Metal has no float64
    sizes, old = (
        torch.stack([torch.full((), size, dtype=dtype, device=device) for size in pair])
        for pair in ((height, width), grid)
    )
    steps = old / (sizes + interpolation.offset * (sizes != old).any().to(dtype))
    return (
        _resample_matrix(height, grid[0], steps[0], interpolation.antialias),
        _resample_matrix(width, grid[1], steps[1], interpolation.antialias),
    )


def _resample_matrix(size: int, grid: int, step: Tensor, antialias: bool) -> Tensor:
    """The weights of bicubic resampling from `grid` samples to `size`: a (size, grid) matrix in the dtype of `step`.

    Row i holds the weights of the input samples around ``step * (i + 0.5) - 0.5``. Without antialiasing these are at
    most four, and the border is repeated beyond itself. With antialiasing the kernel is widened by `step` if the table
    shrinks, cut off at the border, and normalised.
    """
    output = torch.arange(size, device=step.device, dtype=step.dtype)
    source = torch.arange(grid, device=step.device, dtype=step.dtype)
    centre = (output + 0.5) * step
    if antialias:
        return _antialiased_rows(centre[:, None], source, step)
    first = torch.floor(centre - 0.5)
    fraction = centre - 0.5 - first
    matrix = torch.zeros(1, device=step.device, dtype=step.dtype)
    for tap in (-1, 0, 1, 2):
        position = (first + tap).clamp(0, grid - 1)
        matrix = matrix + (position[:, None] == source) * _cubic(fraction - tap, a=-0.75)[:, None]
    return matrix


def _antialiased_rows(centre: Tensor, source: Tensor, step: Tensor) -> Tensor:
    widening = step.clamp(min=1.0)
    first = torch.floor(centre - 2 * widening + 0.5)
    last = torch.floor(centre + 2 * widening + 0.5)
    inside = (source >= first) & (source < last)
    weights = _cubic((source - centre + 0.5) / widening, a=-0.5) * inside
    return weights / weights.sum(dim=1, keepdim=True)


def _cubic(x: Tensor, a: float) -> Tensor:
    """Keys' cubic convolution kernel."""
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
