"""`convert_state_dict`: weights in any layout, converted to a given one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.layouts import BLOCK_NAMES, BLOCK_PREFIX, LAYOUTS, TOP_NAMES, plan_conversion, some_keys, split_ending


@torch.no_grad()
def convert_state_dict(state_dict: Mapping[str, Any], *, to: str, block_chunks: int = 0) -> dict[str, Tensor]:
    """The weights of `state_dict` in the layout `to`. Their own layout is recognised.

    Args:
        state_dict: weights in any layout, wrapped or not. Other tensors, such as a classification head, are kept.
        to: "facebook", "huggingface" (what transformers loads from disk), "huggingface_memory" or "timm".
        block_chunks: for "facebook", the `block_chunks` of the model that will load the weights.

    Returns:
        A new dictionary. Tensors are copied only where the layouts pack them differently. Converting back gives the
        same bits, with two exceptions. timm has no mask token, so it becomes zeros. In models with registers, timm adds
        the CLS token's position into the CLS token, and they stay added.

    Raises:
        ValueError: there is no layout `to`, or `block_chunks` is set for another layout than "facebook".
        ValueError, TypeError: this is no state dict of one backbone (`layouts.plan_conversion`).
        KeyError: the weights are in no known layout.
    """
    if to not in LAYOUTS:
        raise InvalidValueError(f"There is no layout {to!r}; choose one of {', '.join(LAYOUTS)}.")
    if block_chunks and to != "facebook":
        raise InvalidValueError(f"Only the layout 'facebook' has block chunks, not {to!r}.")
    plan = plan_conversion(state_dict)
    for needed in ("cls_token", "pos_embed"):
        if needed not in plan.recipes:
            raise KeyError(
                f"These are no DINOv2 weights in a known layout: there is no {needed} among {some_keys(plan.source)}."
            )
    own = {key: plan.read(key) for key in plan.recipes}
    if to == "timm":
        own = _merge_cls_position(own)
    converted: dict[str, Tensor] = {}
    prefix = _classifier_prefix(own) if to.startswith("huggingface") else ""
    depth = _depth(own)
    for key, tensor in own.items():
        names = _names_in(to, key, block_chunks, depth)
        parts = [tensor] if len(names) == 1 else [part.clone() for part in tensor.chunk(len(names))]
        for name, part in zip(names, parts, strict=True):
            converted[name if name.startswith("classifier.") else prefix + name] = part
    return converted


def _merge_cls_position(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights as timm has them: no mask token and, with registers, the CLS position added into the CLS token."""
    own = {key: tensor for key, tensor in own.items() if key != "mask_token"}
    if "register_tokens" in own:
        positions = own["pos_embed"]
        own["cls_token"] = own["cls_token"] + positions[:, :1]
        own["pos_embed"] = positions[:, 1:].clone()
    return own


def _names_in(layout: str, key: str, block_chunks: int, depth: int) -> list[str]:
    """The names of the own tensor `key` in `layout`: several if that layout stores it in parts."""
    match = re.match(r"blocks\.(\d+)\.(.+?)(\.weight|\.bias)?$", key)
    if match is None:
        stem, ending = split_ending(key)
        top = TOP_NAMES[layout]
        return [top.get(key) or (top[stem] + ending if stem in top else key)]
    index, stem, ending = match[1], match[2], match[3] or ""
    prefix = BLOCK_PREFIX.get(layout, "blocks")
    if block_chunks:
        prefix = f"blocks.{int(index) // max(depth // block_chunks, 1)}"
    return [f"{prefix}.{index}.{name}{ending}" for name in BLOCK_NAMES[layout].get(stem, (stem,))]


def _depth(own: Mapping[str, Tensor]) -> int:
    return 1 + max((int(key.split(".")[1]) for key in own if key.startswith("blocks.")), default=-1)


def _classifier_prefix(own: Mapping[str, Tensor]) -> str:
    """The prefix that transformers gives the backbone of a model with a classifier."""
    if not any(key.startswith("classifier.") for key in own):
        return ""
    return "dinov2_with_registers." if "register_tokens" in own else "dinov2."
