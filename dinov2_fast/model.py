"""DINOv2, a vision transformer: an image becomes a sequence of tokens, a stack of blocks refines them.

    tokens = [CLS, registers, patches]     CLS and patches carry a position, registers none
    tokens = block(tokens)                 depth times
    tokens = norm(tokens)                  CLS describes the image, each patch token its place in it

The class has the constructor, attributes, methods and state-dict keys of the reference (facebookresearch/dinov2,
dinov2/models/vision_transformer.py), so its checkpoints and the code written for it work unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.fx
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinov2_fast import layouts, ops
from dinov2_fast.block import Block
from dinov2_fast.errors import InvalidStateError, InvalidTypeError, InvalidValueError, UnsupportedError
from dinov2_fast.layers import GELU, LayerNorm, Mlp, PatchEmbed, SwiGLUFFNFused, _pair, check_is_tensor
from dinov2_fast.ops.choices import BackendChoice, backend_choices, format_choices
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


class QKV(NamedTuple):
    """Queries, keys and values of chosen blocks, see `DinoVisionTransformer.qkv_features`."""

    query: Tensor
    key: Tensor
    value: Tensor


class BlockChunk(nn.Sequential):
    """Several blocks as one module, a unit for FSDP. Leading `nn.Identity` keep the indices of the state dict.

    The reference's is an `nn.ModuleList`, which FSDP2 refuses; so the reference's own FSDP policy does not find these.
    """


def _identity_ffn(**kwargs: Any) -> nn.Module:
    return nn.Identity()


_FFN_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "mlp": Mlp,
    "swiglu": SwiGLUFFNFused,
    "swiglufused": SwiGLUFFNFused,
    "identity": _identity_ffn,
}


NOT_SCRIPTABLE = (
    "torch.jit.script cannot compile this model, whose ops choose their implementation in Python. Use torch.jit.trace, "
    "torch.export or torch.compile."
)


class AnyLayout(nn.Module):
    """A DINOv2 backbone, or one and a head, that loads weights in any layout of `dinov2_fast.layouts`.

    It does so by itself and as a part of any other module. There torch's own rules hold: what fits is loaded, and the
    error of the outermost `load_state_dict` names what does not, by the names of the parameters.
    """

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """`nn.Module.load_state_dict`, for weights named and packed as any DINOv2 implementation does.

        Args:
            state_dict: the weights; see `dinov2_fast.layouts` for what is recognised.
            strict: raise if keys are missing or unexpected; otherwise they are returned.
            assign: make the tensors the parameters instead of copying into them.

        Returns:
            The named tuple ``(missing_keys, unexpected_keys)``.

        Raises:
            RuntimeError: the weights do not fit; the message names the keys and the layout. Nothing is changed then.
        """
        own = self.state_dict()
        layout, converted = _in_own_layout(state_dict, own)
        missing = [key for key in own if key not in converted]
        unexpected = [key for key in converted if key not in own]
        misshapen = [
            f"{key} {tuple(tensor.shape)} where the model has {tuple(own[key].shape)}"
            for key, tensor in converted.items()
            if key in own and tensor.shape != own[key].shape
        ]
        if misshapen or (strict and (missing or unexpected)):
            raise InvalidStateError(layouts.misfit(layout, missing, unexpected, misshapen))
        return super().load_state_dict(converted, strict=strict, assign=assign)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """What torch calls for each part of a larger module: here the weights get the names of this part's."""
        if prefix:  # else `load_state_dict` has done it
            given = {key[len(prefix) :]: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
            own = dict(chain(self.named_parameters(remove_duplicate=False), self.named_buffers(remove_duplicate=False)))
            try:
                _, given = _in_own_layout(given, own)
            except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
                error_msgs.append(f"{prefix.removesuffix('.')}: {error}")
            state_dict |= {prefix + key: tensor for key, tensor in given.items()}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _in_own_layout(state_dict: Mapping[str, Any], own: Collection[str]) -> tuple[str, dict[str, Any]]:
    """The layout that was recognised, and the weights under the names `own` of a model; others keep theirs."""
    if state_dict.keys() == set(own):
        return "facebook", dict(state_dict)
    plan = layouts.plan_conversion(state_dict)
    own_keys = {layouts.plain_key(key): key for key in own}
    optional = plan.made_up | {"mask_token"}  # which timm's models do not have
    used = [key for key in plan.recipes if key in own_keys or key not in optional]
    return plan.layout, {own_keys.get(key, key): plan.read(key) for key in used}


class DinoVisionTransformer(AnyLayout):
    """A DINOv2 backbone. The arguments are the reference's; the eight published models are in `dinov2_fast.configs`.

    Args:
        img_size: size in pixels of the images the position table is made for, an int or (height, width).
        patch_size: side of a patch in pixels.
        in_chans: channels of an image.
        embed_dim: hidden size.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden size of the feed-forward network over `embed_dim` (SwiGLU takes two thirds of it).
        qkv_bias, ffn_bias, proj_bias: biases of these linears.
        drop_path_rate: stochastic depth, growing linearly to this rate in the last block, or the same in all blocks if
            `drop_path_uniform`.
        init_values: initial LayerScale; None or 0 for none.
        embed_layer, act_layer, block_fn: classes to build from.
        ffn_layer: "mlp", "swiglu", "swiglufused" or "identity".
        block_chunks: groups of blocks (`BlockChunk`); 0 for a flat list, as in the published checkpoints.
        num_register_tokens: registers between CLS and patches.
        interpolate_antialias, interpolate_offset: how positions are resampled, see `position_interpolation`.
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
        if ffn_layer not in _FFN_LAYERS:
            raise InvalidValueError(f"There is no ffn_layer {ffn_layer!r}; choose one of {', '.join(_FFN_LAYERS)}.")
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
        self.loaded_from: str | None = None  # set by `dinov2_fast.load`: the file, or "random:SEED"

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
                ffn_layer=_FFN_LAYERS[ffn_layer],
                init_values=init_values,
            )
            for rate in rates
        ]
        self.chunked_blocks = block_chunks > 0
        self.blocks: Any = nn.ModuleList(_chunk(blocks, block_chunks) if self.chunked_blocks else blocks)
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

    # Patches and their positions

    @property
    def stride(self) -> tuple[int, int]:
        """Pixels from one patch to the next, down and across: the patch size, or less where patches overlap.

        Setting it, to an int or a pair, makes finer maps of the same weights: ``(size - patch_size) // stride + 1``
        patches a side, with positions resampled to that grid (Amir et al., arXiv:2112.05814). Where the stride does not
        divide ``size - patch_size`` the last pixels are not seen. It is a setting, and not saved with the weights.

        Raises:
            ValueError: a stride below 1 or above the patch size is set.
        """
        return _pair(getattr(self.patch_embed, "stride", self.patch_size))

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

        Setting it sets `interpolate_offset` and `interpolate_antialias`; another pair of those is called "custom".
        """
        current = PositionInterpolation(float(self.interpolate_offset or 0.0), bool(self.interpolate_antialias))
        return next((name for name, known in POSITION_INTERPOLATIONS.items() if known == current), "custom")

    @position_interpolation.setter
    def position_interpolation(self, name: str) -> None:
        self.interpolate_offset, self.interpolate_antialias = position_interpolation(name)

    def interpolate_pos_encoding(self, x: Tensor, w: int, h: int) -> Tensor:
        """The position embeddings for an image of `w` rows and `h` columns of pixels (the reference's names).

        Args:
            x: the CLS token and patch tokens (batch, 1 + patches, hidden), for their dtype.
            w, h: height and width of the image in pixels.

        Returns:
            (1, 1 + patches, hidden), CLS first, in the dtype of `x`.
        """
        return self._positions(*self.patch_grid(w, h)).to(x.dtype)

    def _positions(self, rows: int, columns: int) -> Tensor:
        """The position embeddings of a grid of patches, (1, 1 + rows * columns, hidden)."""
        grid = self._position_grid()
        if is_native(rows, columns, grid):
            return self.pos_embed
        how = PositionInterpolation(float(self.interpolate_offset or 0.0), bool(self.interpolate_antialias))
        patches = resample_position_embeddings(self.pos_embed[0, 1:], rows, columns, how, grid)
        return torch.cat((self.pos_embed[:, :1].to(patches.dtype), patches[None]), dim=1)

    def _position_grid(self) -> Grid:
        """Rows and columns of the position table: of `img_size`, or of a square where another table was put in."""
        return position_grid(self.pos_embed[0, 1:], getattr(self.patch_embed, "patches_resolution", (0, 0)))

    # From images to tokens

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Embeds images as tokens with positions.

        Args:
            x: (batch, channels, height, width), floating point, height and width multiples of the patch size.
            masks: (batch, patches) bool; masked patches are replaced by the mask token, before positions are added.

        Returns:
            (batch, 1 + registers + patches, hidden).
        """
        check_is_tensor(x)
        height, width = x.shape[-2:]
        x = self.patch_embed(x)
        if masks is not None:
            if self.mask_token is None:
                raise InvalidValueError("masks were given, but this model has no mask token.")
            x = torch.where(_check_masks(masks, x).unsqueeze(-1), self.mask_token.to(x.dtype), x)
        return self._add_positions(x, height, width)

    def _add_positions(self, x: Tensor, height: int, width: int) -> Tensor:
        """Patches (batch, patches, hidden) of images of that size to all tokens, with positions."""
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = x + self.interpolate_pos_encoding(x, height, width)
        if self.register_tokens is not None:
            x = torch.cat((x[:, :1], self.register_tokens.expand(x.shape[0], -1, -1), x[:, 1:]), dim=1)
        return x

    def embed(self, images: Tensor) -> Tensor:
        """Images as tokens (batch, 1 + registers + patches, hidden), as `forward` makes them."""
        return self.prepare_tokens_with_masks(images)

    def grid(self, images: Tensor) -> Grid:
        """Rows and columns of patches in these images, as `embed` cuts them."""
        height, width = images.shape[-2:]
        return self.patch_grid(height, width)

    # Forward passes

    def forward(self, x: Tensor | list[Tensor], masks: Any = None, is_training: bool = False) -> Any:
        """Features of a batch of images.

        Args:
            x, masks: those of `forward_features`.
            is_training: return everything `forward_features` gives instead of the CLS token alone. By position only
                for the legacy ONNX exporter, which fills in every default.

        Returns:
            The normalised CLS token (batch, hidden), or with `is_training` the dictionary (for a list of batches, the
            list of dictionaries).
        """
        features = self.forward_features(x, masks)
        if is_training:
            return features
        if isinstance(features, list):
            raise InvalidTypeError(
                "A list of batches has one result for each: call the model with is_training=True, or use "
                "forward_features."
            )
        return self.head(features["x_norm_clstoken"])

    def forward_features(self, x: Tensor | list[Tensor], masks: Any = None) -> Any:
        """All tokens of the last block.

        Args:
            x: (batch, channels, height, width), or a list of such batches of different sizes, which run as one.
            masks: (batch, patches) bool or None; for a list, a list of those (or None for no masks at all).

        Returns:
            Dictionary with `x_norm_clstoken` (batch, hidden), `x_norm_regtokens` (batch, registers, hidden),
            `x_norm_patchtokens` (batch, patches, hidden), `x_prenorm` (batch, tokens, hidden; before the last norm) and
            `masks`. For a list, a list of them.
        """
        if isinstance(x, list):
            return self.forward_features_list(x, masks)
        tokens = self._run_blocks(self.prepare_tokens_with_masks(x, masks))
        return self._split_tokens(tokens, masks)

    def forward_features_list(
        self, x_list: list[Tensor], masks_list: list[Tensor | None] | None = None
    ) -> list[dict[str, Tensor | None]]:
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
            n: the number of last blocks, or the indices of blocks (0 is the first), returned in ascending order.
            reshape: give (batch, hidden, rows, columns) instead of (batch, patches, hidden).
            return_class_token: give pairs (patches, CLS token (batch, hidden)).
            norm: apply the final norm.

        Returns:
            A tuple with one entry for each block; CLS and registers are left out of the patches.
        """
        get = (
            self._get_intermediate_layers_chunked if self.chunked_blocks else self._get_intermediate_layers_not_chunked
        )
        outputs = [self.norm(out) if norm else out for out in get(x, n)]
        patches = [out[:, 1 + self.num_register_tokens :] for out in outputs]
        if reshape:
            patches = [p.unflatten(1, self.grid(x)).permute(0, 3, 1, 2).contiguous() for p in patches]
        if return_class_token:
            return tuple(zip(patches, (out[:, 0] for out in outputs), strict=True))
        return tuple(patches)

    def _get_intermediate_layers_not_chunked(self, x: Tensor, n: int | Sequence[int] = 1) -> list[Tensor]:
        """All tokens, before the norm, after the blocks `n` of `get_intermediate_layers`."""
        return self._outputs_after(list(self.blocks), x, n)

    def _get_intermediate_layers_chunked(self, x: Tensor, n: int | Sequence[int] = 1) -> list[Tensor]:
        """The same for a model with block chunks."""
        return self._outputs_after(self._flat_blocks(), x, n)

    def _flat_blocks(self) -> list[Any]:
        """The blocks in one list."""
        if not self.chunked_blocks:
            return list(self.blocks)
        return [block for chunk in self.blocks for block in chunk if not isinstance(block, nn.Identity)]

    def _outputs_after(self, blocks: list[nn.Module], x: Tensor, n: int | Sequence[int]) -> list[Tensor]:
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

    def attention_maps(
        self,
        images: Tensor,
        layers: int | Sequence[int] = -1,
        heads: int | Sequence[int] | None = None,
        queries: slice | None = None,
    ) -> Tensor:
        """Attention weights, by default those of the CLS token on the patches, as one map for each head.

        Only the rows, heads and blocks that are asked for are computed. Gradients flow where autograd records.

        Args:
            images: as `forward` takes them, of any size.
            layers: blocks, 0 is the first and -1 the last; in the order wanted.
            heads: 0 is the first and -1 the last; None for all.
            queries: None for the CLS token, with its weights on CLS and registers left out (so a map sums to less than
                1); or tokens in the order CLS, registers, patches, whose whole rows are given: ``slice(None)`` is all
                of them, ``slice(1 + registers, None)`` the patches.

        Returns:
            (batch, layers, heads, rows, columns) of patches; with `queries` (batch, layers, heads, queries, tokens),
            each row summing to 1. In the dtype of the weights.

        Raises:
            ValueError: there is no such block or head.
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
        """Queries, keys and values of chosen blocks: the features that correspondence and segmentation methods read.

        Args:
            images: as `forward` takes them, of any size.
            layers: blocks, 0 is the first and -1 the last; in the order wanted.
            reshape: give maps of the patches, the channels of all heads side by side.

        Returns:
            `query`, `key` and `value`, each (batch, layers, heads, tokens, head_dim) in the order CLS, registers,
            patches, with which ``softmax(query @ key.mT / head_dim**0.5)`` is the attention; with `reshape` each
            (batch, layers, hidden, rows, columns). In the dtype of the weights.

        Raises:
            ValueError: there is no such block.
        """
        take = _indices(layers, len(self._flat_blocks()), "block")
        found = dict(self._projected(images, take))
        qkv = torch.stack([found[i] for i in take]).permute(3, 1, 0, 4, 2, 5)  # (3, batch, layers, heads, tokens, dim)
        if reshape:
            patches = qkv[..., 1 + self.num_register_tokens :, :].unflatten(-2, self.grid(images))
            qkv = patches.permute(0, 1, 2, 3, 6, 4, 5).flatten(3, 4).contiguous()
        return QKV(*qkv)

    def _projected(self, images: Tensor, layers: list[int]) -> Iterator[tuple[int, Tensor]]:
        """The packed queries, keys and values (batch, tokens, 3, heads, head_dim) of blocks; none after them is run."""
        x, last = self.embed(images), max(layers)
        for i, block in enumerate(self._flat_blocks()[: last + 1]):
            if i in layers:
                yield i, block.attn.project_qkv(block.norm1(x))
            if i < last:
                x = self._call(block, x)

    def _run_blocks(self, x: Any) -> Any:
        for block in self.blocks:
            x = self._call(block, x)
        return x

    def _call(self, block: nn.Module, x: Any) -> Any:
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def _split_tokens(self, x: Tensor, masks: Tensor | None) -> dict[str, Tensor | None]:
        x_norm = self.norm(x)
        first_patch = 1 + self.num_register_tokens
        return {
            "x_norm_clstoken": x_norm[:, 0],
            "x_norm_regtokens": x_norm[:, 1:first_patch],
            "x_norm_patchtokens": x_norm[:, first_patch:],
            "x_prenorm": x,
            "masks": masks,
        }

    # Settings and reports

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.cls_token.device

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the parameters."""
        return self.cls_token.dtype

    def __prepare_scriptable__(self) -> Any:
        """What torch.jit.script asks for first."""
        raise InvalidTypeError(NOT_SCRIPTABLE)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    def backends(self) -> list[BackendChoice]:
        """Which implementation of each op runs for this model's device, dtype and mode, and why."""
        parameter = next(parameter for parameter in self.parameters() if parameter.is_floating_point())
        return backend_choices(parameter.device, parameter.dtype, self.training, only_trainable=True)

    def extra_repr(self) -> str:
        return "\n".join([f"position_interpolation={self.position_interpolation}", *format_choices(self.backends())])


def _chunk(blocks: list[nn.Module], chunks: int) -> list[nn.Module]:
    size = max(len(blocks) // chunks, 1)
    return [BlockChunk(*[nn.Identity()] * i, *blocks[i : i + size]) for i in range(0, len(blocks), size)]


def _indices(asked: int | Sequence[int], count: int, what: str) -> list[int]:
    """Indices from 0 on, in the order asked for."""
    indices = [asked] if isinstance(asked, int) else list(asked)
    outside = [i for i in indices if not -count <= i < count]
    if outside or not indices:
        wrong = f"There is no {what} {outside[0]}" if outside else f"No {what} was asked for"
        raise InvalidValueError(f"{wrong}; the {what}s of this model are 0 to {count - 1}, or -{count} to -1.")
    return [i % count for i in indices]


def _check_masks(masks: Tensor, x: Tensor) -> Tensor:
    if masks.shape != x.shape[:2]:
        raise InvalidValueError(
            f"masks must be (batch, patches) = {tuple(x.shape[:2])} for these images, got {tuple(masks.shape)}."
        )
    if masks.dtype != torch.bool:
        raise InvalidTypeError(f"masks must be bool (True: replace the patch by the mask token), got {masks.dtype}.")
    return masks


def _factory(**sizes: Any) -> Callable[..., DinoVisionTransformer]:
    def make(patch_size: int = 16, num_register_tokens: int = 0, **kwargs: Any) -> DinoVisionTransformer:
        return DinoVisionTransformer(
            patch_size=patch_size, num_register_tokens=num_register_tokens, mlp_ratio=4, **sizes, **kwargs
        )

    return make


vit_small = _factory(embed_dim=384, depth=12, num_heads=6)
vit_base = _factory(embed_dim=768, depth=12, num_heads=12)
vit_large = _factory(embed_dim=1024, depth=24, num_heads=16)
vit_giant2 = _factory(embed_dim=1536, depth=40, num_heads=24)
