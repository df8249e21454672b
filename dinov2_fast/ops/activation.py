"""The activations between the two linears of a feed-forward network.

    gelu(x)     = x * Phi(x) = x/2 * (1 + erf(x / sqrt(2)))         the exact form, as DINOv2 was trained
    swiglu(x12) = silu(x1) * x2,  x1 the first half of the last dimension (the gate), x2 the second

Either adds a bias first if it is given one, which a linear left to it. The `_fp8` forms return e4m3 values, divided by
a given scale. Sources: Hendrycks & Gimpel, arXiv:1606.08415; Shazeer, arXiv:2002.05202.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinov2_fast.backends import Implementation, Op
from dinov2_fast.ops import _activation_cuda, _fp8
from dinov2_fast.ops import _registry_old as _registry


def gelu(x: Tensor, bias: Tensor | None = None, overwrite: bool = False, *, backend: str | None = None) -> Tensor:
    """Exact (erf) GELU of `x` (..., hidden), or of `x + bias` with a bias (hidden,), in its dtype.

    With `overwrite` the result may be written over `x`, which saves memory; not while gradients are recorded.
    """
    return _GELU(x, bias, overwrite, backend=backend)


def swiglu(x12: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """SwiGLU of packed halves: (..., 2 * hidden) with the gate first, to (..., hidden), in the dtype of `x12`.

    `bias` (2 * hidden,) is added to `x12`.
    """
    return _SWIGLU(x12, bias, backend=backend)


def gelu_fp8(x: Tensor, bias: Tensor | None, scale: float, *, backend: str | None = None) -> Tensor:
    """`gelu` as e4m3 values, to be multiplied by `scale`. For inference only."""
    return _GELU_FP8(x, bias, scale, backend=backend)


def swiglu_fp8(x12: Tensor, bias: Tensor | None, scale: float, *, backend: str | None = None) -> Tensor:
    """`swiglu` as e4m3 values, to be multiplied by `scale`. For inference only."""
    return _SWIGLU_FP8(x12, bias, scale, backend=backend)


# The torch references


def gelu_torch(x: Tensor, bias: Tensor | None = None, overwrite: bool = False) -> Tensor:
    if bias is not None:
        x = x + bias
    return torch.ops.aten.gelu_(x) if overwrite else F.gelu(x)


def swiglu_torch(x12: Tensor, bias: Tensor | None = None) -> Tensor:
    gate, value = (x12 if bias is None else x12 + bias).chunk(2, dim=-1)
    return F.silu(gate) * value


def gelu_fp8_torch(x: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return _fp8.quantize(gelu_torch(x.float(), bias), scale)


def swiglu_fp8_torch(x12: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return _fp8.quantize(swiglu_torch(x12.float(), bias), scale)


# The kernels


def _triton_forward(x: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    from dinov2_fast.kernels.activation import activation_forward

    return activation_forward(x, bias, **options)


def _triton_backward(dy: Tensor, x: Tensor, bias: Tensor | None, swiglu: bool) -> tuple[Tensor, Tensor]:
    from dinov2_fast.kernels.activation_backward import activation_backward

    dx, dbias = activation_backward(dy, x, bias, swiglu=swiglu)
    return dx, x.new_empty(0) if dbias is None else dbias


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: _Kernels, x: Tensor, bias: Tensor | None, swiglu: bool) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.kernels, ctx.swiglu = kernels, swiglu
        return (kernels.swiglu if swiglu else kernels.gelu)(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        dx, dbias = ctx.kernels.backward(dy, x, bias, ctx.swiglu)
        return None, dx, None if bias is None else dbias.to(bias.dtype), None


def _fake(x: Tensor, bias: Tensor | None, halves: int, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // halves), dtype=dtype or _registry.promoted(x, bias))


def _fake_backward(dy: Tensor, x: Tensor, bias: Tensor | None, swiglu: bool) -> tuple[Tensor, Tensor]:
    if bias is None:
        return x.new_empty(x.shape), x.new_empty(0)
    wide = torch.promote_types(torch.float32, _registry.promoted(dy, x, bias))
    return x.new_empty(x.shape), x.new_empty(bias.shape, dtype=wide)


class _Kernels:
    """The torch ops of one backend, `gelu` and its kin with a suffix, made of its launchers."""

    def __init__(self, suffix: str, launch: Callable[..., Any], launch_backward: Callable[..., Any]) -> None:
        self.gelu = _registry.register(
            f"gelu{suffix}(Tensor x, Tensor? bias) -> Tensor",
            launch,
            lambda x, bias: _fake(x, bias, 1),
            lambda x, bias: _Activation.apply(self, x, bias, False),
        )
        self.swiglu = _registry.register(
            f"swiglu{suffix}(Tensor x12, Tensor? bias) -> Tensor",
            lambda x, bias: launch(x, bias, swiglu=True),
            lambda x, bias: _fake(x, bias, 2),
            lambda x, bias: _Activation.apply(self, x, bias, True),
        )
        self.backward = _registry.register(
            f"activation_backward{suffix}(Tensor dy, Tensor x, Tensor? bias, bool swiglu) -> (Tensor, Tensor)",
            launch_backward,
            _fake_backward,
        )
        self.gelu_fp8 = _registry.register(
            f"gelu_fp8{suffix}(Tensor x, Tensor? bias, float scale) -> Tensor",
            lambda x, bias, scale: launch(x, bias, e4m3=True, scale=scale),
            lambda x, bias, scale: _fake(x, bias, 1, torch.float8_e4m3fn),
        )
        self.swiglu_fp8 = _registry.register(
            f"swiglu_fp8{suffix}(Tensor x12, Tensor? bias, float scale) -> Tensor",
            lambda x, bias, scale: launch(x, bias, swiglu=True, e4m3=True, scale=scale),
            lambda x, bias, scale: _fake(x, bias, 2, torch.float8_e4m3fn),
        )

    # A device's allocator hands out the same memory again: overwriting would gain nothing.
    def gelu_or_overwrite(self, x: Tensor, bias: Tensor | None = None, overwrite: bool = False) -> Tensor:
        return self.gelu(x, bias)

    def swiglu_with_default(self, x12: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.swiglu(x12, bias)


_TRITON = _Kernels("", _triton_forward, _triton_backward)
_CUDA = _Kernels("_cuda", _activation_cuda.forward, _activation_cuda.backward)


def _refuses(x: Tensor, bias: Tensor | None = None, *rest: Any) -> str | None:
    if bias is not None and bias.shape != x.shape[-1:]:
        return f"takes a bias of shape {tuple(x.shape[-1:])}, got {tuple(bias.shape)}"
    return None if x.dtype in _registry.FLOATS else f"takes fp16, bf16, fp32 and fp64, got {x.dtype}"


def _refuses_swiglu(x12: Tensor, *rest: Any) -> str | None:
    return _refuses(x12, *rest) or ("takes halves of one width" if x12.shape[-1] % 2 else None)


def _refuses_fp8(x: Tensor, *rest: Any) -> str | None:
    return _registry.refuses_e4m3(x) or _refuses(x, *rest)


def _refuses_swiglu_fp8(x12: Tensor, *rest: Any) -> str | None:
    return _registry.refuses_e4m3(x12) or _refuses_swiglu(x12, *rest)


def _cuda_refuses(x: Tensor, bias: Tensor | None = None, *rest: Any) -> str | None:
    return _refuses(x, bias) or _activation_cuda.refuses(x, bias, swiglu=False)


def _cuda_refuses_swiglu(x12: Tensor, bias: Tensor | None = None, *rest: Any) -> str | None:
    return _refuses_swiglu(x12, bias) or _activation_cuda.refuses(x12, bias, swiglu=True)


def _cuda_refuses_fp8(x: Tensor, *rest: Any) -> str | None:
    return _registry.refuses_e4m3(x) or _cuda_refuses(x, *rest)


def _cuda_refuses_swiglu_fp8(x12: Tensor, *rest: Any) -> str | None:
    return _registry.refuses_e4m3(x12) or _cuda_refuses_swiglu(x12, *rest)


def _sample(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    return torch.empty(1, 257, 1536, device=device, dtype=dtype), None


def _sample_fp8(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    return *_sample(device, dtype), 0.0625


# torch stands first, as no kernel has run on a GPU yet.
_GELU = Op(
    "gelu",
    "activation",
    (
        Implementation("torch", gelu_torch),
        _registry.triton(_TRITON.gelu_or_overwrite, _refuses),
        _registry.cuda(_CUDA.gelu_or_overwrite, _cuda_refuses),
    ),
    _sample,
)
_SWIGLU = Op(
    "swiglu",
    "activation",
    (
        Implementation("torch", swiglu_torch),
        _registry.triton(_TRITON.swiglu_with_default, _refuses_swiglu),
        _registry.cuda(_CUDA.swiglu_with_default, _cuda_refuses_swiglu),
    ),
    _sample,
)
_GELU_FP8 = Op(
    "gelu_fp8",
    "activation",
    (
        Implementation("torch", gelu_fp8_torch, trains=False),
        _registry.triton(_TRITON.gelu_fp8, _refuses_fp8, trains=False),
        _registry.cuda(_CUDA.gelu_fp8, _cuda_refuses_fp8, trains=False),
    ),
    _sample_fp8,
)
_SWIGLU_FP8 = Op(
    "swiglu_fp8",
    "activation",
    (
        Implementation("torch", swiglu_fp8_torch, trains=False),
        _registry.triton(_TRITON.swiglu_fp8, _refuses_swiglu_fp8, trains=False),
        _registry.cuda(_CUDA.swiglu_fp8, _cuda_refuses_swiglu_fp8, trains=False),
    ),
    _sample_fp8,
)
