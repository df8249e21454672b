"""`accelerate`: this package's ops, and its engine, inside a model of transformers, timm or torch.hub."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from dinov2_fast.errors import InvalidTypeError
from dinov2_fast.inference.optimize import EngineOptions
from dinov2_fast.integrations.attached_engine import AttachedEngine
from dinov2_fast.integrations.backbone import AcceleratedBackbone
from dinov2_fast.integrations.block import AcceleratedBlock
from dinov2_fast.integrations.block_check import accelerate_block, clear_check_cache, reason_against
from dinov2_fast.integrations.changes import class_path, plain_attributes
from dinov2_fast.integrations.class_swap import SwappedModule, swap_back
from dinov2_fast.integrations.libraries import backbone_class_for, block_class_for

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger("dinov2_fast")

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class AcceleratedGroup:
    """The blocks of one list in a model, or with `by_engine` a backbone with an engine.

    `accelerated` of `count` are accelerated. `reasons` say which are not, wholly or in part, and why.
    """

    name: str  # its place in the model
    class_name: str
    accelerated: int
    count: int
    reasons: tuple[str, ...]
    by_engine: bool = False

    def __str__(self) -> str:
        what = "answered by an engine" if self.by_engine else "accelerated"
        line = f"{self.name or 'the model'}: {self.accelerated} of {self.count} {self.class_name} {what}"
        return "\n  ".join([line, *self.reasons])


@dataclass(frozen=True, repr=False)
class AccelerationReport:
    """What is accelerated in a model, and what is not and why. Print it to read it."""

    groups: tuple[AcceleratedGroup, ...]

    def __repr__(self) -> str:
        return "\n".join(map(str, self.groups)) or "no DINOv2 blocks"


def accelerate(model: Model, inference: bool = False, **options: Unpack[EngineOptions]) -> Model:
    """Makes the DINOv2 blocks inside `model` compute with this package's ops.

    It accepts the blocks of transformers' `Dinov2*` and `Dinov2WithRegisters*` (4.57 and newer), of timm's
    `VisionTransformer`, and of Meta's torch.hub models and copies of them, also where such a backbone is the vision
    tower of a larger model: any block that has their parts and computes the same, which is tried on copies with random
    weights. Everything else in the model is left alone.

    `model` stays the same object, with its parameters, state dict, hooks, `forward` and outputs. It can be trained,
    compiled, copied and saved as before, take adapters before or after, and be sharded afterwards.

    Some calls run the blocks' own code: those with masks or lists of images, and attention in another implementation
    than torch's, if the user chose one. A part of a block runs its own code once it has hooks, or its class or an
    attribute is changed. ``print(dinov2_fast.acceleration_report(model))`` shows this.

    With `inference`, the engine of `optimize_for_inference` answers plain calls of the backbones in eval mode, through
    their own `forward`. The outputs have the dtype of the model and the precision of the engine, and no gradient. The
    accelerated blocks run instead where the engine does not answer:

    - calls in training mode, with masks, for hidden states or attentions, of images in uint8 or with `requires_grad`;
    - compiled calls, and calls while modules inside the backbone have hooks;
    - methods of a backbone that return something else than ours on a small image. This is compared when the engine is
      made, and again whenever the weights or settings change.

    The engine follows changes of weights and of the model's settings, but not writes through ``.data``, a function that
    was replaced in a Python module, or a :func:`~dinov2_fast.use_backend` that needs its weights in another layout:
    call `accelerate` again after these.

    Args:
        model: already built and loaded; changed in place, and returned.
        inference: also attach an engine to every backbone.
        **options: with `inference`, the options of `optimize_for_inference`.

    Raises:
        TypeError: no block can be accelerated, or `inference` can attach no engine, or `options` without `inference`.
        ValueError: `options` that `optimize_for_inference` refuses.
        In both cases the model is as it was.
    """
    if options and not inference:
        raise InvalidTypeError(f"{', '.join(options)}: the engine's options need inference=True.")
    clear_check_cache()
    blocks = [block for _, block in _blocks(model) if isinstance(block, AcceleratedBlock) or not reason_against(block)]
    if not blocks:
        raise InvalidTypeError(_why_nothing_is_accelerated(model))
    new = [block for block in blocks if not isinstance(block, AcceleratedBlock)]
    for block in new:
        accelerate_block(block)
    try:
        engines = _make_engines(model, options) if inference else []
    except BaseException:
        for block in new:
            swap_back(block)  # type: ignore[arg-type]  # its class is another one now
        raise
    for backbone, engine in engines:
        engine.attach(backbone)
    for group in acceleration_report(model).groups:
        logger.log(logging.WARNING if group.reasons else logging.INFO, "%s", group)
    return model


def unaccelerate(model: Model) -> Model:
    """Undoes `accelerate` and returns `model`: every block and backbone computes with the code of its own class again.

    Raises:
        ValueError: FSDP or the like has subclassed the classes of accelerated blocks.
    """
    for module in list(model.modules()):
        if isinstance(module, SwappedModule):
            swap_back(module)
    return model


def acceleration_report(model: nn.Module) -> AccelerationReport:
    """What is accelerated in `model`: a group for each list of blocks, and one for each backbone with an engine."""
    clear_check_cache()
    lists: dict[tuple[str, str], list[tuple[str, nn.Module]]] = {}
    for name, block in _blocks(model):
        list_name = re.sub(r"(^|\.)\d+(\.\d+)*$", "", name)  # "encoder.layer" for "encoder.layer.3"
        lists.setdefault((list_name, type(block).__qualname__), []).append((name, block))
    of_blocks = [_group_of_blocks(name, class_name, blocks) for (name, class_name), blocks in lists.items()]
    backbones = [(name, module) for name, module in model.named_modules() if isinstance(module, AcceleratedBackbone)]
    return AccelerationReport((*of_blocks, *(_group_of_backbone(name, backbone) for name, backbone in backbones)))


def _group_of_blocks(name: str, class_name: str, blocks: list[tuple[str, nn.Module]]) -> AcceleratedGroup:
    names_by_reason: dict[str, list[str]] = {}
    for block_name, block in blocks:
        for reason in _reasons(block):
            names_by_reason.setdefault(reason, []).append(block_name)
    reasons = tuple(f"{', '.join(names)}: {reason}" for reason, names in names_by_reason.items())
    accelerated = sum(isinstance(block, AcceleratedBlock) and block.is_unchanged() for _, block in blocks)
    return AcceleratedGroup(name, class_name, accelerated, len(blocks), reasons)


def _reasons(block: nn.Module) -> list[str]:
    """Why the block, or parts of it, run their own code."""
    if isinstance(block, AcceleratedBlock):
        return list(block.own_code_reasons())
    return [reason_against(block) or "accelerate was not called"]


def _group_of_backbone(name: str, backbone: AcceleratedBackbone) -> AcceleratedGroup:
    engine = backbone.attached_engine
    unanswered = (f"{method} runs its own code: it {why}" for method, why in engine.unanswered.items())
    reasons = (engine.reason,) if engine.reason else tuple(unanswered)
    return AcceleratedGroup(name, type(backbone).__qualname__, int(not engine.reason), 1, reasons, by_engine=True)


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that have the parts of a block, accelerated or not, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, AcceleratedBlock) or block_class_for(module) is not None:
            yield name, module


def _make_engines(model: nn.Module, options: EngineOptions) -> list[tuple[nn.Module, AttachedEngine]]:
    """The backbones in `model` whose calls an engine can answer, each with its engine."""
    found: list[tuple[nn.Module, AttachedEngine]] = []
    reasons = []
    for name, module in model.named_modules():
        backbone_class = backbone_class_for(module)
        if backbone_class is not None:
            engine = AttachedEngine(module, backbone_class, options)
            if engine.reason is None:
                found.append((module, engine))
            else:
                reasons.append(f"{name or 'the model'}: {engine.reason}")
    if not found:
        why = "; ".join(reasons) or "its blocks are not in a backbone of a known class"
        raise InvalidTypeError(f"inference=True cannot attach an engine to this {type(model).__name__}: {why}.")
    for reason in reasons:
        logger.warning("No engine is attached to %s", reason)
    return found


def _why_nothing_is_accelerated(model: nn.Module) -> str:
    message = f"Nothing in this {type(model).__name__} can be accelerated"
    groups = acceleration_report(model).groups
    if groups:
        return "\n".join([f"{message}:", *(reason for group in groups for reason in group.reasons)])
    repeated = {type(m[0]) for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) > 1}
    if any(each.__module__.startswith("dinov2_fast.") for each in repeated):
        return f"{message}: it is a model of this package, which has these blocks already. See optimize_for_inference."
    for place in _backbones_outside_submodules(model):
        return f"{message}: it keeps a {place}, so it is not a submodule. Call accelerate on that backbone itself."
    names = ", ".join(sorted(map(class_path, repeated))) or "none"
    return (
        f"{message}: it has no blocks of transformers' Dinov2 or Dinov2WithRegisters, of timm's VisionTransformer, or "
        f"of Meta's DINOv2. Its repeated modules are: {names}."
    )


def _backbones_outside_submodules(model: nn.Module) -> Iterator[str]:
    """Where `model` keeps modules with blocks in plain containers."""
    for name, module in model.named_modules():
        for attribute, value in plain_attributes(module).items():
            values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
            for held in values:
                if isinstance(held, nn.Module) and next(_blocks(held), None):
                    place = f"{name}.{attribute}".lstrip(".")
                    yield f"{type(held).__name__} in {place}, a plain {type(value).__name__}"
