"""e4m3 in plain torch: real value = e4m3 value * scale, the scale that `torch.nn.functional.scaled_mm` takes."""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0


def quantize(x: Tensor, scale: Tensor | float) -> Tensor:
    """`x` (fp32 or fp64) over `scale`, saturated to ±448 and rounded to e4m3."""
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
