"""A block of another library that computes with this package's ops, on its own modules and parameters.

A call that asks for more than a plain forward pass runs the block's own code. So does each part of the block that was
changed, or has hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dinov2_fast import ops
from dinov2_fast.integrations.changes import ModuleSnapshot, StructureWatch, has_hooks, shadowed_methods
from dinov2_fast.integrations.class_swap import STATE_ATTRIBUTE, SwappedModule
from dinov2_fast.integrations.module_ops import Function, drop_scale, is_identity, is_layer_norm, layer_norm
from dinov2_fast.integrations.parts import KnownPart, attention_name, drop_path_names, known_parts, scale_names
from dinov2_fast.torch_private import has_any_global_hook, is_traced

_MISSING = nn.Identity()


class AcceleratedPart:
    """A part of an accelerated block: what computes it, and what it was when the block was accelerated."""

    def __init__(self, module: Any, known: KnownPart) -> None:
        self.known = known
        bypassed = [(name, ModuleSnapshot(getattr(module, name))) for name in known.bypassed]
        self._snapshots = [("", ModuleSnapshot(module)), *bypassed]
        shadowed = [name for _, each in self._modules_of(module) for name in shadowed_methods(each)]
        self._shadowed = f"methods were set on the instance: {', '.join(shadowed)}" if shadowed else None

    def why_called(self, module: Any) -> str | None:
        """Why `module` has to be called, or None if our ops compute it."""
        if self._shadowed:
            return self._shadowed
        for snapshot, each in self._modules_of(module):
            if not snapshot.matches(each):
                return "it was changed after it was accelerated"
            if has_hooks(each, except_recording=True):
                return "it has hooks, or a forward was set on the instance"
        return self.known.refuses(module)

    def change(self, module: Any) -> str | None:
        """What was changed since the block was accelerated, or None."""
        changed = (snapshot.change(each) for snapshot, each in self._modules_of(module) if not snapshot.matches(each))
        return next(changed, None)

    def _modules_of(self, module: Any) -> list[tuple[ModuleSnapshot, Any]]:
        return [(snapshot, getattr(module, name, None) if name else module) for name, snapshot in self._snapshots]


class BlockParts:
    """The parts of an accelerated block."""

    def __init__(self, block: Any) -> None:
        # The function made last, with the state and the watch that tell whether it still holds.
        self.latest: tuple[tuple[Any, ...], StructureWatch, Function] | None = None
        self.attention = attention_name(block)
        self.scales = scale_names(block)
        self.drop_paths = drop_path_names(block)
        self.by_name = {name: AcceleratedPart(getattr(block, name), part) for name, part in known_parts(block).items()}
        self.snapshot = ModuleSnapshot(block, block.class_swap.replaced)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "latest": None}  # copies of the block make their own


def call_for_features(module: nn.Module, x: Tensor) -> Tensor:
    """Calls `module` and returns the features alone; some attentions return their weights beside them."""
    result = module(x)
    return result[0] if isinstance(result, tuple) else result


class AcceleratedBlock(SwappedModule):
    """One block: ``x + scale1(attention(norm1(x)))``, then ``x + scale2(mlp(norm2(x)))``, with stochastic depth."""

    ignored_arguments: ClassVar[frozenset[str]] = frozenset()  # keyword arguments that change nothing in a block

    norm1: Any
    norm2: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        others = (*args[1:], *(value for name, value in kwargs.items() if name not in self.ignored_arguments))
        asks_for_more = any(other is not None and other is not False for other in others)
        if not args or asks_for_more or self.needs_own_code(args[0]):
            return super().forward(*args, **kwargs)  # of the block's own class
        return self.current_function()(args[0])

    @property
    def accelerated_parts(self) -> BlockParts:
        return self.__dict__[STATE_ATTRIBUTE]

    def needs_own_code(self, x: Any) -> bool:
        """Whether a call with `x` runs the block's own code."""
        return not isinstance(x, Tensor) or x.ndim != 3 or not self.is_unchanged()

    def is_unchanged(self) -> bool:
        """Whether the block itself, apart from its parts, is as it was when it was accelerated."""
        return self.accelerated_parts.snapshot.matches(self)

    def change(self) -> str | None:
        """What was changed in the block or its parts since it was accelerated, or None."""
        parts = self.accelerated_parts
        if not self.is_unchanged():
            return parts.snapshot.change(self)
        changes = ((name, part.change(getattr(self, name))) for name, part in parts.by_name.items())
        return next((f"in its {name}, {change}" for name, change in changes if change), None)

    def own_code_reasons(self) -> Iterator[str]:
        """Which of its parts run their own code now, even in plain calls, and why."""
        parts = self.accelerated_parts
        if not self.is_unchanged():
            yield f"it runs its own code: {parts.snapshot.change(self)}"
            return
        for name, part in parts.by_name.items():
            module = getattr(self, name)
            reason = None if is_identity(module) else part.change(module) or part.why_called(module)
            if reason:
                yield f"its {name} runs its own code: {reason}"

    def current_function(self) -> Function:
        """The function that computes the block as it is now: the latest one, unless the block changed or is traced."""
        if is_traced() or has_any_global_hook():
            return self._make_function()
        parts = self.accelerated_parts
        children = self._modules.values()
        state = self.training, torch.is_grad_enabled(), *children
        latest = parts.latest
        if latest is None or latest[0] != state or latest[1].changed():
            watch = StructureWatch(module for child in children if child is not None for module in child.modules())
            latest = parts.latest = state, watch, self._make_function()
        return latest[2]

    def _make_function(self) -> Function:
        parts = self.accelerated_parts
        drop_path1, drop_path2 = self.active_drop_paths()
        norm1 = layer_norm(self.norm1) if self._can_compute("norm1") else self.norm1
        attention, mlp = self._branch(parts.attention), self._branch("mlp")
        add_and_norm = self._add_and_norm(parts.scales[0], drop_path1)
        add = self._add(parts.scales[1], drop_path2)

        def compute(x: Tensor) -> Tensor:
            x, y = add_and_norm(x, attention(norm1(x)))
            return add(x, mlp(y))

        return compute

    def active_drop_paths(self) -> tuple[str | None, str | None]:
        """The names of the stochastic depth that the block applies to its two branches in this mode."""
        return self.accelerated_parts.drop_paths

    def _branch(self, name: str) -> Function:
        """The function for the attention or the MLP."""
        module = getattr(self, name)
        part = self.accelerated_parts.by_name[name]
        return partial(call_for_features, module) if part.why_called(module) else part.known.function(module)

    def _add_and_norm(self, scale: str | None, drop: str | None) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The function that adds the attention's branch to the stream, and its norm, in one op where possible."""
        norm = self.norm2
        if is_layer_norm(norm) and self._can_compute("norm2") and self._can_compute_or_skip(scale, drop):
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
        """The function that adds a branch to the stream, with LayerScale and stochastic depth."""
        if self._can_compute_or_skip(scale, drop):
            factors = self._factors(scale, drop)
            return lambda x, branch: ops.add_residual(x, branch, *factors(branch))
        scaled, dropped = self._part(scale), self._part(drop)
        return lambda x, branch: x + dropped(scaled(branch))

    def _factors(self, scale: str | None, drop: str | None) -> Callable[[Tensor], tuple[Tensor | None, Tensor | None]]:
        """The function that gives the factors of a branch: LayerScale's (hidden,), and stochastic depth's (batch,)."""
        parameters, drop_path = self._part(scale)._parameters, self._part(drop)
        dropping = drop_path.training and getattr(drop_path, "drop_prob", 0.0)

        def factors(branch: Tensor) -> tuple[Tensor | None, Tensor | None]:
            gamma = next(iter(parameters.values()), None)  # an identity has none
            return gamma, drop_scale(drop_path, branch, gamma) if dropping else None

        return factors

    def _part(self, name: str | None) -> Any:
        return _MISSING if name is None else getattr(self, name)

    def _can_compute(self, name: str) -> bool:
        part = self.accelerated_parts.by_name.get(name)
        return part is not None and part.why_called(getattr(self, name)) is None

    def _can_compute_or_skip(self, *names: str | None) -> bool:
        return all(name is None or is_identity(self._part(name)) or self._can_compute(name) for name in names)
