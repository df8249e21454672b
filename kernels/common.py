"""What several kernels share: properties of a device, tensors as rows, and the conversion to e4m3."""

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
# How many configurations a launcher caches. Computing one takes several calls of `triton.cdiv`, and each call costs the
# host as much as an `F.linear` of 4 x 4.
CACHED_CONFIGURATIONS = 1024


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels on the CPU (``TRITON_INTERPRET=1``)."""
    return INTERPRETING.value


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of `x` the current one, because Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device; (9, 0) for the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@cache
def multiprocessors(device: torch.device) -> int:
    """The streaming multiprocessors of a CUDA device; 2 for the interpreter, so that persistent loops iterate."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def compute_dtype(*tensors: Tensor | None) -> tl.dtype:
    """The dtype in which a kernel computes: fp64 if any tensor is fp64, else fp32."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return tl.float64 if wide else tl.float32


def upcast(dtype: torch.dtype) -> bool:
    """Whether operands are cast to fp32 before a product, because Triton's interpreter multiplies bf16 wrongly."""
    return interpreting() and dtype == torch.bfloat16


def with_contiguous_rows(x: Tensor) -> Tensor:
    """`x`, or a copy if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def rows(x: Tensor) -> Tensor:
    """`x` (..., hidden) as (rows, hidden) with contiguous rows; a copy only if no view is possible."""
    return with_contiguous_rows(x.reshape(-1, x.shape[-1]))


def vectors(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Vectors, contiguous, as kernels read them; None stays None."""
    return tuple([None if tensor is None else tensor.contiguous() for tensor in tensors])


def split_fp32(number: float) -> tuple[float, float]:
    """`number` rounded to fp32, and the rounding error. Triton passes scalar arguments of kernels in fp32."""
    high = struct.unpack("f", struct.pack("f", number))[0]
    return high, number - high


@triton.jit
def to_e4m3(x):
    """Clamps to ±448 and rounds to e4m3, as torch's saturating quantisation does. NaN stays NaN."""
    x = x.to(tl.float32)  # there is no conversion from fp64 to e4m3
    x = tl.minimum(x, E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)
    x = tl.maximum(x, -E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)
    if INTERPRETING:  # the interpreter's cast loses a carry into the exponent, so x is rounded before it
        split = x * 1048577.0  # 2**20 + 1 keeps 4 of 24 significant bits (Veltkamp)
        normal = split - (split - x)
        subnormal = (x + 24576.0) - 24576.0  # at 1.5 * 2**14 the spacing of fp32 is 2**-9
        x = tl.where(tl.abs(x) < 0.015625, subnormal, normal)
    return x.to(tl.float8e4nv)


# Triton's cache key of a kernel includes the constants of this function only if the function's own key has already been
# computed. Without this line, a cache hit would depend on which kernel the process launched first.
_ = getattr(to_e4m3, "cache_key", None)
