"""A small model with the class, module and attribute names of Meta's torch.hub code, on plain PyTorch.

It stands in for that code where its names and the order of its steps are what matters. `in_module` gives each class the
module that it has there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind = TypeVar("Kind", bound=type)
HOME = "standin_dinov2"


def in_module(module: str) -> Callable[[Kind], Kind]:
    def give(kind: Kind) -> Kind:
        kind.__module__ = f"{HOME}.{module}"
        return kind

    return give


@in_module("layers.layer_scale")
class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


@in_module("layers.drop_path")
class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * (x.new_empty(len(x), 1, 1).bernoulli_(keep) / keep)


@in_module("layers.attention")
class MemEffAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, attn_drop: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, attn_bias: Any = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.attn_drop if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


@in_module("layers.mlp")
class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * dim, dim)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


@in_module("layers.swiglu_ffn")
class SwiGLUFFNFused(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = (int(4 * dim * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


@in_module("layers.block")
class NestedTensorBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp: type[nn.Module], drop_path: float, attn_drop: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = MemEffAttention(dim, num_heads, attn_drop)
        self.ls1 = LayerScale(dim)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp(dim)
        self.ls2 = LayerScale(dim)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()
        self.sample_drop_ratio = drop_path

    def forward(self, x: Any) -> Any:
        if isinstance(x, list):
            return [self(part) for part in x]
        if self.training and self.sample_drop_ratio > 0.1:
            x = self._on_subset(x, lambda x: self.ls1(self.attn(self.norm1(x))))
            return self._on_subset(x, lambda x: self.ls2(self.mlp(self.norm2(x))))
        drop = self.drop_path1 if self.training and self.sample_drop_ratio else nn.Identity()
        x = x + drop(self.ls1(self.attn(self.norm1(x))))
        return x + drop(self.ls2(self.mlp(self.norm2(x))))

    def _on_subset(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        count = max(int(len(x) * (1 - self.sample_drop_ratio)), 1)
        index = torch.randperm(len(x))[:count]
        return torch.index_add(x, 0, index, branch(x[index]), alpha=len(x) / count)


@in_module("layers.patch_embed")
class PatchEmbed(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=14, stride=14)

    def forward(self, x: Tensor) -> Tensor:
        assert all(size % 14 == 0 for size in x.shape[2:]), "a size is no multiple of the patch size"
        return self.proj(x).flatten(2).transpose(1, 2)


class Backbone(nn.Module):
    """The parts, and how an image becomes tokens; `grid` is the side of the table of positions."""

    def __init__(
        self,
        dim: int = 128,
        depth: int = 2,
        num_heads: int = 2,
        grid: int = 5,
        registers: int = 0,
        swiglu: bool = False,
        drop_path_rate: float = 0.0,
        attn_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.patch_size, self.num_register_tokens = num_heads, 14, registers
        self.interpolate_antialias, self.interpolate_offset = bool(registers), 0.0 if registers else 0.1
        self.patch_embed = PatchEmbed(dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid**2, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        mlp = SwiGLUFFNFused if swiglu else Mlp
        blocks = [NestedTensorBlock(dim, num_heads, mlp, drop_path_rate, attn_drop) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Identity()

    def interpolate_pos_encoding(self, x: Tensor, w: int, h: int) -> Tensor:
        rows, columns, grid = w // self.patch_size, h // self.patch_size, int((self.pos_embed.shape[1] - 1) ** 0.5)
        if (rows, columns) == (grid, grid):
            return self.pos_embed
        table = self.pos_embed[:, 1:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
        offset = self.interpolate_offset
        how: dict[str, Any] = {"size": (rows, columns)}
        if offset:
            how = {"scale_factor": ((rows + offset) / grid, (columns + offset) / grid)}
        table = F.interpolate(table, mode="bicubic", antialias=self.interpolate_antialias, **how)
        return torch.cat([self.pos_embed[:, :1], table.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        w, h = x.shape[2:]
        x = self.patch_embed(x)
        if masks is not None:
            x = torch.where(masks.unsqueeze(-1), self.mask_token, x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.interpolate_pos_encoding(x, w, h)
        if self.register_tokens is not None:
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        return x


@in_module("models.vision_transformer")
class DinoVisionTransformer(Backbone):
    def forward_features(self, x: Tensor, masks: Tensor | None = None) -> dict[str, Any]:
        x = self.prepare_tokens_with_masks(x, masks)
        for block in self.blocks:
            x = block(x)
        normed, first = self.norm(x), 1 + self.num_register_tokens
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_norm_regtokens": normed[:, 1:first],
            "x_norm_patchtokens": normed[:, first:],
            "x_prenorm": x,
            "masks": masks,
        }

    def get_intermediate_layers(
        self, x: Tensor, n: Any = 1, reshape: bool = False, return_class_token: bool = False, norm: bool = True
    ) -> tuple[Any, ...]:
        outputs, (rows, columns) = [], (size // self.patch_size for size in x.shape[2:])
        x = self.prepare_tokens_with_masks(x)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in (range(len(self.blocks) - n, len(self.blocks)) if isinstance(n, int) else n):
                outputs.append(self.norm(x) if norm else x)
        first = [out[:, 0] for out in outputs]
        outputs = [out[:, 1 + self.num_register_tokens :] for out in outputs]
        if reshape:
            outputs = [out.unflatten(1, (rows, columns)).permute(0, 3, 1, 2).contiguous() for out in outputs]
        return tuple(zip(outputs, first, strict=True)) if return_class_token else tuple(outputs)

    def forward(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        features = self.forward_features(*args, **kwargs)
        return features if is_training else self.head(features["x_norm_clstoken"])
