"""e4m3 in plain torch. The real value is the e4m3 value times a scale, as in `torch.nn.functional.scaled_mm`."""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0


def quantize(x: Tensor, scale: Tensor | float) -> Tensor:
    """`x` (fp32 or fp64) divided by `scale`, saturated to ±448 and rounded to e4m3."""
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
