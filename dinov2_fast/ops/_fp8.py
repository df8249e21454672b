"""e4m3 in plain torch: real value = e4m3 value * scale, the scale that `torch.nn.functional.scaled_mm` takes."""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0
SMALLEST_ROW_SCALE = 1e-12  # of a row of zeros


def quantize(x: Tensor, scale: Tensor | float) -> Tensor:
    """`x` (fp32 or fp64) over `scale`, saturated to ±448 and rounded to e4m3."""
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def row_scale(x: Tensor) -> Tensor:
    """The fp32 scale (..., 1) with which the largest element of each row becomes ±448."""
    return (x.abs().amax(-1, keepdim=True) / E4M3_MAX).clamp_min(SMALLEST_ROW_SCALE).float()


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` in e4m3 and the scale of each row."""
    scale = row_scale(x)
    return quantize(x, scale), scale
