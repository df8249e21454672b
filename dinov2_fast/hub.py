"""The reference's torch.hub entry points: ``torch.hub.load(repository, "dinov2_vits14")`` and the like.

The signatures are facebookresearch/dinov2's (dinov2/hub/backbones.py): keyword arguments only, `pretrained`, `weights`,
and any argument of the model's constructor.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

from dinov2_fast.configs import BACKBONES, BackboneConfig
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.weights import load


class Weights(Enum):
    """The published weights of a backbone."""

    LVD142M = "LVD142M"


def _entry_point(config: BackboneConfig) -> Callable[..., DinoVisionTransformer]:
    def make(
        *, pretrained: bool = True, weights: Weights | str = Weights.LVD142M, **kwargs: Any
    ) -> DinoVisionTransformer:
        if isinstance(weights, str) and weights not in Weights.__members__:
            known = ", ".join(Weights.__members__)
            raise AssertionError(f"Unsupported weights: {weights}; the published ones are {known}")
        if not pretrained:
            return DinoVisionTransformer(**{**config.constructor_arguments(), **kwargs})
        return load(config.name, **kwargs).train()

    make.__name__ = make.__qualname__ = config.name
    registers = " with registers" if config.num_register_tokens else ""
    make.__doc__ = f"""DINOv2 ViT-{config.name[10]}/14{registers}.

    Args:
        pretrained: load the published weights; otherwise initialise at random.
        weights: which weights, only "LVD142M".
        **kwargs: arguments of `dinov2_fast.DinoVisionTransformer`; with `pretrained` also those of `dinov2_fast.load`
            (device, dtype, dialect, …).

    Returns:
        The model in training mode, as torch.hub's users expect; call ``.eval()`` for features.
    """
    return make


dinov2_vits14 = _entry_point(BACKBONES["dinov2_vits14"])
dinov2_vitb14 = _entry_point(BACKBONES["dinov2_vitb14"])
dinov2_vitl14 = _entry_point(BACKBONES["dinov2_vitl14"])
dinov2_vitg14 = _entry_point(BACKBONES["dinov2_vitg14"])
dinov2_vits14_reg = _entry_point(BACKBONES["dinov2_vits14_reg"])
dinov2_vitb14_reg = _entry_point(BACKBONES["dinov2_vitb14_reg"])
dinov2_vitl14_reg = _entry_point(BACKBONES["dinov2_vitl14_reg"])
dinov2_vitg14_reg = _entry_point(BACKBONES["dinov2_vitg14_reg"])
