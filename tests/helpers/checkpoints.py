"""Checkpoints as they are found in the wild, made from weights of the reference's flat layout.

The tables of names are written out here on their own, from the implementations' state dicts, so that the tests do not
lean on the tables they test.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dinov2_fast import hub

Weights = dict[str, Tensor]

_TOP = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "register_tokens": "embeddings.register_tokens",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_ON_DISK = (
    (r"ls(\d)\.gamma", r"layer_scale\1.lambda1"),
    (r"attn\.qkv", "attention.attention.(query|key|value)"),
    (r"attn\.proj", "attention.output.dense"),
    (r"mlp\.w12", "mlp.weights_in"),
    (r"mlp\.w3", "mlp.weights_out"),
)
_IN_MEMORY = (
    (r"ls(\d)\.gamma", r"layer_scale\1.lambda1"),
    (r"attn\.qkv", "attention.(q_proj|k_proj|v_proj)"),
    (r"attn\.proj", "attention.o_proj"),
    (r"mlp\.w12", "mlp.(gate_proj|up_proj)"),
    (r"mlp\.w3", "mlp.down_proj"),
)


def _huggingface(weights: Weights, rules: tuple[tuple[str, str], ...]) -> Weights:
    result = {}
    for key, tensor in weights.items():
        name = _TOP.get(key) or key.replace("blocks.", "encoder.layer.")
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        parts = re.search(r"\((.+)\)", name)
        names = [name.replace(parts[0], part) for part in parts[1].split("|")] if parts else [name]
        for part_name, part in zip(names, torch.tensor_split(tensor, len(names)), strict=True):
            result[part_name] = part.clone()
    return result


def huggingface(weights: Weights) -> Weights:
    """transformers on disk, and in memory before its version 5."""
    return _huggingface(weights, _ON_DISK)


def huggingface_memory(weights: Weights) -> Weights:
    """transformers in memory since its pull request 46266."""
    return _huggingface(weights, _IN_MEMORY)


def timm(weights: Weights) -> Weights:
    """timm: no mask token, SwiGLU under the names of an MLP; with registers, no position of the CLS token."""
    renamed = {"register_tokens": "reg_token"}
    result = {
        renamed.get(key, key).replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2"): tensor.clone()
        for key, tensor in weights.items()
        if key != "mask_token"
    }
    if "reg_token" in result:
        result["cls_token"] = weights["cls_token"] + weights["pos_embed"][:, :1]
        result["pos_embed"] = weights["pos_embed"][:, 1:].clone()
    return result


def chunked(weights: Weights) -> Weights:
    """The reference with block_chunks=3, of a model of 3 blocks."""
    return {re.sub(r"^blocks\.(\d+)\.", r"blocks.\1.\1.", key): tensor for key, tensor in weights.items()}


def teacher(weights: Weights) -> dict[str, Weights]:
    """A teacher checkpoint of the reference's training, with the heads."""
    backbone = {f"backbone.{key}": tensor for key, tensor in chunked(weights).items()}
    heads = {"dino_head.last_layer.weight_v": torch.ones(3, 2), "ibot_head.mlp.0.weight": torch.ones(2, 2)}
    return {"teacher": {**backbone, **heads}}


def training(weights: Weights) -> dict[str, object]:
    """A whole training checkpoint: student and teacher in one dictionary, beside the optimizer."""
    student = {f"student.backbone.{key}": tensor + 1 for key, tensor in weights.items()}
    own = {f"teacher.backbone._fsdp_wrapped_module.{key}": tensor for key, tensor in chunked(weights).items()}
    return {"model": {**student, **own, "teacher.dino_head.mlp.0.weight": torch.ones(2, 2)}, "iteration": 7}


def data_parallel(weights: Weights) -> Weights:
    """Saved from DistributedDataParallel."""
    return {f"module.{key}": tensor for key, tensor in weights.items()}


def compiled(weights: Weights) -> Weights:
    """Saved from blocks that FSDP, activation checkpointing and torch.compile wrapped."""
    wrappers = r"blocks.\1._fsdp_wrapped_module._checkpoint_wrapped_module._orig_mod."
    return {"_orig_mod." + re.sub(r"^blocks\.(\d+)\.", wrappers, key): tensor for key, tensor in weights.items()}


SOURCES: dict[str, Callable[[Weights], dict]] = {
    "facebook": dict,
    "chunked": chunked,
    "teacher": teacher,
    "training": training,
    "data_parallel": data_parallel,
    "compiled": compiled,
    "huggingface": huggingface,
    "huggingface_memory": huggingface_memory,
    "timm": timm,
}


def expected(source: str, weights: Weights) -> Weights:
    """What loading that source must give: `weights`, or for timm what its layout does not lose."""
    if source != "timm":
        return weights
    result = {**weights, "mask_token": torch.zeros_like(weights["mask_token"])}
    if "register_tokens" in weights:
        position = weights["pos_embed"]
        result["cls_token"] = weights["cls_token"] + position[:, :1]
        result["pos_embed"] = torch.cat((torch.zeros_like(position[:, :1]), position[:, 1:]), dim=1)
    return result


def assert_same(actual: Weights, wanted: Weights) -> None:
    """Same keys, same bits."""
    assert actual.keys() == wanted.keys()
    different = [key for key in wanted if not torch.equal(actual[key], wanted[key])]
    assert not different


def shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor."""
    return {key: tuple(tensor.shape) for key, tensor in weights.items()}


def head_of(model: Any) -> dict[str, Tensor]:
    """The weights of a model's head, named as in the published file."""
    if isinstance(model, hub.LinearClassifier):
        return dict(model.linear_head.state_dict())
    return {f"decode_head.{key}": tensor for key, tensor in model.decode_head.state_dict().items()}
