"""What weights are of: the constructor arguments of the backbone that a checkpoint belongs to."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dinov2_fast import layouts
from dinov2_fast.weights.errors import WeightsError

HEAD_DIM = 64  # of every published DINOv2
_BLOCK_KEY = re.compile(r"blocks\.(\d+)\.")


def read_architecture(state_dict: Mapping[str, Any], config: Path | None = None) -> dict[str, Any]:
    """Constructor arguments of the backbone these weights belong to, from the shapes of its tensors.

    Args:
        state_dict: weights in any layout.
        config: a transformers ``config.json``, for the number of heads (otherwise heads of 64 channels are assumed).

    Raises:
        WeightsError: not the weights of a DINOv2.
    """
    plan = plan_weights(state_dict)
    required = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight")
    absent = [key for key in required if key not in plan.recipes]
    if absent:
        raise WeightsError(f"These are not the weights of a DINOv2 backbone: {', '.join(absent)} not found.")
    if read_tensor(plan, "patch_embed.proj.weight").ndim != 4 or read_tensor(plan, "pos_embed").ndim != 3:
        raise WeightsError("These are not the weights of a DINOv2 backbone: patch_embed or pos_embed has another rank.")
    embed_dim, in_chans, patch_size, _ = read_tensor(plan, "patch_embed.proj.weight").shape
    registers = read_tensor(plan, "register_tokens").shape[1] if "register_tokens" in plan.recipes else 0
    ffn_layer, mlp_ratio, ffn_bias = _read_ffn(plan, embed_dim)
    return {
        "img_size": patch_size * math.isqrt(read_tensor(plan, "pos_embed").shape[1] - 1),
        "patch_size": patch_size,
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": 1 + max(int(match[1]) for match in map(_BLOCK_KEY.match, plan.recipes) if match),
        "num_heads": _configured_heads(config) or max(embed_dim // HEAD_DIM, 1),
        "mlp_ratio": mlp_ratio,
        "qkv_bias": "blocks.0.attn.qkv.bias" in plan.recipes,
        "ffn_bias": ffn_bias,
        "proj_bias": "blocks.0.attn.proj.bias" in plan.recipes,
        "ffn_layer": ffn_layer,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in plan.recipes else None,
        "block_chunks": 0,
        "num_register_tokens": registers,
        "interpolate_antialias": registers > 0,
        "interpolate_offset": 0.0 if registers else 0.1,
    }


def _read_ffn(plan: layouts.Plan, embed_dim: int) -> tuple[str, float, bool]:
    """`ffn_layer`, `mlp_ratio` and `ffn_bias` of the first block."""
    for ffn_layer, name, factor in (("swiglufused", "w3", 1.5), ("mlp", "fc2", 1.0)):
        key = f"blocks.0.mlp.{name}.weight"
        if key in plan.recipes:
            hidden = int(read_tensor(plan, key).shape[-1] * factor)
            return ffn_layer, _ratio(hidden, embed_dim), f"blocks.0.mlp.{name}.bias" in plan.recipes
    return "identity", 4.0, True


def _ratio(hidden: int, embed_dim: int) -> float:
    """The ratio that gives `hidden` when the model multiplies by it and rounds down."""
    ratio = hidden / embed_dim
    return ratio if int(embed_dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def _configured_heads(config: Path | None) -> int | None:
    if config is None:
        return None
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("num_attention_heads")
    except (OSError, ValueError, AttributeError) as error:
        raise WeightsError(f"{config} is no configuration of a model ({error}).") from error


def plan_weights(state_dict: Mapping[str, Any]) -> layouts.Plan:
    """`layouts.plan_conversion`, of a checkpoint: what is wrong with it is a `WeightsError`."""
    try:
        return layouts.plan_conversion(state_dict)
    except (ValueError, TypeError, AttributeError) as error:
        raise WeightsError(f"These are not the weights of one DINOv2 backbone: {error}") from error


def read_tensor(plan: layouts.Plan, key: str) -> Tensor:
    """The model's own tensor `key`.

    Raises:
        WeightsError: it cannot be read or put together, or is no tensor of floating-point numbers.
    """
    try:
        tensor = plan.read(key)
    except WeightsError:
        raise
    except (TypeError, RuntimeError) as error:
        raise WeightsError(f"{', '.join(plan.recipes[key].keys)} do not make up a {key} ({error}).") from error
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise WeightsError(f"{key} must be a tensor of floating-point numbers, but these weights have {what}.")
    return tensor
