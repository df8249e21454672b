"""The activations between the two linears of a feed-forward network.

    gelu(x)     = x * Phi(x) = x/2 * (1 + erf(x / sqrt(2)))         the exact form, as DINOv2 was trained
    swiglu(x12) = silu(x1) * x2,  x1 the first half of the last dimension (the gate), x2 the second

Sources: Hendrycks & Gimpel, arXiv:1606.08415; Shazeer, arXiv:2002.05202.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_fast.backends import Implementation, Op


def gelu(x: Tensor, overwrite: bool = False, *, backend: str | None = None) -> Tensor:
    """Exact (erf) GELU of `x`, any shape, in its dtype.

    With `overwrite` the result may be written over `x`, which saves memory; not while gradients are recorded.
    """
    return _GELU(x, overwrite, backend=backend)


def swiglu(x12: Tensor, *, backend: str | None = None) -> Tensor:
    """SwiGLU of packed halves: (..., 2 * hidden) with the gate first, to (..., hidden), in the dtype of `x12`."""
    return _SWIGLU(x12, backend=backend)


def gelu_torch(x: Tensor, overwrite: bool = False) -> Tensor:
    return torch.ops.aten.gelu_(x) if overwrite else F.gelu(x)


def swiglu_torch(x12: Tensor) -> Tensor:
    gate, value = x12.chunk(2, dim=-1)
    return F.silu(gate) * value


def _sample(device: torch.device, dtype: torch.dtype) -> tuple[Tensor]:
    return (torch.empty(1, 257, 1536, device=device, dtype=dtype),)


_GELU = Op("gelu", "activation", (Implementation("torch", gelu_torch),), _sample)
_SWIGLU = Op("swiglu", "activation", (Implementation("torch", swiglu_torch),), _sample)
