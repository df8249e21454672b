"""Attention maps and query, key and value features of a backbone, for any of its blocks.

A block does not store its attention weights, or its queries, keys and values. They are computed again from its input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinov2_fast import ops
from dinov2_fast.base_module import Dinov2Module
from dinov2_fast.errors import InvalidValueError
from dinov2_fast.position_embeddings import Grid


class QKV(NamedTuple):
    """Queries, keys and values of chosen blocks; see `AttentionFeatures.qkv_features`."""

    query: Tensor
    key: Tensor
    value: Tensor


class AttentionFeatures(Dinov2Module):
    """The methods `attention_maps` and `qkv_features` of a backbone, which defines the attributes and methods below."""

    num_heads: int
    num_register_tokens: int

    def embed(self, images: Tensor) -> Tensor:
        """Images as tokens (batch, 1 + registers + patches, hidden), as `forward` makes them."""
        raise NotImplementedError

    def grid(self, images: Tensor) -> Grid:
        """Rows and columns of patches in these images, as `embed` cuts them."""
        raise NotImplementedError

    def _flat_blocks(self) -> list[Any]:
        raise NotImplementedError

    def _call(self, block: nn.Module, x: Any) -> Any:
        raise NotImplementedError

    def attention_maps(
        self,
        images: Tensor,
        layers: int | Sequence[int] = -1,
        heads: int | Sequence[int] | None = None,
        queries: slice | None = None,
    ) -> Tensor:
        """Attention weights; by default those of the CLS token on the patches, as one map per head.

        Attention weights are computed only for the requested blocks, heads and queries. They are differentiable.

        Args:
            images: as for `forward`.
            layers: blocks, in the order of the result; 0 is the first and -1 the last.
            heads: 0 is the first and -1 the last; None for all.
            queries: None for the CLS token. Its weights on CLS and registers are left out, so a map sums to less than
                1. A slice selects tokens in the order CLS, registers, patches and returns their whole rows:
                ``slice(None)`` is all tokens, ``slice(1 + registers, None)`` the patches.

        Returns:
            (batch, layers, heads, rows, columns) of patches; with `queries` (batch, layers, heads, queries, tokens),
            each row summing to 1. In the dtype of the parameters, or under autocast in that of softmax.

        Raises:
            ValueError: there is no such block or head, or none is asked for.
        """
        take = _indices(layers, len(self._flat_blocks()), "block")
        chosen = None if heads is None else _indices(heads, self.num_heads, "head")
        found = {}
        for i, qkv in self._projected(images, take):
            if chosen is not None:
                qkv = torch.stack([qkv[:, :, :, head] for head in chosen], dim=3)
            weights = ops.attention_probabilities(qkv, slice(0, 1) if queries is None else queries)
            found[i] = weights[:, :, 0, 1 + self.num_register_tokens :] if queries is None else weights
        maps = torch.stack([found[i] for i in take], dim=1)
        return maps.unflatten(-1, self.grid(images)) if queries is None else maps

    def qkv_features(self, images: Tensor, layers: int | Sequence[int] = -1, reshape: bool = False) -> QKV:
        """Queries, keys and values of chosen blocks, as correspondence and segmentation methods use them.

        Args:
            images: as for `forward`.
            layers: blocks, in the order of the result; 0 is the first and -1 the last.
            reshape: return maps of the patches, with the channels of all heads concatenated.

        Returns:
            `query`, `key` and `value`, each (batch, layers, heads, tokens, head_dim) in the order CLS, registers,
            patches; ``softmax(query @ key.mT / head_dim**0.5)`` is the attention. With `reshape` each is
            (batch, layers, hidden, rows, columns). In the dtype of the parameters, or that of autocast.

        Raises:
            ValueError: there is no such block, or none is asked for.
        """
        take = _indices(layers, len(self._flat_blocks()), "block")
        found = dict(self._projected(images, take))
        qkv = torch.stack([found[i] for i in take]).permute(3, 1, 0, 4, 2, 5)  # (3, batch, layers, heads, tokens, dim)
        if reshape:
            patches = qkv[..., 1 + self.num_register_tokens :, :].unflatten(-2, self.grid(images))
            qkv = patches.permute(0, 1, 2, 3, 6, 4, 5).flatten(3, 4).contiguous()
        return QKV(*qkv)

    def _projected(self, images: Tensor, layers: list[int]) -> Iterator[tuple[int, Tensor]]:
        """Index and packed projections (batch, tokens, 3, heads, head_dim) of each of `layers`; no later block runs."""
        x, last = self.embed(images), max(layers)
        for i, block in enumerate(self._flat_blocks()[: last + 1]):
            if i in layers:
                yield i, block.attn.project_qkv(block.norm1(x))
            if i < last:
                x = self._call(block, x)


def _indices(asked: int | Sequence[int], count: int, what: str) -> list[int]:
    """The indices `asked`, counted from 0, in the same order."""
    indices = [asked] if isinstance(asked, int) else list(asked)
    outside = [i for i in indices if not -count <= i < count]
    if outside or not indices:
        wrong = f"There is no {what} {outside[0]}" if outside else f"No {what} was asked for"
        raise InvalidValueError(f"{wrong}; the {what}s of this model are 0 to {count - 1}, or -{count} to -1.")
    return [i % count for i in indices]
