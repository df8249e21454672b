"""`TimmVisionTransformer`: the model with the methods, arguments and outputs of timm 1.0.31's VisionTransformer.

Parameters have this package's names. ``convert_state_dict(model.state_dict(), to="timm")`` gives timm's names.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from dinov2_fast.block import Block
from dinov2_fast.errors import InvalidValueError
from dinov2_fast.layers import LayerNorm, check_is_tensor, to_pair
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.position_embeddings import Grid
from dinov2_fast.timm_adapter.layers import TimmAttention, TimmPatchEmbed

POOLS = ("", "token", "avg", "avgmax", "max")
Indices = int | Sequence[int] | None

torch.fx.wrap("check_is_tensor")


class TimmVisionTransformer(DinoVisionTransformer):
    """A `DinoVisionTransformer` with the methods of timm's VisionTransformer; `create_model` makes one.

    Args:
        num_classes: outputs of the classifier `head`; 0 for no classifier.
        global_pool: which of the tokens (batch, tokens, hidden) the head takes: "token" the first, "avg", "max" or
            "avgmax" a mean or maximum of the patch tokens, "" all of them.
        fc_norm: normalise after pooling instead of before. By default only if patch tokens are pooled.
        drop_rate: dropout before the head.
        pos_drop_rate, attn_drop_rate: dropout of the embedded tokens and of the attention weights.
        dynamic_img_size: take images of every size, otherwise only of `img_size`. `patch_embed` returns
            (batch, rows, columns, hidden) with it and (batch, patches, hidden) without.
        dynamic_img_pad: pad images at the bottom and right to whole patches.
        **kwargs: arguments of `DinoVisionTransformer`, such as `drop_path_rate` or `img_size`, the image size in pixels
            that the position table is for.

    The attention weights (batch, heads, seq_len, seq_len) pass through ``blocks[i].attn.attn_drop`` if that has a hook
    or if ``blocks[i].attn.fused_attn`` is False. torch.fx can trace the model, torch.jit.script cannot compile it.
    """

    def __init__(
        self,
        num_classes: int = 0,
        global_pool: str = "token",
        fc_norm: bool | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        dynamic_img_size: bool = True,
        dynamic_img_pad: bool = False,
        **kwargs: Any,
    ) -> None:
        embed_layer = partial(
            kwargs.pop("embed_layer", TimmPatchEmbed),
            dynamic_img_size=dynamic_img_size,
            dynamic_img_pad=dynamic_img_pad,
        )
        block_fn = partial(kwargs.pop("block_fn", Block), attn_class=TimmAttention, attn_drop=attn_drop_rate)
        super().__init__(**{"block_chunks": 0, **kwargs}, embed_layer=embed_layer, block_fn=block_fn)
        if self.chunked_blocks:
            raise InvalidValueError("timm's models have no block chunks: leave block_chunks at 0.")
        self.mask_token = None  # timm has none, and in training it would be an unused parameter
        for block in self.blocks:
            block.subset_threshold = 1.0  # timm computes the branches of all images at every rate
        self.blocks = nn.Sequential(*self.blocks)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.patch_drop: nn.Module = nn.Identity()
        self.norm_pre: nn.Module = nn.Identity()
        self.attn_pool: nn.Module | None = None
        self.num_classes = num_classes
        self.global_pool = _check_pool(global_pool)
        self.dynamic_img_size = dynamic_img_size
        self.dynamic_img_pad = dynamic_img_pad
        self.in_chans = self.patch_embed.in_chans
        self.head_hidden_size = self.embed_dim
        self.has_class_token = True
        self.no_embed_class = self.num_register_tokens > 0
        self.pool_include_prefix = False
        self.num_reg_tokens = self.num_register_tokens
        self.num_prefix_tokens = 1 + self.num_register_tokens
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": self.embed_dim, "reduction": self.patch_size}
            for i in range(self.n_blocks)
        ]
        self.fc_norm: nn.Module = nn.Identity()
        if (global_pool in ("avg", "avgmax", "max")) if fc_norm is None else fc_norm:
            self.norm = nn.Identity()  # type: ignore[assignment]  # as timm does
            self.fc_norm = LayerNorm(self.embed_dim, eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._new_head(num_classes)
        self.default_cfg: dict[str, Any] = {}
        self.pretrained_cfg: dict[str, Any] = {}

    def _new_head(self, num_classes: int) -> nn.Module:
        if not num_classes:
            return nn.Identity()
        head = nn.Linear(self.embed_dim, num_classes, device=self.cls_token.device, dtype=torch.float32)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head.to(self.cls_token.dtype)  # only now: trunc_normal_ puts outliers into a bfloat16 tensor

    @property
    def reg_token(self) -> nn.Parameter | None:
        """The registers (1, registers, hidden); `register_tokens` in the state dict."""
        return self.register_tokens

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Resamples the position table to images of another size. The new table is a new parameter.

        With `dynamic_img_size` the model still takes images of every size, and resamples the new table for them.

        Args:
            img_size: in pixels, an int or (height, width); None for no change.
            patch_size: None or the model's own. The patch embedding is not resampled.

        Raises:
            ValueError: another patch size, or images smaller than a patch.
        """
        if patch_size is not None and to_pair(patch_size) != self.patch_embed.patch_size:
            raise InvalidValueError(
                f"patch_size={patch_size} cannot be set: the patch embedding has patches of {self.patch_size} pixels. "
                "Resize the images instead."
            )
        height, width = self.patch_embed.img_size if img_size is None else to_pair(img_size)
        if min(height, width) < self.patch_size:
            raise InvalidValueError(f"img_size={img_size} is smaller than one patch of {self.patch_size} pixels.")
        if (height // self.patch_size, width // self.patch_size) != self.patch_embed.patches_resolution:
            with torch.no_grad():
                table = self._positions(height // self.patch_size, width // self.patch_size).to(self.pos_embed.dtype)
            self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
        embed: Any = self.patch_embed
        embed.set_img_size((height, width))

    def forward(  # type: ignore[override]  # timm's signature, not the reference's
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Logits of images (batch, channels, height, width); without a classifier, pooled features."""
        return self.forward_head(self.forward_features(x, attn_mask, is_causal))

    def forward_features(  # type: ignore[override]  # timm's signature
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """All tokens, normalised: (batch, 1 + registers + patches, hidden). A mask raises `ValueError`."""
        refuse_masks(attn_mask, is_causal)
        return self.norm(self._run_blocks(self.embed(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The logits of tokens (batch, tokens, hidden); with `pre_logits`, the input of the classifier."""
        x = self.head_drop(self.fc_norm(self.pool(x)))
        return x if pre_logits else self.head(x)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens (batch, tokens, hidden) pooled by `pool_type`, or `global_pool`, to (batch, hidden); for "", all."""
        pool_type = self.global_pool if pool_type is None else _check_pool(pool_type)
        patches = x[:, self.num_prefix_tokens :]
        if pool_type == "token":
            return x[:, 0]
        if pool_type == "avg":
            return patches.mean(dim=1)
        if pool_type == "max":
            return patches.amax(dim=1)
        if pool_type == "avgmax":
            return 0.5 * (patches.amax(dim=1) + patches.mean(dim=1))
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """Outputs of chosen blocks, in ascending order.

        Args:
            x: images (batch, channels, height, width).
            indices: how many of the last blocks, or the indices of blocks, also negative; None for all.
            return_prefix_tokens: also return CLS and registers.
            norm: apply the final norm to the outputs of the blocks.
            stop_early: do not run the blocks after the last one chosen.
            output_fmt: "NCHW" for maps (batch, hidden, rows, columns), "NLC" for (batch, patches, hidden).
            intermediates_only: do not return the final features.
            output_dict: return a dictionary of `image_intermediates`, `image_intermediates_prefix`, `image_features`.
            attn_mask, is_causal: must be None and False: every token attends to all tokens.

        Returns:
            The final features (batch, tokens, hidden), normalised, and the list of outputs; with `intermediates_only`
            only the list. With `return_prefix_tokens` its entries are pairs (output, (batch, 1 + registers, hidden)).

        Raises:
            ValueError: there is no such block or format, or a mask is given.
        """
        refuse_masks(attn_mask, is_causal)
        if output_fmt not in ("NCHW", "NLC"):
            raise InvalidValueError(f"There is no output_fmt {output_fmt!r}; choose one of NCHW, NLC.")
        take = _take_indices(len(self.blocks), indices)
        grid, x, outputs = self.grid(x), self.embed(x), []
        for i, block in enumerate(self.blocks[: max(take) + 1] if stop_early else self.blocks):
            x = self._call(block, x)
            if i in take:
                outputs.append(self.norm(x) if norm else x)
        prefix = [out[:, : self.num_prefix_tokens] for out in outputs]
        outputs = [out[:, self.num_prefix_tokens :] for out in outputs]
        if output_fmt == "NCHW":
            outputs = [out.unflatten(1, grid).permute(0, 3, 1, 2).contiguous() for out in outputs]
        if output_dict:
            given: dict[str, Any] = {"image_intermediates": outputs}
            if return_prefix_tokens:
                given["image_intermediates_prefix"] = prefix
            return given if intermediates_only else {**given, "image_features": self.norm(x)}
        chosen = list(zip(outputs, prefix, strict=True)) if return_prefix_tokens else outputs
        return chosen if intermediates_only else (self.norm(x), chosen)

    def get_intermediate_layers(  # type: ignore[override]  # timm's signature, not the reference's
        self,
        x: Tensor,
        n: Indices = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: Tensor | None = None,
    ) -> list[Any]:
        """`forward_intermediates` with timm's older arguments. Returns a list, by default without the norm."""
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
            attn_mask=attn_mask,
        )

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """`embed` by the reference's name. There is no mask token, so masks raise `ValueError`."""
        if masks is not None:
            raise InvalidValueError("masks were given, but this model has no mask token.")
        return self.embed(x)

    def embed(self, images: Tensor) -> Tensor:
        """Images as tokens (batch, 1 + registers + patches, hidden). With `dynamic_img_pad` they are padded first."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(images))))

    def _pos_embed(self, x: Tensor) -> Tensor:
        """All tokens with positions (batch, 1 + registers + patches, hidden), from the output of `patch_embed`."""
        height, width = self.patch_embed.img_size
        if self.dynamic_img_size:
            (down, across), patch = self.stride, self.patch_size
            height, width = (x.shape[1] - 1) * down + patch, (x.shape[2] - 1) * across + patch
            x = x.flatten(1, 2)
        return self.pos_drop(self._add_positions(x, height, width))

    def _run_blocks(self, x: Any) -> Any:
        return super()._run_blocks(x) if self.grad_checkpointing else self.blocks(x)

    def grid(self, images: Tensor) -> Grid:
        """Rows and columns of patches in these images, after padding if they are padded."""
        check_is_tensor(images)
        if not self.dynamic_img_pad:
            return super().grid(images)
        height, width = (-(-size // self.patch_size) * self.patch_size for size in images.shape[-2:])
        return self.patch_grid(height, width)

    def get_classifier(self) -> nn.Module:
        """The classifier, or `nn.Identity`."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a random one (0 classes: by none) and, if given, `global_pool`."""
        if global_pool is not None:
            self.global_pool = _check_pool(global_pool)
        self.num_classes = num_classes
        self.head = self._new_head(num_classes).train(self.training)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the blocks after the last of `indices`; with `prune_norm` and `prune_head`, also norm and head.

        Returns:
            `indices` counted from the first block.
        """
        take = _take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max(take) + 1]
        self.n_blocks = len(self.blocks)
        if prune_norm:
            self.norm = nn.Identity()  # type: ignore[assignment]  # as timm does
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return take

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, besides norms and biases."""
        return {"pos_embed", "cls_token", "register_tokens"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that assign each parameter to a depth, for learning rates that depend on the depth."""
        return {
            "stem": r"^cls_token|register_tokens|pos_embed|patch_embed|norm_pre",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


def _check_pool(global_pool: str) -> str:
    if global_pool not in POOLS:
        raise InvalidValueError(
            f"There is no global_pool {global_pool!r}; choose one of {', '.join(map(repr, POOLS))}."
        )
    return global_pool


def _take_indices(blocks: int, indices: Indices) -> list[int]:
    """The argument `indices` of `forward_intermediates` as indices counted from the first block."""
    if indices is None or isinstance(indices, int):
        last = blocks if indices is None else indices
        if not 0 < last <= blocks:
            raise InvalidValueError(f"The last {last} blocks were asked for, but the model has {blocks}.")
        return list(range(blocks - last, blocks))
    if not all(-blocks <= i < blocks for i in indices) or not indices:
        raise InvalidValueError(
            f"The blocks are 0 to {blocks - 1}, or -{blocks} to -1 counted from the last; got {list(indices)}."
        )
    return [i % blocks for i in indices]


@torch.fx.wrap
@torch.fx.node.has_side_effect
def refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    """Raises `ValueError` if a mask is given."""
    if attn_mask is not None or is_causal:
        raise InvalidValueError("attn_mask and is_causal are not supported: every token attends to all tokens.")
