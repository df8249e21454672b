"""The libraries whose blocks and backbones are accelerated: one table.

To support another library, write a file like `timm.py` with its `AcceleratedBlock` and its `AcceleratedBackbone`, and
add a row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, NamedTuple

from torch import nn

from dinov2_fast.block import Block as OurBlock
from dinov2_fast.integrations.backbone import AcceleratedBackbone
from dinov2_fast.integrations.block import AcceleratedBlock
from dinov2_fast.integrations.changes import class_path
from dinov2_fast.integrations.facebook import FacebookBackbone, FacebookBlock
from dinov2_fast.integrations.parts import BlockSpec
from dinov2_fast.integrations.timm import TimmBackbone, TimmBlock
from dinov2_fast.integrations.transformers import TransformersBackbone, TransformersBlock


class Library(NamedTuple):
    """A row of the table.

    Args:
        has_block: whether a block is this library's or built like it; the first row that says yes is taken.
        block: accelerates its blocks.
        backbone_path: a pattern for the full names of the classes of its backbones.
        backbone: attaches an engine to its backbones.
    """

    has_block: Callable[[nn.Module], bool]
    block: type[AcceleratedBlock]
    backbone_path: str
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
        block=TimmBlock,
        backbone_path=r"timm\.models\.vision_transformer\.VisionTransformer",
        backbone=TimmBackbone,
    ),
)


def _join(specs: Iterable[BlockSpec]) -> BlockSpec:
    fields: Any = zip(*specs, strict=True)
    return BlockSpec(*(tuple(dict.fromkeys(chain.from_iterable(alternatives))) for alternatives in fields))


# Projects combine parts of several libraries, so a block may have the parts of any of them.
ANY_BLOCK = _join(library.block.spec for library in LIBRARIES)


def block_class_for(module: nn.Module) -> type[AcceleratedBlock] | None:
    """The class that accelerates `module`; None if it lacks the parts of a block, or is this package's own block."""
    if isinstance(module, OurBlock | nn.ModuleDict) or not module._modules.keys() >= {"norm1", "norm2", "mlp"}:
        return None
    if ANY_BLOCK.attention_name(module) is None:
        return None
    return next(library.block for library in LIBRARIES if library.has_block(module))


def backbone_class_for(module: nn.Module) -> type[AcceleratedBackbone] | None:
    """The class that attaches an engine to `module`; None if it is no backbone of these libraries."""
    path = class_path(type(module))
    return next((library.backbone for library in LIBRARIES if re.fullmatch(library.backbone_path, path)), None)
