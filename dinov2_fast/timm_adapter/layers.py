"""Attention and patch embedding with timm's names, attributes and submodules, for code that hooks or replaces them."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.layers import Attention, PatchEmbed, attend, check_is_tensor, has_hooks

torch.fx.wrap("check_is_tensor")


class TimmAttention(Attention):
    """`Attention` whose steps are modules that may be hooked or replaced.

    With ``fused_attn = False``, or a hook on `attn_drop`, the attention weights (batch, heads, seq_len, seq_len) pass
    through `attn_drop`. `q_norm` and `k_norm` take (batch, heads, seq_len, head_dim).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.head_dim = self.dim // self.num_heads
        self.fused_attn = True
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.attn_drop = nn.Dropout(self.attn_drop)

    def project_qkv(self, x: Tensor) -> Tensor:
        qkv = super().project_qkv(x)
        if all(type(norm) is nn.Identity and not has_hooks(norm) for norm in (self.q_norm, self.k_norm)):
            return qkv
        q, k, v = qkv.transpose(-4, -2).unbind(-3)  # each (..., heads, seq_len, head_dim)
        return torch.stack((self.q_norm(q), self.k_norm(k), v), dim=-3).transpose(-4, -2)

    def attend(self, qkv: Tensor, seq_lens: tuple[int, ...] | None = None) -> Tensor:
        if self.fused_attn and type(self.attn_drop) is nn.Dropout and not has_hooks(self.attn_drop):
            return attend(qkv, self.attn_drop.p if self.training else 0.0, seq_lens)
        parts = qkv.split(seq_lens, dim=1) if seq_lens else (qkv,)
        return torch.cat([self._attend_in_steps(part) for part in parts], dim=1)

    def _attend_in_steps(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (batch, heads, seq_len, head_dim)
        weights = (q * self.scale) @ k.transpose(-2, -1)
        return (self.attn_drop(weights.softmax(dim=-1)) @ v).transpose(1, 2)


class TimmPatchEmbed(PatchEmbed):
    """`PatchEmbed` that can pad images to whole patches and tells the grid of patches.

    Args:
        dynamic_img_size: take images of every size and return (batch, rows, columns, hidden). Otherwise take only
            images of `img_size` and return (batch, patches, hidden).
        dynamic_img_pad: pad images at the bottom and right.
        **kwargs: arguments of `PatchEmbed`.
    """

    def __init__(self, dynamic_img_size: bool = True, dynamic_img_pad: bool = False, **kwargs: Any) -> None:
        super().__init__(flatten_embedding=not dynamic_img_size, **kwargs)
        self.dynamic_img_pad = dynamic_img_pad
        self.strict_img_size = not dynamic_img_size
        self.set_img_size(self.img_size)

    def set_img_size(self, img_size: tuple[int, int]) -> None:
        """Sets the image size that the position table is for, under timm's names and the reference's."""
        self.img_size = img_size
        self.grid_size = self.patches_resolution = (
            img_size[0] // self.patch_size[0],
            img_size[1] // self.patch_size[1],
        )
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """The side of a patch in pixels."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches in images (height, width), after padding if they are padded."""
        sizes = [-(-size // patch) * patch for size, patch in zip(img_size, self.patch_size, strict=True)]
        height, width = sizes if self.dynamic_img_pad else img_size
        (down, across), (patch_height, patch_width) = self.stride, self.patch_size
        return (height - patch_height) // down + 1, (width - patch_width) // across + 1

    def forward(self, x: Tensor) -> Tensor:
        check_is_tensor(x)
        return super().forward(pad_to_patches(x, self.patch_size) if self.dynamic_img_pad else x)

    def check(self, x: Tensor) -> None:
        super().check(x)
        if self.strict_img_size:
            check_img_size(x, self.img_size)


def pad_to_patches(x: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Images (batch, channels, height, width) padded to whole patches with zeros at the bottom and right."""
    below, right = -x.shape[-2] % patch_size[0], -x.shape[-1] % patch_size[1]
    return F.pad(x, (0, right, 0, below))


@torch.fx.wrap
@torch.fx.node.has_side_effect
def check_img_size(x: Tensor, img_size: tuple[int, int]) -> None:
    """Raises `ValueError` if the images `x` are not of the size `img_size`."""
    if tuple(x.shape[2:]) != img_size:
        raise InvalidValueError(
            f"With dynamic_img_size=False this model takes images of {img_size[0]} x {img_size[1]} pixels, got "
            f"{x.shape[2]} x {x.shape[3]}. Do not set dynamic_img_size, or call set_input_size."
        )
