"""Layer normalisation, alone and fused with the residual addition before it.

    layer_norm(x)[i] = (x[i] - mean(x)) / sqrt(var(x) + eps) * weight[i] + bias[i]      over the last dimension
    add_layer_norm:    r' = r + drop_scale * gamma * branch,    y = layer_norm(r'),     returns (r', y)

`var` is the biased variance. `gamma` is LayerScale, `drop_scale` the per-picture factor of stochastic depth.
Source: Ba et al., arXiv:1607.06450; LayerScale: Touvron et al., arXiv:2103.17239.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_fast.backends import Implementation, Op
from dinov2_fast.ops.residual import add_residual_torch


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
        backend: the implementation to use instead of the default.

    Returns:
        The new residual stream and its norm, both (batch, seq_len, hidden).
    """
    return _ADD_LAYER_NORM(residual, branch, gamma, drop_scale, weight, bias, eps, backend=backend)


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
) -> tuple[Tensor, Tensor]:
    residual = add_residual_torch(residual, branch, gamma, drop_scale)
    return residual, layer_norm_torch(residual, weight, bias, eps)


def _sample(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, float]:
    x = torch.empty(1, 257, 384, device=device, dtype=dtype)
    return x, x[0, 0], x[0, 0], 1e-6


def _sample_add(device: torch.device, dtype: torch.dtype) -> tuple[object, ...]:
    x, weight, bias, eps = _sample(device, dtype)
    return x, x, weight, None, weight, bias, eps


_LAYER_NORM = Op("layer_norm", "layer_norm", (Implementation("torch", layer_norm_torch),), _sample)
_ADD_LAYER_NORM = Op("add_layer_norm", "layer_norm", (Implementation("torch", add_layer_norm_torch),), _sample_add)
