"""Linears of other libraries, for the op linear: oneDNN's on a CPU and cuBLAS' on a GPU, both called through torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_fast.ops import _backends
from dinov2_fast.ops._backends import HALF
from dinov2_fast.ops._fp8 import E4M3
from dinov2_fast.ops._linear_epilogue import NEEDS_GATES_FIRST, apply_epilogue, refuses_stream
from dinov2_fast.ops.activation import activation
from dinov2_fast.ops.implementation import Implementation, carries_tangent
from dinov2_fast.torch_private import gelu_linear, is_fake_mode_active, is_traced, onednn_linear, onednn_pack

# oneDNN

ONEDNN_MAX_CHAIN = 768  # in_features whose products are added up in one chain
# oneDNN starts some 10 us later than F.linear. The two break even at 2**19 to 2**20 multiplications (AMD EPYC with
# AVX-512, 1 and 2 threads, 1 to 257 rows, 64 to 768 in_features).
ONEDNN_MIN_PRODUCTS = 2**19
_PREPACKED = "_onednn_prepacked"  # the attribute of a weight that holds its parts in oneDNN's blocks


def linear_onednn(
    x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str = "none", residual: Tensor | None = None, *_: object
) -> Tensor:
    """oneDNN's linear from `ONEDNN_MIN_PRODUCTS` multiplications on, and torch's below.

    oneDNN adds up the products of a row one after another. In long rows the error is more than twice that of MKL, which
    adds up partial sums. So long rows are cut into parts, and each part is a product of its own.
    """
    bias = None if bias is None else bias.to(x.dtype)
    if x.numel() * weight.shape[0] < ONEDNN_MIN_PRODUCTS:
        return apply_epilogue(F.linear(x, weight, bias), epilogue, residual)
    first, *others = _parts(weight)
    if not others:
        if epilogue == "gelu":
            return _product(x, first, bias, "gelu")
        return apply_epilogue(_product(x, first, bias), epilogue, residual)
    x_first, *x_others = x.split(ONEDNN_MAX_CHAIN, dim=-1)
    z = _product(x_first, first, bias)
    for x_part, part in zip(x_others, others, strict=True):
        z += _product(x_part, part, None)
    return apply_epilogue(z, epilogue, residual)


def _parts(weight: Tensor) -> Sequence[Tensor]:
    """The weight's columns, `ONEDNN_MAX_CHAIN` at a time; prepacked and cached after :func:`allow_prepacking`."""
    cached: list[Tensor] | None = None if is_traced() else getattr(weight, _PREPACKED, None)
    if cached is None or weight.dtype != torch.float32 or not _backends.HAS_AVX512:
        return weight.split(ONEDNN_MAX_CHAIN, dim=1)
    if not cached:
        with torch.inference_mode(False), torch.no_grad():
            cached[:] = [onednn_pack(part) for part in weight.split(ONEDNN_MAX_CHAIN, dim=1)]
    return cached


def allow_prepacking(weight: Tensor) -> None:
    """Allows :func:`linear_onednn` to cache a copy of `weight` in oneDNN's blocks. Its values must not change."""
    setattr(weight, _PREPACKED, [])


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    weight = weight if weight.is_mkldnn else weight.contiguous()
    return onednn_linear(x.contiguous(), weight, bias, activation)


def _onednn_refuses(
    x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str, residual: Tensor | None, *rest: Any
) -> str | None:
    if weight.dtype != x.dtype:
        return f"takes x and weight of one dtype, got {x.dtype} and {weight.dtype}"
    if epilogue == "swiglu" and rest[-1]:
        return NEEDS_GATES_FIRST
    if carries_tangent((x, weight, bias)):
        return "has no forward-mode derivative"
    return "does not follow autocast" if torch.is_autocast_enabled(x.device.type) else None


