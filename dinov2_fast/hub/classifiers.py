"""Backbones with a linear classifier for the 1000 classes of ImageNet.

Source: facebookresearch/dinov2, dinov2/hub/classifiers.py; Oquab et al., arXiv:2304.07193, section 7.1.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_fast.configs import BackboneConfig
from dinov2_fast.errors import UnsupportedError
from dinov2_fast.hub.backbones import choose_weights, fill_from_published, make_backbone

CLASSES = 1000


class ClassifierWeights(Enum):
    """The data sets of the published classifiers."""

    IMAGENET1K = "IMAGENET1K"


def check_layers(layers: int) -> int:
    """`layers` if it is 1 or 4, as in the published heads. Otherwise an `AssertionError`, as in the reference."""
    if layers not in (1, 4):
        raise UnsupportedError(f"Unsupported number of layers: {layers}; published heads have 1 or 4")
    return layers


class LinearClassifier(nn.Module):
    """A linear layer on normalised tokens: CLS of the last `layers` blocks, and the mean patch token of the last block.

    Args:
        backbone: a `DinoVisionTransformer`, or its engine.
        linear_head: maps (1 + layers) x hidden features to classes.
        layers: 1 or 4.
    """

    def __init__(self, *, backbone: nn.Module, linear_head: nn.Module, layers: int = 4) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.linear_head = linear_head
        self.layers = check_layers(layers)

    def forward(self, x: Tensor) -> Tensor:
        """The logits (batch, classes) of images (batch, channels, height, width)."""
        pairs = self.backbone.get_intermediate_layers(x, n=self.layers, return_class_token=True)
        patches = pairs[-1][0]
        return self.linear_head(torch.cat([*(cls_token for _, cls_token in pairs), patches.mean(dim=1)], dim=1))


def classifier_entry_point(config: BackboneConfig) -> Callable[..., LinearClassifier]:
    def make(
        *,
        layers: int = 4,
        pretrained: bool = True,
        weights: ClassifierWeights | str = ClassifierWeights.IMAGENET1K,
        **kwargs: Any,
    ) -> LinearClassifier:
        check_layers(layers)
        choose_weights(weights, ClassifierWeights)
        backbone = make_backbone(config, pretrained, **kwargs)
        linear_head = nn.Linear((1 + layers) * backbone.embed_dim, CLASSES)
        if pretrained:
            name = "linear" if layers == 1 else f"linear{layers}"
            fill_from_published(linear_head, "", config, name, backbone, **kwargs)
        return LinearClassifier(backbone=backbone, linear_head=linear_head, layers=layers)

    registers = " with registers" if config.num_register_tokens else ""
    make.__name__ = make.__qualname__ = f"{config.name}_lc"
    make.__doc__ = f"""Linear classifier for ImageNet on a DINOv2 ViT-{config.name[10]}/14{registers}.

    Args:
        layers: how many of the last blocks it uses, 1 or 4.
        pretrained: load the published weights of the backbone and the classifier; otherwise initialise at random.
        weights: which published classifier; there is only "IMAGENET1K".
        **kwargs: as for the backbone's entry point.

    Returns:
        A `LinearClassifier` in training mode.
    """
    return make
