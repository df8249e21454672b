"""The activations between the two linears of a feed-forward network, and the quantisation to e4m3.

    gelu(x)     = x * Phi(x) = x/2 * (1 + erf(x / sqrt(2)))         the exact form, with which DINOv2 was trained
    swiglu(x12) = silu(x1) * x2        x1 is the first half of the last dimension (the gate), x2 the second half
    identity(x) = x                    to quantise x to e4m3

With a scale, the result is e4m3: the activation divided by the scale, saturated at ±448 and rounded.

Sources: Hendrycks & Gimpel, arXiv:1606.08415; Shazeer, arXiv:2002.05202.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.ops import _backends, _fp8, _registry
from dinov2_fast.ops.dispatch import Op, refuse_gradient
from dinov2_fast.ops.implementation import Implementation


def activation(
    x: Tensor,
    kind: Literal["gelu", "swiglu", "identity"],
    *,
    overwrite: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """GELU or SwiGLU, or the quantisation to e4m3 alone.

    Args:
        x: (..., hidden), or for SwiGLU (..., 2 * hidden) with the gate first. Any floating dtype but e4m3.
        kind: "gelu", "swiglu", or "identity", which needs `scale`.
        overwrite: allow the result to be written over `x`, which saves memory. Not while gradients are recorded.
        scale: return e4m3 values; the real value is the e4m3 value times `scale`. For inference only.
        backend: the backend to use instead of the default.

    Returns:
        (..., hidden) in the dtype of `x`, or in e4m3.

    Raises:
        BackendError: `backend` cannot take `x`, or gradients are recorded with `scale`.
        ValueError: an unknown `kind`, or "identity" without `scale`.
    """
    if kind == "identity" and scale is None:
        raise InvalidValueError(
            'The activation "identity" changes nothing without a scale: give it the scale of the e4m3 values.'
        )
    if scale is not None:
        refuse_gradient("activation into e4m3", (x,))
    args = x, kind, overwrite, scale
    return ACTIVATION.choose(kind, args, backend).function(*args)


def into_e4m3(x: Tensor, scale: float | None) -> Tensor:
    """Quantises the result `x` of an implementation that has no e4m3 output of its own. Without a `scale`, `x`."""
    return x if scale is None else activation(x, "identity", scale=scale)


def activation_torch(x: Tensor, kind: str, overwrite: bool, scale: float | None) -> Tensor:
    if scale is not None:
        return _fp8.quantize(activation_torch(x.float(), kind, False, None), scale)
    if kind == "identity":
        return x
    if kind == "gelu":
        return torch.ops.aten.gelu_(x) if overwrite else F.gelu(x)
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


# The kernel


def activation_triton(x: Tensor, kind: str, overwrite: bool, scale: float | None) -> Tensor:
    """It ignores `overwrite`, because the outputs of a registered op are new tensors."""
    return _forward(x, kind, scale)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str, scale: None) -> Tensor:
        assert scale is None, "e4m3 is for inference only"
        ctx.save_for_backward(x)
        ctx.kind = kind
        return _forward(x, kind, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(dy, *ctx.saved_tensors, ctx.kind), None, None


def _fake(x: Tensor, kind: str, scale: float | None) -> Tensor:
    hidden = x.shape[-1] // 2 if kind == "swiglu" else x.shape[-1]
    return x.new_empty((*x.shape[:-1], hidden), dtype=x.dtype if scale is None else _fp8.E4M3)


_forward = _registry.register(
    "activation(Tensor x, str kind, float? scale) -> Tensor",
    _registry.launcher("activation", "activation_forward"),
    _fake,
    _Activation.apply,
)
_backward = _registry.register(
    "activation_backward(Tensor dy, Tensor x, str kind) -> Tensor",
    _registry.launcher("activation_backward", "activation_backward"),
    lambda dy, x, kind: x.new_empty(x.shape),
)


def _refuses(x: Tensor, kind: str, overwrite: bool, scale: float | None) -> str | None:
    if kind == "swiglu" and x.shape[-1] % 2:
        return f"takes two halves of equal size, got {x.shape[-1]} columns"
    return None if scale is None else _backends.refuses_e4m3(x)


def _sample(kind: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...] | None:
    e4m3 = dtype == _fp8.E4M3
    if kind == "identity" and not e4m3:
        return None
    x = torch.empty(1, 257, 1536, device=device, dtype=torch.bfloat16 if e4m3 else dtype)
    return x, kind, False, 0.0625 if e4m3 else None


ACTIVATION = Op(
    "activation",
    (
        Implementation("torch", activation_torch, why=_backends.UNMEASURED),
        _backends.triton(activation_triton, _refuses, dtypes=_backends.FLOATS),
    ),
    {kind: partial(_sample, kind) for kind in ("gelu", "swiglu", "identity")},
)
