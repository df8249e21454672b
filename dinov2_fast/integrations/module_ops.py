"""The steps of a block on the modules of another library's block.

A module that computes just what its class says, and has no hooks, is computed by our ops from its parameters. Any other
is called, so hooks run, and an adapter in place of a linear works.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_fast import ops
from dinov2_fast.integrations.class_swap import has_own_forward
from dinov2_fast.ops.attention import ATTENTION
from dinov2_fast.torch_private import has_any_global_hook, is_traced

Function = Callable[[Tensor], Tensor]

_CAPTURING = "transformers.utils.output_capturing"  # of the hooks with which transformers 5 records outputs


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` is more than the computation of its class."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or has_own_forward(module) or has_any_global_hook()


def has_only_recording_hooks(module: nn.Module) -> bool:
    """Whether all that hangs on `module` are the hooks with which transformers records outputs."""
    if has_any_global_hook() or has_own_forward(module):
        return False
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    return all(getattr(hook, "__module__", "") == _CAPTURING for hook in module._forward_hooks.values())


def is_identity(module: Any) -> bool:
    """Whether `module` returns what it gets, and has no hooks."""
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


def layer_norm(norm: Any) -> Function:
    """What computes `norm`: our op for a layer norm that is not watched, or `norm` itself."""
    if not is_layer_norm(norm) or has_hooks(norm):
        return norm
    parameters, eps = norm._parameters, norm.eps
    return lambda x: ops.layer_norm(x, parameters["weight"], parameters["bias"], eps)


def linear(module: Any) -> Function:
    """What computes `module`: the engine's op for a plain linear that runs without gradients, or `module` itself."""
    if not (runs_once() and is_plain_linear(module)):
        return module
    parameters = module._parameters
    return lambda x: ops.linear(x, parameters["weight"], parameters["bias"])


def compose(*functions: Function | None) -> Function:
    """Applies `functions` one after the other, without those that return what they get."""
    active: list[Any] = [
        function for function in functions if not is_identity(function) and not _is_idle_dropout(function)
    ]

    def apply(x: Tensor) -> Tensor:
        for function in active:
            x = function(x)
        return x

    return apply


def _is_idle_dropout(module: Any) -> bool:
    return type(module) is nn.Dropout and not module.training and not has_hooks(module)


def runs_once() -> bool:
    """Whether what is computed now is neither recorded for a gradient nor for running it again."""
    return not (torch.is_grad_enabled() or is_traced())


def is_plain_linear(module: Any) -> bool:
    """Whether `module` is torch's linear on a dense weight; sharded and quantised ones are of other classes."""
    if type(module) is not nn.Linear or has_hooks(module):
        return False
    return type(module._parameters.get("weight")) is nn.Parameter and "bias" in module._parameters


def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Attention of separate queries, keys and values, each (batch, seq_len, hidden), which is the shape of the result.

    torch's implementation takes them as they are; the kernels read them packed, which costs a copy.
    """
    q, k, v = (tensor.unflatten(-1, (num_heads, -1)) for tensor in (q, k, v))
    shaped_as_packed = q.unsqueeze(2).expand(-1, -1, 3, -1, -1)
    if ATTENTION.choose("batch", (shaped_as_packed, None, 0.0, None)).backend != "torch":
        return ops.attention(torch.stack((q, k, v), dim=2)).flatten(-2)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).flatten(-2)


def attend_packed(qkv: Tensor, num_heads: int) -> Tensor:
    """Attention of (batch, seq_len, 3 * hidden): (batch, seq_len, hidden)."""
    return ops.attention(qkv.unflatten(-1, (3, num_heads, -1))).flatten(-2)


def hidden_gelu(first: Any, activation: Any) -> Function:
    """What computes ``activation(first(x))``, written over the result of a plain linear that nothing else refers to.

    See `dinov2_fast.layers.Mlp` for what it saves.
    """
    if not is_exact_gelu(activation) or has_hooks(activation):
        return compose(linear(first), activation)
    overwrite = runs_once() and is_plain_linear(first)
    return compose(linear(first), lambda hidden: ops.activation(hidden, "gelu", overwrite=overwrite))


def swiglu(x12: Tensor) -> Tensor:
    """SwiGLU of gate and value side by side, (..., 2 * hidden)."""
    return ops.activation(x12, "swiglu")


def drop_scale(drop_path: Any, branch: Tensor, gamma: Tensor | None) -> Tensor:
    """The factor of each image's branch, (batch,), with the random numbers `drop_path` would draw."""
    dtype = branch.dtype if gamma is None else torch.promote_types(branch.dtype, gamma.dtype)
    return drop_path(branch.new_ones((branch.shape[0], 1, 1), dtype=dtype)).flatten()
