"""The attention of one query per head over the norm of the residual stream, without keys and values. Inference only.

Shapes: x (batch, seq_len, hidden), absorbed and pooled (batch, num_heads, hidden).

    y = layer_norm(x),    p = softmax over tokens of y . absorbed,    pooled = sum over tokens of p y

This gives the attention of the CLS token. Let W_q, W_k, W_v be the rows of one head, b_q, b_v their biases, and
q = W_q y_cls + b_q. Then

    absorbed = W_k^T q / sqrt(head_dim),    out = W_v pooled + b_v

It is exact except for rounding, for three reasons: y . (W_k^T q) = (W_k y) . q; the bias of the keys adds the same
number to every score of a head, which the softmax ignores; p sums to 1. The other tokens need no query, key or value.
So the last block of a model that returns the CLS token alone skips nearly all its work.
The formula of attention: Vaswani et al., arXiv:1706.03762.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.ops import _backends, _registry
from dinov2_fast.ops._fp8 import E4M3
from dinov2_fast.ops.dispatch import Op
from dinov2_fast.ops.implementation import Implementation

MAX_HEADS = 32  # a program of the kernels holds a tile of all heads


def attention_pool(
    x: Tensor, absorbed: Tensor, weight: Tensor, bias: Tensor, eps: float, *, backend: str | None = None
) -> Tensor:
    """The mean of `layer_norm(x)` over the tokens, weighted for each head by the softmax of its product with a query.

    Args:
        x: (batch, seq_len, hidden), the residual stream.
        absorbed: (batch, num_heads, hidden), the queries in the hidden space, already scaled.
        weight, bias: (hidden,) of the norm.
        eps: added to the variance.
        backend: the backend to use instead of the default.

    Returns:
        (batch, num_heads, hidden), contiguous, in the dtype of `x` (under autocast: its dtype).

    Raises:
        ValueError: the shapes of `x` and `absorbed` do not fit together, or there is no token.
        BackendError: `backend` cannot take these tensors, or gradients are recorded.
    """
    if x.ndim != 3 or absorbed.ndim != 3 or absorbed.shape[::2] != x.shape[::2]:
        raise InvalidValueError(
            "attention_pool takes x (batch, seq_len, hidden) and absorbed (batch, num_heads, hidden), "
            f"got {tuple(x.shape)} and {tuple(absorbed.shape)}."
        )
    if x.shape[1] == 0:
        raise InvalidValueError("attention_pool needs at least one token.")
    args = x, absorbed, weight, bias, eps
    return ATTENTION_POOL.choose("pool", args, backend).function(*args)


def attention_pool_torch(x: Tensor, absorbed: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    y = F.layer_norm(x, weight.shape, weight, bias, eps)
    return (absorbed @ y.transpose(1, 2)).softmax(-1).to(y.dtype) @ y


def _refuses(x: Tensor, absorbed: Tensor, *rest: object) -> str | None:
    heads = absorbed.shape[1]
    return None if heads <= MAX_HEADS else f"takes at most {MAX_HEADS} heads, got {heads}"


def _sample(device: torch.device, dtype: torch.dtype) -> tuple[object, ...] | None:
    if dtype == E4M3:
        return None
    x = torch.empty(2, 257, 384, device=device, dtype=dtype)
    return x, x[:, :6], x[0, 0], x[0, 0], 1e-6


_attention_pool = _registry.register(
    "attention_pool(Tensor x, Tensor absorbed, Tensor weight, Tensor bias, float eps) -> Tensor",
    _registry.launcher("attention_pool", "attention_pool_forward"),
    lambda x, absorbed, weight, bias, eps: x.new_empty(absorbed.shape),
    autocast=torch.get_autocast_dtype,
)

# torch is first because the kernel has not been measured on a GPU yet.
ATTENTION_POOL = Op(
    "attention_pool",
    (
        Implementation("torch", attention_pool_torch, has_backward=False, why=_backends.UNMEASURED),
        _backends.triton(_attention_pool, _refuses, dtypes=_backends.FLOATS, has_backward=False),
    ),
    {"pool": _sample},
)
