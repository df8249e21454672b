"""Layer normalisation, alone and fused with the residual addition before it.

    layer_norm(x)[i] = (x[i] - mean(x)) / sqrt(var(x) + eps) * weight[i] + bias[i]      over the last dimension
    add_layer_norm:    r' = r + drop_scale * gamma * branch + deferred_bias,    y = layer_norm(r'),    returns (r', y)

`var` is the biased variance. `gamma` is LayerScale, `drop_scale` the per-picture factor of stochastic depth,
`deferred_bias` what earlier linears left out of the stream (an inference engine adds the biases of in-place matrix
products here). `layer_norm_fp8` returns y in e4m3, divided by a given scale. Source: Ba et al., arXiv:1607.06450;
LayerScale: Touvron et al., arXiv:2103.17239.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinov2_fast.backends import Op, records_gradient
from dinov2_fast.ops import _fp8, _registry
from dinov2_fast.ops.residual import add_residual_torch

MAX_HIDDEN = 8192  # the kernels keep a row in registers


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, backend: str | None = None) -> Tensor:
    """Normalises the last dimension of `x`.

    Args:
        x: (..., hidden), floating point.
        weight, bias: (hidden,).
        eps: added to the variance.
        backend: the implementation to use instead of the default.

    Returns:
        Tensor of the shape and dtype of `x` (under autocast: float32).
    """
    return _LAYER_NORM(x, weight, bias, eps, backend=backend)


def add_layer_norm(
    residual: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    deferred_bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds `branch` to the residual stream and normalises the sum.

    Args:
        residual, branch: (batch, seq_len, hidden).
        gamma: LayerScale, (hidden,), or None for 1.
        drop_scale: (batch,) factor of each picture's branch (stochastic depth), or None for 1.
        weight, bias: (hidden,) of the norm.
        eps: added to the variance.
        deferred_bias: (hidden,) added to every token, or None for 0.
        backend: the implementation to use instead of the default.

    Returns:
        The new residual stream and its norm, both (batch, seq_len, hidden).
    """
    return _ADD_LAYER_NORM(residual, branch, gamma, drop_scale, weight, bias, eps, deferred_bias, backend=backend)


def layer_norm_fp8(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, scale: float, *, backend: str | None = None
) -> Tensor:
    """`layer_norm` as e4m3 values (..., hidden), to be multiplied by `scale`. For inference only."""
    return _LAYER_NORM_FP8(x, weight, bias, eps, scale, backend=backend)


# The torch references


