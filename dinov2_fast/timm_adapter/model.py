"""timm's face of the model: `create_model` in place of ``timm.create_model``, for timm's eight DINOv2 names.

Methods, arguments and outputs are those of timm 1.0.31's VisionTransformer and of its ``features_only=True``;
timm is not needed. Parameters have this package's names, and weights in any layout load:
``convert_state_dict(model.state_dict(), to="timm")`` gives timm's.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from dinov2_fast.base_module import NOT_SCRIPTABLE
from dinov2_fast.block import Block
from dinov2_fast.configs import BACKBONES, BackboneConfig
from dinov2_fast.data.image_processor import IMAGENET_MEAN, IMAGENET_STD
from dinov2_fast.errors import InvalidTypeError, InvalidValueError, WeightsError
from dinov2_fast.layers import LayerNorm, check_is_tensor, to_pair
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.position_embeddings import Grid
from dinov2_fast.timm_adapter.layers import TimmAttention, TimmPatchEmbed
from dinov2_fast.weights.files import open_weights
from dinov2_fast.weights.load import load

POOLS = ("", "token", "avg", "avgmax", "max")
TAG = ".lvd142m"  # of the weights, which timm's names end with
TRAINED_SIZE = 518  # pixels that the position table of the published weights is for
Indices = int | Sequence[int] | None

# Arguments that timm's scripts give: those without an effect, and those that may say what is so anyway.
IGNORED = ("exportable", "no_jit")
SO_ANYWAY: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("scriptable", "qk_norm", "scale_attn_norm", "scale_mlp_norm", "pre_norm", "fix_init"), (False,)),
    **dict.fromkeys(("pool_include_prefix", "patch_drop_rate", "proj_drop_rate"), (False,)),
    **dict.fromkeys(("class_token", "final_norm"), (True,)),
    "pos_embed": ("learn",),
    "weight_init": ("", "skip"),
    "attn_layer": ("", "attn"),
    "feature_cls": ("getter",),
}

torch.fx.wrap("check_is_tensor")


def create_model(
    model_name: str,
    pretrained: bool = False,
    checkpoint_path: str | Path | None = None,
    features_only: bool = False,
    out_indices: int | Sequence[int] = 3,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> Any:
    """A DINOv2 by timm's name.

    Unlike timm's, the model by default takes images of any size that is a multiple of the patch size: its position
    table is resampled for each, as timm's with ``dynamic_img_size=True``. The resampling is timm's; Meta's
    is another one in models without registers: set ``model.position_interpolation = "offset"`` for that.

    Args:
        model_name: such as "vit_small_patch14_dinov2" or "vit_small_patch14_reg4_dinov2.lvd142m".
        pretrained: load the published weights; a classifier (`num_classes`) is initialised at random.
        checkpoint_path: a file to load afterwards, in any layout.
        features_only: give a `FeatureGetter`, whose forward pass returns feature maps.
        out_indices: its blocks: the last so many, or their indices, which may be negative.
        device, dtype: of the parameters; None for the CPU and float32.
        pretrained_cfg: entries of `default_cfg` to replace, a dictionary or timm's object; or the tag of the weights.
            `num_classes`, `global_pool` and `input_size` become arguments, `file` is what `pretrained` loads.
        pretrained_cfg_overlay: more such entries.
        cache_dir: refused with `pretrained`; otherwise without an effect.
        **kwargs: arguments of `TimmVisionTransformer`; those that are None, or say what is so anyway, count as not
            given. With `img_size` the published position table, of 518 pixels, is resampled, as
            `TimmVisionTransformer.set_input_size` does; for another number of `in_chans` the published filters are
            summed or repeated, as timm does.

    Returns:
        A `TimmVisionTransformer` or `FeatureGetter` in training mode.

    Raises:
        TypeError: an argument that this model does not have; the message lists those it has.
        ValueError: timm has no DINOv2 of this name; the message lists the nearest.
        WeightsError: the weights cannot be found, fetched or read, or do not fit.
    """
    config = _find(model_name)
    given_cfg = _given_cfg(config, pretrained_cfg, pretrained_cfg_overlay)
    arguments = _own_arguments(config, {**_arguments_in(given_cfg), **_given(kwargs)})
    if pretrained:
        _refuse_other_sources(config, given_cfg, cache_dir)
        model = _with_published_weights(config, arguments, given_cfg.get("file"))
    else:
        model = _build(config, arguments)
    if checkpoint_path:
        _load_checkpoint(model, Path(checkpoint_path).expanduser())
    model.to(device=device, dtype=dtype)
    model.default_cfg = model.pretrained_cfg = {**_data_config(config), **given_cfg}
    return FeatureGetter(model, out_indices) if features_only else model


class TimmVisionTransformer(DinoVisionTransformer):
    """A `DinoVisionTransformer` with the methods of timm's VisionTransformer; `create_model` makes one.

    Args:
        num_classes: outputs of the classifier `head`; 0 for none.
        global_pool: what the head takes of the tokens (batch, tokens, hidden): "token" the first, "avg", "max" or
            "avgmax" of the patch tokens, or "" all of them.
        fc_norm: normalise after pooling instead of before; by default where `global_pool` is of the patch tokens.
        drop_rate: dropout before the head.
        pos_drop_rate, attn_drop_rate: dropout of the embedded tokens and of the attention weights.
        dynamic_img_size: take images of every size; without it only those of `img_size`. `patch_embed` gives
            (batch, rows, columns, hidden) with it and (batch, patches, hidden) without.
        dynamic_img_pad: pad images below and on the right to whole patches.
        **kwargs: arguments of `DinoVisionTransformer`, such as `drop_path_rate` or `img_size`, the size in pixels that
            the position table is for.

    The attention weights (batch, heads, seq_len, seq_len) go through ``blocks[i].attn.attn_drop`` where that has a hook
    or ``blocks[i].attn.fused_attn`` is False. torch.fx traces the model; torch.jit.script does not take it.
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
        self.mask_token = None  # timm has none, and training would find it unused
        for block in self.blocks:
            block.subset_threshold = 1.0  # timm drops branches of single images at every rate
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
        return head.to(self.cls_token.dtype)  # only now, since trunc_normal_ puts outliers into a bfloat16 tensor

    @property
    def reg_token(self) -> nn.Parameter | None:
        """The registers (1, registers, hidden), which the state dict has as `register_tokens`."""
        return self.register_tokens

    # Positions

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Resamples the position table for images of another size; the new one is a new parameter.

        The model still takes images of every size, whose positions are resampled from the new table.

        Args:
            img_size: in pixels, an int or (height, width), which may be no square; None leaves it.
            patch_size: the model's own, or None: there is no resampling of the patch embedding.

        Raises:
            ValueError: another patch size, or images smaller than a patch.
        """
        if patch_size is not None and to_pair(patch_size) != self.patch_embed.patch_size:
            raise InvalidValueError(
                f"patch_size={patch_size} cannot be set: the patch embedding is for patches of {self.patch_size} "
                "pixels. Resize the images instead."
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

    # Forward passes

    def forward(  # type: ignore[override]  # timm's signature, not the reference's
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Images (batch, channels, height, width) to logits, or without a classifier to pooled features."""
        return self.forward_head(self.forward_features(x, attn_mask, is_causal))

    def forward_features(  # type: ignore[override]  # timm's signature
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """All tokens, normalised: (batch, 1 + registers + patches, hidden). Masks are refused."""
        _refuse_masks(attn_mask, is_causal)
        return self.norm(self._run_blocks(self.embed(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens to logits, or with `pre_logits` to what the classifier takes."""
        x = self.head_drop(self.fc_norm(self.pool(x)))
        return x if pre_logits else self.head(x)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens (batch, tokens, hidden) to (batch, hidden), as `global_pool` or `pool_type` says."""
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
            indices: the last so many blocks, or their indices, which may be negative; None for all.
            return_prefix_tokens: give CLS and registers, too.
            norm: apply the final norm to the outputs of the blocks.
            stop_early: do not run the blocks after the last one chosen.
            output_fmt: "NCHW" for maps (batch, hidden, rows, columns), "NLC" for (batch, patches, hidden).
            intermediates_only: leave out the final features.
            output_dict: give a dictionary of `image_intermediates`, `image_intermediates_prefix`, `image_features`.
            attn_mask, is_causal: refused, every token attends to all.

        Returns:
            The final features (batch, tokens, hidden), normalised, and the list of outputs; with `intermediates_only`
            the list alone. With `return_prefix_tokens` its entries are pairs (output, (batch, 1 + registers, hidden)).

        Raises:
            ValueError: there is no such block or format, or a mask.
        """
        _refuse_masks(attn_mask, is_causal)
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
        """`forward_intermediates` with timm's older arguments: without the norm unless asked, as a list."""
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
        """Images as tokens (batch, 1 + registers + patches, hidden), by the reference's name; masks are refused."""
        if masks is not None:
            raise InvalidValueError("masks were given, but this model has no mask token.")
        return self.embed(x)

    def embed(self, images: Tensor) -> Tensor:
        """Images as tokens (batch, 1 + registers + patches, hidden), padded first with `dynamic_img_pad`."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(images))))

    def _pos_embed(self, x: Tensor) -> Tensor:
        """What `patch_embed` gives to all tokens (batch, 1 + registers + patches, hidden), with positions."""
        height, width = self.patch_embed.img_size
        if self.dynamic_img_size:
            (down, across), patch = self.stride, self.patch_size
            height, width = (x.shape[1] - 1) * down + patch, (x.shape[2] - 1) * across + patch
            x = x.flatten(1, 2)
        return self.pos_drop(self._add_positions(x, height, width))

    def _run_blocks(self, x: Any) -> Any:
        return super()._run_blocks(x) if self.grad_checkpointing else self.blocks(x)

    def grid(self, images: Tensor) -> Grid:
        """Rows and columns of patches, of padded images where they are padded."""
        check_is_tensor(images)
        if not self.dynamic_img_pad:
            return super().grid(images)
        height, width = (-(-size // self.patch_size) * self.patch_size for size in images.shape[-2:])
        return self.patch_grid(height, width)

    # What training scripts ask for

    def get_classifier(self) -> nn.Module:
        """The classifier, or `nn.Identity`."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier, initialised at random; 0 classes for none. `global_pool` may change with it."""
        if global_pool is not None:
            self.global_pool = _check_pool(global_pool)
        self.num_classes = num_classes
        self.head = self._new_head(num_classes).train(self.training)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the blocks after the last of `indices`, and the norm and head if asked.

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
        """Names of parameters that weight decay should leave alone, besides norms and biases."""
        return {"pos_embed", "cls_token", "register_tokens"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that assign each parameter to a depth, for learning rates that fall with it."""
        return {
            "stem": r"^cls_token|register_tokens|pos_embed|patch_embed|norm_pre",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


class FeatureInfo:
    """What `FeatureGetter` returns: for each block its module's name, its channels, and how many pixels a patch has.

    Without `idx`, methods answer for the blocks returned; an index, or several, asks for others.
    """

    def __init__(self, feature_info: Iterable[dict[str, Any]], out_indices: int | Sequence[int]) -> None:
        self.info = [{**entry, "index": i} for i, entry in enumerate(feature_info)]
        self.out_indices = tuple(range(-out_indices, 0)) if isinstance(out_indices, int) else tuple(out_indices)

    def from_other(self, out_indices: int | Sequence[int]) -> FeatureInfo:
        """The same for other blocks."""
        return FeatureInfo(deepcopy(self.info), out_indices)

    def get(self, key: str, idx: Indices = None) -> Any:
        """One entry, such as "num_chs"."""
        if isinstance(idx, int):
            return self.info[idx][key]
        return [self.info[i][key] for i in (self.out_indices if idx is None else idx)]

    def get_dicts(self, keys: Sequence[str] | None = None, idx: Indices = None) -> Any:
        """Dictionaries of several entries, or of all."""
        if isinstance(idx, int):
            return {key: self.info[idx][key] for key in keys or self.info[idx]}
        return [self.get_dicts(keys, i) for i in (self.out_indices if idx is None else idx)]

    def channels(self, idx: Indices = None) -> Any:
        """Channels of each map."""
        return self.get("num_chs", idx)

    def reduction(self, idx: Indices = None) -> Any:
        """Pixels of the image for each pixel of a map: the patch size."""
        return self.get("reduction", idx)

    def module_name(self, idx: Indices = None) -> Any:
        """Names of the blocks, as `named_modules` has them in the model."""
        return self.get("module", idx)

    def __getitem__(self, item: int) -> dict[str, Any]:
        return self.info[item]

    def __len__(self) -> int:
        return len(self.info)


class FeatureGetter(nn.Module):
    """Images to a list of feature maps (batch, hidden, rows, columns), of the blocks `out_indices`.

    All have the resolution of the patches, as timm's have. `model` loses the blocks and the norm that they do not need.
    For inference it may be replaced by its engine: ``features.model = optimize_for_inference(features.model)``.
    """

    def __init__(
        self,
        model: TimmVisionTransformer,
        out_indices: int | Sequence[int] = 4,
        output_fmt: str = "NCHW",
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.out_indices = model.prune_intermediate_layers(out_indices, prune_norm=not norm)
        self.feature_info = FeatureInfo(model.feature_info, self.out_indices)
        self.model = model
        self.output_fmt = output_fmt
        self.norm = norm
        self.default_cfg = self.pretrained_cfg = model.default_cfg

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.model.forward_intermediates(
            x, indices=self.out_indices, norm=self.norm, output_fmt=self.output_fmt, intermediates_only=True
        )


def _find(model_name: str) -> BackboneConfig:
    named = {config.timm_name.removesuffix(TAG): config for config in BACKBONES.values()}
    plain = model_name.removeprefix("hf-hub:").removeprefix("hf_hub:").removeprefix("timm/").removesuffix(TAG)
    if plain in named:
        return named[plain]
    near = difflib.get_close_matches(plain, named, n=3, cutoff=0.5) or list(named)
    raise InvalidValueError(f"timm has no DINOv2 called {model_name!r}; did you mean {' or '.join(near)}?")


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    """Without those that are None."""
    return {name: value for name, value in arguments.items() if value is not None}


def _given_cfg(config: BackboneConfig, pretrained_cfg: Any, overlay: dict[str, Any] | None) -> dict[str, Any]:
    """The entries of timm's `pretrained_cfg` and of what is laid over it."""
    if isinstance(pretrained_cfg, str):
        if pretrained_cfg != TAG.removeprefix("."):
            raise InvalidValueError(
                f"{config.timm_name} has no weights tagged {pretrained_cfg!r}; leave pretrained_cfg out."
            )
        pretrained_cfg = None
    if is_dataclass(pretrained_cfg) and not isinstance(pretrained_cfg, type):
        pretrained_cfg = asdict(pretrained_cfg)
    return {**_given(pretrained_cfg or {}), **(overlay or {})}


def _arguments_in(cfg: dict[str, Any]) -> dict[str, Any]:
    """What timm takes from a `pretrained_cfg` to build the model."""
    arguments = {name: cfg.get(name) for name in ("num_classes", "global_pool")}
    channels, *img_size = cfg.get("input_size") or (None,)
    return _given({**arguments, "in_chans": channels, "img_size": tuple(img_size) or None})


def _refuse_other_sources(config: BackboneConfig, cfg: dict[str, Any], cache_dir: Any) -> None:
    published = (None, config.url, "timm/", f"timm/{config.timm_name}")
    others = [name for name in ("url", "hf_hub_id", "state_dict") if cfg.get(name) not in published]
    if others and not cfg.get("file"):
        raise InvalidValueError(
            f"pretrained_cfg names other weights, by {', '.join(others)}. Give a file: as its entry `file`, or as "
            "checkpoint_path."
        )
    if cache_dir is not None:
        raise InvalidValueError("cache_dir is not read: set the environment variable DINOV2_FAST_CACHE to that folder.")


def _own_arguments(config: BackboneConfig, given: dict[str, Any]) -> dict[str, Any]:
    """Those of `given` that a `TimmVisionTransformer` takes, without what says what is so anyway."""
    if given.get("scriptable"):
        raise InvalidTypeError(f"scriptable=True: {NOT_SCRIPTABLE}")
    so_anyway = {
        **SO_ANYWAY,
        "reg_tokens": (config.num_register_tokens,),
        "no_embed_class": (config.num_register_tokens > 0,),
        "act_layer": ("gelu",) if config.ffn_layer == "mlp" else ("silu", nn.SiLU),
    }
    given = {name: value for name, value in given.items() if name not in IGNORED}
    given = {name: value for name, value in given.items() if not any(value == v for v in so_anyway.get(name, ()))}
    signatures = (inspect.signature(kind.__init__) for kind in (TimmVisionTransformer, DinoVisionTransformer))
    elsewhere = {"self", "kwargs"}
    if config.ffn_layer != "mlp" or isinstance(given.get("act_layer"), str):
        elsewhere.add("act_layer")  # SwiGLU has its own, and names of others are timm's
    known = [name for signature in signatures for name in signature.parameters if name not in elsewhere]
    unknown = [f"{name}={value!r}" for name, value in given.items() if name not in known]
    if unknown:
        raise InvalidTypeError(
            f"create_model has no {', '.join(unknown)}. A model takes {', '.join(known)}. Weights of your own go in as "
            "checkpoint_path; `dinov2_fast.load` says where published ones are looked for."
        )
    return given


def _build(config: BackboneConfig, arguments: dict[str, Any]) -> TimmVisionTransformer:
    timm_has = {"init_values": 1e-5, "interpolate_antialias": True, "interpolate_offset": 0.0}
    return TimmVisionTransformer(**{**config.constructor_arguments(), **timm_has, **arguments})


def _with_published_weights(
    config: BackboneConfig, arguments: dict[str, Any], file: str | None
) -> TimmVisionTransformer:
    """Built without storage, and given the tensors that `load` read: the weights are in memory once."""
    with torch.device("meta"):
        model = _build(config, {**arguments, "num_classes": 0, "img_size": TRAINED_SIZE})
    if isinstance(model.norm, nn.Identity):
        raise InvalidValueError(
            f"The published weights normalise before pooling: with global_pool={model.global_pool!r}, give "
            "fc_norm=False."
        )
    backbone = load(config.name, weights=file, in_chans=arguments.get("in_chans", 3))
    model.load_state_dict(backbone.state_dict(), assign=True)
    model.loaded_from = backbone.loaded_from
    model.set_input_size(arguments.get("img_size"))
    model.reset_classifier(arguments.get("num_classes", 0))
    return model


def _load_checkpoint(model: TimmVisionTransformer, path: Path) -> None:
    try:
        model.load_state_dict(open_weights(path))
    except WeightsError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        raise WeightsError(f"{path}: {error}") from error
    model.loaded_from = str(path)


def _data_config(config: BackboneConfig) -> dict[str, Any]:
    """What ``timm.data.resolve_model_data_config`` reads, and the names that timm's scripts look for."""
    return {
        "architecture": config.timm_name.removesuffix(TAG),
        "tag": TAG.removeprefix("."),
        "num_classes": 0,
        "input_size": (3, TRAINED_SIZE, TRAINED_SIZE),
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": tuple(IMAGENET_MEAN),
        "std": tuple(IMAGENET_STD),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
    }


def _check_pool(global_pool: str) -> str:
    if global_pool not in POOLS:
        raise InvalidValueError(
            f"There is no global_pool {global_pool!r}; choose one of {', '.join(map(repr, POOLS))}."
        )
    return global_pool


def _take_indices(blocks: int, indices: Indices) -> list[int]:
    """Indices counted from the first block, of `forward_intermediates`'s argument."""
    if indices is None or isinstance(indices, int):
        last = blocks if indices is None else indices
        if not 0 < last <= blocks:
            raise InvalidValueError(f"There are {blocks} blocks, so not the last {last}.")
        return list(range(blocks - last, blocks))
    if not all(-blocks <= i < blocks for i in indices) or not indices:
        raise InvalidValueError(
            f"The blocks are 0 to {blocks - 1}, or -{blocks} to -1 from the last; got {list(indices)}."
        )
    return [i % blocks for i in indices]


@torch.fx.wrap
@torch.fx.node.has_side_effect
def _refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise InvalidValueError("attn_mask and is_causal are not supported: every token attends to all.")
