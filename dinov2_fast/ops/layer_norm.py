"""Layer normalisation, alone and fused with the residual addition before it.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias             over the last dimension
    with a branch:         x' = x + drop_scale * gamma * branch        returns x' and the norm of x'
    with a deferred bias:  the norm of x + deferred_bias               the sum is not stored

`var` is the biased variance, `gamma` is LayerScale, and `drop_scale` is the per-image factor of stochastic depth. The
deferred bias is for inference: the engine's in-place matrix products leave their biases out of the stream, and the
norms that read the stream add them.
Sources: Ba et al., arXiv:1607.06450; LayerScale: Touvron et al., arXiv:2103.17239.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.ops import _backends, _fp8, _registry
from dinov2_fast.ops.dispatch import Op, refuse_gradient
from dinov2_fast.ops.implementation import Implementation, records_gradient
from dinov2_fast.ops.residual import add_residual_torch

MAX_HIDDEN = 8192  # a program of the kernel keeps a row in registers


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    branch: Tensor | None = None,
    gamma: Tensor | None = None,
    drop_scale: Tensor | None = None,
    deferred_bias: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Any:
    """Normalises the last dimension of `x`, or of its sum with a branch.

    Args:
        x: (..., hidden), floating point; with a branch (batch, seq_len, hidden).
        weight, bias: (hidden,).
        eps: added to the variance.
        branch: (batch, seq_len, hidden), added to `x` before the norm.
        gamma: LayerScale of the branch, (hidden,), or None for 1.
        drop_scale: (batch,), the factor of each image's branch (stochastic depth), or None for 1.
        deferred_bias: (hidden,), added to `x` before the norm, or None for 0. For inference only, without a branch.
        scale: return e4m3 values; the real value is the e4m3 value times `scale`. For inference only, without a branch.
        backend: the backend to use instead of the default.

    Returns:
        The norm, in the shape and dtype of `x` (fp32 under autocast on a GPU, except with `deferred_bias`), or in e4m3.
        With a branch: the sum, in the promoted dtype of its terms, and its norm.

    Raises:
        BackendError: `backend` cannot take these tensors, or gradients are recorded with `scale` or `deferred_bias`.
        ValueError: `scale` or `deferred_bias` is given with a branch, or `gamma` or `drop_scale` without one.
    """
    if branch is None and not (gamma is drop_scale is None):
        raise InvalidValueError("layer_norm takes gamma and drop_scale with a branch only: give it a branch.")
    if scale is not None or deferred_bias is not None:
        if branch is not None:
            raise InvalidValueError("layer_norm takes no scale or deferred_bias with a branch: add the branch first.")
        refuse_gradient("layer_norm with scale or deferred_bias", (x, weight, bias, deferred_bias))
    args = x, weight, bias, eps, branch, gamma, drop_scale, deferred_bias, scale
    return LAYER_NORM.choose("plain" if branch is None else "add", args, backend).function(*args)


def layer_norm_torch(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, branch: Tensor | None, gamma: Tensor | None,
    drop_scale: Tensor | None, deferred_bias: Tensor | None, scale: float | None,
) -> Any:  # fmt: skip
    if branch is not None:
        x = add_residual_torch(x, branch, gamma, drop_scale)
        return x, F.layer_norm(x, weight.shape, weight, bias, eps)
    if scale is None and deferred_bias is None:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide) if deferred_bias is None else x.to(wide) + deferred_bias
    y = F.layer_norm(total, weight.shape, weight.to(wide), bias.to(wide), eps)
    return y.to(x.dtype) if scale is None else _fp8.quantize(y, scale)


# The kernel


def layer_norm_triton(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, branch: Tensor | None, gamma: Tensor | None,
    drop_scale: Tensor | None, deferred_bias: Tensor | None, scale: float | None,
) -> Any:  # fmt: skip
    if branch is not None:
        return _add_layer_norm(x, weight, bias, eps, branch, gamma, drop_scale)
    if scale is None and deferred_bias is None:
        return _layer_norm(x, weight, bias, eps)
    return _layer_norm_inference(x, weight, bias, eps, deferred_bias, scale)


_launch = _registry.launcher("layer_norm", "layer_norm_forward")
_launch_backward = _registry.launcher("layer_norm_backward", "layer_norm_backward")


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, rstd = _forward(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.bias_dtype = bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        dx, sums = _backward(dy, x, weight, mean, rstd)
        return dx, sums[0].to(weight.dtype), sums[1].to(ctx.bias_dtype), None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, *addends: Any) -> tuple[Tensor, Tensor]:
        total, y, mean, rstd = _add_forward(x, weight, bias, eps, *addends)
        ctx.save_for_backward(total, weight, mean, rstd, *addends)
        ctx.dtypes = x.dtype, bias.dtype
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: with gradient checkpointing, each read computes them again
        total, weight, mean, rstd, branch, gamma, drop_scale = saved
        dtype, bias_dtype = ctx.dtypes
        dx, dbranch, sums = _add_backward(dy, total, weight, mean, rstd, dtotal, branch, gamma, drop_scale, dtype)
        dweight, dbias, dgamma = sums.unbind(0)
        dgamma = None if gamma is None else dgamma.to(gamma.dtype)
        return dx, dweight.to(weight.dtype), dbias.to(bias_dtype), None, dbranch, dgamma, None


def _like(x: Tensor, *others: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """A new contiguous tensor in the shape of `x` and in `dtype`, by default the promoted dtype of all."""
    return x.new_empty(x.shape, dtype=dtype or _backends.promoted(x, *others))


def _wide(x: Tensor, shape: tuple[int, ...], *others: Tensor | None) -> Tensor:
    return x.new_empty(shape, dtype=torch.promote_types(torch.float32, _backends.promoted(x, *others)))


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *addends: Tensor | None) -> tuple[Tensor, ...]:
    """The sum, the norm, the mean and rstd, as :func:`_launch` returns them."""
    mean, rstd = (_wide(x, x.shape[:-1], weight, *addends) for _ in range(2))
    return _like(x, *addends), _like(x, *addends), mean, rstd


def _fake_add_backward(
    dy: Tensor, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, dtotal: Tensor, branch: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *factors, dtype = rest
    return _like(total, dtype=dtype), _like(branch), _wide(total, (3, total.shape[-1]), weight, branch, *factors)


_PLAIN = "(Tensor x, Tensor weight, Tensor bias, float eps"
_ADD = f"{_PLAIN}, Tensor branch, Tensor? gamma, Tensor? drop_scale)"
_BACKWARD = "(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd"

_layer_norm = _registry.register(
    f"layer_norm{_PLAIN}) -> Tensor",
    lambda *args: _launch(*args)[1],
    lambda x, weight, bias, eps: _like(x),
    _LayerNorm.apply,
    autocast=lambda device: torch.float32 if device == "cuda" else None,
)
_forward = _registry.register(
    f"layer_norm_forward{_PLAIN}) -> (Tensor, Tensor, Tensor)",
    lambda *args: _launch(*args, statistics=True)[1:],
    lambda *args: _fake_forward(*args)[1:],
)
_backward = _registry.register(
    f"layer_norm_backward{_BACKWARD}) -> (Tensor, Tensor)",
    lambda *args: _launch_backward(*args)[::2],
    lambda dy, x, weight, mean, rstd: (_like(x), _wide(x, (2, x.shape[-1]), weight)),
)
_layer_norm_inference = _registry.register(
    f"layer_norm_inference{_PLAIN}, Tensor? deferred_bias, float? scale) -> Tensor",
    lambda x, weight, bias, eps, deferred, scale: _launch(x, weight, bias, eps, deferred_bias=deferred, scale=scale)[1],
    lambda x, weight, bias, eps, deferred, scale: _like(x, dtype=x.dtype if scale is None else _fp8.E4M3),
)
_add_layer_norm = _registry.register(
    f"add_layer_norm{_ADD} -> (Tensor, Tensor)",
    lambda *args: _launch(*args)[:2],
    lambda *args: _fake_forward(*args)[:2],
    _AddLayerNorm.apply,
)
_add_forward = _registry.register(
    f"add_layer_norm_forward{_ADD} -> (Tensor, Tensor, Tensor, Tensor)",
    lambda *args: _launch(*args, statistics=True),
    _fake_forward,
)
_add_backward = _registry.register(
    f"add_layer_norm_backward{_BACKWARD}, Tensor dtotal, Tensor branch, Tensor? gamma, Tensor? drop_scale,"
    " ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_add_backward,
)


def _refuses(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, branch: Tensor | None, gamma: Tensor | None,
    drop_scale: Tensor | None, deferred_bias: Tensor | None, scale: float | None,
) -> str | None:  # fmt: skip
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        return f"takes weight and bias of shape {tuple(x.shape[-1:])}, got {tuple(weight.shape)}, {tuple(bias.shape)}"
    if x.shape[-1] > MAX_HIDDEN:
        return f"takes a hidden size up to {MAX_HIDDEN}, got {x.shape[-1]}"
    if branch is None:
        if deferred_bias is not None and deferred_bias.shape != x.shape[-1:]:
            return f"takes deferred_bias of shape {tuple(x.shape[-1:])}, got {tuple(deferred_bias.shape)}"
        return None if scale is None else _backends.refuses_e4m3(x)
    if records_gradient([drop_scale]):
        return "has no gradient for drop_scale"
    autocast = x.is_cuda and torch.is_autocast_enabled("cuda")
    if autocast and _backends.promoted(x, branch, gamma, drop_scale) in _backends.HALF:
        return "returns the norm in the dtype of the sum, but autocast asks for fp32"
    return _backends.refuses_to_broadcast(x, branch, drop_scale, gamma=gamma)


def _sample(form: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...] | None:
    e4m3 = dtype == _fp8.E4M3
    if e4m3 and form == "add":
        return None
    x = torch.empty(1, 257, 384, device=device, dtype=torch.bfloat16 if e4m3 else dtype)
    vector, scale = x[0, 0], 0.125 if e4m3 else None
    branch, gamma = (x, vector) if form == "add" else (None, None)
    return x, vector, vector, 1e-6, branch, gamma, None, None, scale


LAYER_NORM = Op(
    "layer_norm",
    (
        Implementation("torch", layer_norm_torch, why=_backends.UNMEASURED),
        _backends.triton(layer_norm_triton, _refuses, dtypes=_backends.FLOATS),
    ),
    {"plain": partial(_sample, "plain"), "add": partial(_sample, "add")},
)
