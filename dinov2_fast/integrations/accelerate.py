"""`accelerate`: fast blocks inside a model of transformers, timm or torch.hub that exists already."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from dinov2_fast.errors import InvalidTypeError
from dinov2_fast.integrations.attached_engine import AttachedEngine
from dinov2_fast.integrations.backbone import AcceleratedBackbone
from dinov2_fast.integrations.block import AcceleratedBlock
from dinov2_fast.integrations.block_check import accelerate_block, clear_check_cache, reason_against
from dinov2_fast.integrations.changes import class_path, plain_attributes
from dinov2_fast.integrations.class_swap import SwappedModule, swap_back
from dinov2_fast.integrations.libraries import backbone_class_for, block_class_for, is_backbone

logger = logging.getLogger("dinov2_fast")

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Row:
    """A group of blocks in a model, or a backbone with an engine.

    `name` is its place in the model and `kind` its class; `accelerated` of `count` are accelerated, and `reasons` says
    which are not and why.
    """

    name: str
    kind: str
    accelerated: int
    count: int
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        line = f"{self.name or 'the model'}: {self.accelerated} of {self.count} {self.kind} accelerated"
        return "\n  ".join([line, *self.reasons])


@dataclass(frozen=True, repr=False)
class Report:
    """What in a model is accelerated, and what is not and why; print it."""

    rows: tuple[Row, ...]

    def __repr__(self) -> str:
        return "\n".join(map(str, self.rows)) or "no blocks of a DINOv2"


def accelerate(model: Model, inference: bool = False, **options: Any) -> Model:
    """Makes the DINOv2 blocks inside `model` compute with this package's ops.

    It takes the blocks of transformers' `Dinov2*` and `Dinov2WithRegisters*` (4.57 and newer), of timm's
    `VisionTransformer` and of Meta's torch.hub models and copies of them, alone or as backbones inside larger models:
    any block that has their parts and computes the same, which is tried on copies with random weights. The object
    stays the same, and so do its parameters, state dict, hooks, `forward` and outputs. It can be trained, compiled, copied
    and saved as before, be given adapters before or after, and be sharded afterwards. Everything else in the model is left
    alone. Calls with masks or lists of images run the blocks' own code, and attention for which the user chose another
    implementation than torch's runs in that. So does each part of a block from when it has hooks, or its class or an
    attribute of it is changed, which ``print(dinov2_fast.accelerated(model))`` tells.

    Args:
        model: already built and loaded; changed in place.
        inference: also let the engine of `optimize_for_inference` answer plain calls of the backbones in eval mode,
            through their own `forward`. Outputs have the dtype of the model and the precision of the engine, and carry
            no gradient. Calls in training mode, with masks, of uint8 images, for hidden states or attentions,
            compiled, or while hooks hang on modules inside, run the accelerated blocks instead. So do backbones whose
            methods return something else than ours on a small image, tried when the engine is made and whenever a
            setting changes. The engine follows weights and settings; after what it does not see (writes through
            ``.data``, a function replaced in a Python module), call `accelerate` again.
        **options: with `inference`, those of `optimize_for_inference`.

    Returns:
        `model`. ``print(dinov2_fast.accelerated(model))`` says what was found in it.

    Raises:
        TypeError: nothing in the model can be accelerated, or with `inference` no backbone can; the message says why.
        ValueError: `options` that `optimize_for_inference` refuses.
        In either case the model is as it was.
    """
    if options and not inference:
        raise InvalidTypeError(f"{', '.join(options)}: the engine's options need inference=True.")
    clear_check_cache()
    accepted = [block for name, block in _blocks(model) if _reason(block) is None]
    if not accepted:
        raise InvalidTypeError(_nothing_to_take(model))
    new = [block for block in accepted if not isinstance(block, AcceleratedBlock)]
    for block in new:
        accelerate_block(block)
    try:
        backbones = _engines(model, options) if inference else []
    except BaseException:
        for block in new:
            swap_back(block)  # type: ignore[arg-type]  # its class is another one now
        raise
    for backbone, engine in backbones:
        engine.attach(backbone)
    for row in accelerated(model).rows:
        logger.log(logging.WARNING if row.reasons else logging.INFO, "%s", row)
    return model


def restore(model: Model) -> Model:
    """Undoes `accelerate`: every block and backbone computes with the code of its own class again.

    Returns:
        `model`.

    Raises:
        ValueError: after it was accelerated, FSDP or the like made classes of its own of the accelerated ones.
    """
    for module in list(model.modules()):
        if isinstance(module, SwappedModule):
            swap_back(module)
    return model


def accelerated(model: nn.Module) -> Report:
    """What in `model` is accelerated: a row for each group of blocks, and for each backbone with an engine."""
    clear_check_cache()
    groups: dict[tuple[str, str], list[tuple[str, nn.Module]]] = {}
    for name, block in _blocks(model):
        groups.setdefault((_group(name), type(block).__qualname__), []).append((name, block))
    rows = [_row_of_blocks(name, kind, blocks) for (name, kind), blocks in groups.items()]
    backbones = [(name, module) for name, module in model.named_modules() if isinstance(module, AcceleratedBackbone)]
    return Report((*rows, *(_row_of_backbone(name, backbone) for name, backbone in backbones)))


def _row_of_blocks(name: str, kind: str, blocks: list[tuple[str, nn.Module]]) -> Row:
    names_by_reason: dict[str, list[str]] = {}
    for place, block in blocks:
        for reason in _reasons(block):
            names_by_reason.setdefault(reason, []).append(place)
    reasons = tuple(f"{', '.join(places)}: {reason}" for reason, places in names_by_reason.items())
    done = sum(isinstance(block, AcceleratedBlock) and block.is_unchanged() for _, block in blocks)
    return Row(name, kind, done, len(blocks), reasons)


def _reasons(block: nn.Module) -> list[str]:
    """Why it, or parts of it, run in their own code."""
    if isinstance(block, AcceleratedBlock):
        return list(block.own_code())
    return [reason_against(block) or "accelerate was not called"]


def _row_of_backbone(name: str, backbone: AcceleratedBackbone) -> Row:
    engine = backbone.attached_engine
    partly = (f"{method} runs its own code: it {why}" for method, why in engine.unanswered.items())
    reasons = (engine.reason,) if engine.reason else tuple(partly)
    return Row(name, f"{type(backbone).__qualname__} by an engine", int(not engine.reason), 1, reasons)


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, AcceleratedBlock) or block_class_for(module) is not None:
            yield name, module


def _reason(block: nn.Module) -> str | None:
    return None if isinstance(block, AcceleratedBlock) else reason_against(block)


def _group(name: str) -> str:
    """The place of the list that a block is in: "encoder.layer" for "encoder.layer.3"."""
    return re.sub(r"(^|\.)\d+(\.\d+)*$", "", name)


def _engines(model: nn.Module, options: dict[str, Any]) -> list[tuple[nn.Module, AttachedEngine]]:
    """The backbones in `model` whose calls an engine can answer, each with its engine."""
    found: list[tuple[nn.Module, AttachedEngine]] = []
    reasons = []
    for name, module in model.named_modules():
        if is_backbone(module):
            engine = AttachedEngine(module, backbone_class_for(module), options)
            if engine.reason is None:
                found.append((module, engine))
            else:
                reasons.append(f"{name or 'the model'}: {engine.reason}")
    if not found:
        why = "; ".join(reasons) or "its blocks are in no backbone whose calls are known here"
        raise InvalidTypeError(f"inference=True cannot attach an engine to this {type(model).__name__}. {why}.")
    for reason in reasons:
        logger.warning("No engine is attached to %s", reason)
    return found


def _nothing_to_take(model: nn.Module) -> str:
    message = f"Nothing in this {type(model).__name__} can be accelerated"
    rows = accelerated(model).rows
    if rows:
        return "\n".join([f"{message}:", *(reason for row in rows for reason in row.reasons)])
    repeated = {type(m[0]) for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) > 1}
    if any(kind.__module__.startswith("dinov2_fast.") for kind in repeated):
        return f"{message}: it is a model of this package, which has these blocks already. See optimize_for_inference."
    for unseen in _unseen_backbones(model):
        return f"{message}: {unseen}, where it is no submodule. Call accelerate on that backbone itself."
    has = ", ".join(sorted(class_path(kind) for kind in repeated)) or "none"
    return (
        f"{message}: it has no blocks of transformers' Dinov2 or Dinov2WithRegisters, of timm's VisionTransformer, or "
        f"of Meta's DINOv2. The repeated modules it has are: {has}."
    )


def _unseen_backbones(model: nn.Module) -> Iterator[str]:
    """Where modules with blocks stand in plain containers, which are no submodules."""
    for name, module in model.named_modules():
        for attribute, value in plain_attributes(module).items():
            values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
            for held in values:
                if isinstance(held, nn.Module) and next(_blocks(held), None):
                    place = f"{name}.{attribute}".lstrip(".")
                    yield f"it keeps a {type(held).__name__} in {place}, a plain {type(value).__name__}"
