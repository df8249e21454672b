"""Linear layers with what follows them, for inference only.

    linear(x)               z = x @ weight^T + bias
    linear_gelu(x)          z * Phi(z), the exact (erf) GELU
    linear_swiglu(x)        silu(z[0::2]) * z[1::2], gate and value features in turn (:func:`interleave` orders them)
    linear_residual_(r, x)  r += gamma * z, in place

The `_fp8` forms take e4m3 operands: `x` times one scale or a scale of each row, `weight` times a scale of each output
feature. A scale is what the e4m3 value is multiplied by to give the real one, as `torch.nn.functional.scaled_mm` has
it. Their sums are precise: where the tensor cores add e4m3 products with fewer bits than fp32, short partial sums are
added in fp32.
Sources: GELU: Hendrycks & Gimpel, arXiv:1606.08415; SwiGLU: Shazeer, arXiv:2002.05202; LayerScale: Touvron et al.,
arXiv:2103.17239; e4m3: Micikevicius et al., arXiv:2209.05433.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_fast.backends import Implementation, Op
from dinov2_fast.ops import _cuda, _fp8, _registry

E4M3 = torch.float8_e4m3fn
HALF = (torch.float16, torch.bfloat16)
_HAS_ONEDNN = torch.backends.mkldnn.is_available()


def interleave(packed: Tensor) -> Tensor:
    """Reorders a packed SwiGLU parameter, (2 * hidden, ...) with all gates first, for :func:`linear_swiglu`.

    Row 2j of the result is gate j, row 2j + 1 value j. For weights, biases and weight scales; a copy.
    """
    return packed.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: str | None = None) -> Tensor:
    """`x` @ `weight`^T + `bias`.

    Args:
        x: (..., in_features), fp16, bf16, fp32 or fp64.
        weight: (out_features, in_features), in the dtype of `x`.
        bias: (out_features,) or None.
        backend: the implementation to use instead of the default.

    Returns:
        (..., out_features), contiguous, in the dtype of `x`.

    Raises:
        ValueError: sizes do not go together.
        BackendError: gradients are recorded.
    """
    _check(x, weight, bias=bias)
    return _LINEAR(x, weight, bias, backend=backend)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: str | None = None) -> Tensor:
    """GELU of :func:`linear`, with the same arguments, result and errors."""
    _check(x, weight, bias=bias)
    return _LINEAR_GELU(x, weight, bias, backend=backend)


def linear_swiglu(x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: str | None = None) -> Tensor:
    """SwiGLU of :func:`linear`.

    Args:
        x: (..., in_features).
        weight: (2 * hidden, in_features), its rows in the order of :func:`interleave`.
        bias: (2 * hidden,) in that order, or None.
        backend: the implementation to use instead of the default.

    Returns:
        (..., hidden), contiguous, in the dtype of `x`.

    Raises:
        As :func:`linear`.
    """
    _check(x, weight, swiglu=True, bias=bias)
    return _LINEAR_SWIGLU(x, weight, bias, backend=backend)


def linear_residual_(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    *,
    backend: str | None = None,
) -> None:
    """Adds `gamma` * :func:`linear` to the residual stream, in place.

    Args:
        residual: (..., out_features), which may be wider (fp32) than `x`, and may not overlap the other arguments.
        x, weight, bias: as for :func:`linear`.
        gamma: LayerScale, (out_features,), or None for 1.
        backend: the implementation to use instead of the default.

    Raises:
        As :func:`linear`.
    """
    _check(x, weight, residual, bias=bias, gamma=gamma)
    _LINEAR_RESIDUAL(residual, x, weight, bias, gamma, backend=backend)


def linear_fp8(
    x: Tensor,
    x_scale: Tensor | float,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    backend: str | None = None,
) -> Tensor:
    """:func:`linear` of e4m3 operands.

    Args:
        x: (..., in_features), e4m3.
        x_scale: one number, or the fp32 scale (..., 1) of each row.
        weight: (out_features, in_features), e4m3.
        weight_scale: (out_features,), fp32.
        bias: (out_features,) or None.
        dtype: of the result, bf16 or fp16.
        backend: the implementation to use instead of the default.

    Returns:
        (..., out_features), contiguous.

    Raises:
        ValueError: sizes or dtypes do not go together.
        BackendError: gradients are recorded.
    """
    _check(x, weight, x_scale=x_scale, bias=bias, weight_scale=weight_scale)
    _check_dtypes(x, weight, dtype, HALF)
    return _LINEAR_FP8(x, *_split(x_scale), weight, weight_scale, bias, dtype, backend=backend)


def linear_gelu_fp8(
    x: Tensor,
    x_scale: Tensor | float,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype = torch.bfloat16,
    out_scale: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """GELU of :func:`linear_fp8`; `dtype` may be e4m3, the values of which are to be multiplied by `out_scale`."""
    _check(x, weight, x_scale=x_scale, bias=bias, weight_scale=weight_scale)
    _check_dtypes(x, weight, dtype, (*HALF, E4M3))
    return _LINEAR_GELU_FP8(x, *_split(x_scale), weight, weight_scale, bias, dtype, out_scale, backend=backend)


def linear_swiglu_fp8(
    x: Tensor,
    x_scale: Tensor | float,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype = torch.bfloat16,
    out_scale: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """SwiGLU of :func:`linear_fp8`, rows of the weight as for :func:`linear_swiglu`, `dtype` as for the GELU form."""
    _check(x, weight, swiglu=True, x_scale=x_scale, bias=bias, weight_scale=weight_scale)
    _check_dtypes(x, weight, dtype, (*HALF, E4M3))
    return _LINEAR_SWIGLU_FP8(x, *_split(x_scale), weight, weight_scale, bias, dtype, out_scale, backend=backend)


def linear_residual_fp8_(
    residual: Tensor,
    x: Tensor,
    x_scale: Tensor | float,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    *,
    backend: str | None = None,
) -> None:
    """:func:`linear_residual_` of the e4m3 operands of :func:`linear_fp8`."""
    _check(x, weight, residual, x_scale=x_scale, bias=bias, weight_scale=weight_scale, gamma=gamma)
    _check_dtypes(x, weight, residual.dtype, (*HALF, torch.float32))
    _LINEAR_RESIDUAL_FP8(residual, x, *_split(x_scale), weight, weight_scale, bias, gamma, backend=backend)


def _check(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    swiglu: bool = False,
    x_scale: Tensor | float = 1.0,
    **vectors: Tensor | None,
) -> None:
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, which does not go with x {tuple(x.shape)}.")
    for name, vector in vectors.items():
        if vector is not None and vector.shape != weight.shape[:1]:
            raise ValueError(
                f"{name} has shape {tuple(vector.shape)}, but there are {weight.shape[0]} output features."
            )
    if 0 in weight.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: there is nothing to multiply.")
    if swiglu and weight.shape[0] % 2:
        raise ValueError(f"SwiGLU takes pairs of gate and value features, not {weight.shape[0]} features.")
    if residual is not None and residual.shape != (*x.shape[:-1], weight.shape[0]):
        raise ValueError(f"residual has shape {tuple(residual.shape)}, not {(*x.shape[:-1], weight.shape[0])}.")
    if isinstance(x_scale, Tensor) and x_scale.shape != (*x.shape[:-1], 1):
        raise ValueError(f"x_scale has shape {tuple(x_scale.shape)}, not {(*x.shape[:-1], 1)}.")


def _check_dtypes(x: Tensor, weight: Tensor, dtype: torch.dtype, allowed: tuple[torch.dtype, ...]) -> None:
    if x.dtype != E4M3 or weight.dtype != E4M3:
        raise ValueError(f"x and weight must be e4m3, got {x.dtype} and {weight.dtype}.")
    if dtype not in allowed:
        raise ValueError(f"the result can be {', '.join(map(str, allowed))}, not {dtype}.")


def _split(x_scale: Tensor | float) -> tuple[Tensor | None, float]:
    """Scale of each row, and scale of all."""
    return (x_scale, 1.0) if isinstance(x_scale, Tensor) else (None, x_scale)


# The torch references


def linear_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def linear_gelu_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.aten.gelu_(linear_torch(x, weight, bias))  # nobody else holds it: no fresh memory is needed


def linear_swiglu_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _swiglu(linear_torch(x, weight, bias))


def linear_residual_torch_(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None
) -> None:
    _add_(residual, linear_torch(x, weight, bias), gamma)


def linear_fp8_torch(
    x: Tensor, row_scale: Tensor | None, scale: float, weight: Tensor, weight_scale: Tensor, bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return _dequantized_linear(x, row_scale, scale, weight, weight_scale, bias).to(dtype)


def linear_gelu_fp8_torch(
    x: Tensor, row_scale: Tensor | None, scale: float, weight: Tensor, weight_scale: Tensor, bias: Tensor | None,
    dtype: torch.dtype, out_scale: float,
) -> Tensor:  # fmt: skip
    return _rounded(F.gelu(_dequantized_linear(x, row_scale, scale, weight, weight_scale, bias)), dtype, out_scale)


def linear_swiglu_fp8_torch(
    x: Tensor, row_scale: Tensor | None, scale: float, weight: Tensor, weight_scale: Tensor, bias: Tensor | None,
    dtype: torch.dtype, out_scale: float,
) -> Tensor:  # fmt: skip
    return _rounded(_swiglu(_dequantized_linear(x, row_scale, scale, weight, weight_scale, bias)), dtype, out_scale)


def linear_residual_fp8_torch_(
    residual: Tensor, x: Tensor, row_scale: Tensor | None, scale: float, weight: Tensor, weight_scale: Tensor,
    bias: Tensor | None, gamma: Tensor | None,
) -> None:  # fmt: skip
    _add_(residual, _dequantized_linear(x, row_scale, scale, weight, weight_scale, bias), gamma)


def _swiglu(z: Tensor) -> Tensor:
    return F.silu(z[..., 0::2]) * z[..., 1::2]


def _add_(residual: Tensor, branch: Tensor, gamma: Tensor | None) -> None:
    if gamma is None:
        residual.add_(branch)
    else:
        residual.addcmul_(branch, gamma)


def _dequantized_linear(
    x: Tensor, row_scale: Tensor | None, scale: float, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    wide = x.float() * (scale if row_scale is None else row_scale)
    return linear_torch(wide, weight.float() * weight_scale[:, None], bias)


def _rounded(y: Tensor, dtype: torch.dtype, out_scale: float) -> Tensor:
    return _fp8.quantize(y.float(), out_scale) if dtype == E4M3 else y.to(dtype)


# cuBLAS, through torch


def linear_gelu_cublas(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """With the GELU in the epilogue of the product, which on CUDA is the tanh form (the erf form on the CPU)."""
    y = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.t(), use_gelu=True)
    return y.view(*x.shape[:-1], weight.shape[0])


def linear_residual_cublas_(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None
) -> None:
    residual.view(-1, residual.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.t())


def linear_fp8_cublas(*args: Any) -> Tensor:
    *operands, dtype = args
    return _scaled_mm(dtype, *operands)


def linear_gelu_fp8_cublas(*args: Any) -> Tensor:
    *operands, dtype, out_scale = args
    return _rounded(F.gelu(_scaled_mm(torch.bfloat16, *operands)), dtype, out_scale)


def linear_swiglu_fp8_cublas(*args: Any) -> Tensor:
    *operands, dtype, out_scale = args
    return _rounded(_swiglu(_scaled_mm(torch.bfloat16, *operands)), dtype, out_scale)


def linear_residual_fp8_cublas_(residual: Tensor, *args: Any) -> None:
    *operands, gamma = args
    _add_(residual, _scaled_mm(torch.bfloat16, *operands), gamma)


def _scaled_mm(
    dtype: torch.dtype, x: Tensor, row_scale: Tensor | None, scale: float, weight: Tensor, weight_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    rows, by_row = x.reshape(-1, x.shape[-1]).contiguous(), F.ScalingType.RowWise
    if row_scale is None:
        row_scale = weight_scale.new_full((rows.shape[0], 1), scale)
    y = F.scaled_mm(
        rows, weight.t(), row_scale.reshape(-1, 1), by_row, weight_scale[None], by_row, bias=bias, output_dtype=dtype
    )
    return y.view(*x.shape[:-1], weight.shape[0])


# oneDNN, through torch

ONEDNN_CHAIN = 768  # in_features that are added up at once


def linear_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """oneDNN adds up a whole row of products one by one, so that of long ones the error is more than twice MKL's, which
    adds up parts of them. Here the parts are products of their own."""
    first, *others = zip(x.split(ONEDNN_CHAIN, dim=-1), weight.split(ONEDNN_CHAIN, dim=1), strict=True)
    if not others:
        return _onednn_linear(x, weight, bias, activation)
    y = _onednn_linear(*first, bias)
    for part in others:
        y += _onednn_linear(*part, None)
    return torch.ops.aten.gelu_(y) if activation == "gelu" else y


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    algorithm = "none" if activation == "gelu" else ""  # not the tanh form
    return torch.ops.mkldnn._linear_pointwise(
        x.contiguous(), weight.contiguous(), None if bias is None else bias.to(x.dtype), activation, [], algorithm
    )


def linear_gelu_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear_onednn(x, weight, bias, "gelu")


def linear_swiglu_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _swiglu(linear_onednn(x, weight, bias))


def linear_residual_onednn_(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None
) -> None:
    _add_(residual, linear_onednn(x, weight, bias), gamma)


# The Triton kernel


def _launch(epilogue: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from dinov2_fast.kernels.linear import linear_forward

    return linear_forward(x, weight, bias, epilogue)


def _launch_residual_(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, **scales: Any
) -> None:
    from dinov2_fast.kernels.linear import linear_residual_forward_

    linear_residual_forward_(residual, x, weight, bias, gamma, **scales)
    _was_written(residual)


def _was_written(residual: Tensor) -> None:
    """Tells autograd, which does not see what a launch overwrites."""
    if not residual.is_inference():
        torch.autograd.graph.increment_version(residual)


def _launch_fp8(
    epilogue: str, x: Tensor, row_scale: Tensor | None, scale: float, weight: Tensor, weight_scale: Tensor,
    bias: Tensor | None, dtype: torch.dtype, out_scale: float = 1.0,
) -> Tensor:  # fmt: skip
    from dinov2_fast.kernels.linear import linear_forward

    return linear_forward(
        x, weight, bias, epilogue, row_scale=row_scale, scale=scale, weight_scale=weight_scale, dtype=dtype,
        out_scale=out_scale,
    )  # fmt: skip


def _launch_residual_fp8_(
    residual: Tensor, x: Tensor, row_scale: Tensor | None, scale: float, weight: Tensor, weight_scale: Tensor,
    bias: Tensor | None, gamma: Tensor | None,
) -> None:  # fmt: skip
    _launch_residual_(
        residual, x, weight, bias, gamma, row_scale=row_scale, scale=scale, weight_scale=weight_scale
    )  # fmt: skip


# The CUDA kernels, which are CUTLASS' with epilogues of their own

_FORMS = ("linear", "gelu", "swiglu", "residual")  # as csrc/linear_tiles.h numbers them


def _launch_cuda(
    form: str, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None = None,
    row_scale: Tensor | None = None, scale: float = 1.0, weight_scale: Tensor | None = None, out_scale: float = 1.0,
) -> None:  # fmt: skip
    row_scale = None if row_scale is None else row_scale.reshape(-1).contiguous()
    bias, gamma, weight_scale = (_cuda.vector(vector) for vector in (bias, gamma, weight_scale))
    _cuda.launches().linear_forward(
        _operand_cuda(x), _operand_cuda(weight), bias, gamma, row_scale, weight_scale, scale, 1.0 / out_scale,
        _FORMS.index(form), _cuda.flat_rows(out),
    )  # fmt: skip


def _operand_cuda(x: Tensor) -> Tensor:
    """`x` (..., in_features) as rows that TMA can read: they start at multiples of 16 bytes and do not overlap."""
    rows = _cuda.rows(x)
    starts_aligned = (rows.data_ptr() | rows.stride(0) * rows.itemsize) % 16 == 0
    return (
        rows
        if starts_aligned and rows.stride(0) >= rows.shape[1]
        else rows.clone(memory_format=torch.contiguous_format)
    )


def _output_cuda(form: str, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] // (2 if form == "swiglu" else 1), dtype=dtype)


def _forward_cuda(form: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = _output_cuda(form, x, weight, x.dtype)
    _launch_cuda(form, out, x, weight, bias)
    return out


def _forward_fp8_cuda(
    form: str, x: Tensor, row_scale: Tensor | None, scale: float, weight: Tensor, weight_scale: Tensor,
    bias: Tensor | None, dtype: torch.dtype, out_scale: float = 1.0,
) -> Tensor:  # fmt: skip
    out = _output_cuda(form, x, weight, dtype)
    _launch_cuda(form, out, x, weight, bias, None, row_scale, scale, weight_scale, out_scale)
    return out


def _residual_cuda_(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None) -> None:
    _launch_cuda("residual", residual, x, weight, bias, gamma)
    _was_written(residual)


def _residual_fp8_cuda_(
    residual: Tensor, x: Tensor, row_scale: Tensor | None, scale: float, weight: Tensor, weight_scale: Tensor,
    bias: Tensor | None, gamma: Tensor | None,
) -> None:  # fmt: skip
    _launch_cuda("residual", residual, x, weight, bias, gamma, row_scale, scale, weight_scale)
    _was_written(residual)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_swiglu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2)


def _fake_fp8(x: Tensor, row_scale: Any, scale: float, weight: Tensor, weight_scale: Any, bias: Any, *rest: Any) -> Any:
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=rest[0])


def _fake_swiglu_fp8(*args: Any) -> Tensor:
    return _fake_fp8(*args)[..., ::2].contiguous()


_OPERANDS = "Tensor x, Tensor weight, Tensor? bias"
_FP8 = "Tensor x, Tensor? row_scale, float scale, Tensor weight, Tensor weight_scale, Tensor? bias"

_linear = _registry.register(
    f"linear({_OPERANDS}) -> Tensor", lambda *args: _launch("linear", *args), _fake, autocast=torch.get_autocast_dtype
)
_linear_gelu = _registry.register(
    f"linear_gelu({_OPERANDS}) -> Tensor",
    lambda *args: _launch("gelu", *args),
    _fake,
    autocast=torch.get_autocast_dtype,
)
_linear_swiglu = _registry.register(
    f"linear_swiglu({_OPERANDS}) -> Tensor",
    lambda *args: _launch("swiglu", *args),
    _fake_swiglu,
    autocast=torch.get_autocast_dtype,
)
_linear_residual = _registry.register(
    f"linear_residual_(Tensor(a!) residual, {_OPERANDS}, Tensor? gamma) -> ()", _launch_residual_, lambda *args: None
)
_linear_fp8 = _registry.register(
    f"linear_fp8({_FP8}, ScalarType dtype) -> Tensor", lambda *args: _launch_fp8("linear", *args), _fake_fp8
)
_linear_gelu_fp8 = _registry.register(
    f"linear_gelu_fp8({_FP8}, ScalarType dtype, float out_scale) -> Tensor",
    lambda *args: _launch_fp8("gelu", *args),
    _fake_fp8,
)
_linear_swiglu_fp8 = _registry.register(
    f"linear_swiglu_fp8({_FP8}, ScalarType dtype, float out_scale) -> Tensor",
    lambda *args: _launch_fp8("swiglu", *args),
    _fake_swiglu_fp8,
)
_linear_residual_fp8 = _registry.register(
    f"linear_residual_fp8_(Tensor(a!) residual, {_FP8}, Tensor? gamma) -> ()",
    _launch_residual_fp8_,
    lambda *args: None,
)
_linear_gelu_cuda = _registry.register(
    f"linear_gelu_cuda({_OPERANDS}) -> Tensor", partial(_forward_cuda, "gelu"), _fake
)
_linear_swiglu_cuda = _registry.register(
    f"linear_swiglu_cuda({_OPERANDS}) -> Tensor", partial(_forward_cuda, "swiglu"), _fake_swiglu
)
_linear_residual_cuda = _registry.register(
    f"linear_residual_cuda_(Tensor(a!) residual, {_OPERANDS}, Tensor? gamma) -> ()", _residual_cuda_, lambda *args: None
)
_linear_fp8_cuda = _registry.register(
    f"linear_fp8_cuda({_FP8}, ScalarType dtype) -> Tensor", partial(_forward_fp8_cuda, "linear"), _fake_fp8
)
_linear_gelu_fp8_cuda = _registry.register(
    f"linear_gelu_fp8_cuda({_FP8}, ScalarType dtype, float out_scale) -> Tensor",
    partial(_forward_fp8_cuda, "gelu"),
    _fake_fp8,
)
_linear_swiglu_fp8_cuda = _registry.register(
    f"linear_swiglu_fp8_cuda({_FP8}, ScalarType dtype, float out_scale) -> Tensor",
    partial(_forward_fp8_cuda, "swiglu"),
    _fake_swiglu_fp8,
)
_linear_residual_fp8_cuda = _registry.register(
    f"linear_residual_fp8_cuda_(Tensor(a!) residual, {_FP8}, Tensor? gamma) -> ()",
    _residual_fp8_cuda_,
    lambda *args: None,
)


def _refuses(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if x.dtype not in (*HALF, torch.float32):
        return f"takes fp16, bf16 and fp32, got {x.dtype}"
    if weight.dtype != x.dtype:
        return f"takes x and weight of one dtype, got {x.dtype} and {weight.dtype}"
    return None


def _refuses_residual(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None
) -> str | None:
    return _refuses(x, weight, bias) or _refuses_stream(residual)


def _refuses_stream(residual: Tensor) -> str | None:
    """A matrix that is written in place has evenly spaced rows that do not overlap."""
    if residual.dtype not in (*HALF, torch.float32):
        return f"adds to fp16, bf16 and fp32, not to {residual.dtype}"
    shape, strides = residual.shape, residual.stride()
    even = all(shape[i] == 1 or strides[i] == shape[i + 1] * strides[i + 1] for i in range(residual.ndim - 2))
    overlapping = residual.numel() > shape[-1] and strides[-2] < shape[-1]
    if not even or overlapping or (shape[-1] > 1 and strides[-1] != 1):
        return f"needs a residual that is a view of evenly spaced rows, got strides {strides} for shape {tuple(shape)}"
    return None


def _refuses_fp8(x: Tensor, *rest: Any) -> str | None:
    return _registry.refuses_e4m3(x)


def _refuses_residual_fp8(residual: Tensor, x: Tensor, *rest: Any) -> str | None:
    return _registry.refuses_e4m3(x) or _refuses_stream(residual)


def _cuda_refuses_any(form: str, x: Tensor, weight: Tensor, *vectors: Tensor | None) -> str | None:
    """What no CUDA kernel does. Operands that TMA cannot read in place are copied, so their strides do not matter."""
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
    for vector in vectors:
        if vector is not None and vector.dtype not in (*HALF, torch.float32):
            return f"takes a bias and gamma of fp16, bf16 or fp32, got {vector.dtype}"
    return None


def _cuda_refuses(form: str, x: Tensor, weight: Tensor, *vectors: Tensor | None) -> str | None:
    if x.dtype not in HALF:
        return f"takes fp16 and bf16, got {x.dtype}"
    return _cuda_refuses_any(form, x, weight, *vectors)


def _cuda_refuses_fp8(
    form: str, x: Tensor, row_scale: Tensor | None, scale: float, weight: Tensor, weight_scale: Tensor,
    bias: Tensor | None, dtype: torch.dtype, out_scale: float = 1.0,
) -> str | None:  # fmt: skip
    if dtype == torch.float16:
        return "gives bf16, or e4m3 behind an activation, not fp16"
    return _refuses_scales(row_scale, weight_scale) or _cuda_refuses_any(form, x, weight, bias)


def _cuda_refuses_residual(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None
) -> str | None:
    return _cuda_refuses("residual", x, weight, bias, gamma) or _cuda_refuses_stream(residual, x.dtype)


def _cuda_refuses_residual_fp8(
    residual: Tensor, x: Tensor, row_scale: Tensor | None, scale: float, weight: Tensor, weight_scale: Tensor,
    bias: Tensor | None, gamma: Tensor | None,
) -> str | None:  # fmt: skip
    reason = _refuses_scales(row_scale, weight_scale) or _cuda_refuses_any("residual", x, weight, bias, gamma)
    return reason or _cuda_refuses_stream(residual, torch.bfloat16)


def _refuses_scales(*scales: Tensor | None) -> str | None:
    wrong = [scale.dtype for scale in scales if scale is not None and scale.dtype != torch.float32]
    return f"takes scales in fp32, got {wrong[0]}" if wrong else None


def _cuda_refuses_stream(residual: Tensor, narrow: torch.dtype) -> str | None:
    """The stream is written in place, in accesses of 16 bytes, so no copy of it would do."""
    if residual.dtype not in (narrow, torch.float32):
        return f"adds to {narrow} or fp32, not to {residual.dtype}"
    start = 0 if torch.compiler.is_compiling() else residual.storage_offset()  # not traced; the launch checks it anyway
    if any(step * residual.itemsize % 16 for step in (start, *residual.stride()[:-1])):
        return "needs a residual whose rows start at multiples of 16 bytes"
    return _refuses_stream(residual)


def _onednn_refuses(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if not _HAS_ONEDNN:
        return "needs a torch that is built with oneDNN"
    if x.dtype not in (torch.float32, torch.bfloat16) or weight.dtype != x.dtype:
        return f"takes fp32 and bf16, x and weight alike, got {x.dtype} and {weight.dtype}"
    if torch.is_autocast_enabled(x.device.type):
        return "does not follow autocast"
    if _registry._is_exporting():
        return "does not export: an exported graph holds standard ops only"
    return None


def _onednn_refuses_residual(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None
) -> str | None:
    return _onednn_refuses(x, weight, bias)


def _cublas_refuses_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if x.dtype != torch.bfloat16:
        return f"computes the tanh form of GELU, which is near enough for bf16 results only, not for {x.dtype}"
    if bias is None or {weight.dtype, bias.dtype} != {x.dtype}:
        return "needs weight and bias in the dtype of x"
    return None


def _cublas_refuses_residual(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None
) -> str | None:
    if bias is not None or gamma is not None:
        return "adds neither bias nor gamma: fold gamma into the weight and add the bias with the next norm"
    if {residual.dtype, weight.dtype} != {x.dtype}:
        return f"needs one dtype, got residual {residual.dtype}, x {x.dtype} and weight {weight.dtype}"
    return _refuses_stream(residual)


def _cublas_refuses_fp8(
    x: Tensor, row_scale: Tensor | None, scale: float, weight: Tensor, weight_scale: Tensor, bias: Tensor | None,
    dtype: torch.dtype = torch.bfloat16, out_scale: float = 1.0,
) -> str | None:  # fmt: skip
    if weight.shape[0] % 16 or weight.shape[1] % 16:
        return f"needs features in multiples of 16, got {weight.shape[1]} in and {weight.shape[0]} out"
    if not weight.is_contiguous():
        return "needs a contiguous weight"
    if dtype == torch.float16 or (bias is not None and bias.dtype != torch.bfloat16):
        return "gives bf16 (or e4m3 made of it) and takes a bf16 bias"
    return _registry.refuses_e4m3(x)


def _cublas_refuses_residual_fp8(residual: Tensor, *args: Any) -> str | None:
    if residual.dtype == torch.float16:
        return "gives bf16, which is too coarse for an fp16 stream"
    return _cublas_refuses_fp8(*args[:-1])


def _sample(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.empty(1, 257, 384, device=device, dtype=dtype)
    return x, x.new_empty(1536, 384), x.new_empty(1536)


def _sample_residual(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    x, weight, bias = _sample(device, dtype)
    return x.new_empty(1, 257, 1536), x, weight, bias, bias


def _sample_fp8(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    x, weight, bias = _sample(device, torch.bfloat16)
    return x.to(E4M3), None, 0.125, weight.to(E4M3), bias.float(), bias, torch.bfloat16


def _sample_activation_fp8(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    return *_sample_fp8(device, dtype)[:-1], E4M3, 0.0625


def _sample_residual_fp8(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    *operands, _ = _sample_fp8(device, dtype)
    return _sample_residual(device, torch.bfloat16)[0], *operands, None


def _torch(function: Callable[..., Any]) -> Implementation:
    return Implementation("torch", function, trains=False)


def _onednn(function: Callable[..., Any], refuses: Callable[..., str | None] = _onednn_refuses) -> Implementation:
    # On a CPU with AVX-512 oneDNN took 0.5 (up to 768 in_features) to 0.65 of the time of F.linear, which is MKL's in
    # fp32 (AMD EPYC, 257 to 2056 rows, 384 to 4096 features); on one with AVX2 alone 1.2 times it, so there it has to
    # be asked for.
    fast = torch.backends.cpu.get_cpu_capability() == "AVX512"
    devices = ("cpu",) if fast else ("cpu with AVX-512",)
    return Implementation("onednn", function, refuses, devices, lambda device: device.type == "cpu", trains=False)


def _cublas(function: Callable[..., Any], refuses: Callable[..., str | None]) -> Implementation:
    return Implementation("cublas", function, refuses, ("cuda",), trains=False)


def _triton(function: Callable[..., Any], refuses: Callable[..., str | None]) -> Implementation:
    return _registry.triton(function, refuses, trains=False)


def _cutlass(function: Callable[..., Any], refuses: Callable[..., str | None]) -> Implementation:
    return _registry.cuda(function, refuses, trains=False)


# On a GPU torch stands first: none of the others has been measured there, and its plain linear is cuBLAS already.
_LINEAR = Op("linear", "linear", (_onednn(linear_onednn), _torch(linear_torch), _triton(_linear, _refuses)), _sample)
_LINEAR_GELU = Op(
    "linear_gelu",
    "linear",
    (
        _onednn(linear_gelu_onednn),
        _torch(linear_gelu_torch),
        _cublas(linear_gelu_cublas, _cublas_refuses_gelu),
        _triton(_linear_gelu, _refuses),
        _cutlass(_linear_gelu_cuda, partial(_cuda_refuses, "gelu")),
    ),
    _sample,
)
_LINEAR_SWIGLU = Op(
    "linear_swiglu",
    "linear",
    (
        _onednn(linear_swiglu_onednn),
        _torch(linear_swiglu_torch),
        _triton(_linear_swiglu, _refuses),
        _cutlass(_linear_swiglu_cuda, partial(_cuda_refuses, "swiglu")),
    ),
    _sample,
)
_LINEAR_RESIDUAL = Op(
    "linear_residual_",
    "linear",
    (
        _onednn(linear_residual_onednn_, _onednn_refuses_residual),
        _torch(linear_residual_torch_),
        _cublas(linear_residual_cublas_, _cublas_refuses_residual),
        _triton(_linear_residual, _refuses_residual),
        _cutlass(_linear_residual_cuda, _cuda_refuses_residual),
    ),
    _sample_residual,
)
_LINEAR_FP8 = Op(
    "linear_fp8",
    "linear",
    (
        _torch(linear_fp8_torch),
        _cublas(linear_fp8_cublas, _cublas_refuses_fp8),
        _triton(_linear_fp8, _refuses_fp8),
        _cutlass(_linear_fp8_cuda, partial(_cuda_refuses_fp8, "linear")),
    ),
    _sample_fp8,
)
_LINEAR_GELU_FP8 = Op(
    "linear_gelu_fp8",
    "linear",
    (
        _torch(linear_gelu_fp8_torch),
        _cublas(linear_gelu_fp8_cublas, _cublas_refuses_fp8),
        _triton(_linear_gelu_fp8, _refuses_fp8),
        _cutlass(_linear_gelu_fp8_cuda, partial(_cuda_refuses_fp8, "gelu")),
    ),
    _sample_activation_fp8,
)
_LINEAR_SWIGLU_FP8 = Op(
    "linear_swiglu_fp8",
    "linear",
    (
        _torch(linear_swiglu_fp8_torch),
        _cublas(linear_swiglu_fp8_cublas, _cublas_refuses_fp8),
        _triton(_linear_swiglu_fp8, _refuses_fp8),
        _cutlass(_linear_swiglu_fp8_cuda, partial(_cuda_refuses_fp8, "swiglu")),
    ),
    _sample_activation_fp8,
)
_LINEAR_RESIDUAL_FP8 = Op(
    "linear_residual_fp8_",
    "linear",
    (
        _torch(linear_residual_fp8_torch_),
        _cublas(linear_residual_fp8_cublas_, _cublas_refuses_residual_fp8),
        _triton(_linear_residual_fp8, _refuses_residual_fp8),
        _cutlass(_linear_residual_fp8_cuda, _cuda_refuses_residual_fp8),
    ),
    _sample_residual_fp8,
)
