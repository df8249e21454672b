"""The engine's backbones: subclasses of the model's classes with folded blocks and a folded patch embedding.

They inherit methods, arguments and outputs, and override how tokens are made and how they run through the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import Tensor

from dinov2_fast.block import pack, unpack
from dinov2_fast.errors import InvalidTypeError, InvalidValueError
from dinov2_fast.huggingface.modeling import Dinov2PreTrainedBackbone
from dinov2_fast.inference.capture import is_captured, keep_alive
from dinov2_fast.inference.fold import LinearLayout
from dinov2_fast.inference.packing import Features, Masks, check_image_list, check_mask_list, forward_packed
from dinov2_fast.inference.plan import EnginePlan
from dinov2_fast.layers import check_is_tensor, check_masks
from dinov2_fast.model import BackboneFeatures, DinoVisionTransformer
from dinov2_fast.ops._fp8 import E4M3
from dinov2_fast.ops.choices import BackendChoice, backend_choices
from dinov2_fast.timm_adapter.layers import check_img_size, pad_to_patches
from dinov2_fast.timm_adapter.model import TimmVisionTransformer, refuse_masks
from dinov2_fast.torch_private import is_traced

CACHED_SIZES = 16  # how many image sizes keep their position embeddings


class FoldedBackbone(DinoVisionTransformer):
    """The common part of the folded backbones of all faces; `fold_model.fold_backbone` makes them."""

    plan: EnginePlan
    cls_only: bool  # a plain call needs the CLS token alone, and runs the last block for that token alone
    gated: bool  # the MLPs have SwiGLU
    layouts: dict[torch.dtype, LinearLayout]  # of the linears, by the dtype of their operands
    _sizes: dict[tuple[Any, ...], tuple[Tensor, Tensor, Tensor]]

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        check_is_tensor(x)
        patches = self.patch_embed.project(x)  # type: ignore[operator]
        first, positions, biased = self._tokens_of_size(x, patches.shape[1])
        tokens = patches + biased
        if masks is not None:
            if self.mask_token is None:
                raise InvalidValueError("masks were given, but this model has no mask token.")
            masked = (self.mask_token + positions).to(tokens.dtype)
            tokens = torch.where(check_masks(masks, tokens).unsqueeze(-1), masked, tokens)
        return torch.cat((first.expand(len(x), -1, -1), tokens), dim=1)

    def _tokens_of_size(self, x: Tensor, patches: int) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors that tokens of images of one size have in common, kept for the next call.

        Returns:
            CLS plus its position, and the registers, (1, 1 + registers, hidden), in `residual_dtype`;
            the positions of patches, (patches, hidden), in fp32;
            those positions plus the bias of the projection, in `residual_dtype`.
        """
        height, width = x.shape[-2:]
        if is_traced():
            return self._make_tokens(x, patches)
        key = (height, width, x.dtype == torch.uint8, self.cls_token.device)
        if is_captured(x):
            return keep_alive(self._sizes.get(key)) or self._make_tokens(x, patches)
        if (found := self._sizes.get(key)) is None:
            if len(self._sizes) >= CACHED_SIZES:
                self._sizes.clear()
            with torch.inference_mode(False), torch.no_grad():
                found = self._make_tokens(x, patches)
            if x.is_cuda:
                torch.cuda.current_stream(x.device).synchronize()  # calls on other streams may read them next
            self._sizes[key] = found
        return found  # another thread may have cleared the dictionary

    def _make_tokens(self, x: Tensor, patches: int) -> tuple[Tensor, Tensor, Tensor]:
        height, width = x.shape[-2:]
        positions = self.interpolate_pos_encoding(self.cls_token.expand(1, 1 + patches, -1), height, width)
        positions = positions.expand(1, 1 + patches, -1)  # a user's own method may return (1, 1, hidden)
        first = self.cls_token + positions[:, :1]
        if self.register_tokens is not None:
            first = torch.cat((first, self.register_tokens), dim=1)
        biased = positions[0, 1:] + self.patch_embed.proj_for(x).bias  # type: ignore[operator]
        return first.to(self.plan.residual_dtype), positions[0, 1:], biased.to(self.plan.residual_dtype)

    def _run_blocks(self, x: Any) -> Any:
        """Runs the blocks in place, since the tokens of `prepare_tokens_with_masks` have no other user."""
        return _update_list(x, self.blocks) if isinstance(x, list) else _update_(x, self.blocks)

    def _run_for_cls(self, x: Tensor) -> Tensor:
        """The CLS token after the last block, (batch, 1, hidden)."""
        *blocks, last = self.blocks
        return last.first_token(_update_(x, blocks)).unsqueeze(1)

    def forward_features_list(
        self, x_list: list[Tensor], masks_list: list[Tensor | None] | None = None
    ) -> list[BackboneFeatures]:
        def forward(batches: list[Tensor], masks: list[Tensor | None]) -> list[Features]:
            tokens = [self.prepare_tokens_with_masks(x, mask) for x, mask in zip(batches, masks, strict=True)]
            found = [self._split_tokens(x, None) for x in self._run_blocks(tokens)]
            return [{key: value for key, value in features.items() if isinstance(value, Tensor)} for features in found]

        features, masks = self._forward_packed(x_list, masks_list, forward)
        return [cast(BackboneFeatures, {**found, "masks": mask}) for found, mask in zip(features, masks, strict=True)]

    def cls_tokens(self, x_list: list[Tensor]) -> list[Tensor]:
        """The normalised CLS tokens of each batch of a list, (batch, hidden).

        The last block runs for the CLS token alone, unless `outputs` is "all".
        """
        if self.plan.outputs == "all":
            return [found["x_norm_clstoken"] for found in self.forward_features_list(x_list)]

        def forward(batches: list[Tensor], masks: list[Tensor | None]) -> list[Features]:
            *blocks, last = self.blocks
            streams = _update_list([self.prepare_tokens_with_masks(x) for x in batches], blocks)
            cls = self.norm(torch.cat([last.first_token(x) for x in streams]))
            return [{"cls": x} for x in cls.split([len(x) for x in batches])]

        return [found["cls"] for found in self._forward_packed(x_list, None, forward)[0]]

    def _forward_packed(
        self, x_list: list[Tensor], masks_list: Masks | None, forward: Callable[..., list[Features]]
    ) -> tuple[list[Features], Masks]:
        """The features that `forward` computes of each batch of a list, and the masks, see `packing.forward_packed`."""
        check_image_list(x_list)
        patches = [rows * columns for rows, columns in map(self.grid, x_list)]
        masks = check_mask_list(masks_list, x_list, patches)
        seq_lens = [1 + self.num_register_tokens + count for count in patches]
        return forward_packed(x_list, masks, seq_lens, self.plan.max_tokens, forward), masks

    def backends(self) -> list[BackendChoice]:
        """The implementation that runs each op of the engine, and the reason."""
        device, dtype = self.cls_token.device, self.plan.dtype
        names = {dtype: {"patches", "linear.none", "layer_norm.plain"}, E4M3: set()}
        if self.cls_only:
            names[dtype].add("attention_pool")
        for block in self.blocks:
            for of, found in block.op_names().items():
                names[of] |= found
        return [row for of in names for row in backend_choices(device, of) if row.name in names[row.dtype]]


