"""Linear layers with what follows them, for inference only.

    linear(x)               z = x @ weight^T + bias
    linear_gelu(x)          z * Phi(z), the exact (erf) GELU
    linear_swiglu(x)        silu(z[0::2]) * z[1::2], gate and value features in turn (:func:`interleave` orders them)
    linear_residual_(r, x)  r += z, in place

The `_fp8` forms take e4m3 operands: `x` times one scale, `weight` times a scale of each output feature. A scale is what
the e4m3 value is multiplied by to give the real one, as `torch.nn.functional.scaled_mm` has it. Their sums are precise:
where the tensor cores add e4m3 products with fewer bits than fp32, short partial sums are added in fp32.
Sources: GELU: Hendrycks & Gimpel, arXiv:1606.08415; SwiGLU: Shazeer, arXiv:2002.05202; e4m3: Micikevicius et al.,
arXiv:2209.05433.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_fast.backends import Implementation, Op
from dinov2_fast.ops import _linear_cuda
from dinov2_fast.ops import _registry_old as _registry
from dinov2_fast.ops._linear_epilogue import E4M3, HALF, refuses_stream, rounded, swiglu, was_written
from dinov2_fast.ops._linear_peers import (
    cublas,
    cublas_refuses_fp8,
    cublas_refuses_gelu,
    cublas_refuses_residual,
    cublas_refuses_residual_fp8,
    linear_fp8_cublas,
    linear_gelu_cublas,
    linear_gelu_fp8_cublas,
    linear_gelu_onednn,
    linear_onednn,
    linear_residual_cublas_,
    linear_residual_fp8_cublas_,
    linear_residual_onednn_,
    linear_swiglu_fp8_cublas,
    linear_swiglu_onednn,
    onednn,
    onednn_refuses_residual,
)
from dinov2_fast.ops._registry import register


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
    *,
    backend: str | None = None,
) -> None:
    """Adds :func:`linear` to the residual stream, in place.

    Args:
        residual: (..., out_features), which may be wider (fp32) than `x`, and may not overlap the other arguments.
        x, weight, bias: as for :func:`linear`.
        backend: the implementation to use instead of the default.

    Raises:
        As :func:`linear`.
    """
    _check(x, weight, residual, bias=bias)
    _LINEAR_RESIDUAL(residual, x, weight, bias, backend=backend)


def linear_fp8(
    x: Tensor,
    x_scale: float,
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
        x_scale: of all of `x`.
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
    _check(x, weight, bias=bias, weight_scale=weight_scale)
    _check_dtypes(x, weight, dtype, HALF)
    return _LINEAR_FP8(x, x_scale, weight, weight_scale, bias, dtype, backend=backend)


def linear_gelu_fp8(
    x: Tensor,
    x_scale: float,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype = torch.bfloat16,
    out_scale: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """GELU of :func:`linear_fp8`; `dtype` may be e4m3, the values of which are to be multiplied by `out_scale`."""
    _check(x, weight, bias=bias, weight_scale=weight_scale)
    _check_dtypes(x, weight, dtype, (*HALF, E4M3))
    return _LINEAR_GELU_FP8(x, x_scale, weight, weight_scale, bias, dtype, out_scale, backend=backend)


def linear_swiglu_fp8(
    x: Tensor,
    x_scale: float,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype = torch.bfloat16,
    out_scale: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """SwiGLU of :func:`linear_fp8`, rows of the weight as for :func:`linear_swiglu`, `dtype` as for the GELU form."""
    _check(x, weight, swiglu=True, bias=bias, weight_scale=weight_scale)
    _check_dtypes(x, weight, dtype, (*HALF, E4M3))
    return _LINEAR_SWIGLU_FP8(x, x_scale, weight, weight_scale, bias, dtype, out_scale, backend=backend)


def linear_residual_fp8_(
    residual: Tensor,
    x: Tensor,
    x_scale: float,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    *,
    backend: str | None = None,
) -> None:
    """:func:`linear_residual_` of the e4m3 operands of :func:`linear_fp8`."""
    _check(x, weight, residual, bias=bias, weight_scale=weight_scale)
    _check_dtypes(x, weight, residual.dtype, (*HALF, torch.float32))
    _LINEAR_RESIDUAL_FP8(residual, x, x_scale, weight, weight_scale, bias, backend=backend)


def _check(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    swiglu: bool = False,
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


def _check_dtypes(x: Tensor, weight: Tensor, dtype: torch.dtype, allowed: tuple[torch.dtype, ...]) -> None:
    if x.dtype != E4M3 or weight.dtype != E4M3:
        raise ValueError(f"x and weight must be e4m3, got {x.dtype} and {weight.dtype}.")
    if dtype not in allowed:
        raise ValueError(f"the result can be {', '.join(map(str, allowed))}, not {dtype}.")


# The torch references


def linear_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def linear_gelu_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.aten.gelu_(linear_torch(x, weight, bias))  # nobody else holds it: no fresh memory is needed


def linear_swiglu_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return swiglu(linear_torch(x, weight, bias))


def linear_residual_torch_(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    residual.add_(linear_torch(x, weight, bias))


def linear_fp8_torch(
    x: Tensor, scale: float, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return _dequantized_linear(x, scale, weight, weight_scale, bias).to(dtype)


def linear_gelu_fp8_torch(
    x: Tensor, scale: float, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype,
    out_scale: float,
) -> Tensor:  # fmt: skip
    return rounded(F.gelu(_dequantized_linear(x, scale, weight, weight_scale, bias)), dtype, out_scale)


def linear_swiglu_fp8_torch(
    x: Tensor, scale: float, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype,
    out_scale: float,
) -> Tensor:  # fmt: skip
    return rounded(swiglu(_dequantized_linear(x, scale, weight, weight_scale, bias)), dtype, out_scale)


def linear_residual_fp8_torch_(
    residual: Tensor, x: Tensor, scale: float, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> None:
    residual.add_(_dequantized_linear(x, scale, weight, weight_scale, bias))


def _dequantized_linear(x: Tensor, scale: float, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    return linear_torch(x.float() * scale, weight.float() * weight_scale[:, None], bias)


# The Triton kernel


def _launch(epilogue: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from dinov2_fast.kernels.linear import linear_forward

    return linear_forward(x, weight, bias, epilogue)


def _launch_residual_(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, **scales: Any) -> None:
    from dinov2_fast.kernels.linear import linear_residual_forward_

    linear_residual_forward_(residual, x, weight, bias, **scales)
    was_written(residual)


def _launch_fp8(
    epilogue: str, x: Tensor, scale: float, weight: Tensor, weight_scale: Tensor, bias: Tensor | None,
    dtype: torch.dtype, out_scale: float = 1.0,
) -> Tensor:  # fmt: skip
    from dinov2_fast.kernels.linear import linear_forward

    return linear_forward(
        x, weight, bias, epilogue, scale=scale, weight_scale=weight_scale, dtype=dtype, out_scale=out_scale
    )


def _launch_residual_fp8_(
    residual: Tensor, x: Tensor, scale: float, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> None:
    _launch_residual_(residual, x, weight, bias, scale=scale, weight_scale=weight_scale)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_swiglu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2)


def _fake_fp8(x: Tensor, scale: float, weight: Tensor, weight_scale: Any, bias: Any, *rest: Any) -> Any:
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=rest[0])


def _fake_swiglu_fp8(*args: Any) -> Tensor:
    return _fake_fp8(*args)[..., ::2].contiguous()


def _fake_residual(*args: Any) -> None:
    """Writes in place, and so allocates nothing."""


_OPERANDS = "Tensor x, Tensor weight, Tensor? bias"
_OPERANDS_FP8 = "Tensor x, float scale, Tensor weight, Tensor weight_scale, Tensor? bias"
_FORWARD = f"({_OPERANDS}) -> Tensor"
_FORWARD_FP8 = f"({_OPERANDS_FP8}, ScalarType dtype) -> Tensor"
_ACTIVATION_FP8 = f"({_OPERANDS_FP8}, ScalarType dtype, float out_scale) -> Tensor"
_RESIDUAL = f"(Tensor(a!) residual, {_OPERANDS}) -> ()"
_RESIDUAL_FP8 = f"(Tensor(a!) residual, {_OPERANDS_FP8}) -> ()"
_AUTOCAST = torch.get_autocast_dtype

_linear = register(f"linear{_FORWARD}", partial(_launch, "linear"), _fake, autocast=_AUTOCAST)
_linear_gelu = register(f"linear_gelu{_FORWARD}", partial(_launch, "gelu"), _fake, autocast=_AUTOCAST)
_linear_swiglu = register(f"linear_swiglu{_FORWARD}", partial(_launch, "swiglu"), _fake_swiglu, autocast=_AUTOCAST)
_linear_residual = register(f"linear_residual_{_RESIDUAL}", _launch_residual_, _fake_residual)
_linear_fp8 = register(f"linear_fp8{_FORWARD_FP8}", partial(_launch_fp8, "linear"), _fake_fp8)
_linear_gelu_fp8 = register(f"linear_gelu_fp8{_ACTIVATION_FP8}", partial(_launch_fp8, "gelu"), _fake_fp8)
_linear_swiglu_fp8 = register(f"linear_swiglu_fp8{_ACTIVATION_FP8}", partial(_launch_fp8, "swiglu"), _fake_swiglu_fp8)
_linear_residual_fp8 = register(f"linear_residual_fp8_{_RESIDUAL_FP8}", _launch_residual_fp8_, _fake_residual)

_linear_gelu_cuda = register(f"linear_gelu_cuda{_FORWARD}", partial(_linear_cuda.forward, "gelu"), _fake)
_linear_swiglu_cuda = register(f"linear_swiglu_cuda{_FORWARD}", partial(_linear_cuda.forward, "swiglu"), _fake_swiglu)
_linear_residual_cuda = register(f"linear_residual_cuda_{_RESIDUAL}", _linear_cuda.residual_forward_, _fake_residual)
_linear_fp8_cuda = register(f"linear_fp8_cuda{_FORWARD_FP8}", partial(_linear_cuda.forward_fp8, "linear"), _fake_fp8)
_linear_gelu_fp8_cuda = register(
    f"linear_gelu_fp8_cuda{_ACTIVATION_FP8}", partial(_linear_cuda.forward_fp8, "gelu"), _fake_fp8
)
_linear_swiglu_fp8_cuda = register(
    f"linear_swiglu_fp8_cuda{_ACTIVATION_FP8}", partial(_linear_cuda.forward_fp8, "swiglu"), _fake_swiglu_fp8
)
_linear_residual_fp8_cuda = register(
    f"linear_residual_fp8_cuda_{_RESIDUAL_FP8}", _linear_cuda.residual_forward_fp8_, _fake_residual
)


def _refuses(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if x.dtype not in (*HALF, torch.float32):
        return f"takes fp16, bf16 and fp32, got {x.dtype}"
    if weight.dtype != x.dtype:
        return f"takes x and weight of one dtype, got {x.dtype} and {weight.dtype}"
    return None


def _refuses_residual(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    return _refuses(x, weight, bias) or refuses_stream(residual)


def _refuses_fp8(x: Tensor, *rest: Any) -> str | None:
    return _registry.refuses_e4m3(x)


def _refuses_residual_fp8(residual: Tensor, x: Tensor, *rest: Any) -> str | None:
    return _registry.refuses_e4m3(x) or refuses_stream(residual)


def _sample(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.empty(1, 257, 384, device=device, dtype=dtype)
    return x, x.new_empty(1536, 384), x.new_empty(1536)


def _sample_residual(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    x, weight, bias = _sample(device, dtype)
    return x.new_empty(1, 257, 1536), x, weight, bias


def _sample_fp8(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    x, weight, bias = _sample(device, torch.bfloat16)
    return x.to(E4M3), 0.125, weight.to(E4M3), bias.float(), bias, torch.bfloat16


def _sample_activation_fp8(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    return *_sample_fp8(device, dtype)[:-1], E4M3, 0.0625


def _sample_residual_fp8(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    *operands, _ = _sample_fp8(device, dtype)
    return _sample_residual(device, torch.bfloat16)[0], *operands


def _torch(function: Callable[..., Any]) -> Implementation:
    return Implementation("torch", function, trains=False)


def _triton(function: Callable[..., Any], refuses: Callable[..., str | None]) -> Implementation:
    return _registry.triton(function, refuses, trains=False)


def _cutlass(function: Callable[..., Any], refuses: Callable[..., str | None]) -> Implementation:
    return _registry.cuda(function, refuses, trains=False)


# On a GPU torch stands first: none of the others has been measured there, and its plain linear is cuBLAS already.
_LINEAR = Op("linear", "linear", (onednn(linear_onednn), _torch(linear_torch), _triton(_linear, _refuses)), _sample)
_LINEAR_GELU = Op(
    "linear_gelu",
    "linear",
    (
        onednn(linear_gelu_onednn),
        _torch(linear_gelu_torch),
        cublas(linear_gelu_cublas, cublas_refuses_gelu),
        _triton(_linear_gelu, _refuses),
        _cutlass(_linear_gelu_cuda, partial(_linear_cuda.refuses, "gelu")),
    ),
    _sample,
)
_LINEAR_SWIGLU = Op(
    "linear_swiglu",
    "linear",
    (
        onednn(linear_swiglu_onednn),
        _torch(linear_swiglu_torch),
        _triton(_linear_swiglu, _refuses),
        _cutlass(_linear_swiglu_cuda, partial(_linear_cuda.refuses, "swiglu")),
    ),
    _sample,
)
_LINEAR_RESIDUAL = Op(
    "linear_residual_",
    "linear",
    (
        onednn(linear_residual_onednn_, onednn_refuses_residual),
        _torch(linear_residual_torch_),
        cublas(linear_residual_cublas_, cublas_refuses_residual),
        _triton(_linear_residual, _refuses_residual),
        _cutlass(_linear_residual_cuda, _linear_cuda.refuses_residual),
    ),
    _sample_residual,
)
_LINEAR_FP8 = Op(
    "linear_fp8",
    "linear",
    (
        _torch(linear_fp8_torch),
        cublas(linear_fp8_cublas, cublas_refuses_fp8),
        _triton(_linear_fp8, _refuses_fp8),
        _cutlass(_linear_fp8_cuda, partial(_linear_cuda.refuses_fp8, "linear")),
    ),
    _sample_fp8,
)
_LINEAR_GELU_FP8 = Op(
    "linear_gelu_fp8",
    "linear",
    (
        _torch(linear_gelu_fp8_torch),
        cublas(linear_gelu_fp8_cublas, cublas_refuses_fp8),
        _triton(_linear_gelu_fp8, _refuses_fp8),
        _cutlass(_linear_gelu_fp8_cuda, partial(_linear_cuda.refuses_fp8, "gelu")),
    ),
    _sample_activation_fp8,
)
_LINEAR_SWIGLU_FP8 = Op(
    "linear_swiglu_fp8",
    "linear",
    (
        _torch(linear_swiglu_fp8_torch),
        cublas(linear_swiglu_fp8_cublas, cublas_refuses_fp8),
        _triton(_linear_swiglu_fp8, _refuses_fp8),
        _cutlass(_linear_swiglu_fp8_cuda, partial(_linear_cuda.refuses_fp8, "swiglu")),
    ),
    _sample_activation_fp8,
)
_LINEAR_RESIDUAL_FP8 = Op(
    "linear_residual_fp8_",
    "linear",
    (
        _torch(linear_residual_fp8_torch_),
        cublas(linear_residual_fp8_cublas_, cublas_refuses_residual_fp8),
        _triton(_linear_residual_fp8, _refuses_residual_fp8),
        _cutlass(_linear_residual_fp8_cuda, _linear_cuda.refuses_residual_fp8),
    ),
    _sample_residual_fp8,
)
