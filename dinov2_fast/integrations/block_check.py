"""Whether a block is one that can be accelerated, tried on copies."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinov2_fast.block import SUBSET_THRESHOLD
from dinov2_fast.integrations.block import BLOCK_NAMES, BlockParts, called
from dinov2_fast.integrations.changes import class_path, plain_attributes, shadowed_methods
from dinov2_fast.integrations.class_swap import STATE_ATTRIBUTE, has_own_forward, swap_class
from dinov2_fast.integrations.libraries import ATTENTIONS, MLPS, block_class_for
from dinov2_fast.integrations.module_ops import is_identity
from dinov2_fast.integrations.parts import KnownPart, match_part
from dinov2_fast.integrations.trial import TrialRun, agree, copy_with_random_weights, relative_error, run_copy


def reason_against(block: nn.Module) -> str | None:
    """Why `block`, which has a face here, cannot be accelerated; or None."""
    return _reason_by_looks(block) or _check(block).reason


def accelerate_block(block: nn.Module) -> None:
    """Gives `block`, which :func:`reason_against` takes, the class that computes with our ops."""
    _accelerate(block, _check(block).replaced_class)


def _accelerate(block: nn.Module, replaced_class: type) -> None:
    face = block_class_for(block)
    assert face is not None
    swap_class(block, face, replaced_class)
    block.__dict__[STATE_ATTRIBUTE] = None  # has its place before the attributes are counted
    block.__dict__[STATE_ATTRIBUTE] = BlockParts(block, ATTENTIONS, MLPS)


def _reason_by_looks(block: Any) -> str | None:
    if has_own_forward(block):
        return "it has a forward of its own, set on the instance"
    if shadowed_methods(block):
        return f"{' and '.join(shadowed_methods(block))} was set on the instance"
    unknown = [name for name, child in block._modules.items() if name not in BLOCK_NAMES and not is_identity(child)]
    if unknown:
        return f"it has {' and '.join(unknown)} beside the parts of a block"
    return _reason_against_attention(block) or _reason_against_mlp(block)


def _reason_against_mlp(block: Any) -> str | None:
    return None if match_part(block.mlp, MLPS) else f"its mlp is a {class_path(type(block.mlp))}"


def _reason_against_attention(block: Any) -> str | None:
    attention = getattr(block, "attn" if "attn" in block._modules else "attention")
    form = match_part(attention, ATTENTIONS)
    if form is None:
        return f"its attention is a {class_path(type(attention))}"
    if form.others(attention):
        return f"its attention has {' and '.join(form.others(attention))}"
    rate = form.dropout(attention)
    if block.training and getattr(rate, "p", rate):
        return f"it is in training mode and drops attention weights (p = {getattr(rate, 'p', rate)})"
    return None


class BlockCheck(NamedTuple):
    """Why a block is not accepted, or the class whose `forward` is replaced: the lowest that its own code reaches."""

    reason: str | None
    replaced_class: type


_checks: dict[Hashable, BlockCheck] = {}


def clear_check_cache() -> None:
    """Blocks are tried again. Within one call of `accelerate`, blocks that differ by weights only are tried once."""
    _checks.clear()


def _check(block: nn.Module) -> BlockCheck:
    key = tuple((name, type(module), _comparable(module)) for name, module in block.named_modules())
    if key not in _checks:
        _checks[key] = _check_block(block)
    return _checks[key]


def _comparable(module: nn.Module) -> Hashable:
    return tuple(
        (name, _rate(value) if "drop" in name else _hashable(value)) for name, value in plain_attributes(module).items()
    )


def _hashable(value: Any) -> Hashable:
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


def _rate(value: Any) -> Hashable:
    """Of a rate, which may be another in each block: whether it is none, and whether Meta's rule changes with it."""
    return (value > 0, value > SUBSET_THRESHOLD) if isinstance(value, float | int) else _hashable(value)


def _check_block(block: nn.Module) -> BlockCheck:
    where: tuple[str, torch.dtype] = ("cpu", torch.float64)
    stock = _trials(copy_with_random_weights(block, *where))
    if isinstance(stock[0].output, Exception) and torch.cuda.is_available():  # xformers has no attention for the CPU
        where = ("cuda", torch.float32)
        stock = _trials(copy_with_random_weights(block, *where))
    if isinstance(stock[0].output, Exception):
        return BlockCheck(f"its code fails on a random input: {_first_line(stock[0].output)}", type(block))
    for replaced_class in _classes_with_forward(block):
        copied = copy_with_random_weights(block, *where)
        _accelerate(copied, replaced_class)
        accelerated_parts = copied.__dict__[STATE_ATTRIBUTE] = _ReachedParts(copied.__dict__[STATE_ATTRIBUTE])
        ours = _trials(copied)
        if accelerated_parts.seen:
            reasons = map(_difference, ("in eval mode", "in training"), stock, ours)
            reason = next(filter(None, reasons), None)
            return BlockCheck(reason and (_difference_of_parts(block, where) or reason), replaced_class)
    return BlockCheck("its forward does not call ours", type(block))


def _trials(copied: nn.Module) -> list[TrialRun]:
    """In eval mode, and in training."""
    return [run_copy(copied, training) for training in (False, True)]


def _classes_with_forward(block: nn.Module) -> list[type]:
    """Those of its class and its bases that define `forward`, the lowest first."""
    kinds = [kind for kind in type(block).__mro__ if "forward" in vars(kind) and not issubclass(nn.Module, kind)]
    return kinds[::-1]


class _ReachedParts:
    """Says whether the accelerated forward was reached: it alone asks for the name of the attention."""

    def __init__(self, accelerated_parts: BlockParts) -> None:
        self._anatomy = accelerated_parts
        self.seen = False

    def __getattr__(self, name: str) -> Any:
        self.seen = self.seen or name == "attention"
        return getattr(self._anatomy, name)


def _difference(mode: str, stock: TrialRun, ours: TrialRun) -> str | None:
    if not isinstance(stock.output, Tensor):
        failed = isinstance(stock.output, Exception)
        what = f"fails: {_first_line(stock.output)}" if failed else f"returns a {type(stock.output).__name__}"
        return f"its forward {what}"
    if stock.kept != ours.kept:
        return f"a call sets {' and '.join(stock.kept)}, which our code would not"
    if not agree(ours.output, stock.output):
        error = relative_error(ours.output, stock.output)
        return f"{mode} its forward computes something else than a block of DINOv2 (off by {error:.2g})"
    if stock.calls != ours.calls:
        again = sorted(name for name in stock.calls if stock.calls[name] != ours.calls[name])
        return f"it runs {', '.join(again)} more than once, as with checkpointing, which our code would not"
    return None


def _difference_of_parts(block: Any, where: tuple[str, torch.dtype]) -> str | None:
    """Which of attention and MLP computes something else by itself."""
    attention = "attn" if "attn" in block._modules else "attention"
    forms_by_name: dict[str, tuple[type[KnownPart], ...]] = {attention: ATTENTIONS, "mlp": MLPS}
    for name, forms in forms_by_name.items():
        copied = copy_with_random_weights(getattr(block, name), *where)
        form = match_part(copied, forms)
        if form is None or form.refuses(copied):
            continue
        wanted = run_copy(copied, False, called).output
        if isinstance(wanted, Tensor):
            found = run_copy(copied, False, form.compute).output
            if not agree(found, wanted):
                error = relative_error(found, wanted)
                return f"its {name} computes something else than that of DINOv2 (off by {error:.2g})"
    return None


def _first_line(error: Any) -> str:
    return f"{type(error).__name__} ({str(error).strip().partition(chr(10))[0]})"
