"""Linears of other libraries for the op linear: oneDNN's on a CPU, cuBLAS' on a GPU, both through torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_fast.ops import _backends
from dinov2_fast.ops._fp8 import E4M3
from dinov2_fast.ops._linear_epilogue import HALF, IN_TURN, finish, refuses_stream
from dinov2_fast.ops.activation import activation
from dinov2_fast.ops.implementation import Implementation, carries_tangent
from dinov2_fast.torch_private import gelu_linear, is_fake_mode_active, is_traced, onednn_linear, onednn_pack

ONEDNN_CHAIN = 768  # in_features that are added up at once
# Multiplications from which oneDNN is worth its start, some 10 us dearer than that of F.linear: they break even at
# 2**19 to 2**20 (AMD EPYC with AVX-512, 1 and 2 threads, 1 to 257 rows, 64 to 768 in_features).
ONEDNN_LEAST = 2**19
_PACKED = "_onednn_packed"  # the attribute of a weight with its packed parts
# torch.compile traces neither.
_HAS_ONEDNN = torch.backends.mkldnn.is_available()
HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


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
    first, *others = _parts(weight)
    if not others:
        if epilogue == "gelu":
            return _product(x, first, bias, "gelu")
        return finish(_product(x, first, bias), epilogue, residual)
    x_first, *x_others = x.split(ONEDNN_CHAIN, dim=-1)
    z = _product(x_first, first, bias)
    for x_part, part in zip(x_others, others, strict=True):
        z += _product(x_part, part, None)
    return finish(z, epilogue, residual)


def _parts(weight: Tensor) -> Sequence[Tensor]:
    """The weight's columns, `ONEDNN_CHAIN` at a time; packed, and kept with it, if :func:`let_pack` was told of it."""
    kept: list[Tensor] | None = None if is_traced() else getattr(weight, _PACKED, None)
    if kept is None or weight.dtype != torch.float32 or not HAS_AVX512:
        return weight.split(ONEDNN_CHAIN, dim=1)
    if not kept:
        with torch.inference_mode(False), torch.no_grad():
            kept[:] = [onednn_pack(part) for part in weight.split(ONEDNN_CHAIN, dim=1)]
    return kept


def let_pack(weight: Tensor) -> None:
    """Lets :func:`linear_onednn` keep a copy of `weight` in oneDNN's blocks, since its values never change."""
    setattr(weight, _PACKED, [])


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    weight = weight if weight.is_mkldnn else weight.contiguous()
    return onednn_linear(x.contiguous(), weight, bias, activation)


def _onednn_refuses(
    x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str, residual: Tensor | None, *rest: Any
) -> str | None:
    if weight.dtype != x.dtype:
        return f"takes x and weight of one dtype, got {x.dtype} and {weight.dtype}"
    if epilogue == "swiglu" and rest[-1]:
        return IN_TURN
    if carries_tangent((x, weight, bias)):
        return "has no derivative of forward mode"
    return "does not follow autocast" if torch.is_autocast_enabled(x.device.type) else None


def onednn_is_absent(device: torch.device) -> str | None:
    if not _HAS_ONEDNN:
        return "needs a torch that is built with oneDNN"
    return "does not export: an exported graph holds standard ops only" if _backends._is_exporting() else None


def onednn() -> Implementation:
    # Its time as a share of that of F.linear, which is MKL's in fp32 (AMD EPYC of family 26, 2 threads, 257 to 2056
    # rows, 384 to 3072 features; AVX2 by ONEDNN_MAX_CPU_ISA and its like). With AVX2 alone it has to be asked for.
    #             as it is      packed
    #   AVX-512   0.45 to 0.55  0.42 to 0.46
    #   AVX2      0.80 to 0.93  the same    but 1.2 on an AMD EPYC that has no AVX-512
    return Implementation(
        "onednn",
        linear_onednn,
        _onednn_refuses,
        devices=("cpu",) if HAS_AVX512 else ("cpu with AVX-512",),
        dtypes=(torch.float32, torch.bfloat16),
        trains=False,
        unavailable=onednn_is_absent,
        elsewhere=lambda device: device.type == "cpu",
        why="takes 0.45 of the time of torch's on a CPU with AVX-512",
    )


# cuBLAS


def linear_cublas(
    x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str, residual: Tensor | None = None, *_: object
) -> Tensor:
    """The residual form without a bias reads and writes the stream inside the product. SwiGLU is the op activation."""
    rows = x.reshape(-1, x.shape[-1])
    if residual is not None:
        residual.view(-1, residual.shape[-1]).addmm_(rows, weight.t())
        return residual
    if epilogue == "swiglu":
        return activation(F.linear(x, weight, bias), "swiglu")
    assert bias is not None
    return gelu_linear(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])


