"""The steps of a block on the modules of another library's block.

What is known to compute just what its class says, and is not looked upon, is computed by our ops from its parameters;
any other module is called, so hooks run, and an adapter in place of a linear works.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from dinov2_fast import ops
from dinov2_fast.integrations.joining import has_own_forward
from dinov2_fast.ops.attention import ATTENTION
from dinov2_fast.tracing import is_traced

_CAPTURING = "transformers.utils.output_capturing"  # of the hooks with which transformers 5 records outputs


def is_watched(module: nn.Module) -> bool:
    """Whether calling `module` is more than the computation of its class."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or has_own_forward(module) or _has_any_global_hook()


def is_recorded_only(module: nn.Module) -> bool:
    """Whether all that hangs on `module` are the hooks with which transformers records outputs."""
    if _has_any_global_hook() or has_own_forward(module):
        return False
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    return all(getattr(hook, "__module__", "") == _CAPTURING for hook in module._forward_hooks.values())


def is_nothing(module: nn.Module | None) -> bool:
    """Whether `module` returns what it gets, and nobody looks on."""
    return module is None or (type(module) is nn.Identity and not is_watched(module))


def is_layer_norm(norm: Any) -> bool:
    """Whether `norm` is a layer norm over the last dimension with weight and bias: torch's, or timm's of that name."""
    plain = type(norm) is nn.LayerNorm or (
        type(norm).__name__ == "LayerNorm" and getattr(norm, "_fast_norm", 1) is False
    )
    return plain and len(norm.normalized_shape) == 1 and norm.weight is not None and norm.bias is not None


def is_exact_gelu(activation: Any) -> bool:
    """Whether `activation` is the erf form of GELU: torch's module, or transformers' around torch's function."""
    if type(activation) is nn.GELU:
        return activation.approximate == "none"
    return type(activation).__name__ == "GELUActivation" and activation.act is F.gelu


def normalise(norm: Any, x: Tensor) -> Tensor:
    """`norm(x)`."""
    if is_layer_norm(norm) and not is_watched(norm):
        return ops.layer_norm(x, norm.weight, norm.bias, norm.eps)
    return norm(x)


def linear(module: Any, x: Tensor) -> Tensor:
    """`module(x)`; of a plain linear whose result nobody differentiates, by the op of the inference engine."""
    if runs_once() and is_plain_linear(module):
        return ops.linear(x, module.weight, module.bias)
    return module(x)


def runs_once() -> bool:
    """Whether what is computed now is neither recorded for a gradient nor for running it again."""
    return not (torch.is_grad_enabled() or is_traced())


def is_plain_linear(module: Any) -> bool:
    """Whether `module` is torch's linear on a dense weight; sharded and quantised ones are of other classes."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and not is_watched(module)


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


def hidden_gelu(first: nn.Module, activation: nn.Module, x: Tensor) -> Tensor:
    """``activation(first(x))``, written over what a plain linear returned where nobody else can hold that.

    See `dinov2_fast.layers.Mlp` for what it saves.
    """
    hidden = linear(first, x)
    if not is_exact_gelu(activation) or is_watched(activation):
        return activation(hidden)
    return ops.activation(hidden, "gelu", overwrite=runs_once() and is_plain_linear(first))


def drop_scale(drop_path: Any, branch: Tensor, gamma: Tensor | None) -> Tensor | None:
    """The factor of each picture's branch, (batch,), with the random numbers `drop_path` would draw; None for 1."""
    if not drop_path.training or not getattr(drop_path, "drop_prob", 0.0):
        return None
    dtype = branch.dtype if gamma is None else torch.promote_types(branch.dtype, gamma.dtype)
    return drop_path(branch.new_ones((branch.shape[0], 1, 1), dtype=dtype)).flatten()
