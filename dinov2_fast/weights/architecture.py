"""The architecture of a checkpoint: constructor arguments of its backbone, read from the shapes of its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_fast import layouts
from dinov2_fast.errors import WeightsError
from dinov2_fast.position_embeddings import PositionInterpolation, position_interpolation
from dinov2_fast.weights.sources import read_config

HEAD_DIM = 64  # channels of an attention head in every published DINOv2
MAX_BLOCKS = 1000
_BLOCK_KEY = re.compile(r"blocks\.(\d{1,9})\.")
# The number of dimensions of the tensors from which sizes are read, where it is not 2.
_RANKS = {"patch_embed.proj.weight": 4, "pos_embed": 3, "register_tokens": 3}

Size = int | Sequence[int]


def read_architecture(
    state_dict: Mapping[str, Any], config: Path | None = None, img_size: Size | None = None
) -> dict[str, Any]:
    """Constructor arguments of the backbone that these weights belong to.

    Args:
        state_dict: weights in any layout.
        config: a ``config.json`` of transformers or of a pretraining run, with the number of heads and the image size,
            and perhaps ``position_interpolation``. Without it heads of 64 channels are assumed.
        img_size: the image size that the position table is for: height and width in pixels, or one number for both. It
            is needed only if the table is not square and there is no config.

    Raises:
        WeightsError: these are not the weights of a DINOv2.
    """
    plan = plan_weights(state_dict)
    required = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight")
    absent = [key for key in required if key not in plan.recipes]
    if absent:
        raise WeightsError(
            f"These are not the weights of a DINOv2 backbone: {', '.join(absent)} not found among "
            f"{layouts.some_keys(plan.source)}."
        )
    embed_dim, in_chans, patch_size, _ = _shape(plan, "patch_embed.proj.weight")
    registers = _shape(plan, "register_tokens")[1] if "register_tokens" in plan.recipes else 0
    ffn_layer, mlp_ratio, ffn_bias = _read_ffn(plan, embed_dim)
    fields = {} if config is None else read_config(config)
    resampling = _resampling(fields, registers, config)
    return {
        "img_size": _img_size(_shape(plan, "pos_embed")[1] - 1, patch_size, img_size or fields.get("image_size")),
        "patch_size": patch_size,
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": _depth(plan),
        "num_heads": _heads(fields, embed_dim, config),
        "mlp_ratio": mlp_ratio,
        "qkv_bias": "blocks.0.attn.qkv.bias" in plan.recipes,
        "ffn_bias": ffn_bias,
        "proj_bias": "blocks.0.attn.proj.bias" in plan.recipes,
        "ffn_layer": ffn_layer,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in plan.recipes else None,
        "block_chunks": 0,
        "num_register_tokens": registers,
        "interpolate_antialias": resampling.antialias,
        "interpolate_offset": resampling.offset,
    }


def _shape(plan: layouts.ConversionPlan, key: str) -> torch.Size:
    """The shape of the own tensor `key`, after a check of its number of dimensions and that it is not empty."""
    shape = read_tensor(plan, key).shape
    if len(shape) != _RANKS.get(key, 2) or not all(shape):
        raise WeightsError(
            f"These are not the weights of a DINOv2 backbone: {key} has the shape {tuple(shape)}, where "
            f"{_RANKS.get(key, 2)} dimensions are needed, none of them 0."
        )
    return shape


def _depth(plan: layouts.ConversionPlan) -> int:
    """The number of blocks. Raises if one is missing between the first and the last."""
    found = {int(match[1]) for match in map(_BLOCK_KEY.match, plan.recipes) if match}
    if len(found) > MAX_BLOCKS:
        raise WeightsError(f"These weights have {len(found)} blocks; a DINOv2 has at most {MAX_BLOCKS} here.")
    missing = next(i for i in range(len(found) + 1) if i not in found)
    if missing < len(found):
        raise WeightsError(
            f"These weights have a block {max(found)} but no block {missing}: a part of the model is missing, or these "
            "are not the weights of a DINOv2 backbone."
        )
    return len(found)


def _img_size(positions: int, patch_size: int, stated: Any) -> Size:
    """The image size for a table of `positions` patches: the stated size if it fits, otherwise a square."""
    if positions < 1:
        raise WeightsError("These are not the weights of a DINOv2 backbone: pos_embed has no positions of patches.")
    if _patches(stated, patch_size) == positions:
        return stated
    side = math.isqrt(positions)
    if side * side != positions:
        raise WeightsError(
            f"The position table has {positions} positions, which is not a square grid. Give the image size that it is "
            "for, in pixels: dinov2_fast.load(…, img_size=(height, width))."
        )
    return patch_size * side


def _patches(img_size: Any, patch_size: int) -> int:
    """The number of patches in an image of that size; 0 if `img_size` is not a size."""
    sides = (img_size, img_size) if isinstance(img_size, int) else img_size
    if not isinstance(sides, list | tuple) or len(sides) != 2:
        return 0
    return math.prod(side // patch_size if isinstance(side, int) and side > 0 else 0 for side in sides)


def _heads(fields: Mapping[str, Any], embed_dim: int, config: Path | None) -> int:
    heads = fields.get("num_attention_heads")
    if heads is None:
        return max(embed_dim // HEAD_DIM, 1)
    if type(heads) is not int or heads < 1 or embed_dim % heads:
        raise WeightsError(
            f"{config} has num_attention_heads {heads!r}, which must divide the hidden size {embed_dim} of the weights."
        )
    return heads


def _resampling(fields: Mapping[str, Any], registers: int, config: Path | None) -> PositionInterpolation:
    """How positions are resampled: as the config says, or else as in the reference."""
    name = fields.get("position_interpolation")
    try:
        return position_interpolation(name or ("antialias" if registers else "offset"))
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{config} cannot be used: {error}") from error


def _read_ffn(plan: layouts.ConversionPlan, embed_dim: int) -> tuple[str, float, bool]:
    """`ffn_layer`, `mlp_ratio` and `ffn_bias` of the first block."""
    for ffn_layer, name, factor in (("swiglufused", "w3", 1.5), ("mlp", "fc2", 1.0)):
        key = f"blocks.0.mlp.{name}.weight"
        if key in plan.recipes:
            hidden = int(_shape(plan, key)[1] * factor)
            return ffn_layer, _ratio(hidden, embed_dim), f"blocks.0.mlp.{name}.bias" in plan.recipes
    return "identity", 4.0, True


def _ratio(hidden: int, embed_dim: int) -> float:
    """The `mlp_ratio` from which the model computes `hidden`: it multiplies and rounds down."""
    ratio = hidden / embed_dim
    return ratio if int(embed_dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def plan_weights(state_dict: Mapping[str, Any]) -> layouts.ConversionPlan:
    """`layouts.plan_conversion` of a checkpoint. Every error becomes a `WeightsError`."""
    try:
        return layouts.plan_conversion(state_dict)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"These are not the weights of one DINOv2 backbone: {error}") from error


def read_tensor(plan: layouts.ConversionPlan, key: str) -> Tensor:
    """The model's own tensor `key`, of a floating-point dtype. Every error becomes a `WeightsError`."""
    try:
        tensor = plan.read(key)
    except WeightsError:
        raise
    except (TypeError, RuntimeError, IndexError) as error:
        raise WeightsError(f"{key} cannot be made from {', '.join(plan.recipes[key].keys)} ({error}).") from error
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise WeightsError(f"{key} must be a floating-point tensor, but these weights have {what}.")
    _check_is_whole(key, tensor)
    return tensor


def _check_is_whole(key: str, tensor: Tensor) -> None:
    """Raises for a sparse or expanded tensor: with those, a small file could fill the memory.

    Subclasses of `Tensor` are not checked, since their storage may be of another kind.
    """
    if type(tensor) not in (Tensor, nn.Parameter):
        return
    is_sparse = tensor.layout != torch.strided
    if is_sparse or tensor.nbytes > tensor.untyped_storage().nbytes():
        kind = "sparse" if is_sparse else "expanded from fewer values"
        raise WeightsError(f"{key} {tuple(tensor.shape)} is {kind}. Save it as a dense tensor with all its values.")
