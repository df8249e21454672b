"""The networks before the first step: with random weights, or with those of another run or of a published model."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.pretraining.checkpoint import read_heads
from dinov2_fast.pretraining.config import PretrainingConfig
from dinov2_fast.pretraining.networks import Network
from dinov2_fast.pretraining.order import mix
from dinov2_fast.weights.load import load


def make_networks(config: PretrainingConfig, start_from: str | os.PathLike[str] | None) -> tuple[Network, Network]:
    """Student and teacher with equal weights, on the CPU in fp32. They are the same in every process.

    Sets the seed of torch's generator.

    Args:
        start_from: see :func:`.run.pretrain`.
    """
    torch.manual_seed(mix(config.run.seed))
    student, teacher = Network(config), Network(config)
    if start_from is not None:
        _load_backbone(student.backbone, load(Path(start_from), dtype=torch.float32), start_from)
        _load_heads(student, read_heads(Path(start_from)), start_from)
    teacher.load_state_dict(student.state_dict())
    return student, teacher


def _load_backbone(backbone: DinoVisionTransformer, source: DinoVisionTransformer, name: object) -> None:
    """Copies the weights; the table of positions is resampled to the size of the crops, in the source's own way."""
    state, own = source.state_dict(), backbone.state_dict()
    if source.num_heads != backbone.num_heads:  # shapes do not show it
        raise InvalidValueError(
            f"The backbone of {str(name)!r} has {source.num_heads} heads, and model.num_heads is {backbone.num_heads}. "
            "Set it as in the run that made it."
        )
    height, width = backbone.patch_embed.img_size
    if source.patch_size == backbone.patch_size:
        state["pos_embed"] = source.interpolate_pos_encoding(torch.empty(0), height, width).detach()
    misfit = _misfit(state, own)
    if misfit:
        raise InvalidValueError(
            f"The backbone of {str(name)!r} has another architecture: {misfit}. Set the group model as in the run that "
            "made it."
        )
    backbone.load_state_dict(state)


def _load_heads(network: Network, heads: dict[str, Tensor], name: object) -> None:
    """Copies the heads; without any they stay as they are."""
    if not heads:
        return
    own = {key: value for key, value in network.state_dict().items() if not key.startswith("backbone.")}
    misfit = _misfit(heads, own)
    if misfit:
        raise InvalidValueError(
            f"The heads of {str(name)!r} have other sizes: {misfit}. Set the groups dino_head and ibot_head as in the "
            "run that made them."
        )
    network.load_state_dict(heads, strict=False)


def _misfit(found: dict[str, Tensor], own: dict[str, Tensor]) -> str | None:
    """The first tensor whose shape is not the one that the configuration asks for."""
    theirs, ours = ({key: tuple(tensor.shape) for key, tensor in state.items()} for state in (found, own))
    for key in sorted(theirs.keys() | ours.keys()):
        if theirs.get(key) != ours.get(key):
            return f"{key} is {theirs.get(key)}, and the configuration asks for {ours.get(key)}"
    return None
