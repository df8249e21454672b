"""The activations between the two linears of a feed-forward network.

    gelu(x)     = x * Phi(x) = x/2 * (1 + erf(x / sqrt(2)))         the exact form, as DINOv2 was trained
    swiglu(x12) = silu(x1) * x2,  x1 the first half of the last dimension (the gate), x2 the second

The `_fp8` forms return e4m3 values, divided by a given scale. Sources: Hendrycks & Gimpel, arXiv:1606.08415; Shazeer,
arXiv:2002.05202.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinov2_fast.backends import Op
from dinov2_fast.ops import _fp8, _registry


def gelu(x: Tensor, overwrite: bool = False, *, backend: str | None = None) -> Tensor:
    """Exact (erf) GELU of `x` (..., hidden), in its dtype.

    With `overwrite` the result may be written over `x`, which saves memory; not while gradients are recorded.
    """
    return _GELU(x, overwrite, backend=backend)


def swiglu(x12: Tensor, *, backend: str | None = None) -> Tensor:
    """SwiGLU of packed halves: (..., 2 * hidden) with the gate first, to (..., hidden), in the dtype of `x12`."""
    return _SWIGLU(x12, backend=backend)


def gelu_fp8(x: Tensor, scale: float, *, backend: str | None = None) -> Tensor:
    """`gelu` as e4m3 values, to be multiplied by `scale`. For inference only."""
    return _GELU_FP8(x, scale, backend=backend)


def swiglu_fp8(x12: Tensor, scale: float, *, backend: str | None = None) -> Tensor:
    """`swiglu` as e4m3 values, to be multiplied by `scale`. For inference only."""
    return _SWIGLU_FP8(x12, scale, backend=backend)


# The torch references


def gelu_torch(x: Tensor, overwrite: bool = False) -> Tensor:
    return torch.ops.aten.gelu_(x) if overwrite else F.gelu(x)


def swiglu_torch(x12: Tensor) -> Tensor:
    gate, value = x12.chunk(2, dim=-1)
    return F.silu(gate) * value


def gelu_fp8_torch(x: Tensor, scale: float) -> Tensor:
    return _fp8.quantize(gelu_torch(x.float()), scale)


def swiglu_fp8_torch(x12: Tensor, scale: float) -> Tensor:
    return _fp8.quantize(swiglu_torch(x12.float()), scale)


# The kernels


def _launch(x: Tensor, **options: Any) -> Tensor:
    from dinov2_fast.kernels.activation import activation_forward

    return activation_forward(x, **options)


def _launch_backward(dy: Tensor, x: Tensor, swiglu: bool) -> Tensor:
    from dinov2_fast.kernels.activation_backward import activation_backward

    return activation_backward(dy, x, swiglu=swiglu)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, swiglu: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.swiglu = swiglu
        return (_swiglu if swiglu else _gelu)(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _activation_backward(dy, *ctx.saved_tensors, ctx.swiglu), None


def _fake(x: Tensor, halves: int, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // halves), dtype=dtype)


_gelu = _registry.register(
    "gelu(Tensor x) -> Tensor", _launch, lambda x: _fake(x, 1), lambda x: _Activation.apply(x, False)
)
_swiglu = _registry.register(
    "swiglu(Tensor x12) -> Tensor",
    lambda x12: _launch(x12, swiglu=True),
    lambda x12: _fake(x12, 2),
    lambda x12: _Activation.apply(x12, True),
)
_activation_backward = _registry.register(
    "activation_backward(Tensor dy, Tensor x, bool swiglu) -> Tensor",
    _launch_backward,
    lambda dy, x, swiglu: x.new_empty(x.shape),
)
_gelu_fp8 = _registry.register(
    "gelu_fp8(Tensor x, float scale) -> Tensor",
    lambda x, scale: _launch(x, e4m3=True, scale=scale),
    lambda x, scale: _fake(x, 1, torch.float8_e4m3fn),
)
_swiglu_fp8 = _registry.register(
    "swiglu_fp8(Tensor x12, float scale) -> Tensor",
    lambda x12, scale: _launch(x12, swiglu=True, e4m3=True, scale=scale),
    lambda x12, scale: _fake(x12, 2, torch.float8_e4m3fn),
)


# A device's allocator hands out the same memory again: overwriting would gain nothing.
def _gelu_or_overwrite(x: Tensor, overwrite: bool = False) -> Tensor:
    return _gelu(x)


def _refuses(x: Tensor, *rest: Any) -> str | None:
    return None if x.dtype in _registry.FLOATS else f"takes fp16, bf16, fp32 and fp64, got {x.dtype}"


def _refuses_swiglu(x12: Tensor, *rest: Any) -> str | None:
    return _refuses(x12) or ("takes halves of one width" if x12.shape[-1] % 2 else None)


def _refuses_fp8(x: Tensor, *rest: Any) -> str | None:
    return _registry.refuses_e4m3(x) or _refuses(x)


def _refuses_swiglu_fp8(x12: Tensor, *rest: Any) -> str | None:
    return _registry.refuses_e4m3(x12) or _refuses_swiglu(x12)


def _sample(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    return (torch.empty(1, 257, 1536, device=device, dtype=dtype),)


def _sample_fp8(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    return *_sample(device, dtype), 0.0625


_GELU = Op("gelu", "activation", _registry.torch_and_triton(gelu_torch, _gelu_or_overwrite, _refuses), _sample)
_SWIGLU = Op("swiglu", "activation", _registry.torch_and_triton(swiglu_torch, _swiglu, _refuses_swiglu), _sample)
_GELU_FP8 = Op(
    "gelu_fp8",
    "activation",
    _registry.torch_and_triton(gelu_fp8_torch, _gelu_fp8, _refuses_fp8, trains=False),
    _sample_fp8,
)
_SWIGLU_FP8 = Op(
    "swiglu_fp8",
    "activation",
    _registry.torch_and_triton(swiglu_fp8_torch, _swiglu_fp8, _refuses_swiglu_fp8, trains=False),
    _sample_fp8,
)
