"""Launches csrc/linear.cu, whose kernels are CUTLASS' with epilogues of their own; allocates what they write."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_fast.ops import _cuda
from dinov2_fast.ops import _registry_old as _registry
from dinov2_fast.ops._linear_epilogue import HALF, refuses_stream, was_written

FORMS = ("linear", "gelu", "swiglu", "residual")  # as csrc/linear_tiles.h numbers them


def refuses(form: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why the kernels take none of these, or None. Shapes have been checked."""
    if x.dtype not in HALF:
        return f"takes fp16 and bf16, got {x.dtype}"
    return _refuses_any(form, x, weight, bias)


def refuses_residual(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    return refuses("residual", x, weight, bias) or _refuses_stream(residual, x.dtype)


def refuses_fp8(
    form: str, x: Tensor, scale: float, weight: Tensor, weight_scale: Tensor, bias: Tensor | None,
    dtype: torch.dtype, out_scale: float = 1.0,
) -> str | None:  # fmt: skip
    if dtype == torch.float16:
        return "gives bf16, or e4m3 behind an activation, not fp16"
    return _refuses_scale(weight_scale) or _refuses_any(form, x, weight, bias)


def refuses_residual_fp8(
    residual: Tensor, x: Tensor, scale: float, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> str | None:
    reason = _refuses_scale(weight_scale) or _refuses_any("residual", x, weight, bias)
    return reason or _refuses_stream(residual, torch.bfloat16)


def _refuses_any(form: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """What no kernel does. Operands that TMA cannot read in place are copied, so their strides do not matter."""
    if x.is_cuda and _registry._capability(x.device.index) != (9, 0):
        major, minor = _registry._capability(x.device.index)
        return f"is for sm_90 only, got sm_{major}{minor}"
    if weight.dtype != x.dtype:
        return f"takes x and weight of one dtype, got {x.dtype} and {weight.dtype}"
    if torch.is_autocast_enabled(x.device.type):
        return "does not follow autocast"
    out_features, in_features = weight.shape
    step, columns = 16 // x.itemsize, 16 if form == "swiglu" else 8
    if in_features % step or out_features % columns:
        return (
            f"needs in_features in multiples of {step} and out_features in multiples of {columns}, "
            f"got {in_features} and {out_features}"
        )
    if bias is not None and bias.dtype not in (*HALF, torch.float32):
        return f"takes a bias of fp16, bf16 or fp32, got {bias.dtype}"
    return None


def _refuses_scale(weight_scale: Tensor) -> str | None:
    return None if weight_scale.dtype == torch.float32 else f"takes scales in fp32, got {weight_scale.dtype}"


def _refuses_stream(residual: Tensor, narrow: torch.dtype) -> str | None:
    """The stream is written in place, in accesses of 16 bytes, so no copy of it would do."""
    if residual.dtype not in (narrow, torch.float32):
        return f"adds to {narrow} or fp32, not to {residual.dtype}"
    start = 0 if torch.compiler.is_compiling() else residual.storage_offset()  # not traced; the launch checks it anyway
    if any(step * residual.itemsize % 16 for step in (start, *residual.stride()[:-1])):
        return "needs a residual whose rows start at multiples of 16 bytes"
    return refuses_stream(residual)


def forward(form: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A form, but for "residual", of `x` (..., in_features), in its dtype."""
    out = _output(form, x, weight, x.dtype)
    _launch(form, out, x, weight, bias)
    return out


def forward_fp8(
    form: str, x: Tensor, scale: float, weight: Tensor, weight_scale: Tensor, bias: Tensor | None,
    dtype: torch.dtype, out_scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """The same of e4m3 operands, in `dtype`; e4m3 values are over `out_scale`."""
    out = _output(form, x, weight, dtype)
    _launch(form, out, x, weight, bias, scale, weight_scale, out_scale)
    return out


def residual_forward_(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _launch("residual", residual, x, weight, bias)
    was_written(residual)


def residual_forward_fp8_(
    residual: Tensor, x: Tensor, scale: float, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> None:
    _launch("residual", residual, x, weight, bias, scale, weight_scale)
    was_written(residual)


def _output(form: str, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] // (2 if form == "swiglu" else 1), dtype=dtype)


def _launch(
    form: str, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float = 1.0,
    weight_scale: Tensor | None = None, out_scale: float = 1.0,
) -> None:  # fmt: skip
    bias, weight_scale = (_cuda.vector(vector) for vector in (bias, weight_scale))
    _cuda.launches().linear_forward(
        _operand(x), _operand(weight), bias, weight_scale, scale, 1.0 / out_scale, FORMS.index(form),
        _cuda.flat_rows(out),
    )  # fmt: skip


def _operand(x: Tensor) -> Tensor:
    """`x` (..., in_features) as rows that TMA can read: they start at multiples of 16 bytes and do not overlap."""
    rows = _cuda.rows(x)
    aligned = (rows.data_ptr() | rows.stride(0) * rows.itemsize) % 16 == 0
    readable = aligned and rows.stride(0) >= rows.shape[1]
    return rows if readable else rows.clone(memory_format=torch.contiguous_format)
