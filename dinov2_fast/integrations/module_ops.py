"""This package's ops on the modules of other libraries.

A module that computes just what its class says, and has no hooks, is computed by an op from its parameters. Any other
module is called, so that hooks run, and an adapter in place of a linear works.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_fast import ops
from dinov2_fast.integrations.changes import has_hooks
from dinov2_fast.ops.attention import ATTENTION
from dinov2_fast.torch_private import is_traced

Function = Callable[[Tensor], Tensor]


def is_identity(module: Any) -> bool:
    """Whether `module` is missing, or returns its input and has no hooks."""
    return module is None or (type(module) is nn.Identity and not has_hooks(module))


def is_layer_norm(norm: Any) -> bool:
    """Whether `norm` is a layer norm over the last dimension with weight and bias: torch's, or timm's of that name."""
    plain = type(norm) is nn.LayerNorm or (
        type(norm).__name__ == "LayerNorm" and getattr(norm, "_fast_norm", 1) is False
    )
    if not plain or len(norm.normalized_shape) != 1:
        return False
    return all(norm._parameters.get(name) is not None for name in ("weight", "bias"))


def is_exact_gelu(activation: Any) -> bool:
    """Whether `activation` is the erf form of GELU: torch's module, or transformers' around torch's function."""
    if type(activation) is nn.GELU:
        return activation.approximate == "none"
    return type(activation).__name__ == "GELUActivation" and activation.act is F.gelu


def is_plain_linear(module: Any) -> bool:
    """Whether `module` is torch's linear on a dense weight; sharded and quantised weights are of other classes."""
    if type(module) is not nn.Linear or has_hooks(module):
        return False
    return type(module._parameters.get("weight")) is nn.Parameter and "bias" in module._parameters


def is_recorded() -> bool:
    """Whether the present computation is recorded, by autograd or in a graph that will run again."""
    return torch.is_grad_enabled() or is_traced()


def layer_norm(norm: Any) -> Function:
    """The function that computes `norm`: our op for a layer norm without hooks, or `norm` itself."""
    if not is_layer_norm(norm) or has_hooks(norm):
        return norm
    parameters, eps = norm._parameters, norm.eps
    return lambda x: ops.layer_norm(x, parameters["weight"], parameters["bias"], eps)


def linear(module: Any) -> Function:
    """The function that computes `module`: our op for a plain linear where nothing is recorded, or `module` itself."""
    if is_recorded() or not is_plain_linear(module):
        return module
    parameters = module._parameters
    return lambda x: ops.linear(x, parameters["weight"], parameters["bias"])


def hidden_gelu(first: Any, activation: Any) -> Function:
    """The function ``activation(first(x))``; `layers._owns_hidden` says why it may overwrite ``first(x)``."""
    if not is_exact_gelu(activation) or has_hooks(activation):
        return compose(linear(first), activation)
    overwrite = not is_recorded() and is_plain_linear(first)
    return compose(linear(first), lambda hidden: ops.activation(hidden, "gelu", overwrite=overwrite))


def _does_nothing(module: Any) -> bool:
    idle_dropout = type(module) is nn.Dropout and not module.training and not has_hooks(module)
    return idle_dropout or is_identity(module)


def compose(*functions: Function | None) -> Function:
    """A function that applies `functions` one after the other, without those that return their input."""
    active: list[Any] = [function for function in functions if not _does_nothing(function)]

    def apply(x: Tensor) -> Tensor:
        for function in active:
            x = function(x)
        return x

    return apply


def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Attention of separate queries, keys and values, each (batch, seq_len, hidden), which is also the result's shape.

    torch's implementation takes them as they are; the kernels read them packed, which costs a copy.
    """
    q, k, v = (tensor.unflatten(-1, (num_heads, -1)) for tensor in (q, k, v))
    shaped_as_packed = q.unsqueeze(2).expand(-1, -1, 3, -1, -1)
    if ATTENTION.choose("batch", (shaped_as_packed, None, 0.0, None)).backend not in ("torch", "cpu"):
        return ops.attention(torch.stack((q, k, v), dim=2)).flatten(-2)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).flatten(-2)


def attend_packed(qkv: Tensor, num_heads: int) -> Tensor:
    """Attention of packed queries, keys and values: (batch, seq_len, 3 * hidden) to (batch, seq_len, hidden)."""
    return ops.attention(qkv.unflatten(-1, (3, num_heads, -1))).flatten(-2)


def swiglu(x12: Tensor) -> Tensor:
    """SwiGLU of gate and value side by side, (..., 2 * hidden)."""
    return ops.activation(x12, "swiglu")


def drop_scale(drop_path: Any, branch: Tensor, gamma: Tensor | None) -> Tensor:
    """The factor of each image's branch, (batch,), with the random numbers that `drop_path` would draw."""
    dtype = branch.dtype if gamma is None else torch.promote_types(branch.dtype, gamma.dtype)
    return drop_path(branch.new_ones((branch.shape[0], 1, 1), dtype=dtype)).flatten()
