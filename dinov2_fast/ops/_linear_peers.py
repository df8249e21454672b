"""Linears of other libraries as implementations of the op linear: oneDNN's on a CPU, cuBLAS' on a GPU, through torch.

The arguments are those of the op's form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_fast.backends import Implementation
from dinov2_fast.ops import _registry_old as _registry
from dinov2_fast.ops._linear_epilogue import refuses_stream, rounded, swiglu

ONEDNN_CHAIN = 768  # in_features that are added up at once
_HAS_ONEDNN = torch.backends.mkldnn.is_available()


# oneDNN


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
    return swiglu(linear_onednn(x, weight, bias))


def linear_residual_onednn_(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    residual.add_(linear_onednn(x, weight, bias))


def onednn_refuses(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if not _HAS_ONEDNN:
        return "needs a torch that is built with oneDNN"
    if x.dtype not in (torch.float32, torch.bfloat16) or weight.dtype != x.dtype:
        return f"takes fp32 and bf16, x and weight alike, got {x.dtype} and {weight.dtype}"
    if torch.is_autocast_enabled(x.device.type):
        return "does not follow autocast"
    if _registry._is_exporting():
        return "does not export: an exported graph holds standard ops only"
    return None


def onednn_refuses_residual(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    return onednn_refuses(x, weight, bias)


def onednn(function: Callable[..., Any], refuses: Callable[..., str | None] = onednn_refuses) -> Implementation:
    # On a CPU with AVX-512 oneDNN took 0.5 (up to 768 in_features) to 0.65 of the time of F.linear, which is MKL's in
    # fp32 (AMD EPYC, 257 to 2056 rows, 384 to 4096 features); on one with AVX2 alone 1.2 times it, so there it has to
    # be asked for.
    fast = torch.backends.cpu.get_cpu_capability() == "AVX512"
    devices = ("cpu",) if fast else ("cpu with AVX-512",)
    return Implementation("onednn", function, refuses, devices, lambda device: device.type == "cpu", trains=False)


# cuBLAS


def linear_gelu_cublas(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """With the GELU in the epilogue of the product, which on CUDA is the tanh form (the erf form on the CPU)."""
    y = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.t(), use_gelu=True)
    return y.view(*x.shape[:-1], weight.shape[0])


def linear_residual_cublas_(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    residual.view(-1, residual.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.t())


def linear_fp8_cublas(*args: Any) -> Tensor:
    *operands, dtype = args
    return _scaled_mm(dtype, *operands)


def linear_gelu_fp8_cublas(*args: Any) -> Tensor:
    *operands, dtype, out_scale = args
    return rounded(F.gelu(_scaled_mm(torch.bfloat16, *operands)), dtype, out_scale)


def linear_swiglu_fp8_cublas(*args: Any) -> Tensor:
    *operands, dtype, out_scale = args
    return rounded(swiglu(_scaled_mm(torch.bfloat16, *operands)), dtype, out_scale)


def linear_residual_fp8_cublas_(residual: Tensor, *args: Any) -> None:
    residual.add_(_scaled_mm(torch.bfloat16, *args))


def _scaled_mm(
    dtype: torch.dtype, x: Tensor, scale: float, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    rows, by_row = x.reshape(-1, x.shape[-1]).contiguous(), F.ScalingType.RowWise
    row_scale = weight_scale.new_full((rows.shape[0], 1), scale)
    y = F.scaled_mm(rows, weight.t(), row_scale, by_row, weight_scale[None], by_row, bias=bias, output_dtype=dtype)
    return y.view(*x.shape[:-1], weight.shape[0])


def cublas_refuses_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if x.dtype != torch.bfloat16:
        return f"computes the tanh form of GELU, which is near enough for bf16 results only, not for {x.dtype}"
    if bias is None or {weight.dtype, bias.dtype} != {x.dtype}:
        return "needs weight and bias in the dtype of x"
    return None


def cublas_refuses_residual(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if bias is not None:
        return "adds no bias: add it with the next norm"
    if {residual.dtype, weight.dtype} != {x.dtype}:
        return f"needs one dtype, got residual {residual.dtype}, x {x.dtype} and weight {weight.dtype}"
    return refuses_stream(residual)


def cublas_refuses_fp8(
    x: Tensor, scale: float, weight: Tensor, weight_scale: Tensor, bias: Tensor | None,
    dtype: torch.dtype = torch.bfloat16, out_scale: float = 1.0,
) -> str | None:  # fmt: skip
    if weight.shape[0] % 16 or weight.shape[1] % 16:
        return f"needs features in multiples of 16, got {weight.shape[1]} in and {weight.shape[0]} out"
    if not weight.is_contiguous():
        return "needs a contiguous weight"
    if dtype == torch.float16 or (bias is not None and bias.dtype != torch.bfloat16):
        return "gives bf16 (or e4m3 made of it) and takes a bf16 bias"
    return _registry.refuses_e4m3(x)


def cublas_refuses_residual_fp8(residual: Tensor, *args: Any) -> str | None:
    if residual.dtype == torch.float16:
        return "gives bf16, which is too coarse for an fp16 stream"
    return cublas_refuses_fp8(*args)


def cublas(function: Callable[..., Any], refuses: Callable[..., str | None]) -> Implementation:
    return Implementation("cublas", function, refuses, ("cuda",), trains=False)
