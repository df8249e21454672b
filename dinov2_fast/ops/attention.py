"""Multi-head self-attention on packed queries, keys and values.

    p = softmax(q @ k^T / sqrt(head_dim)),  out = p @ v          for each picture and head

`qkv` is what the qkv linear writes, (batch, seq_len, 3, heads, head_dim), read in place; the result is token-major,
(batch, seq_len, heads, head_dim), as the output projection reads it. `attention_varlen` takes pictures of different
sizes packed along one token axis. `attention_probabilities` is p itself, which the fast forms never write out.
Source: Vaswani et al., arXiv:1706.03762.
"""

from __future__ import annotations

from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_fast.backends import Implementation, Op


def attention(qkv: Tensor, dropout_p: float = 0.0, *, backend: str | None = None) -> Tensor:
    """Attention within each picture.

    Args:
        qkv: (batch, seq_len, 3, heads, head_dim).
        dropout_p: probability of dropping an attention weight; 0 outside training.
        backend: the implementation to use instead of the default.

    Returns:
        (batch, seq_len, heads, head_dim), contiguous, in the dtype of `qkv`.
    """
    return _ATTENTION(qkv, dropout_p, backend=backend)


def attention_varlen(
    qkv: Tensor, seq_lens: tuple[int, ...], dropout_p: float = 0.0, *, backend: str | None = None
) -> Tensor:
    """Attention within each of several sequences packed along one axis.

    Args:
        qkv: (total_tokens, 3, heads, head_dim).
        seq_lens: tokens of each sequence in order; they sum to total_tokens.
        dropout_p: probability of dropping an attention weight; 0 outside training.
        backend: the implementation to use instead of the default.

    Returns:
        (total_tokens, heads, head_dim), contiguous, in the dtype of `qkv`.
    """
    return _ATTENTION_VARLEN(qkv, seq_lens, dropout_p, backend=backend)


def attention_probabilities(qkv: Tensor, rows: slice = slice(None), *, backend: str | None = None) -> Tensor:
    """The attention weights of chosen query rows.

    Args:
        qkv: (batch, seq_len, 3, heads, head_dim).
        rows: the queries asked for; ``slice(0, 1)`` is the CLS token's attention map.
        backend: the implementation to use instead of the default.

    Returns:
        (batch, heads, len(rows), seq_len), rows summing to 1, in the dtype of `qkv`.
    """
    return _ATTENTION_PROBABILITIES(qkv, rows, backend=backend)


def attention_torch(qkv: Tensor, dropout_p: float = 0.0) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, seq_len, head_dim)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p).transpose(1, 2).contiguous()


def attention_varlen_torch(qkv: Tensor, seq_lens: tuple[int, ...], dropout_p: float = 0.0) -> Tensor:
    outputs, start = [], 0
    for seq_len, run in groupby(seq_lens):  # neighbours of one length are one batch
        batch = len(list(run))
        packed = qkv[start : start + batch * seq_len].unflatten(0, (batch, seq_len))
        outputs.append(attention_torch(packed, dropout_p).flatten(0, 1))
        start += batch * seq_len
    return torch.cat(outputs)


def attention_probabilities_torch(qkv: Tensor, rows: slice = slice(None)) -> Tensor:
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    return ((q[:, :, rows] * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1)


def _sample(device: torch.device, dtype: torch.dtype) -> tuple[Tensor]:
    return (torch.empty(1, 257, 3, 6, 64, device=device, dtype=dtype),)


def _sample_varlen(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, tuple[int, ...]]:
    return _sample(device, dtype)[0][0], (200, 57)


_ATTENTION = Op("attention", "attention", (Implementation("torch", attention_torch),), _sample)
_ATTENTION_VARLEN = Op(
    "attention_varlen", "attention", (Implementation("torch", attention_varlen_torch),), _sample_varlen
)
_ATTENTION_PROBABILITIES = Op(
    "attention_probabilities", "attention", (Implementation("torch", attention_probabilities_torch),), _sample
)
