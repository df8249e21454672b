"""Launches csrc/linear.cu, whose kernels are CUTLASS' with epilogues of ours, and allocates their outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_fast.ops import _backends
from dinov2_fast.ops._backends import HALF
from dinov2_fast.ops._fp8 import E4M3
from dinov2_fast.ops._linear_epilogue import NEEDS_INTERLEAVED, mark_written, new_result, refuses_stream

FORMS = ("none", "gelu", "swiglu", "residual")  # in the order of `Form` in csrc/linear_tiles.h


def refuses(
    x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str, residual: Tensor | None, scale: float,
    weight_scale: Tensor | None, dtype: torch.dtype | None, out_scale: float, interleaved: bool | None,
) -> str | None:  # fmt: skip
    """Operands of any strides are taken, because they are copied if TMA cannot read them in place."""
    if reason := _backends.refuses_other_than_sm_90(x):
        return reason
    if weight.dtype != x.dtype:
        return f"takes x and weight of one dtype, got {x.dtype} and {weight.dtype}"
    if torch.is_autocast_enabled(x.device.type):
        return "does not follow autocast"
    if epilogue == "swiglu" and interleaved is False:
        return NEEDS_INTERLEAVED
    out_features, in_features = weight.shape
    step, columns = 16 // x.itemsize, 16 if epilogue == "swiglu" else 8
    if in_features % step or out_features % columns:
        return (
            f"needs in_features in multiples of {step} and out_features in multiples of {columns}, "
            f"got {in_features} and {out_features}"
        )
    if bias is not None and bias.dtype not in (*HALF, torch.float32):
        return f"takes a bias in fp16, bf16 or fp32, got {bias.dtype}"
    if dtype == torch.float16:
        return "returns bf16, or e4m3 after an activation, not fp16"
    return None if residual is None else _refuses_stream(residual, torch.bfloat16 if x.dtype == E4M3 else x.dtype)


def _refuses_stream(residual: Tensor, narrow: torch.dtype) -> str | None:
    """The stream is written in place, 16 bytes at a time. It cannot be copied, so its rows must be aligned."""
    if residual.dtype not in (narrow, torch.float32):
        return f"adds to {narrow} or fp32, not to {residual.dtype}"
    start = 0 if torch.compiler.is_compiling() else residual.storage_offset()  # not traced; the launch checks it again
    if any(step * residual.itemsize % 16 for step in (start, *residual.stride()[:-1])):
        return "needs a residual whose rows start at multiples of 16 bytes"
    return refuses_stream(residual)


def linear_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str, scale: float, weight_scale: Tensor | None,
    dtype: torch.dtype | None, out_scale: float,
) -> Tensor:  # fmt: skip
    """As `dinov2_fast.kernels.linear.linear_forward`."""
    out = new_result(x, weight, epilogue, dtype)
    _launch(out, x, weight, bias, epilogue, scale, weight_scale, out_scale)
    return out


def linear_residual_forward_(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, weight_scale: Tensor | None
) -> None:
    """As `dinov2_fast.kernels.linear.linear_residual_forward_`."""
    _launch(residual, x, weight, bias, "residual", scale, weight_scale)
    mark_written(residual)


def _launch(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str, scale: float,
    weight_scale: Tensor | None, out_scale: float = 1.0,
) -> None:  # fmt: skip
    torch.ops.dinov2_fast_cuda.linear_forward(
        _operand(x), _operand(weight), _vector(bias), _vector(weight_scale), scale, 1.0 / out_scale,
        FORMS.index(epilogue), out.view(-1, out.shape[-1]),
    )  # fmt: skip


def _operand(x: Tensor) -> Tensor:
    """`x` (..., in_features) as a matrix that TMA can read: rows start at multiples of 16 bytes and do not overlap."""
    rows = x.reshape(-1, x.shape[-1])
    step = rows.stride(0)
    aligned = (rows.data_ptr() | step * rows.itemsize) % 16 == 0
    readable = aligned and step >= rows.shape[1] and rows.stride(1) == 1
    return rows if readable else rows.clone(memory_format=torch.contiguous_format)


def _vector(v: Tensor | None) -> Tensor | None:
    """`v` contiguous and aligned to 16 bytes, which the kernels read at once. None stays None."""
    if v is None or (v.stride(0) == 1 and v.data_ptr() % 16 == 0):
        return v
    return v.clone(memory_format=torch.contiguous_format)
