"""The libraries whose blocks and backbones are accelerated."""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import nn

from dinov2_fast.block import Block as OurBlock
from dinov2_fast.integrations.backbone import AcceleratedBackbone
from dinov2_fast.integrations.block import ATTENTION_NAMES, AcceleratedBlock
from dinov2_fast.integrations.facebook import FacebookBackbone, FacebookBlock, SwiGLU
from dinov2_fast.integrations.parts import Attention, PackedAttention, PlainMlp
from dinov2_fast.integrations.timm import GatedMlp, TimmBackbone
from dinov2_fast.integrations.transformers import (
    NestedAttention,
    SeparateAttention,
    SeparateSwiGLU,
    TransformersBackbone,
    TransformersBlock,
    TransformersSwiGLU,
)

ATTENTIONS: tuple[type[Attention], ...] = (PackedAttention, NestedAttention, SeparateAttention)
MLPS = (GatedMlp, PlainMlp, SwiGLU, TransformersSwiGLU, SeparateSwiGLU)


class Face(NamedTuple):
    """Where a library defines its backbones: patterns for the module and the name of their class."""

    backbone: type[AcceleratedBackbone]
    module: str
    name: str


FACES = (
    Face(
        TransformersBackbone,
        r"transformers\.models\.(dinov2|dinov2_with_registers)\.modeling_\1",
        "Dinov2(WithRegisters)?(Model|Backbone)",
    ),
    Face(TimmBackbone, r"timm\.models\.vision_transformer", "VisionTransformer"),
    Face(FacebookBackbone, r"(?!dinov2_fast\.).*dinov2.*", "DinoVisionTransformer"),
)


def block_class_for(module: nn.Module) -> type[AcceleratedBlock] | None:
    """The class here that accelerates `module`, or None if it has not the parts of a block, or is this package's."""
    children = module._modules.keys()
    if isinstance(module, OurBlock) or not children >= {"norm1", "norm2", "mlp"}:
        return None
    if isinstance(module, nn.ModuleDict) or len(children & set(ATTENTION_NAMES)) != 1:
        return None
    if type(module).__module__.startswith("transformers."):
        return TransformersBlock
    return FacebookBlock if hasattr(module, "sample_drop_ratio") else AcceleratedBlock


def is_backbone(module: nn.Module) -> bool:
    """Whether `module` is a backbone whose calls are known here."""
    return any(_matches(face, module) for face in FACES)


def _matches(face: Face, module: nn.Module) -> bool:
    kind = type(module)
    return bool(re.fullmatch(face.module, kind.__module__) and re.fullmatch(face.name, kind.__qualname__))


def backbone_class_for(backbone: nn.Module) -> type[AcceleratedBackbone]:
    return next(face.backbone for face in FACES if _matches(face, backbone))
