"""AdamW for a network of pretraining: parameter groups with their multipliers, the rates of a step, clipping."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from dinov2_fast.pretraining.config import PretrainingConfig
from dinov2_fast.pretraining.schedules import Rates

_EMBEDDINGS = ("pos_embed", "patch_embed", "mask_token", "cls_token", "register_tokens")
_BLOCK = re.compile(r"\bblocks\.(?:\d+\.)?(\d+)\.")  # blocks.7.… or, with chunks, blocks.1.7.…


def parameter_groups(network: nn.Module, config: PretrainingConfig) -> list[dict[str, Any]]:
    """The trainable parameters, in one group for each combination of what differs.

    As in the reference (facebookresearch/dinov2, dinov2/utils/param_groups.py), with d = `layer_decay` and L blocks:

        learning rate   times d^(L-i) for block i, d^(L+1) for embeddings and tokens, 1 for the last norm and the heads;
                        that of the patch embedding also times `patch_embed_multiplier`
        weight decay    none for biases, norms and LayerScale; all others have it, also tokens, positions and the
                        lengths of prototypes

    Args:
        network: with the children `backbone`, `dino_head` and perhaps `ibot_head`.
        config: its groups `model` and `optimizer` are used.

    Returns:
        Groups for a torch optimizer, with "learning_rate_multiplier", "weight_decay_multiplier", "is_last_layer" and
        "is_backbone".
    """
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        settings = {
            "learning_rate_multiplier": _learning_rate_multiplier(name, config),
            "weight_decay_multiplier": 0.0 if name.endswith(".bias") or "norm" in name or "gamma" in name else 1.0,
            "is_last_layer": "last_layer" in name,
            "is_backbone": name.startswith("backbone."),
        }
        groups.setdefault(tuple(settings.values()), {"params": [], **settings})["params"].append(parameter)
    return list(groups.values())


def _learning_rate_multiplier(name: str, config: PretrainingConfig) -> float:
    layers = config.model.depth + 1  # the blocks, and before them the embeddings
    layer = layers
    if name.startswith("backbone."):
        block = _BLOCK.search(name)
        if any(each in name for each in _EMBEDDINGS):
            layer = 0
        elif block:
            layer = int(block[1]) + 1
    multiplier = config.optimizer.layer_decay ** (layers - layer)
    return multiplier * config.optimizer.patch_embed_multiplier if "patch_embed" in name else multiplier


def make_optimizer(network: nn.Module, config: PretrainingConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`. `set_rates` sets its rates before each step."""
    betas = (config.optimizer.beta1, config.optimizer.beta2)
    return torch.optim.AdamW(parameter_groups(network, config), lr=0.0, betas=betas, weight_decay=0.0, fused=True)


def set_rates(optimizer: torch.optim.AdamW, rates: Rates, freeze_backbone: bool) -> None:
    """Gives each group its learning rate and weight decay.

    A learning rate of 0 leaves parameters as they are, without weight decay too; AdamW still averages their gradients.
    """
    for group in optimizer.param_groups:
        learning_rate = rates.last_layer_learning_rate if group["is_last_layer"] else rates.learning_rate
        is_frozen = freeze_backbone and group["is_backbone"]
        group["lr"] = 0.0 if is_frozen else learning_rate * group["learning_rate_multiplier"]
        group["weight_decay"] = rates.weight_decay * group["weight_decay_multiplier"]


def clip_gradients(network: nn.Module, max_norm: float) -> dict[str, Tensor]:
    """Scales the gradients of each child of the network so that their norm is at most `max_norm`.

    Args:
        network: its children are the backbone and the heads.
        max_norm: 0 scales nothing.

    Returns:
        For each child the norm of its gradients before, an fp32 scalar: the root of the sum of squares over all
        parameters, and over all processes where they are sharded.
    """
    norms = {}
    for name, child in network.named_children():
        parameters = list(child.parameters())
        norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        norms[name] = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if max_norm:
            clip_grads_with_norm_(parameters, max_norm, norms[name])
    return norms
