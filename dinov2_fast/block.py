"""One transformer block: attention and a feed-forward network, each with a norm, LayerScale and stochastic depth.

Source: facebookresearch/dinov2, dinov2/layers/block.py; Oquab et al., arXiv:2304.07193, section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_fast import ops
from dinov2_fast.layers import GELU, Attention, DropPath, LayerNorm, LayerScale, Mlp, has_hooks
from dinov2_fast.torch_private import is_fx_traced

# Up to this rate the reference computes the branch of every image, then zeroes some. Above, it computes only a subset.
SUBSET_THRESHOLD = 0.1


class Block(nn.Module):
    """A transformer block. In training, an image skips a branch with probability `drop_path`."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | Tensor | None = None,
        drop_path: float = 0.0,
        act_layer: Callable[..., nn.Module] = GELU,
        norm_layer: Callable[..., nn.Module] = LayerNorm,
        attn_class: Callable[..., nn.Module] = Attention,
        ffn_layer: Callable[..., nn.Module] = Mlp,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = attn_class(
            dim, num_heads=num_heads, qkv_bias=qkv_bias, proj_bias=proj_bias, attn_drop=attn_drop, proj_drop=drop
        )
        self.ls1 = LayerScale(dim, init_values=init_values) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = ffn_layer(
            in_features=dim, hidden_features=int(dim * mlp_ratio), act_layer=act_layer, drop=drop, bias=ffn_bias
        )
        self.ls2 = LayerScale(dim, init_values=init_values) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.sample_drop_ratio = drop_path
        self.subset_threshold = SUBSET_THRESHOLD

    def forward(self, x: Tensor | list[Tensor]) -> Any:
        """Runs the block on a batch (batch, seq_len, hidden), or on a list of batches that differ in length.

            x = x + drop_path1(ls1(attn(norm1(x))))
            x = x + drop_path1(ls2(mlp(norm2(x))))      drop_path1 again, as in the reference

        Each addition is fused with LayerScale and stochastic depth, the first one also with `norm2`. A list runs
        packed: each linear takes all tokens at once, and attention stays within each image.
        """
        if isinstance(x, list):
            return self._forward_list(x)
        if self.training and self.sample_drop_ratio > self.subset_threshold:
            x = self._add_on_subset(x, lambda x: self.attn(self.norm1(x)), self.ls1)
            return self._add_on_subset(x, lambda x: self.mlp(self.norm2(x)), self.ls2)
        x, normed = add_and_norm(x, self.attn(self.norm1(x)), self.ls1, self.drop_path1, self.norm2)
        return add(x, self.mlp(normed), self.ls2, self.drop_path1)

    def _add_on_subset(self, x: Tensor, branch: Callable[[Tensor], Tensor], layer_scale: nn.Module) -> Tensor:
        index, scale = self._draw_subset(x)
        subset = ops.gather_rows([x], [index]).view(index.shape[0], *x.shape[1:])
        part, gamma = split_gamma(branch(subset), layer_scale)
        return ops.add_residual(x, part, gamma, index=index, scale=scale)

    def _draw_subset(self, x: Tensor) -> tuple[Tensor, float]:
        """The indices of random images whose branch is computed, and the factor that keeps the expected sum."""
        batch = x.shape[0]
        subset = max(int(batch * (1 - self.sample_drop_ratio)), 1)
        return torch.randperm(batch, device=x.device)[:subset], batch / subset

    def _forward_list(self, x_list: list[Tensor]) -> list[Tensor]:
        if self.training and self.sample_drop_ratio > 0.0:
            x_list = self._add_on_subsets(
                x_list, lambda x, seq_lens: self.attn(self.norm1(x), seq_lens=seq_lens), self.ls1
            )
            return self._add_on_subsets(x_list, lambda x, seq_lens: self.mlp(self.norm2(x)), self.ls2)
        x, seq_lens = pack(x_list)
        x, normed = add_and_norm(x, self.attn(self.norm1(x), seq_lens=seq_lens), self.ls1, nn.Identity(), self.norm2)
        return unpack(add(x, self.mlp(normed), self.ls2, nn.Identity()), [x.shape for x in x_list])

    def _add_on_subsets(
        self, x_list: list[Tensor], branch: Callable[[Tensor, tuple[int, ...]], Tensor], layer_scale: nn.Module
    ) -> list[Tensor]:
        indices, scales = map(list, zip(*[self._draw_subset(x) for x in x_list], strict=True))
        shapes = [(index.shape[0], *x.shape[1:]) for x, index in zip(x_list, indices, strict=True)]
        seq_lens = tuple(seq_len for subset, seq_len, _ in shapes for _ in range(subset))
        packed = ops.gather_rows(x_list, indices)[None]  # (1, total_tokens, hidden)
        packed, gamma = split_gamma(branch(packed, seq_lens), layer_scale)
        each = zip(x_list, unpack(packed, shapes), indices, scales, strict=True)
        return [ops.add_residual(x, part, gamma, index=index, scale=scale) for x, part, index, scale in each]


NestedTensorBlock = Block  # the reference's name for the class its models use


# The fused additions do not call LayerScale, stochastic depth and the norm. So if one of these modules has a hook, a
# `forward` set on the instance, or was replaced by another class, they are called one after the other instead. The
# result is the same. In a graph of torch.fx the norm stays a node of its own, since users ask for it by name.


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
    """The branch, and the gamma that the addition still has to multiply it by; None if there is none."""
    return (branch, _gamma(layer_scale)) if _is_plain(layer_scale) else (layer_scale(branch), None)


def _is_plain(module: nn.Module) -> bool:
    return type(module) in (LayerScale, DropPath, nn.Identity) and not has_hooks(module)


def _gamma(layer_scale: nn.Module) -> Tensor | None:
    return layer_scale.gamma if isinstance(layer_scale, LayerScale) else None


def _drop_scale(drop_path: nn.Module, branch: Tensor) -> Tensor | None:
    return drop_path.scale(branch) if isinstance(drop_path, DropPath) else None


def pack(x_list: list[Tensor]) -> tuple[Tensor, tuple[int, ...]]:
    """Batches that differ in length as one (1, total_tokens, hidden), and the length of every sequence."""
    seq_lens = tuple(x.shape[1] for x in x_list for _ in range(x.shape[0]))
    return torch.cat([x.flatten(0, 1) for x in x_list])[None], seq_lens


def unpack(packed: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """The batches (batch, seq_len, hidden) of these shapes, as views of `packed` (1, total_tokens, hidden)."""
    parts = packed[0].split([shape[0] * shape[1] for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


class BlockChunk(nn.Sequential):
    """Several blocks as one module, a unit for FSDP. Leading `nn.Identity` keep the indices of the state dict.

    The reference's chunk is an `nn.ModuleList`, which FSDP2 refuses. The reference's own FSDP policy looks for that
    class and does not find this one.
    """


def chunk_blocks(blocks: list[nn.Module], chunks: int) -> list[BlockChunk]:
    """The blocks in chunks of ``len(blocks) // chunks``, at least one; the last chunk may be shorter."""
    size = max(len(blocks) // chunks, 1)
    return [BlockChunk(*[nn.Identity()] * i, *blocks[i : i + size]) for i in range(0, len(blocks), size)]