def layer_norm_torch(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm_torch(
    residual: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    deferred_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    residual = add_residual_torch(residual, branch, gamma, drop_scale)
    if deferred_bias is not None:
        residual = residual + deferred_bias
    return residual, layer_norm_torch(residual, weight, bias, eps)


def layer_norm_fp8_torch(x: Tensor, weight: Tensor, bias: Tensor, eps: float, scale: float) -> Tensor:
    return _fp8.quantize(layer_norm_torch(x.float(), weight.float(), bias.float(), eps), scale)


# The kernels


def _launch(*args: Any, **options: Any) -> Any:
    from dinov2_fast.kernels.layer_norm import layer_norm_forward

    return layer_norm_forward(*args, **options)


def _launch_add(
    residual: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    deferred_bias: Tensor | None,
    **options: Any,
) -> Any:
    addends = {"branch": branch, "gamma": gamma, "drop_scale": drop_scale, "deferred_bias": deferred_bias}
    return _launch(residual, weight, bias, eps, **addends, **options)


def _launch_backward(*args: Any, **options: Any) -> Any:
    from dinov2_fast.kernels.layer_norm_backward import layer_norm_backward

    return layer_norm_backward(*args, **options)


def _launch_add_backward(
    dtotal: Tensor,
    dy: Tensor,
    total: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dtype: torch.dtype,
    deferred: bool,
) -> Any:
    addends = {"branch": branch, "gamma": gamma, "drop_scale": drop_scale, "deferred": deferred}
    return _launch_backward(dy, total, weight, mean, rstd, dtotal=dtotal, dx_dtype=dtype, **addends)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, rstd = _layer_norm_forward(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.bias_dtype = bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        dx, sums = _layer_norm_backward(dy, x, weight, mean, rstd)
        return dx, sums[0].to(weight.dtype), sums[1].to(ctx.bias_dtype), None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, branch: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        gamma, drop_scale, weight, bias, _, deferred_bias = rest
        total, y, mean, rstd = _add_layer_norm_forward(residual, branch, *rest)
        ctx.save_for_backward(total, branch, gamma, drop_scale, weight, mean, rstd)
        ctx.dtypes = residual.dtype, bias.dtype, None if deferred_bias is None else deferred_bias.dtype
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: gradient checkpointing computes them anew each time
        gamma, weight = saved[2], saved[4]
        dtype, bias_dtype, deferred_dtype = ctx.dtypes
        dresidual, dbranch, sums = _add_layer_norm_backward(dtotal, dy, *saved, dtype, deferred_dtype is not None)
        dweight, dbias, dgamma, ddeferred = sums.unbind(0)
        dgamma = None if gamma is None else dgamma.to(gamma.dtype)
        ddeferred = None if deferred_dtype is None else ddeferred.to(deferred_dtype)
        return dresidual, dbranch, dgamma, None, dweight.to(weight.dtype), dbias.to(bias_dtype), None, ddeferred


def _like(x: Tensor, *others: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """A new contiguous tensor of the shape of `x`, in `dtype` or the common dtype."""
    return x.new_empty(x.shape, dtype=dtype or _registry.promoted(x, *others))


def _wide(x: Tensor, shape: tuple[int, ...], *others: Tensor | None) -> Tensor:
    return x.new_empty(shape, dtype=torch.promote_types(torch.float32, _registry.promoted(x, *others)))


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    return _like(x), _wide(x, x.shape[:-1], weight), _wide(x, x.shape[:-1], weight)


def _fake_add(r: Tensor, o: Tensor, gamma: Any, drop: Any, w: Tensor, b: Tensor, eps: float, deferred: Any) -> Any:
    return _like(r, o, gamma, drop, deferred), _like(r, o, gamma, drop, deferred)


def _fake_add_forward(r: Tensor, o: Tensor, gamma: Any, drop: Any, w: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    rows = [_wide(r, r.shape[:-1], o, gamma, drop, rest[-1], w) for _ in range(2)]
    return *_fake_add(r, o, gamma, drop, w, *rest), *rows


def _fake_add_backward(
    dtotal: Tensor, dy: Tensor, total: Tensor, o: Tensor, gamma: Any, drop: Any, w: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return _like(total, dtype=rest[-2]), _like(o), _wide(total, (4, total.shape[-1]), o, gamma, drop, w)


_NORM = "Tensor weight, Tensor bias, float eps"
_ADD = f"(Tensor residual, Tensor branch, Tensor? gamma, Tensor? drop_scale, {_NORM}, Tensor? deferred_bias)"

_layer_norm = _registry.register(
    f"layer_norm(Tensor x, {_NORM}) -> Tensor",
    lambda *args: _launch(*args)[1],
    lambda x, weight, bias, eps: _like(x),
    _LayerNorm.apply,
    autocast=lambda device: torch.float32 if device == "cuda" else None,
)
_layer_norm_forward = _registry.register(
    f"layer_norm_forward(Tensor x, {_NORM}) -> (Tensor, Tensor, Tensor)",
    lambda *args: _launch(*args, statistics=True)[1:],
    _fake_forward,
)
_layer_norm_backward = _registry.register(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd) -> (Tensor, Tensor)",
    lambda *args: _launch_backward(*args)[::2],
    lambda dy, x, weight, mean, rstd: (_like(x), _wide(x, (2, x.shape[-1]), weight)),
)
_add_layer_norm = _registry.register(
    f"add_layer_norm{_ADD} -> (Tensor, Tensor)",
    lambda *args: _launch_add(*args)[:2],
    _fake_add,
    _AddLayerNorm.apply,
)
_add_layer_norm_forward = _registry.register(
    f"add_layer_norm_forward{_ADD} -> (Tensor, Tensor, Tensor, Tensor)",
    lambda *args: _launch_add(*args, statistics=True),
    _fake_add_forward,
)
_add_layer_norm_backward = _registry.register(
    "add_layer_norm_backward(Tensor dtotal, Tensor dy, Tensor total, Tensor branch, Tensor? gamma, Tensor? drop_scale,"
    " Tensor weight, Tensor mean, Tensor rstd, ScalarType dtype, bool deferred) -> (Tensor, Tensor, Tensor)",
    _launch_add_backward,
    _fake_add_backward,
)
_layer_norm_fp8 = _registry.register(
    f"layer_norm_fp8(Tensor x, {_NORM}, float scale) -> Tensor",
    lambda x, weight, bias, eps, scale: _launch(x, weight, bias, eps, scale=scale)[1],
    lambda x, weight, bias, eps, scale: _like(x, dtype=torch.float8_e4m3fn),
)


def _refuses(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> str | None:
    if x.dtype not in _registry.FLOATS:
        return f"takes fp16, bf16, fp32 and fp64, got {x.dtype}"
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        return f"takes weight and bias of shape {tuple(x.shape[-1:])}"
    if x.shape[-1] > MAX_HIDDEN:
        return f"takes a hidden size up to {MAX_HIDDEN}, got {x.shape[-1]}"
    return None


def _refuses_add(
    residual: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    deferred_bias: Tensor | None = None,
) -> str | None:
    if records_gradient([drop_scale]):
        return "gives no gradient for drop_scale"
    vectors = {"gamma": gamma, "deferred_bias": deferred_bias}
    reason = _registry.refuses_to_broadcast(residual, branch, drop_scale, **vectors)
    if residual.is_cuda and torch.is_autocast_enabled("cuda"):
        dtype = _registry.promoted(residual, branch, gamma, drop_scale, deferred_bias)
        if dtype in (torch.float16, torch.bfloat16):
            reason = "gives the norm in the dtype of the sum, where autocast gives it in fp32"
    return reason or _refuses(residual, weight, bias, eps)


def _refuses_fp8(x: Tensor, *rest: Any) -> str | None:
    return _registry.refuses_e4m3(x) or _refuses(x, *rest[:3])


def _sample(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.empty(1, 257, 384, device=device, dtype=dtype)
    return x, x[0, 0], x[0, 0], 1e-6


def _sample_add(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    x, weight, bias, eps = _sample(device, dtype)
    return x, x, weight, None, weight, bias, eps, None


_LAYER_NORM = Op(
    "layer_norm", "layer_norm", _registry.torch_and_triton(layer_norm_torch, _layer_norm, _refuses), _sample
)
_ADD_LAYER_NORM = Op(
    "add_layer_norm",
    "layer_norm",
    _registry.torch_and_triton(add_layer_norm_torch, _add_layer_norm, _refuses_add),
    _sample_add,
)
_LAYER_NORM_FP8 = Op(
    "layer_norm_fp8",
    "layer_norm",
    _registry.torch_and_triton(layer_norm_fp8_torch, _layer_norm_fp8, _refuses_fp8, trains=False),
    lambda device, dtype: (*_sample(device, dtype), 0.125),
)
