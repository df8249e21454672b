"""Launches csrc/linear.cu, whose kernels are CUTLASS' with epilogues of their own; allocates what they write."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_fast.ops import _backends
from dinov2_fast.ops._fp8 import E4M3
from dinov2_fast.ops._linear_epilogue import HALF, HALVES, new_result, refuses_stream, was_written

FORMS = ("none", "gelu", "swiglu", "residual")  # as csrc/linear_tiles.h numbers them


def refuses(
    x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str, residual: Tensor | None, scale: float,
    weight_scale: Tensor | None, dtype: torch.dtype | None, out_scale: float, interleaved: bool | None,
) -> str | None:  # fmt: skip
    """Why the kernels take none of these. Operands that TMA cannot read in place are copied, so strides are free."""
    if x.is_cuda and _backends._capability(x.device.index) != (9, 0):
        major, minor = _backends._capability(x.device.index)
        return f"is for sm_90 only, got sm_{major}{minor}"
    if weight.dtype != x.dtype:
        return f"takes x and weight of one dtype, got {x.dtype} and {weight.dtype}"
    if torch.is_autocast_enabled(x.device.type):
        return "does not follow autocast"
    if epilogue == "swiglu" and interleaved is False:
        return HALVES
    out_features, in_features = weight.shape
    step, columns = 16 // x.itemsize, 16 if epilogue == "swiglu" else 8
    if in_features % step or out_features % columns:
        return (
            f"needs in_features in multiples of {step} and out_features in multiples of {columns}, "
            f"got {in_features} and {out_features}"
        )
    if bias is not None and bias.dtype not in (*HALF, torch.float32):
        return f"takes a bias of fp16, bf16 or fp32, got {bias.dtype}"
    if dtype == torch.float16:
        return "gives bf16, or e4m3 behind an activation, not fp16"
    return None if residual is None else _refuses_stream(residual, torch.bfloat16 if x.dtype == E4M3 else x.dtype)


def _refuses_stream(residual: Tensor, narrow: torch.dtype) -> str | None:
    """The stream is written in place, in accesses of 16 bytes, so no copy of it would do."""
    if residual.dtype not in (narrow, torch.float32):
        return f"adds to {narrow} or fp32, not to {residual.dtype}"
    start = 0 if torch.compiler.is_compiling() else residual.storage_offset()  # not traced; the launch checks it anyway
    if any(step * residual.itemsize % 16 for step in (start, *residual.stride()[:-1])):
        return "needs a residual whose rows start at multiples of 16 bytes"
    return refuses_stream(residual)


def linear_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str, scale: float, weight_scale: Tensor | None,
    dtype: torch.dtype | None, out_scale: float,
) -> Tensor:  # fmt: skip
    """What `dinov2_fast.kernels.linear.linear_forward` computes, as the next does for its namesake there."""
    out = new_result(x, weight, epilogue, dtype)
    _launch(out, x, weight, bias, epilogue, scale, weight_scale, out_scale)
    return out


def linear_residual_forward_(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, weight_scale: Tensor | None
) -> None:
    _launch(residual, x, weight, bias, "residual", scale, weight_scale)
    was_written(residual)


def _launch(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str, scale: float,
    weight_scale: Tensor | None, out_scale: float = 1.0,
) -> None:  # fmt: skip
    torch.ops.dinov2_fast_cuda.linear_forward(
        _operand(x), _operand(weight), _vector(bias), _vector(weight_scale), scale, 1.0 / out_scale,
        FORMS.index(epilogue), out.view(-1, out.shape[-1]),
    )  # fmt: skip


def _operand(x: Tensor) -> Tensor:
    """`x` (..., in_features) as rows that TMA can read: they start at multiples of 16 bytes and do not overlap."""
    rows = x.reshape(-1, x.shape[-1])
    step = rows.stride(0)
    aligned = (rows.data_ptr() | step * rows.itemsize) % 16 == 0
    readable = aligned and step >= rows.shape[1] and rows.stride(1) == 1
    return rows if readable else rows.clone(memory_format=torch.contiguous_format)


def _vector(v: Tensor | None) -> Tensor | None:
    """`v`, with neighbouring elements from a multiple of 16 bytes on, which kernels read at once; None stays."""
    if v is None or (v.stride(0) == 1 and v.data_ptr() % 16 == 0):
        return v
    return v.clone(memory_format=torch.contiguous_format)
