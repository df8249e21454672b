"""The epilogues of the op linear in plain torch, and the rules of its results, for all of its backends."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_fast.ops._backends import HALF
from dinov2_fast.ops._fp8 import E4M3, quantize

# Refusals of the two orders of SwiGLU features.
NEEDS_INTERLEAVED = (
    "takes interleaved gate and value features, got all gates first: reorder weight, bias and weight_scale with "
    "ops.linear.interleave"
)
NEEDS_GATES_FIRST = "takes all gates first, got interleaved gate and value features"


def apply_epilogue(
    z: Tensor, epilogue: str, residual: Tensor | None = None, dtype: torch.dtype | None = None, out_scale: float = 1.0,
    interleaved: bool = False,
) -> Tensor:  # fmt: skip
    """The result of a linear, given z = x @ weight^T + bias. It may be written over `z`."""
    if residual is not None:
        return residual.add_(z)
    if epilogue == "gelu":
        z = torch.ops.aten.gelu_(z)
    elif epilogue == "swiglu":
        gate, value = (z[..., 0::2], z[..., 1::2]) if interleaved else z.chunk(2, dim=-1)
        z = F.silu(gate) * value
    if dtype is None or dtype == z.dtype:
        return z
    return quantize(z.float(), out_scale) if dtype == E4M3 else z.to(dtype)


def new_result(x: Tensor, weight: Tensor, epilogue: str, dtype: torch.dtype | None) -> Tensor:
    """Memory for the result of a linear, in `dtype` or else in the dtype of `x`."""
    width = weight.shape[0] // 2 if epilogue == "swiglu" else weight.shape[0]
    return x.new_empty((*x.shape[:-1], width), dtype=dtype)


def mark_written(residual: Tensor) -> None:
    """Tells autograd that a launch has written to `residual`, which it cannot see."""
    if not residual.is_inference():
        torch.autograd.graph.increment_version(residual)


def refuses_stream(residual: Tensor) -> str | None:
    """A matrix that is written in place must have evenly spaced rows that do not overlap."""
    if residual.dtype not in (*HALF, torch.float32):
        return f"adds to fp16, bf16 and fp32, not to {residual.dtype}"
    shape, strides = residual.shape, residual.stride()
    leading = [(size, stride) for size, stride in zip(shape[:-1], strides[:-1], strict=True) if size > 1]
    even = all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(leading))
    overlapping = bool(leading) and leading[-1][1] < shape[-1]
    if not even or overlapping or (shape[-1] > 1 and strides[-1] != 1):
        return f"needs a residual that is a view of evenly spaced rows, got strides {strides} for shape {tuple(shape)}"
    return None
