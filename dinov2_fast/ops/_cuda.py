"""What the launchers of the CUDA extension need: its launches, and operands as its kernels read them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 8  # elements that a kernel reads at once, in accesses of 16 bytes (8 of e4m3)


def launches() -> Any:
    """The raw launches, `torch.ops.dinov2_fast_cuda`; they write into what they are given."""
    return torch.ops.dinov2_fast_cuda


def rows(x: Tensor) -> Tensor:
    """`x` (..., hidden) as (rows, hidden), each row aligned and in one piece; a copy only where no view can be."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 and _is_aligned(x, x.stride(0)) else x.clone(memory_format=torch.contiguous_format)


def vector(v: Tensor | None) -> Tensor | None:
    """`v`, aligned and with neighbouring elements; None stays."""
    if v is None or (v.stride(0) == 1 and _is_aligned(v)):
        return v
    return v.clone(memory_format=torch.contiguous_format)


def flat_rows(x: Tensor) -> Tensor:
    """An output (..., hidden), which is contiguous, as (rows, hidden)."""
    return x.view(-1, x.shape[-1])


def _is_aligned(x: Tensor, stride: int = 0) -> bool:
    chunk = min(16, CHUNK * x.itemsize)
    return x.data_ptr() % chunk == 0 and stride * x.itemsize % chunk == 0