def _update_(x: Tensor, blocks: Any, seq_lens: tuple[int, ...] | None = None) -> Tensor:
    """Runs blocks, beginning with the first, on the stream `x` in place, and adds the biases that it then lacks."""
    for block in blocks:
        block.update_(x, seq_lens)
    return blocks[-1].deferred.restore_(x) if blocks else x


def _update_list(x_list: list[Tensor], blocks: Any) -> list[Tensor]:
    """`_update_` for batches that differ in length, packed into one sequence."""
    if len(x_list) == 1:
        return [_update_(x_list[0], blocks)]
    packed, seq_lens = pack(x_list)
    if seq_lens:  # none where all batches are empty
        _update_(packed, blocks, seq_lens)
    return unpack(packed, [x.shape for x in x_list])


class FoldedVisionTransformer(FoldedBackbone):
    """The reference's face."""

    def forward(self, x: Tensor | list[Tensor], masks: Any = None, is_training: bool = False) -> Any:
        if is_training or not self.cls_only:
            return super().forward(x, masks, is_training)
        if isinstance(x, list):
            raise InvalidTypeError(
                "A list of batches has one result for each: use cls_tokens, forward_features, or is_training=True."
            )
        x = self._run_for_cls(self.prepare_tokens_with_masks(x, masks))
        return self.head(self.norm(x)[:, 0])


class FoldedEncoder(FoldedBackbone, Dinov2PreTrainedBackbone):
    """The Hugging Face face."""

    def encode(
        self, x: Tensor, hidden_states: Collection[int], output_attentions: Any, blocks: int | None = None
    ) -> tuple[Tensor, dict[int, Tensor], tuple[Tensor | None, ...] | None]:
        if hidden_states or output_attentions or blocks is not None:
            return super().encode(x, hidden_states, output_attentions, blocks)
        return self._run_for_cls(x) if self.cls_only else self._run_blocks(x), {}, None


class FoldedTimmVisionTransformer(FoldedBackbone, TimmVisionTransformer):
    """timm's face."""

    def embed(self, x: Tensor) -> Tensor:
        check_is_tensor(x)
        padded = self.dynamic_img_pad and any(size % self.patch_size for size in x.shape[-2:])
        if padded and x.dtype == torch.uint8:
            raise InvalidValueError(
                f"uint8 images of {tuple(x.shape[-2:])} pixels cannot be padded to multiples of {self.patch_size}: "
                "timm pads after normalising. Give normalised images, or other sizes."
            )
        if not self.dynamic_img_size:
            check_img_size(x, self.patch_embed.img_size)
        return self.prepare_tokens_with_masks(pad_to_patches(x, self.patch_embed.patch_size) if padded else x)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:  # type: ignore[override]  # timm's signature
        if not self.cls_only:
            return super().forward(x, attn_mask, is_causal)
        refuse_masks(attn_mask, is_causal)
        return self.forward_head(self.norm(self._run_for_cls(self.embed(x))))

    def _refuse_surgery(self, *args: Any, **kwargs: Any) -> Any:
        raise AttributeError("This method changes the model: call it on the model, and the engine will follow.")

    reset_classifier = set_input_size = prune_intermediate_layers = _refuse_surgery
