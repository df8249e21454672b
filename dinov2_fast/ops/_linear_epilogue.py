"""What follows the product of a linear, in plain torch, and the stream it is added to: for every backend of the op."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_fast.ops._fp8 import E4M3, quantize

HALF = (torch.float16, torch.bfloat16)
HALVES = "takes gate and value features in turn, got all gates first: interleave weight, bias and weight_scale"
IN_TURN = "takes all gates first, got gate and value features in turn"


def finish(
    z: Tensor, epilogue: str, residual: Tensor | None = None, dtype: torch.dtype | None = None, out_scale: float = 1.0,
    interleaved: bool = False,
) -> Tensor:  # fmt: skip
    """The result of a linear whose product with its bias is `z`, which may be overwritten: nobody else holds it."""
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
    """Memory for the result of a linear, in `dtype` or that of `x`."""
    width = weight.shape[0] // 2 if epilogue == "swiglu" else weight.shape[0]
    return x.new_empty((*x.shape[:-1], width), dtype=dtype)


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
