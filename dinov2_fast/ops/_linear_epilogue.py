"""What follows the product of a linear, in plain torch, and the stream it is added to: for every backend of the op."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_fast.ops import _fp8

E4M3 = torch.float8_e4m3fn
HALF = (torch.float16, torch.bfloat16)


def swiglu(z: Tensor) -> Tensor:
    """SwiGLU of features (..., 2 * hidden), gate and value in turn."""
    return F.silu(z[..., 0::2]) * z[..., 1::2]


def rounded(y: Tensor, dtype: torch.dtype, out_scale: float) -> Tensor:
    """`y` in `dtype`; as e4m3 over `out_scale`."""
    return _fp8.quantize(y.float(), out_scale) if dtype == E4M3 else y.to(dtype)


def was_written(residual: Tensor) -> None:
    """Tells autograd, which does not see what a launch overwrites."""
    if not residual.is_inference():
        torch.autograd.graph.increment_version(residual)


def refuses_stream(residual: Tensor) -> str | None:
    """A matrix that is written in place has evenly spaced rows that do not overlap."""
    if residual.dtype not in (*HALF, torch.float32):
        return f"adds to fp16, bf16 and fp32, not to {residual.dtype}"
    shape, strides = residual.shape, residual.stride()
    even = all(shape[i] == 1 or strides[i] == shape[i + 1] * strides[i + 1] for i in range(residual.ndim - 2))
    overlapping = residual.numel() > shape[-1] and strides[-2] < shape[-1]
    if not even or overlapping or (shape[-1] > 1 and strides[-1] != 1):
        return f"needs a residual that is a view of evenly spaced rows, got strides {strides} for shape {tuple(shape)}"
    return None
