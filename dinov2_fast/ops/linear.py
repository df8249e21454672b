"""A linear layer with an epilogue, for inference only.

    z = x @ weight^T + bias                  x (..., in_features), weight (out_features, in_features)

    epilogue   result
    none       z
    gelu       z * Phi(z), the exact (erf) GELU
    swiglu     silu(gate) * value: the first and second half of z, or its even and odd features (:func:`interleave`)
    residual   residual += z, in place

The operands may be e4m3. Then `x` has one scale and `weight` a scale for each output feature. The real value is the
e4m3 value times the scale, as in `torch.nn.functional.scaled_mm`.

The kernels leave the sum of e4m3 products to the tensor cores (fast accumulation). Those of sm_90 add with some 14
significant bits (DeepSeek-V3, arXiv:2412.19437, section 3.3.2), while fp32 has 24. In a simulation with 4096
in_features, this error is less than a twentieth of the error of rounding the operands to e4m3.

Sources: GELU: Hendrycks & Gimpel, arXiv:1606.08415; SwiGLU: Shazeer, arXiv:2002.05202; e4m3: Micikevicius et al.,
arXiv:2209.05433.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.ops import _backends, _linear_cuda, _registry
from dinov2_fast.ops._backends import HALF
from dinov2_fast.ops._fp8 import E4M3
from dinov2_fast.ops._linear_epilogue import (
    NEEDS_INTERLEAVED,
    apply_epilogue,
    mark_written,
    new_result,
    refuses_stream,
)
from dinov2_fast.ops._linear_peers import CUBLAS, ONEDNN
from dinov2_fast.ops.dispatch import Op
from dinov2_fast.ops.implementation import Implementation


def interleave(packed: Tensor) -> Tensor:
    """A copy of a SwiGLU parameter (2 * hidden, ...) with gate and value rows in turn instead of all gates first.

    Row 2j of the result is gate j, and row 2j + 1 is value j. It serves weights, biases and weight scales.
    """
    return packed.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    epilogue: str = "none",
    residual: Tensor | None = None,
    scale: float | None = None,
    weight_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out_scale: float = 1.0,
    interleaved: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`x` @ `weight`^T + `bias`, followed by an epilogue.

    Args:
        x: (..., in_features), fp16, bf16, fp32, fp64 or e4m3.
        weight: (out_features, in_features), in the dtype of `x`. For "swiglu", all gates come first.
        bias: (out_features,) in the same order, or None.
        epilogue: "none", "gelu", "swiglu" or "residual".
        residual: (..., out_features), to which "residual" adds the result in place. It may be fp32 where `x` is
            narrower, and must not overlap the other arguments.
        scale: the scale of `x`, for e4m3 operands.
        weight_scale: (out_features,), fp32, for e4m3 operands.
        dtype: of the result of e4m3 operands: bf16 (the default) or fp16; with "gelu" and "swiglu" also e4m3. With
            "residual" the result has the dtype of `residual`.
        out_scale: the scale of an e4m3 result.
        interleaved: for "swiglu", whether weight, bias and weight_scale are in the order of :func:`interleave`. Kernels
            that compute SwiGLU in their epilogue take only this order, in which a tile holds gates and their values.
        backend: the backend to use instead of the default.

    Returns:
        (..., out_features), or for "swiglu" (..., out_features / 2), contiguous, in the dtype of `x` or in `dtype`. For
        "residual" it is `residual`.

    Raises:
        ValueError: the arguments do not fit together, or there is no such epilogue.
        BackendError: `backend` cannot take these tensors, or gradients are recorded.
    """
    _check(x, weight, bias, epilogue)
    if residual is not None or epilogue == "residual":
        _check_residual(x, weight, epilogue, residual)
    if scale is not None or weight_scale is not None or dtype is not None or x.dtype == E4M3:
        _check_e4m3(x, weight, scale, weight_scale)
        dtype = _result_dtype(epilogue, residual, dtype)
    scale = 1.0 if scale is None else scale
    args = x, weight, bias, epilogue, residual, scale, weight_scale, dtype, out_scale, interleaved
    return LINEAR.choose(epilogue, args, backend).function(*args)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str) -> None:
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise InvalidValueError(f"weight has shape {tuple(weight.shape)}, which does not fit x {tuple(x.shape)}.")
    out_features, in_features = weight.shape
    if bias is not None and bias.shape != (out_features,):
        raise InvalidValueError(f"bias has shape {tuple(bias.shape)}, but there are {out_features} output features.")
    if out_features == 0 or in_features == 0:
        raise InvalidValueError(f"weight has shape {tuple(weight.shape)}: there is nothing to multiply.")
    if epilogue == "swiglu" and out_features % 2:
        raise InvalidValueError(f"SwiGLU takes pairs of gate and value features, got {out_features} features.")


