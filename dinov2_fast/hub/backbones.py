"""The eight backbones, and how the entry points find and load published weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, TypeVar

from torch import Tensor, nn

from dinov2_fast import layouts
from dinov2_fast.configs import BackboneConfig
from dinov2_fast.errors import UnsupportedError, WeightsError
from dinov2_fast.logs import logger
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.weights.files import open_weights
from dinov2_fast.weights.load import load
from dinov2_fast.weights.sources import find_head

Published = TypeVar("Published", bound=Enum)


class BackboneWeights(Enum):
    """The published weights of a backbone."""

    LVD142M = "LVD142M"


def choose_weights(weights: Enum | str, published: type[Published]) -> Published:
    """The member of `published` that `weights` is or names; as in the reference, an `AssertionError` if none is."""
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

    The file may be a training framework's, with the weights under "state_dict". Only its keys with `prefix` are taken.
    `kwargs` are those that the backbone was loaded with; `local_files_only` counts for the head too.

    Raises:
        WeightsError: the file cannot be found or read, or lacks a tensor of the head, which stays unchanged.
    """
    path = find_head(config, name, kwargs.get("local_files_only", False))
    content = open_weights(path)
    nested = content.get("state_dict")
    source = nested if isinstance(nested, Mapping) else content
    own = head.state_dict()
    given = {key: source[prefix + key] for key in own if prefix + key in source}
    # The number of batches that a batch norm has seen does not change its output, and not every file has it.
    missing = [prefix + key for key in own if key not in given and not key.endswith("num_batches_tracked")]
    misshapen = [
        f"{prefix}{key} {tuple(getattr(tensor, 'shape', ()))} where the head has {tuple(own[key].shape)}"
        for key, tensor in given.items()
        if not isinstance(tensor, Tensor) or tensor.shape != own[key].shape
    ]
    if missing or misshapen:
        raise WeightsError(f"{path}: " + layouts.misfit("a head of the reference", missing, [], misshapen))
    if len(source) > len(given):
        logger.info("Skipped %d keys of %s that do not belong to the head.", len(source) - len(given), path)
    head.load_state_dict({**own, **given})
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
