"""DINOv2, a vision transformer: an image becomes a sequence of tokens, which a stack of blocks refines.

    tokens = [CLS, registers, patches]     CLS and patches have a position, registers do not
    tokens = block(tokens)                 depth times
    tokens = norm(tokens)                  CLS describes the image, a patch token its part of the image

The class has the constructor, attributes, methods and state-dict keys of the reference (facebookresearch/dinov2,
dinov2/models/vision_transformer.py), so the reference's checkpoints, and code written for it, work unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypedDict, overload

import numpy as np
import torch
import torch.fx
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinov2_fast.attention_features import AttentionFeatures
from dinov2_fast.block import Block, chunk_blocks
from dinov2_fast.errors import InvalidTypeError, InvalidValueError, UnsupportedError
from dinov2_fast.layers import FFN_LAYERS, GELU, LayerNorm, PatchEmbed, check_is_tensor, check_masks, to_pair
from dinov2_fast.ops.choices import format_choices
from dinov2_fast.position_embeddings import (
    POSITION_INTERPOLATIONS,
    Grid,
    PositionInterpolation,
    is_native,
    position_grid,
    position_interpolation,
    resample_position_embeddings,
)

torch.fx.wrap("check_is_tensor")
torch.fx.wrap("resample_position_embeddings")
torch.fx.wrap("position_grid")


class BackboneFeatures(TypedDict):
    """What `DinoVisionTransformer.forward_features` returns for a batch."""

    x_norm_clstoken: Tensor  # (batch, hidden)
    x_norm_regtokens: Tensor  # (batch, registers, hidden)
    x_norm_patchtokens: Tensor  # (batch, patches, hidden)
    x_prenorm: Tensor  # (batch, tokens, hidden), before the last norm
    masks: Tensor | None  # those of the call


class DinoVisionTransformer(AttentionFeatures):
    """A DINOv2 backbone. The arguments are the reference's; `dinov2_fast.configs` has the eight published models.

    Args:
        img_size: image size in pixels that the position table is for, an int or (height, width).
        patch_size: side of a patch in pixels.
        in_chans, embed_dim, depth, num_heads: channels of an image, hidden size, number of blocks, attention heads.
        mlp_ratio: hidden size of the feed-forward network divided by `embed_dim`. SwiGLU uses two thirds of it.
        qkv_bias, ffn_bias, proj_bias: whether these linears have a bias.
        drop_path_rate: of stochastic depth. It grows linearly up to the last block, or is the same in all blocks with
            `drop_path_uniform`.
        init_values: initial LayerScale; None or 0 for no LayerScale.
        embed_layer, act_layer, block_fn: classes of the parts.
        ffn_layer: "mlp", "swiglu", "swiglufused" or "identity".
        block_chunks: number of `BlockChunk`, or more if it does not divide `depth`; 0 for a flat list, as published.
        num_register_tokens: registers between CLS and patches.
        interpolate_antialias, interpolate_offset: how positions are resampled; see `position_interpolation`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        ffn_bias: bool = True,
        proj_bias: bool = True,
        drop_path_rate: float = 0.0,
        drop_path_uniform: bool = False,
        init_values: float | None = None,
        embed_layer: Callable[..., PatchEmbed] = PatchEmbed,
        act_layer: Callable[..., nn.Module] = GELU,
        block_fn: Callable[..., nn.Module] = Block,
        ffn_layer: str = "mlp",
        block_chunks: int = 1,
        num_register_tokens: int = 0,
        interpolate_antialias: bool = False,
        interpolate_offset: float = 0.1,
    ) -> None:
        super().__init__()
        if ffn_layer not in FFN_LAYERS:
            raise InvalidValueError(f"There is no ffn_layer {ffn_layer!r}; choose one of {', '.join(FFN_LAYERS)}.")
        if num_register_tokens < 0:
            raise InvalidValueError(f"num_register_tokens must not be negative, got {num_register_tokens}.")
        norm_layer = partial(LayerNorm, eps=1e-6)
        self.embed_dim = embed_dim
        self.num_features: Any = embed_dim
        self.num_tokens = 1
        self.n_blocks = depth
        self.num_heads = num_heads
        self.patch_size = patch_size
        self.num_register_tokens = num_register_tokens
        self.interpolate_antialias = interpolate_antialias
        self.interpolate_offset = interpolate_offset
        self.grad_checkpointing = False
        self.loaded_from: str | None = None  # set by `load` and `create_model`: the file, or "random:SEED"

        self.patch_embed = embed_layer(img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + self.num_tokens, embed_dim))
        self.register_tokens = (
            nn.Parameter(torch.zeros(1, num_register_tokens, embed_dim)) if num_register_tokens else None
        )

        rates = [drop_path_rate] * depth if drop_path_uniform else np.linspace(0, drop_path_rate, depth).tolist()
        blocks = [
            block_fn(
                dim=embed_dim,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                proj_bias=proj_bias,
                ffn_bias=ffn_bias,
                drop_path=rate,
                norm_layer=norm_layer,
                act_layer=act_layer,
                ffn_layer=FFN_LAYERS[ffn_layer],
                init_values=init_values,
            )
            for rate in rates
        ]
        self.chunked_blocks = block_chunks > 0
        self.blocks: Any = nn.ModuleList(chunk_blocks(blocks, block_chunks) if self.chunked_blocks else blocks)
        self.norm = norm_layer(embed_dim)
        self.head: nn.Module = nn.Identity()
        self.mask_token: nn.Parameter | None = nn.Parameter(torch.zeros(1, embed_dim))
        self.init_weights()

    def init_weights(self) -> None:
        """The reference's initialisation, from torch's global generator."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def stride(self) -> tuple[int, int]:
        """Pixels from one patch to the next, down and across: the patch size, or less if patches overlap.

        Set it to an int or a pair for finer maps from the same weights: ``(size - patch_size) // stride + 1`` patches
        per side, with positions resampled to that grid (Amir et al., arXiv:2112.05814). If the stride does not divide
        ``size - patch_size``, the last pixels are ignored. It is not saved with the weights.

        Raises:
            ValueError: the stride set is below 1 or above the patch size.
        """
        return to_pair(getattr(self.patch_embed, "stride", self.patch_size))

    @stride.setter
    def stride(self, stride: int | tuple[int, int]) -> None:
        self.patch_embed.stride = stride

    def patch_grid(self, height: int, width: int) -> Grid:
        """Rows and columns of whole patches in an image of `height` x `width` pixels."""
        (down, across), patch = self.stride, self.patch_size
        return (height - (patch - down)) // down, (width - (patch - across)) // across

    @property
    def position_interpolation(self) -> str:
        """How the position table is resampled: "offset", "size" or "antialias" (`dinov2_fast.position_embeddings`).

        Setting it sets `interpolate_offset` and `interpolate_antialias`. Any other combination of them is "custom".
        """
        return next((name for name, how in POSITION_INTERPOLATIONS.items() if how == self._interpolation), "custom")

    @position_interpolation.setter
    def position_interpolation(self, name: str) -> None:
        self.interpolate_offset, self.interpolate_antialias = position_interpolation(name)

    @property
    def _interpolation(self) -> PositionInterpolation:
        return PositionInterpolation(float(self.interpolate_offset or 0.0), bool(self.interpolate_antialias))

    def interpolate_pos_encoding(self, x: Tensor, w: int, h: int) -> Tensor:
        """The position embeddings (1, 1 + patches, hidden) of an image, CLS first, in the dtype of the tokens `x`.

        As in the reference, `w` is the image's height in pixels and `h` its width.
        """
        return self._positions(*self.patch_grid(w, h)).to(x.dtype)

    def _positions(self, rows: int, columns: int) -> Tensor:
        """The position embeddings of a grid of patches, (1, 1 + rows * columns, hidden)."""
        grid = position_grid(self.pos_embed[0, 1:], getattr(self.patch_embed, "patches_resolution", (0, 0)))
        if is_native(rows, columns, grid):
            return self.pos_embed
        patches = resample_position_embeddings(self.pos_embed[0, 1:], rows, columns, self._interpolation, grid)
        return torch.cat((self.pos_embed[:, :1].to(patches.dtype), patches[None]), dim=1)

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Embeds images as tokens with positions.

        Args:
            x: (batch, channels, height, width), floating point; height and width are multiples of the patch size.
            masks: (batch, patches) bool. The mask token replaces the patches that are True, before positions are added.

        Returns:
            (batch, 1 + registers + patches, hidden).
        """
        check_is_tensor(x)
        height, width = x.shape[-2:]
        x = self.patch_embed(x)
        if masks is not None:
            if self.mask_token is None:
                raise InvalidValueError("masks were given, but this model has no mask token.")
            x = torch.where(check_masks(masks, x).unsqueeze(-1), self.mask_token.to(x.dtype), x)
        return self._add_positions(x, height, width)

    def _add_positions(self, x: Tensor, height: int, width: int) -> Tensor:
        """All tokens with positions, from the patches (batch, patches, hidden) of images of that size."""
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = x + self.interpolate_pos_encoding(x, height, width)
        if self.register_tokens is not None:
            x = torch.cat((x[:, :1], self.register_tokens.expand(x.shape[0], -1, -1), x[:, 1:]), dim=1)
        return x

    def embed(self, images: Tensor) -> Tensor:
        return self.prepare_tokens_with_masks(images)

    def grid(self, images: Tensor) -> Grid:
        height, width = images.shape[-2:]
        return self.patch_grid(height, width)

    def forward(self, x: Tensor | list[Tensor], masks: Any = None, is_training: bool = False) -> Any:
        """The normalised CLS token (batch, hidden), passed through `head`, which is the identity unless replaced.

        Args:
            x, masks: as for `forward_features`. A list of batches needs ``is_training=True``.
            is_training: return the result of `forward_features`. Not keyword-only, because the legacy ONNX exporter
                passes every default by position.
        """
        features = self.forward_features(x, masks)
        if is_training:
            return features
        if isinstance(features, list):
            raise InvalidTypeError(
                "A list of batches has one result per batch: call the model with is_training=True, or use "
                "forward_features."
            )
        return self.head(features["x_norm_clstoken"])

    @overload
    def forward_features(self, x: Tensor, masks: Tensor | None = None) -> BackboneFeatures: ...
    @overload
    def forward_features(self, x: list[Tensor], masks: list[Tensor | None] | None = None) -> list[BackboneFeatures]: ...
    def forward_features(self, x: Tensor | list[Tensor], masks: Any = None) -> Any:
        """All tokens of the last block, as a dictionary.

        Args:
            x: (batch, channels, height, width), or a list of such batches of different sizes, which run as one.
            masks: (batch, patches) bool, or None. For a list of batches, a list of masks, or None for no masks.

        Returns:
            The dictionary `BackboneFeatures`; for a list of batches, a list of dictionaries.
        """
        if isinstance(x, list):
            return self.forward_features_list(x, masks)
        tokens = self._run_blocks(self.prepare_tokens_with_masks(x, masks))
        return self._split_tokens(tokens, masks)

    def forward_features_list(
        self, x_list: list[Tensor], masks_list: list[Tensor | None] | None = None
    ) -> list[BackboneFeatures]:
        """`forward_features` of a list of batches of different sizes, computed together."""
        if not x_list:
            raise InvalidValueError("The list of batches is empty.")
        masks_list = [None] * len(x_list) if masks_list is None else masks_list
        if len(masks_list) != len(x_list):
            raise InvalidValueError(
                f"Got {len(x_list)} batches but {len(masks_list)} masks; give one (or None) for each."
            )
        tokens = [self.prepare_tokens_with_masks(x, masks) for x, masks in zip(x_list, masks_list, strict=True)]
        outputs = self._run_blocks(tokens)
        return [self._split_tokens(x, masks) for x, masks in zip(outputs, masks_list, strict=True)]

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """Patch tokens after chosen blocks.

        Args:
            x: (batch, channels, height, width).
            n: how many of the last blocks, or the indices of blocks, where 0 is the first.
            reshape: return (batch, hidden, rows, columns) instead of (batch, patches, hidden).
            return_class_token: return pairs (patches, CLS token (batch, hidden)).
            norm: apply the final norm.

        Returns:
            A tuple with one entry per block, in ascending order, without CLS and registers.

        Raises:
            AssertionError: there is no such block, as in the reference.
        """
        outputs = self._get_intermediate_layers_not_chunked(x, n)
        if norm:
            outputs = [self.norm(out) for out in outputs]
        patches = [out[:, 1 + self.num_register_tokens :] for out in outputs]
        if reshape:
            patches = [p.unflatten(1, self.grid(x)).permute(0, 3, 1, 2).contiguous() for p in patches]
        if return_class_token:
            return tuple(zip(patches, (out[:, 0] for out in outputs), strict=True))
        return tuple(patches)

    def _get_intermediate_layers_not_chunked(self, x: Tensor, n: int | Sequence[int] = 1) -> list[Tensor]:
        """All tokens after the blocks `n`, before the norm."""
        blocks = self._flat_blocks()
        take = set(range(len(blocks) - n, len(blocks)) if isinstance(n, int) else n)
        missing = sorted(take - set(range(len(blocks))))
        if missing:
            found = len(take) - len(missing)
            raise UnsupportedError(
                f"only {found} / {len(take)} blocks found: there is no block {', '.join(map(str, missing))}; "
                f"the blocks are 0 to {len(blocks) - 1}"
            )
        outputs = []
        x = self.prepare_tokens_with_masks(x)
        for i, block in enumerate(blocks):
            x = self._call(block, x)
            if i in take:
                outputs.append(x)
        return outputs

    _get_intermediate_layers_chunked = _get_intermediate_layers_not_chunked  # the reference's name with block chunks

    def _flat_blocks(self) -> list[Any]:
        """The blocks as one list, whether they are in chunks or not."""
        if not self.chunked_blocks:
            return list(self.blocks)
        return [block for chunk in self.blocks for block in chunk if not isinstance(block, nn.Identity)]

    def _run_blocks(self, x: Any) -> Any:
        for block in self.blocks:
            x = self._call(block, x)
        return x

    def _call(self, block: nn.Module, x: Any) -> Any:
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def _split_tokens(self, x: Tensor, masks: Tensor | None) -> BackboneFeatures:
        x_norm = self.norm(x)
        first_patch = 1 + self.num_register_tokens
        return {
            "x_norm_clstoken": x_norm[:, 0],
            "x_norm_regtokens": x_norm[:, 1:first_patch],
            "x_norm_patchtokens": x_norm[:, first_patch:],
            "x_prenorm": x,
            "masks": masks,
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training, recomputes the activations of each block (or chunk) in the backward pass, to save memory."""
        self.grad_checkpointing = enable

    def extra_repr(self) -> str:
        return "\n".join([f"position_interpolation={self.position_interpolation}", *format_choices(self.backends())])


def _factory(**sizes: Any) -> Callable[..., DinoVisionTransformer]:
    def make(patch_size: int = 16, num_register_tokens: int = 0, **kwargs: Any) -> DinoVisionTransformer:
        return DinoVisionTransformer(
            patch_size=patch_size, num_register_tokens=num_register_tokens, mlp_ratio=4, **sizes, **kwargs
        )

    return make


# The reference's constructors of each size. `dinov2_fast.configs` has the arguments of the published models.
vit_small = _factory(embed_dim=384, depth=12, num_heads=6)
vit_base = _factory(embed_dim=768, depth=12, num_heads=12)
vit_large = _factory(embed_dim=1024, depth=24, num_heads=16)
vit_giant2 = _factory(embed_dim=1536, depth=40, num_heads=24)
