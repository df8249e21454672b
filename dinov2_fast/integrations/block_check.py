"""Decides whether a block can be accelerated, by its looks and by a trial on copies of it with random weights."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinov2_fast.block import SUBSET_THRESHOLD
from dinov2_fast.integrations.block import BlockParts, call_for_features
from dinov2_fast.integrations.changes import class_path, plain_attributes, shadowed_methods
from dinov2_fast.integrations.class_swap import STATE_ATTRIBUTE, has_own_forward, swap_class
from dinov2_fast.integrations.libraries import block_class_for
from dinov2_fast.integrations.module_ops import is_identity
from dinov2_fast.integrations.parts import ATTENTIONS, MLPS, PART_NAMES, attention_name, known_branches, match_part
from dinov2_fast.integrations.trial import TrialRun, copy_with_random_weights, error_beyond_rounding, run_copy


class BlockCheck(NamedTuple):
    """The result of a trial."""

    reason: str | None  # why the block cannot be accelerated
    replaced: type  # the class whose `forward` is replaced: of those that a call reaches, the furthest base


def reason_against(block: nn.Module) -> str | None:
    """Why `block`, for which `block_class_for` finds a class, cannot be accelerated, or None."""
    return _reason_by_looks(block) or _check(block).reason


def accelerate_block(block: nn.Module) -> None:
    """Swaps the class of `block` for one that computes with our ops; `reason_against` must have found no reason."""
    _accelerate(block, _check(block).replaced)


def _accelerate(block: nn.Module, replaced: type) -> None:
    block_class = block_class_for(block)
    assert block_class is not None
    swap_class(block, block_class, replaced)
    block.__dict__[STATE_ATTRIBUTE] = None  # BlockParts counts the attributes, and this is one
    block.__dict__[STATE_ATTRIBUTE] = BlockParts(block)


def _reason_by_looks(block: Any) -> str | None:
    if has_own_forward(block):
        return "forward was set on the instance"
    if shadowed_methods(block):
        return f"methods were set on the instance: {', '.join(shadowed_methods(block))}"
    unknown = [name for name, child in block._modules.items() if name not in PART_NAMES and not is_identity(child)]
    if unknown:
        return f"it has {' and '.join(unknown)} in addition to the parts of a block"
    attention = getattr(block, attention_name(block))
    known = match_part(attention, ATTENTIONS)
    if known is None:
        return f"its attention is a {class_path(type(attention))}, which our ops cannot compute"
    if known.extra_parts(attention):
        return f"its attention has {' and '.join(known.extra_parts(attention))}, which that of DINOv2 does not have"
    dropout = known.dropout(attention)
    rate = getattr(dropout, "p", dropout)
    if block.training and rate:
        return f"it is in training mode and drops attention weights (p = {rate})"
    if match_part(block.mlp, MLPS) is None:
        return f"its mlp is a {class_path(type(block.mlp))}, which our ops cannot compute"
    return None


_checks: dict[Hashable, BlockCheck] = {}


def clear_check_cache() -> None:
    """Empties the cache in which blocks that differ only by their weights share one trial."""
    _checks.clear()


def _check(block: nn.Module) -> BlockCheck:
    key = tuple(
        (name, type(module), *map(_comparable, plain_attributes(module).items()))
        for name, module in block.named_modules()
    )
    if key not in _checks:
        _checks[key] = _try_block(block)
    return _checks[key]


def _comparable(attribute: tuple[str, Any]) -> Hashable:
    """What matters of an attribute. Drop rates often differ from block to block: 0 and Meta's threshold matter."""
    name, value = attribute
    if "drop" in name and isinstance(value, float | int):
        return name, value > 0, value > SUBSET_THRESHOLD
    try:
        hash(value)
    except TypeError:
        return name, id(value)
    return name, value


def _try_block(block: nn.Module) -> BlockCheck:
    place: tuple[str, torch.dtype] = ("cpu", torch.float64)
    theirs = _run_in_both_modes(copy_with_random_weights(block, *place))
    if isinstance(theirs[0].output, Exception) and torch.cuda.is_available():  # xformers has no attention for the CPU
        place = ("cuda", torch.float32)
        theirs = _run_in_both_modes(copy_with_random_weights(block, *place))
    if isinstance(theirs[0].output, Exception):
        return BlockCheck(f"its code fails on a random input: {_first_line(theirs[0].output)}", type(block))
    for replaced in _classes_with_forward(block):
        copied = copy_with_random_weights(block, *place)
        _accelerate(copied, replaced)
        ours = _run_in_both_modes(copied)
        # Our forward ran if it made its function, or failed, since the block's own code does not fail.
        our_forward_ran = copied.__dict__[STATE_ATTRIBUTE].latest is not None or isinstance(ours[0].output, Exception)
        if our_forward_ran:
            reasons = map(_difference, ("in eval mode", "in training mode"), theirs, ours)
            reason = next(filter(None, reasons), None)
            return BlockCheck(reason and (_difference_of_parts(block, place) or reason), replaced)
    return BlockCheck("it does not call the forward of its class", type(block))


def _run_in_both_modes(copied: nn.Module) -> list[TrialRun]:
    return [run_copy(copied, training) for training in (False, True)]


def _classes_with_forward(block: nn.Module) -> list[type]:
    """The class of `block` and its bases that define `forward`, the furthest base first."""
    classes = [each for each in type(block).__mro__ if "forward" in vars(each) and not issubclass(nn.Module, each)]
    return classes[::-1]


def _difference(mode: str, theirs: TrialRun, ours: TrialRun) -> str | None:
    """How the accelerated block differs from the block itself, or None."""
    if isinstance(theirs.output, Exception):
        return f"{mode} its forward fails: {_first_line(theirs.output)}"
    if not isinstance(theirs.output, Tensor):
        return f"its forward returns a {type(theirs.output).__name__}"
    if theirs.changed != ours.changed:
        return f"a call sets {' and '.join(theirs.changed)}, which our code would not do"
    error = error_beyond_rounding(ours.output, theirs.output)
    if error is not None:
        return f"{mode} its forward computes something else than a block of DINOv2 (relative error {error:.2g})"
    if names := sorted(dict(theirs.calls.items() ^ ours.calls.items())):
        counts = ", ".join(f"{name} {theirs.calls[name]} times" for name in names)
        return f"{mode} it calls {counts}, unlike our code (checkpointing calls them twice)"
    return None


def _difference_of_parts(block: Any, place: tuple[str, torch.dtype]) -> str | None:
    """Which of attention and MLP, run alone, computes something else than ours, or None."""
    for name, known in known_branches(block).items():
        copied = copy_with_random_weights(getattr(block, name), *place)
        if known is None or known.refuses(copied):
            continue
        theirs = run_copy(copied, False, call_for_features).output
        if isinstance(theirs, Tensor):
            ours = run_copy(copied, False, known.compute).output
            error = error_beyond_rounding(ours, theirs)
            if error is not None:
                return f"its {name} computes something else than that of DINOv2 (relative error {error:.2g})"
    return None


def _first_line(error: Any) -> str:
    return f"{type(error).__name__} ({str(error).strip().partition(chr(10))[0]})"
