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
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_fast.configs import BACKBONES, BackboneConfig
from dinov2_fast.image_processor import IMAGENET_MEAN, IMAGENET_STD
from dinov2_fast.layers import LayerNorm, _pair, check_is_tensor
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.position_embeddings import Grid
from dinov2_fast.weights import load
from dinov2_fast.weights.files import open_weights

POOLS = ("", "token", "avg", "avgmax", "max")
TAG = ".lvd142m"  # of the weights, which timm's names end with
TRAINED_SIZE = 518  # pixels that the position table of the published weights is for
Indices = int | Sequence[int] | None

# Arguments that timm's scripts give: those that say what is so anyway, and those that have to be off.
IGNORED = ("exportable", "no_jit")
OFF = ("scriptable", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate")


def create_model(
    model_name: str,
    pretrained: bool = False,
    checkpoint_path: str | Path | None = None,
    features_only: bool = False,
    out_indices: int | Sequence[int] = 3,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> Any:
    """A DINOv2 by timm's name.

    Unlike timm's, the model always takes pictures of any size that is a multiple of the patch size: its position table
    is resampled for each, as timm's with ``dynamic_img_size=True``.

    Args:
        model_name: such as "vit_small_patch14_dinov2" or "vit_small_patch14_reg4_dinov2.lvd142m".
        pretrained: load the published weights; a classifier (`num_classes`) is initialised at random.
        checkpoint_path: a file to load afterwards, in any layout.
        features_only: give a `FeatureGetter`, whose forward pass returns feature maps.
        out_indices: its blocks: the last so many, or their indices, which may be negative.
        device, dtype: of the parameters; None for the CPU and float32.
        **kwargs: arguments of `TimmVisionTransformer`; those that are None count as not given. With `img_size` the
            published position table, of 518 pixels, is resampled, as `TimmVisionTransformer.set_input_size` does.

    Returns:
        A `TimmVisionTransformer` or `FeatureGetter` in training mode.

    Raises:
        TypeError: an argument that this model does not have; the message lists those it has.
        ValueError: timm has no DINOv2 of this name; the message lists the nearest.
        WeightsError: the weights cannot be found, fetched or read.
    """
    config = _find(model_name)
    arguments = _own_arguments(kwargs)
    model = _with_published_weights(config, arguments) if pretrained else _build(config, arguments)
    if checkpoint_path is not None:
        model.load_state_dict(open_weights(Path(checkpoint_path).expanduser()))
        model.loaded_from = str(checkpoint_path)
    model.to(device=device, dtype=dtype)
    model.default_cfg = model.pretrained_cfg = _data_config(config)
    return FeatureGetter(model, out_indices) if features_only else model


class TimmVisionTransformer(DinoVisionTransformer):
    """A `DinoVisionTransformer` with the methods of timm's VisionTransformer; `create_model` makes one.

    Args:
        num_classes: outputs of the classifier `head`; 0 for none.
        global_pool: what the head takes of the tokens (batch, tokens, hidden): "token" the first, "avg", "max" or
            "avgmax" of the patch tokens, or "" all of them.
        fc_norm: normalise after pooling instead of before; by default where `global_pool` is of the patch tokens.
        drop_rate: dropout before the head.
        dynamic_img_size: has no effect, see `create_model`.
        dynamic_img_pad: pad pictures below and on the right to whole patches.
        **kwargs: arguments of `DinoVisionTransformer`, such as `drop_path_rate` or `img_size`, the size in pixels that
            the position table is for.
    """

    def __init__(
        self,
        num_classes: int = 0,
        global_pool: str = "token",
        fc_norm: bool | None = None,
        drop_rate: float = 0.0,
        dynamic_img_size: bool = True,
        dynamic_img_pad: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**{"block_chunks": 0, **kwargs})
        if self.chunked_blocks:
            raise ValueError("timm's models have no block chunks: leave block_chunks at 0.")
        if self.mask_token is not None:
            self.mask_token.requires_grad_(False)  # timm has none, and training would find it unused
        for block in self.blocks:
            block.subset_threshold = 1.0  # timm drops branches of single pictures at every rate
        self.num_classes = num_classes
        self.global_pool = _check_pool(global_pool)
        self.dynamic_img_size = True
        self.dynamic_img_pad = dynamic_img_pad
        self._set_grid(self.patch_embed.img_size)
        self.in_chans = self.patch_embed.in_chans
        self.head_hidden_size = self.embed_dim
        self.has_class_token = True
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

    # Positions

    def _set_grid(self, img_size: tuple[int, int]) -> None:
        """Says in timm's names, and in the reference's, which pictures the position table is for."""
        embed: Any = self.patch_embed
        embed.img_size = img_size
        embed.grid_size = embed.patches_resolution = img_size[0] // self.patch_size, img_size[1] // self.patch_size
        embed.num_patches = embed.grid_size[0] * embed.grid_size[1]

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Resamples the position table for pictures of another size; the new one is a new parameter.

        The model still takes pictures of every size, whose positions are resampled from the new table.

        Args:
            img_size: in pixels, an int or (height, width), which may be no square; None leaves it.
            patch_size: the model's own, or None: there is no resampling of the patch embedding.

        Raises:
            ValueError: another patch size, or pictures smaller than a patch.
        """
        if patch_size is not None and _pair(patch_size) != self.patch_embed.patch_size:
            raise ValueError(
                f"patch_size={patch_size} cannot be set: the patch embedding is for patches of {self.patch_size} "
                "pixels. Resize the pictures instead."
            )
        height, width = self.patch_embed.img_size if img_size is None else _pair(img_size)
        if min(height, width) < self.patch_size:
            raise ValueError(f"img_size={img_size} is smaller than one patch of {self.patch_size} pixels.")
        if (height // self.patch_size, width // self.patch_size) != self.patch_embed.patches_resolution:
            with torch.no_grad():
                table = self._positions(height // self.patch_size, width // self.patch_size).to(self.pos_embed.dtype)
            self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
        self._set_grid((height, width))

    def _position_grid(self) -> Grid:
        """Also of a table for pictures that are not square."""
        return self.patch_embed.patches_resolution

    # Forward passes

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:  # type: ignore[override]  # timm's signature, not the reference's
        """Pictures (batch, channels, height, width) to logits, or without a classifier to pooled features."""
        return self.forward_head(self.forward_features(x, attn_mask, is_causal))

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:  # type: ignore[override]  # as above
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
            x: pictures (batch, channels, height, width).
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
            raise ValueError(f"There is no output_fmt {output_fmt!r}; choose one of NCHW, NLC.")
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

    def embed(self, x: Tensor) -> Tensor:
        """Images as tokens (batch, 1 + registers + patches, hidden), padded first with `dynamic_img_pad`."""
        if self.dynamic_img_pad:
            check_is_tensor(x)
            below, right = (-size % self.patch_size for size in x.shape[-2:])
            x = F.pad(x, (0, right, 0, below))
        return self.prepare_tokens_with_masks(x)

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
        return {"pos_embed", "cls_token", "register_tokens", "mask_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that assign each parameter to a depth, for learning rates that fall with it."""
        return {
            "stem": r"^cls_token|register_tokens|mask_token|pos_embed|patch_embed",
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
        """Pixels of the picture for each pixel of a map: the patch size."""
        return self.get("reduction", idx)

    def module_name(self, idx: Indices = None) -> Any:
        """Names of the blocks, as `named_modules` has them in the model."""
        return self.get("module", idx)

    def __getitem__(self, item: int) -> dict[str, Any]:
        return self.info[item]

    def __len__(self) -> int:
        return len(self.info)


class FeatureGetter(nn.Module):
    """Pictures to a list of feature maps (batch, hidden, rows, columns), of the blocks `out_indices`.

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
    raise ValueError(f"timm has no DINOv2 called {model_name!r}; did you mean {' or '.join(near)}?")


def _own_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Those of `given` that a `TimmVisionTransformer` takes; None, and what is as it should be, is left out."""
    given = {name: value for name, value in given.items() if value is not None and name not in IGNORED}
    given = {name: value for name, value in given.items() if value or name not in OFF}
    signatures = (inspect.signature(kind.__init__) for kind in (TimmVisionTransformer, DinoVisionTransformer))
    known = [name for signature in signatures for name in signature.parameters if name not in ("self", "kwargs")]
    unknown = [f"{name}={value!r}" for name, value in given.items() if name not in known]
    if unknown:
        raise TypeError(
            f"create_model has no {', '.join(unknown)}. A model takes {', '.join(known)}. Weights of your own go in as "
            "checkpoint_path; `dinov2_fast.load` says where published ones are looked for."
        )
    return given


def _build(config: BackboneConfig, arguments: dict[str, Any]) -> TimmVisionTransformer:
    timm_has = {"init_values": 1e-5, "interpolate_antialias": True, "interpolate_offset": 0.0}
    return TimmVisionTransformer(**{**config.constructor_arguments(), **timm_has, **arguments})


def _with_published_weights(config: BackboneConfig, arguments: dict[str, Any]) -> TimmVisionTransformer:
    """Built without storage, and given the tensors that `load` read: the weights are in memory once."""
    with torch.device("meta"):
        model = _build(config, {**arguments, "num_classes": 0, "img_size": TRAINED_SIZE})
    if isinstance(model.norm, nn.Identity):
        raise ValueError(
            f"The published weights normalise before pooling: with global_pool={model.global_pool!r}, give "
            "fc_norm=False."
        )
    backbone = load(config.name)
    model.load_state_dict(backbone.state_dict(), assign=True)
    model.loaded_from = backbone.loaded_from
    model.set_input_size(arguments.get("img_size"))
    model.reset_classifier(arguments.get("num_classes", 0))
    return model


def _data_config(config: BackboneConfig) -> dict[str, Any]:
    """What ``timm.data.resolve_model_data_config`` reads, and the names that timm's scripts look for."""
    return {
        "architecture": config.timm_name.removesuffix(TAG),
        "tag": TAG.removeprefix("."),
        "num_classes": 0,
        "input_size": (3, TRAINED_SIZE, TRAINED_SIZE),
        "fixed_input_size": False,
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
        raise ValueError(f"There is no global_pool {global_pool!r}; choose one of {', '.join(map(repr, POOLS))}.")
    return global_pool


def _take_indices(blocks: int, indices: Indices) -> list[int]:
    """Indices counted from the first block, of `forward_intermediates`'s argument."""
    if indices is None or isinstance(indices, int):
        last = blocks if indices is None else indices
        if not 0 < last <= blocks:
            raise ValueError(f"There are {blocks} blocks, so not the last {last}.")
        return list(range(blocks - last, blocks))
    if not all(-blocks <= i < blocks for i in indices) or not indices:
        raise ValueError(f"The blocks are 0 to {blocks - 1}, or -{blocks} to -1 from the last; got {list(indices)}.")
    return [i % blocks for i in indices]


def _refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError("attn_mask and is_causal are not supported: every token attends to all.")
