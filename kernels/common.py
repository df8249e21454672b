"""What several kernels need: what a launcher asks of its device, rows of a tensor, and the step to e4m3."""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETING = tl.constexpr(bool(triton.knobs.runtime.interpret))
E4M3_MAX = tl.constexpr(448.0)
# How many configurations a launcher remembers. To compute one takes several calls of `triton.cdiv`, each of which takes
# the host as long as an `F.linear` of 4 x 4.
CONFIGURATIONS = 1024


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU (``TRITON_INTERPRET=1``)."""
    return INTERPRETING.value


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of `x` the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; (9, 0) for the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 2 for the interpreter, so that persistent loops turn."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def compute_dtype(*tensors: Tensor | None) -> tl.dtype:
    """In what a kernel computes: fp64 if any tensor is fp64, else fp32."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return tl.float64 if wide else tl.float32


def rows(x: Tensor) -> Tensor:
    """`x` (..., hidden) as (rows, hidden) with neighbouring elements in a row; a copy only where no view can be."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def vector(v: Tensor | None) -> Tensor | None:
    """`v` with neighbouring elements, as kernels read it; None stays."""
    return None if v is None else v.contiguous()


def in_two(number: float) -> tuple[float, float]:
    """`number` as a sum of two fp32 numbers: a kernel gets its scalar arguments in fp32."""
    nearest = struct.unpack("f", struct.pack("f", number))[0]
    return nearest, number - nearest


@triton.jit
def to_e4m3(x):
    """Rounds to e4m3 after clamping to ±448, as torch's saturating quantisation does; NaN stays NaN."""
    x = x.to(tl.float32)  # there is no step from fp64 to e4m3
    x = tl.minimum(x, E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)
    x = tl.maximum(x, -E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)
    if INTERPRETING:  # its cast loses the carry into the exponent, so what it is given is rounded already
        split = x * 1048577.0  # 2**20 + 1 leaves 4 of 24 significant bits (Veltkamp)
        normal = split - (split - x)
        subnormal = (x + 24576.0) - 24576.0  # a neighbour of 1.5 * 2**14 is 2**-9 away
        x = tl.where(tl.abs(x) < 0.015625, subnormal, normal)
    return x.to(tl.float8e4nv)


# Triton's key of a kernel names the constants of this function only if the function's own key is there already: without
# this line, what a process finds in Triton's cache would depend on which kernel it launched first.
_ = getattr(to_e4m3, "cache_key", None)