# The time of oneDNN as a share of that of F.linear, which is MKL's in fp32 (AMD EPYC of family 26, 2 threads, 257 to
# 2056 rows, 384 to 3072 features; AVX2 by ONEDNN_MAX_CPU_ISA and the like). With AVX2 alone it has to be asked for.
#             plain weight  prepacked
#   AVX-512   0.45 to 0.55  0.42 to 0.46
#   AVX2      0.80 to 0.93  the same    but 1.2 on an AMD EPYC that has no AVX-512
ONEDNN = _backends.onednn(
    linear_onednn,
    _onednn_refuses,
    dtypes=(torch.float32, torch.bfloat16),
    has_backward=False,
    why="takes 0.45 of torch's time on a CPU with AVX-512",
)


# cuBLAS


def linear_cublas(
    x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str, residual: Tensor | None = None, *_: object
) -> Tensor:
    """GELU and the residual addition run inside the product; SwiGLU is the op `activation` after it."""
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
        return NEEDS_GATES_FIRST if rest[-1] else _refuses_dtypes(x, weight, bias)
    if residual is None:
        if x.dtype != torch.bfloat16:
            return f"computes the tanh form of GELU, which is accurate enough for bf16 results only, got {x.dtype}"
        return "needs a bias" if bias is None else _refuses_dtypes(x, weight, bias)
    if bias is not None:
        return "adds no bias: add it in the next norm"
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
    """The product, with fast accumulation and rounded to bf16; then the op `activation` or the residual addition."""
    rows, by_row = x.reshape(-1, x.shape[-1]).contiguous(), F.ScalingType.RowWise
    z = F.scaled_mm(
        rows, weight.t(), _row_scales(len(rows), scale, x.device), by_row, weight_scale[None], by_row, bias=bias,
        output_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip
    z = z.view(*x.shape[:-1], weight.shape[0])
    if epilogue in ("gelu", "swiglu"):
        return activation(z, cast(Any, epilogue), overwrite=True, scale=out_scale if dtype == E4M3 else None)
    return apply_epilogue(z, epilogue, residual)


_ROW_SCALES: dict[tuple[float, torch.device], list[Tensor]] = {}  # never emptied, because CUDA graphs read the tensors


def _row_scales(rows: int, scale: float, device: torch.device) -> Tensor:
    """(rows, 1) fp32 filled with `scale`: a view of a cached tensor, except while tracing or capturing."""
    temporary = is_traced() or is_fake_mode_active()
    cached = [] if temporary else _ROW_SCALES.setdefault((scale, device), [])
    if cached and len(cached[-1]) >= rows:
        return cached[-1][:rows]
    if temporary or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return torch.full((rows, 1), scale, device=device)
    with torch.inference_mode(False):
        scales = torch.full((1 << (rows - 1).bit_length(), 1), scale, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # calls on other streams will read the tensor as well
    cached.append(scales)
    return scales[:rows]


def _cublas_refuses_e4m3(
    x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str, residual: Tensor | None, scale: float,
    weight_scale: Tensor, dtype: torch.dtype | None, out_scale: float, interleaved: bool | None,
) -> str | None:  # fmt: skip
    if epilogue == "swiglu" and interleaved:
        return NEEDS_GATES_FIRST
    if residual is not None and residual.dtype == torch.float16:
        return "returns bf16, which is too coarse for an fp16 stream"
    if weight.shape[0] % 16 or weight.shape[1] % 16:
        return f"needs features in multiples of 16, got {weight.shape[1]} in and {weight.shape[0]} out"
    if not weight.is_contiguous():
        return "needs a contiguous weight"
    if dtype == torch.float16 or (bias is not None and bias.dtype != torch.bfloat16):
        return "returns bf16 (or e4m3 rounded from it) and takes a bf16 bias"
    return _backends.refuses_e4m3(x)


# The first can be forced on a CPU, where the same functions of torch compute the same, with another form of the GELU.
# It has no form "none", because torch's own linear is cuBLAS' already. The second takes e4m3 operands.
CUBLAS = (
    Implementation(
        "cublas", linear_cublas, _cublas_refuses, ("cuda",), (*HALF, torch.float32), ("gelu", "swiglu", "residual"),
        has_backward=False, can_force_on=lambda device: device.type == "cpu",
    ),
    Implementation("cublas", linear_cublas_e4m3, _cublas_refuses_e4m3, ("cuda",), (E4M3,), has_backward=False),
)  # fmt: skip
