"""Linears of other libraries for the op linear: oneDNN's on a CPU, cuBLAS' on a GPU, both through torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_fast.ops import _registry
from dinov2_fast.ops._fp8 import E4M3
from dinov2_fast.ops._linear_epilogue import HALF, finish, refuses_stream
from dinov2_fast.ops.dispatch import Implementation
from dinov2_fast.torch_private import gelu_linear, onednn_linear

ONEDNN_CHAIN = 768  # in_features that are added up at once
# Multiplications from which oneDNN is worth its start, some 10 us dearer than that of F.linear: they break even at
# 2**19 to 2**20 (AMD EPYC with AVX-512, 1 and 2 threads, 1 to 257 rows, 64 to 768 in_features).
ONEDNN_LEAST = 2**19
_HAS_ONEDNN = torch.backends.mkldnn.is_available()  # torch.compile does not trace it


# oneDNN


def linear_onednn(
    x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str = "none", residual: Tensor | None = None, *_: object
) -> Tensor:
    """By oneDNN from `ONEDNN_LEAST` multiplications on, and by torch's linear below that.

    oneDNN adds up a whole row of products one by one, so that of long ones the error is more than twice MKL's, which
    adds up parts of them. Here the parts are products of their own.
    """
    bias = None if bias is None else bias.to(x.dtype)
    if x.numel() * weight.shape[0] < ONEDNN_LEAST:
        return finish(F.linear(x, weight, bias), epilogue, residual)
    if weight.shape[1] <= ONEDNN_CHAIN:
        if epilogue == "gelu":
            return _product(x, weight, bias, "gelu")
        return finish(_product(x, weight, bias), epilogue, residual)
    first, *others = zip(x.split(ONEDNN_CHAIN, dim=-1), weight.split(ONEDNN_CHAIN, dim=1), strict=True)
    z = _product(*first, bias)
    for part in others:
        z += _product(*part, None)
    return finish(z, epilogue, residual)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    return onednn_linear(x.contiguous(), weight.contiguous(), bias, activation)


def _onednn_refuses(x: Tensor, weight: Tensor, *_: object) -> str | None:
    if weight.dtype != x.dtype:
        return f"takes x and weight of one dtype, got {x.dtype} and {weight.dtype}"
    return "does not follow autocast" if torch.is_autocast_enabled(x.device.type) else None


def _onednn_is_absent(device: torch.device) -> str | None:
    if not _HAS_ONEDNN:
        return "needs a torch that is built with oneDNN"
    return "does not export: an exported graph holds standard ops only" if _registry._is_exporting() else None


def onednn() -> Implementation:
    # On a CPU with AVX-512 it took 0.5 (up to 768 in_features) to 0.65 of the time of F.linear, which is MKL's in fp32
    # (AMD EPYC, 257 to 2056 rows, 384 to 4096 features); on one with AVX2 alone 1.2 times it, so there it has to be
    # asked for.
    fast = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return Implementation(
        "onednn",
        linear_onednn,
        _onednn_refuses,
        devices=("cpu",) if fast else ("cpu with AVX-512",),
        dtypes=(torch.float32, torch.bfloat16),
        trains=False,
        unavailable=_onednn_is_absent,
        elsewhere=lambda device: device.type == "cpu",
        why="takes 0.5 to 0.65 of the time of torch's on a CPU with AVX-512",
    )


# cuBLAS


def linear_cublas(
    x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str, residual: Tensor | None = None, *_: object
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if residual is not None:
        residual.view(-1, residual.shape[-1]).addmm_(rows, weight.t())
        return residual
    assert bias is not None
    return gelu_linear(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])


def _cublas_refuses(
    x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str, residual: Tensor | None, *_: object
) -> str | None:
    if residual is None:
        if x.dtype != torch.bfloat16:
            return f"computes the tanh form of GELU, which is near enough for bf16 results only, not for {x.dtype}"
        if bias is None or weight.dtype != x.dtype or bias.dtype != x.dtype:
            return "needs weight and bias in the dtype of x"
        return None
    if bias is not None:
        return "adds no bias: add it with the next norm"
    if weight.dtype != x.dtype or residual.dtype != x.dtype:
        return f"needs one dtype, got residual {residual.dtype}, x {x.dtype} and weight {weight.dtype}"
    return refuses_stream(residual)


def linear_cublas_e4m3(
    x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str, residual: Tensor | None, scale: float,
    weight_scale: Tensor, dtype: torch.dtype | None, out_scale: float,
) -> Tensor:  # fmt: skip
    rows, by_row = x.reshape(-1, x.shape[-1]).contiguous(), F.ScalingType.RowWise
    row_scale = weight_scale.new_full((rows.shape[0], 1), scale)
    z = F.scaled_mm(
        rows, weight.t(), row_scale, by_row, weight_scale[None], by_row, bias=bias, output_dtype=torch.bfloat16
    )
    return finish(z.view(*x.shape[:-1], weight.shape[0]), epilogue, residual, dtype, out_scale)


def _cublas_refuses_e4m3(
    x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str, residual: Tensor | None, scale: float,
    weight_scale: Tensor, dtype: torch.dtype | None, out_scale: float,
) -> str | None:  # fmt: skip
    if residual is not None and residual.dtype == torch.float16:
        return "gives bf16, which is too coarse for an fp16 stream"
    if weight.shape[0] % 16 or weight.shape[1] % 16:
        return f"needs features in multiples of 16, got {weight.shape[1]} in and {weight.shape[0]} out"
    if not weight.is_contiguous():
        return "needs a contiguous weight"
    if dtype == torch.float16 or (bias is not None and bias.dtype != torch.bfloat16):
        return "gives bf16 (or e4m3 made of it) and takes a bf16 bias"
    return _registry.refuses_e4m3(x)


def cublas() -> tuple[Implementation, Implementation]:
    """For the forms that have an epilogue of cuBLAS, and for all of e4m3 operands; torch's plain linear is cuBLAS'."""
    floats = (*HALF, torch.float32)
    return (
        Implementation("cublas", linear_cublas, _cublas_refuses, ("cuda",), floats, ("gelu", "residual"), trains=False),
        Implementation("cublas", linear_cublas_e4m3, _cublas_refuses_e4m3, ("cuda",), (E4M3,), trains=False),
    )