def _cublas_refuses(
    x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str, residual: Tensor | None, *rest: Any
) -> str | None:
    if epilogue == "swiglu":
        return IN_TURN if rest[-1] else _refuses_dtypes(x, weight, bias)
    if residual is None:
        if x.dtype != torch.bfloat16:
            return f"computes the tanh form of GELU, which is near enough for bf16 results only, not for {x.dtype}"
        return "needs a bias" if bias is None else _refuses_dtypes(x, weight, bias)
    if bias is not None:
        return "adds no bias: add it with the next norm"
    return _refuses_dtypes(x, weight, residual) or refuses_stream(residual)


def _refuses_dtypes(x: Tensor, *others: Tensor | None) -> str | None:
    dtypes = [other.dtype for other in others if other is not None]
    if any(dtype != x.dtype for dtype in dtypes):
        return f"takes tensors of one dtype, got {', '.join(map(str, (x.dtype, *dtypes)))}"
    return None


def linear_cublas_e4m3(
    x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str, residual: Tensor | None, scale: float,
    weight_scale: Tensor, dtype: torch.dtype | None, out_scale: float, interleaved: bool,
) -> Tensor:  # fmt: skip
    """The product in bf16 with fast accumulation; behind it the op activation, or the addition to the stream."""
    rows, by_row = x.reshape(-1, x.shape[-1]).contiguous(), F.ScalingType.RowWise
    z = F.scaled_mm(
        rows, weight.t(), _scale_of_rows(len(rows), scale, x.device), by_row, weight_scale[None], by_row, bias=bias,
        output_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip
    z = z.view(*x.shape[:-1], weight.shape[0])
    if epilogue in ("gelu", "swiglu"):
        return activation(z, cast(Any, epilogue), overwrite=True, scale=out_scale if dtype == E4M3 else None)
    return finish(z, epilogue, residual)


_SCALES: dict[tuple[float, torch.device], list[Tensor]] = {}  # none is ever dropped: CUDA graphs read them


def _scale_of_rows(rows: int, scale: float, device: torch.device) -> Tensor:
    """(rows, 1) fp32, `scale` in every row: a part of what is kept for this scale and device."""
    passing = is_traced() or is_fake_mode_active()
    kept = [] if passing else _SCALES.setdefault((scale, device), [])
    if kept and len(kept[-1]) >= rows:
        return kept[-1][:rows]
    if passing or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return torch.full((rows, 1), scale, device=device)
    with torch.inference_mode(False):
        made = torch.full((1 << (rows - 1).bit_length(), 1), scale, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # calls on other streams will read it, too
    kept.append(made)
    return made[:rows]


def _cublas_refuses_e4m3(
    x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str, residual: Tensor | None, scale: float,
    weight_scale: Tensor, dtype: torch.dtype | None, out_scale: float, interleaved: bool | None,
) -> str | None:  # fmt: skip
    if epilogue == "swiglu" and interleaved:
        return IN_TURN
    if residual is not None and residual.dtype == torch.float16:
        return "gives bf16, which is too coarse for an fp16 stream"
    if weight.shape[0] % 16 or weight.shape[1] % 16:
        return f"needs features in multiples of 16, got {weight.shape[1]} in and {weight.shape[0]} out"
    if not weight.is_contiguous():
        return "needs a contiguous weight"
    if dtype == torch.float16 or (bias is not None and bias.dtype != torch.bfloat16):
        return "gives bf16 (or e4m3 made of it) and takes a bf16 bias"
    return _backends.refuses_e4m3(x)


def cublas() -> tuple[Implementation, Implementation]:
    """One for fp16, bf16 and fp32, which leaves "none" to torch's linear, itself cuBLAS'; and one for e4m3 operands.

    The first can be forced on a CPU. The same functions of torch compute the same there, but for the form of the GELU.
    """
    floats, forms = (*HALF, torch.float32), ("gelu", "swiglu", "residual")
    return (
        Implementation(
            "cublas", linear_cublas, _cublas_refuses, ("cuda",), floats, forms, trains=False,
            elsewhere=lambda device: device.type == "cpu",
        ),
        Implementation("cublas", linear_cublas_e4m3, _cublas_refuses_e4m3, ("cuda",), (E4M3,), trains=False),
    )  # fmt: skip
