"""The residual addition of a block, fused with LayerScale, stochastic depth and the norm that follows it.

The fused op does not call those modules. So if one of them has a hook, a `forward` set on the instance, or was replaced
by another class, they are called one after the other instead. The result is the same. In a graph of torch.fx the norm
stays a node of its own, since users ask for it by name.
"""

from __future__ import annotations

from torch import Tensor, nn

from dinov2_fast import ops
from dinov2_fast.layers import DropPath, LayerNorm, LayerScale, has_hooks
from dinov2_fast.torch_private import is_fx_traced


def add_and_norm(
    x: Tensor, branch: Tensor, layer_scale: nn.Module, drop_path: nn.Module, norm: nn.Module
) -> tuple[Tensor, Tensor]:
    """``x = x + drop_path(layer_scale(branch))`` and ``norm(x)``."""
    plain = _is_plain(layer_scale) and _is_plain(drop_path) and not is_fx_traced()
    if plain and type(norm) is LayerNorm and not has_hooks(norm):
        gamma, drop_scale = _gamma(layer_scale), _drop_scale(drop_path, branch)
        return ops.layer_norm(x, norm.weight, norm.bias, norm.eps, branch=branch, gamma=gamma, drop_scale=drop_scale)
    x = add(x, branch, layer_scale, drop_path)
    return x, norm(x)


def add(x: Tensor, branch: Tensor, layer_scale: nn.Module, drop_path: nn.Module) -> Tensor:
    """``x + drop_path(layer_scale(branch))``."""
    if _is_plain(layer_scale) and _is_plain(drop_path):
        return ops.add_residual(x, branch, _gamma(layer_scale), _drop_scale(drop_path, branch))
    return x + drop_path(layer_scale(branch))


def split_gamma(branch: Tensor, layer_scale: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The branch and the gamma by which the addition multiplies it, None if the branch has been multiplied already."""
    return (branch, _gamma(layer_scale)) if _is_plain(layer_scale) else (layer_scale(branch), None)


def _is_plain(module: nn.Module) -> bool:
    return type(module) in (LayerScale, DropPath, nn.Identity) and not has_hooks(module)


def _gamma(layer_scale: nn.Module) -> Tensor | None:
    return layer_scale.gamma if isinstance(layer_scale, LayerScale) else None


def _drop_scale(drop_path: nn.Module, branch: Tensor) -> Tensor | None:
    return drop_path.scale(branch) if isinstance(drop_path, DropPath) else None
