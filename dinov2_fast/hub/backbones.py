"""The eight backbones, without a head."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, TypeVar

from torch import nn

from dinov2_fast.configs import BackboneConfig
from dinov2_fast.errors import UnsupportedError
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.weights.heads import find_head, load_head
from dinov2_fast.weights.load import load

Published = TypeVar("Published", bound=Enum)


class BackboneWeights(Enum):
    """The published weights of a backbone."""

    LVD142M = "LVD142M"


def choose_weights(weights: Enum | str, published: type[Published]) -> Published:
    """The member of `published` that `weights` is or names.

    Raises:
        AssertionError: `published` has no such member (an assertion in the reference too).
    """
    name = str(getattr(weights, "name", weights))
    if name not in published.__members__:
        known = ", ".join(published.__members__)
        raise UnsupportedError(f"Unsupported weights: {name}; the published ones are {known}")
    return published[name]


def make_backbone(config: BackboneConfig, pretrained: bool, **kwargs: Any) -> DinoVisionTransformer:
    """A backbone in training mode, with published or random weights."""
    if not pretrained:
        return DinoVisionTransformer(**{**config.constructor_arguments(), **kwargs})
    return load(config.name, **kwargs).train()


def fill_from_published(
    head: nn.Module, prefix: str, config: BackboneConfig, name: str, backbone: DinoVisionTransformer, **kwargs: Any
) -> None:
    """Loads the published weights `name` into `head`, and moves it to the device and dtype of its backbone.

    `kwargs` are those that the backbone was loaded with; `local_files_only` counts for the head too.
    """
    load_head(head, find_head(config, name, kwargs.get("local_files_only", False)), prefix)
    head.to(device=backbone.cls_token.device, dtype=backbone.cls_token.dtype)


def backbone_entry_point(config: BackboneConfig) -> Callable[..., DinoVisionTransformer]:
    def make(
        *, pretrained: bool = True, weights: BackboneWeights | str = BackboneWeights.LVD142M, **kwargs: Any
    ) -> DinoVisionTransformer:
        try:
            choose_weights(weights, BackboneWeights)
        except AssertionError as error:
            raise UnsupportedError(
                f"{error}. To load your own file, call dinov2_fast.load({config.name!r}, weights=file)"
            ) from None
        return make_backbone(config, pretrained, **kwargs)

    registers = " with registers" if config.num_register_tokens else ""
    make.__name__ = make.__qualname__ = config.name
    make.__doc__ = f"""DINOv2 ViT-{config.name[10]}/14{registers}.

    Args:
        pretrained: load the published weights; otherwise initialise at random.
        weights: which published weights; there is only "LVD142M".
        **kwargs: arguments of `dinov2_fast.DinoVisionTransformer`; with `pretrained` also those of `dinov2_fast.load`
            (device, dtype, position_interpolation, …).

    Returns:
        The model in training mode, as in the reference. Call ``.eval()`` before computing features.
    """
    return make
