"""Blocks of other libraries that compute with this package's ops, on their own modules and parameters.

A block is recognised by its parts, and accepted if it computes, on random input, what ours would in its place. What a
call asks for beyond a plain forward pass runs in the block's own code. So does a part that was changed after that, or has
hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dinov2_fast import ops
from dinov2_fast.block import SUBSET_THRESHOLD
from dinov2_fast.block import Block as OurBlock
from dinov2_fast.integrations.changes import (
    ModuleSnapshot,
    StructureWatch,
    class_path,
    plain_attributes,
    shadowed_methods,
)
from dinov2_fast.integrations.class_swap import STATE_ATTRIBUTE, SwappedModule, has_own_forward, swap_class
from dinov2_fast.integrations.module_ops import Function, drop_scale, is_identity, is_layer_norm, layer_norm
from dinov2_fast.integrations.parts import (
    ATTENTIONS,
    MLPS,
    AcceleratedPart,
    DropPath,
    KnownPart,
    LayerScale,
    Norm,
    match_part,
)
from dinov2_fast.integrations.trial import TrialRun, agree, copy_with_random_weights, relative_error, run_copy
from dinov2_fast.torch_private import has_any_global_hook, is_traced

_NOTHING = nn.Identity()
_ATTENTION_NAMES = ("attn", "attention")
_SCALE_NAMES = (("ls1", "ls2"), ("layer_scale1", "layer_scale2"))
_DROP_PATH_NAMES = (("drop_path1", "drop_path2"), ("drop_path", "drop_path"))
_NAMES = {"norm1", "norm2", "mlp", *_ATTENTION_NAMES, *sum(_SCALE_NAMES + _DROP_PATH_NAMES, ())}


class BlockFunctions(NamedTuple):
    """The functions that compute a block as it is now, from those of its parts."""

    norm1: Function
    attention: Function
    add_and_norm: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    mlp: Function
    add: Callable[[Tensor, Tensor], Tensor]


class BlockParts:
    """The parts of a block: their names, and by name what is known of each that our code can compute.

    `latest` is the last plan and what it was made from, which copies of the block do not share.
    """

    def __init__(self, block: Any) -> None:
        self.latest: tuple[tuple[Any, ...], StructureWatch, BlockFunctions] | None = None
        children = block._modules.keys()
        self.attention = next(name for name in _ATTENTION_NAMES if name in children)
        self.scales = _present(children, _SCALE_NAMES)
        self.drop_paths = _present(children, _DROP_PATH_NAMES)
        forms: dict[str, tuple[type[KnownPart], ...]] = {self.attention: ATTENTIONS, "mlp": MLPS}
        forms |= {"norm1": (Norm,), "norm2": (Norm,)}
        forms |= {name: (LayerScale,) for name in self.scales if name}
        forms |= {name: (DropPath,) for name in self.drop_paths if name}
        found = {name: match_part(getattr(block, name), forms[name]) for name in forms}
        self.parts = {name: AcceleratedPart(getattr(block, name), form) for name, form in found.items() if form}
        self.settings = ModuleSnapshot(block, block.origin[2])

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "latest": None}


def _present(children: Any, names: tuple[tuple[str, str], ...]) -> tuple[str | None, str | None]:
    return next((pair for pair in names if children >= set(pair)), (None, None))


def called(module: nn.Module, x: Tensor) -> Tensor:
    """The features that `module` gives for `x`; some attentions return their weights beside them."""
    result = module(x)
    return result[0] if isinstance(result, tuple) else result


class AcceleratedBlock(SwappedModule):
    """One block: ``x + scale1(attention(norm1(x)))``, then ``x + scale2(mlp(norm2(x)))``, with stochastic depth."""

    norm1: Any
    norm2: Any
    irrelevant: ClassVar[frozenset[str]] = frozenset()  # keyword arguments that change nothing in a block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        others = (*args[1:], *(value for name, value in kwargs.items() if name not in self.irrelevant))
        if not args or self.declines(args[0]) or any(other is not None and other is not False for other in others):
            return super().forward(*args, **kwargs)  # of the block's own class
        plan = self.plan()
        x, y = plan.add_and_norm(args[0], plan.attention(plan.norm1(args[0])))
        return plan.add(x, plan.mlp(y))

    @property
    def accelerated_parts(self) -> BlockParts:
        return self.__dict__[STATE_ATTRIBUTE]

    def declines(self, x: Any) -> bool:
        """Whether a call with `x` is for the block's own code."""
        return not isinstance(x, Tensor) or x.ndim != 3 or not self.is_unchanged()

    def is_unchanged(self) -> bool:
        """Whether the block itself is what it was when it was accelerated; its parts are looked at apart."""
        return self.accelerated_parts.settings.matches_subclass(self)

    def plan(self) -> BlockFunctions:
        """What computes the block now: as decided last, unless something changed since, or a graph is being made."""
        if is_traced() or has_any_global_hook():
            return self._make_functions()
        accelerated_parts = self.accelerated_parts
        children = self._modules.values()
        state = self.training, torch.is_grad_enabled(), *children
        latest = accelerated_parts.latest
        if latest is None or latest[0] != state or latest[1].changed():
            watch = StructureWatch(module for child in children if child is not None for module in child.modules())
            latest = accelerated_parts.latest = state, watch, self._make_functions()
        return latest[2]

    def _make_functions(self) -> BlockFunctions:
        accelerated_parts = self.accelerated_parts
        drop1, drop2 = self.drop_paths(accelerated_parts)
        return BlockFunctions(
            self._norm("norm1"),
            self._branch(accelerated_parts.attention),
            self._add_and_norm(accelerated_parts.scales[0], drop1),
            self._branch("mlp"),
            self._add(accelerated_parts.scales[1], drop2),
        )

    def drop_paths(self, accelerated_parts: BlockParts) -> tuple[str | None, str | None]:
        """Names of the stochastic depth of the two branches, as it is in this mode."""
        return accelerated_parts.drop_paths

    def own_code(self) -> Iterator[str]:
        """What of it runs in its own code now, in plain calls too, and why."""
        if not self.is_unchanged():
            yield f"it runs in its own code: {self.accelerated_parts.settings.change_in_subclass(self)}"
            return
        for name, part in self.accelerated_parts.parts.items():
            module = getattr(self, name)
            reason = None if is_identity(module) else part.reason(module)
            if reason:
                yield f"its {name} runs in its own code: {reason}"

    def change(self) -> str | None:
        """What of it is not as it was when it was accelerated."""
        if not self.is_unchanged():
            return self.accelerated_parts.settings.change_in_subclass(self)
        changes = ((name, part.change(getattr(self, name))) for name, part in self.accelerated_parts.parts.items())
        return next((f"of its {name}, {change}" for name, change in changes if change), None)

    def _branch(self, name: str) -> Function:
        """Attention or MLP."""
        module = getattr(self, name)
        part = self.accelerated_parts.parts[name]
        return partial(called, module) if part.why_called(module) else part.form.function(module)

    def _norm(self, name: str) -> Function:
        norm = getattr(self, name)
        return layer_norm(norm) if self._knows(name, norm) else norm

    def _add_and_norm(self, scale: str | None, drop: str | None) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        norm = self.norm2
        if is_layer_norm(norm) and self._knows("norm2", norm) and self._foldable(scale, drop):
            factors = self._factors(scale, drop)
            parameters, eps = norm._parameters, norm.eps

            def add_and_norm_at_once(x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
                gamma, dropped = factors(branch)
                weight, bias = parameters["weight"], parameters["bias"]
                return ops.layer_norm(x, weight, bias, eps, branch=branch, gamma=gamma, drop_scale=dropped)

            return add_and_norm_at_once
        add = self._add(scale, drop)

        def add_and_norm(x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
            x = add(x, branch)
            return x, norm(x)

        return add_and_norm

    def _add(self, scale: str | None, drop: str | None) -> Callable[[Tensor, Tensor], Tensor]:
        if self._foldable(scale, drop):
            factors = self._factors(scale, drop)
            return lambda x, branch: ops.add_residual(x, branch, *factors(branch))
        scaled, dropped = self._get(scale), self._get(drop)
        return lambda x, branch: x + dropped(scaled(branch))

    def _foldable(self, *names: str | None) -> bool:
        return all(is_identity(self._get(name)) or self._knows(name, self._get(name)) for name in names)

    def _factors(self, scale: str | None, drop: str | None) -> Callable[[Tensor], tuple[Tensor | None, Tensor | None]]:
        """LayerScale, and stochastic depth of a branch."""
        parameters, drop_path = self._get(scale)._parameters, self._get(drop)
        dropping = drop_path.training and getattr(drop_path, "drop_prob", 0.0)

        def factors(branch: Tensor) -> tuple[Tensor | None, Tensor | None]:
            gamma = next(iter(parameters.values()), None)  # an identity has none
            return gamma, drop_scale(drop_path, branch, gamma) if dropping else None

        return factors

    def _get(self, name: str | None) -> Any:
        return _NOTHING if name is None else getattr(self, name)

    def _knows(self, name: str | None, module: nn.Module) -> bool:
        part = self.accelerated_parts.parts.get(name or "")
        return part is not None and part.why_called(module) is None


class TransformersBlock(AcceleratedBlock):
    """`Dinov2Layer` and others of transformers, which hand on what is asked of the whole model."""

    irrelevant = frozenset({"output_attentions", "output_hidden_states", "return_dict", "num_items_in_batch"})


class FacebookBlock(AcceleratedBlock):
    """Meta's `Block` and copies of it, which have a rule of their own for stochastic depth."""

    sample_drop_ratio: float

    def declines(self, x: Any) -> bool:
        # Above that rate the reference computes a branch for a subset of the images only.
        return super().declines(x) or (self.training and self.sample_drop_ratio > SUBSET_THRESHOLD)

    def drop_paths(self, accelerated_parts: BlockParts) -> tuple[str | None, str | None]:
        if not (self.training and self.sample_drop_ratio):
            return None, None  # the reference does not call them then
        return accelerated_parts.drop_paths[0], accelerated_parts.drop_paths[
            0
        ]  # twice the first, as the reference does


def block_class_for(module: nn.Module) -> type[AcceleratedBlock] | None:
    """The class here that accelerates `module`, or None if it has not the parts of a block, or is this package's."""
    children = module._modules.keys()
    if isinstance(module, OurBlock) or not children >= {"norm1", "norm2", "mlp"}:
        return None
    if isinstance(module, nn.ModuleDict) or len(children & set(_ATTENTION_NAMES)) != 1:
        return None
    if type(module).__module__.startswith("transformers."):
        return TransformersBlock
    return FacebookBlock if hasattr(module, "sample_drop_ratio") else AcceleratedBlock


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
    block.__dict__[STATE_ATTRIBUTE] = BlockParts(block)


def _reason_by_looks(block: Any) -> str | None:
    if has_own_forward(block):
        return "it has a forward of its own, set on the instance"
    if shadowed_methods(block):
        return f"{' and '.join(shadowed_methods(block))} was set on the instance"
    unknown = [name for name, child in block._modules.items() if name not in _NAMES and not is_identity(child)]
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


# What a block computes, tried on copies


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
