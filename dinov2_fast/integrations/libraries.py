"""The libraries whose blocks and backbones are accelerated: one table.

To support another library, write a file like `facebook.py` with its `AcceleratedBlock` and its `AcceleratedBackbone`,
add a row, and add the parts of its blocks to `parts.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from dinov2_fast.block import Block as OurBlock
from dinov2_fast.integrations.backbone import AcceleratedBackbone
from dinov2_fast.integrations.block import AcceleratedBlock
from dinov2_fast.integrations.changes import class_path
from dinov2_fast.integrations.facebook import FacebookBackbone, FacebookBlock
from dinov2_fast.integrations.parts import attention_name
from dinov2_fast.integrations.timm import TimmBackbone
from dinov2_fast.integrations.transformers import TransformersBackbone, TransformersBlock


class Library(NamedTuple):
    """A row of the table."""

    has_block: Callable[[nn.Module], bool]  # whether a block is built like this library's; the first such row is taken
    block: type[AcceleratedBlock]
    backbone_path: str  # a pattern for the full names of the classes of its backbones
    backbone: type[AcceleratedBackbone]


LIBRARIES = (
    Library(
        has_block=lambda block: type(block).__module__.startswith("transformers."),
        block=TransformersBlock,
        backbone_path=r"transformers\.models\.(dinov2(?:_with_registers)?)\.modeling_\1\.Dinov2(WithRegisters)?(Model|Backbone)",
        backbone=TransformersBackbone,
    ),
    Library(
        has_block=lambda block: hasattr(block, "sample_drop_ratio"),
        block=FacebookBlock,
        backbone_path=r"(?!dinov2_fast\.).*dinov2.*\.DinoVisionTransformer",
        backbone=FacebookBackbone,
    ),
    Library(
        has_block=lambda block: True,  # also blocks of any other project
        block=AcceleratedBlock,
        backbone_path=r"timm\.models\.vision_transformer\.VisionTransformer",
        backbone=TimmBackbone,
    ),
)


def block_class_for(module: nn.Module) -> type[AcceleratedBlock] | None:
    """The class that accelerates `module`; None if it lacks the parts of a block, or is this package's own block."""
    if isinstance(module, OurBlock | nn.ModuleDict) or not module._modules.keys() >= {"norm1", "norm2", "mlp"}:
        return None
    if not attention_name(module):
        return None
    return next(library.block for library in LIBRARIES if library.has_block(module))


def backbone_class_for(module: nn.Module) -> type[AcceleratedBackbone] | None:
    """The class that attaches an engine to `module`; None if it is not a backbone of these libraries."""
    path = class_path(type(module))
    return next((library.backbone for library in LIBRARIES if re.fullmatch(library.backbone_path, path)), None)