def _check_residual(x: Tensor, weight: Tensor, epilogue: str, residual: Tensor | None) -> None:
    if residual is None or epilogue != "residual":
        raise InvalidValueError('The epilogue "residual" needs a residual, and the other epilogues take none.')
    if residual.shape != (*x.shape[:-1], weight.shape[0]):
        raise InvalidValueError(f"residual has shape {tuple(residual.shape)}, not {(*x.shape[:-1], weight.shape[0])}.")


def _check_e4m3(x: Tensor, weight: Tensor, scale: float | None, weight_scale: Tensor | None) -> None:
    if x.dtype != E4M3 or weight.dtype != E4M3:
        raise InvalidValueError(
            f"scale, weight_scale and dtype are for x and weight in e4m3, got {x.dtype} and {weight.dtype}."
        )
    if scale is None or weight_scale is None:
        raise InvalidValueError("e4m3 operands need scale and weight_scale.")
    if weight_scale.shape != weight.shape[:1] or weight_scale.dtype != torch.float32:
        raise InvalidValueError(
            f"weight_scale is {weight_scale.dtype} of shape {tuple(weight_scale.shape)}, but must be torch.float32 of "
            f"shape {tuple(weight.shape[:1])}: one scale for each output feature."
        )


def _result_dtype(epilogue: str, residual: Tensor | None, dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype of the result of e4m3 operands; None for a residual stream, which has its own."""
    given = dtype or (torch.bfloat16 if residual is None else residual.dtype)
    allowed = {"none": HALF, "residual": (*HALF, torch.float32)}.get(epilogue, (*HALF, E4M3))
    if residual is not None and given != residual.dtype:
        raise InvalidValueError(f"The result has the dtype of the residual, {residual.dtype}: leave out dtype={given}.")
    if given not in allowed:
        raise InvalidValueError(f"The result of {epilogue!r} can be {', '.join(map(str, allowed))}, got {given}.")
    return given if residual is None else None


def linear_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str = "none", residual: Tensor | None = None,
    scale: float = 1.0, weight_scale: Tensor | None = None, dtype: torch.dtype | None = None, out_scale: float = 1.0,
    interleaved: bool = False,
) -> Tensor:  # fmt: skip
    if weight_scale is not None:
        x, weight = x.float() * scale, weight.float() * weight_scale[:, None]
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    return apply_epilogue(F.linear(x, weight, bias), epilogue, residual, dtype, out_scale, interleaved)


# The kernels


def linear_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str, residual: Tensor | None, scale: float,
    weight_scale: Tensor | None, dtype: torch.dtype | None, out_scale: float, interleaved: bool,
) -> Tensor:  # fmt: skip
    if residual is not None:
        _residual(residual, x, weight, bias, scale, weight_scale)
        return residual
    if weight_scale is None:
        return _forward(x, weight, bias, epilogue)
    return _forward_fp8(x, weight, bias, epilogue, scale, weight_scale, dtype, out_scale)


def linear_cuda(
    x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str, residual: Tensor | None, scale: float,
    weight_scale: Tensor | None, dtype: torch.dtype | None, out_scale: float, interleaved: bool,
) -> Tensor:  # fmt: skip
    if residual is not None:
        _residual_cuda(residual, x, weight, bias, scale, weight_scale)
        return residual
    return _forward_cuda(x, weight, bias, epilogue, scale, weight_scale, dtype, out_scale)


_launch = _registry.launcher("linear", "linear_forward")
_launch_residual_ = _registry.launcher("linear", "linear_residual_forward_")


def _write_residual_(residual: Tensor, *args: Any) -> None:
    _launch_residual_(residual, *args)
    mark_written(residual)


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str, scale: float = 1.0,
    weight_scale: Tensor | None = None, dtype: torch.dtype | None = None, out_scale: float = 1.0,
) -> Tensor:  # fmt: skip
    return new_result(x, weight, epilogue, dtype)


def _fake_residual(*args: Any) -> None:
    """The op writes in place, so there is nothing to allocate."""


_FORWARD = "(Tensor x, Tensor weight, Tensor? bias, str epilogue"
_E4M3 = "float scale, Tensor? weight_scale, ScalarType? dtype, float out_scale"
_RESIDUAL = "(Tensor(a!) residual, Tensor x, Tensor weight, Tensor? bias, float scale, Tensor? weight_scale) -> ()"

# Two ops on Triton, because autocast must cast the operands of `linear`, and not those of `linear_fp8`.
_forward = _registry.register(f"linear{_FORWARD}) -> Tensor", _launch, _fake, autocast=torch.get_autocast_dtype)
_forward_fp8 = _registry.register(f"linear_fp8{_FORWARD}, {_E4M3}) -> Tensor", _launch, _fake)
_residual = _registry.register(f"linear_residual_{_RESIDUAL}", _write_residual_, _fake_residual)
_forward_cuda = _registry.register(f"linear_cuda{_FORWARD}, {_E4M3}) -> Tensor", _linear_cuda.linear_forward, _fake)
_residual_cuda = _registry.register(
    f"linear_residual_cuda_{_RESIDUAL}", _linear_cuda.linear_residual_forward_, _fake_residual
)


def _refuses(
    x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str, residual: Tensor | None, *rest: Any
) -> str | None:
    if weight.dtype != x.dtype:
        return f"takes x and weight of one dtype, got {x.dtype} and {weight.dtype}"
    if epilogue == "swiglu" and rest[-1] is False:
        return NEEDS_INTERLEAVED
    if x.dtype == E4M3 and (reason := _backends.refuses_e4m3(x)):
        return reason
    return None if residual is None else refuses_stream(residual)


def sample_inputs(epilogue: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of a form, of which callers fit two to the implementation: `interleaved` is None, and "residual" has a
    bias only with e4m3 operands.
    """
    e4m3 = dtype == E4M3
    x = torch.empty(1, 257, 384, device=device, dtype=torch.bfloat16 if e4m3 else dtype)
    weight, bias = x.new_empty(1536, 384), x.new_empty(1536)
    residual = x.new_empty(1, 257, 1536) if epilogue == "residual" else None
    if not e4m3:
        return x, weight, None if residual is not None else bias, epilogue, residual, 1.0, None, None, 1.0, None
    result = {"none": torch.bfloat16, "residual": None}.get(epilogue, E4M3)
    return x.to(E4M3), weight.to(E4M3), bias, epilogue, residual, 0.125, bias.float(), result, 0.0625, None


# For fp16 and bf16 the CUDA extension has no form "none", because cuBLAS computes it.
LINEAR = Op(
    "linear",
    (
        ONEDNN,
        Implementation("torch", linear_torch, has_backward=False, why=_backends.UNMEASURED),
        *CUBLAS,
        _backends.triton(linear_triton, _refuses, dtypes=(*HALF, torch.float32, E4M3), has_backward=False),
        _backends.cuda(
            linear_cuda, _linear_cuda.refuses, dtypes=HALF, forms=("gelu", "swiglu", "residual"), has_backward=False
        ),
        _backends.cuda(linear_cuda, _linear_cuda.refuses, dtypes=(E4M3,), has_backward=False),
    ),
    {epilogue: partial(sample_inputs, epilogue) for epilogue in _linear_cuda.FORMS},
)
