"""Blocks of other libraries that compute with this package's ops, on their own modules and parameters.

A block is recognised by its parts, and accepted if it computes, on random input, what ours would in its place. What a
call asks for beyond a plain forward pass runs in the block's own code. So does a part that was changed after that, or
has hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dinov2_fast import ops
from dinov2_fast.integrations.changes import ModuleSnapshot, StructureWatch
from dinov2_fast.integrations.class_swap import STATE_ATTRIBUTE, SwappedModule
from dinov2_fast.integrations.module_ops import Function, drop_scale, is_identity, is_layer_norm, layer_norm
from dinov2_fast.integrations.parts import AcceleratedPart, Attention, DropPath, KnownPart, LayerScale, Norm, match_part
from dinov2_fast.torch_private import has_any_global_hook, is_traced

_NOTHING = nn.Identity()
ATTENTION_NAMES = ("attn", "attention")
_SCALE_NAMES = (("ls1", "ls2"), ("layer_scale1", "layer_scale2"))
_DROP_PATH_NAMES = (("drop_path1", "drop_path2"), ("drop_path", "drop_path"))
BLOCK_NAMES = {"norm1", "norm2", "mlp", *ATTENTION_NAMES, *sum(_SCALE_NAMES + _DROP_PATH_NAMES, ())}


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

    def __init__(self, block: Any, attentions: tuple[type[Attention], ...], mlps: tuple[type[KnownPart], ...]) -> None:
        self.latest: tuple[tuple[Any, ...], StructureWatch, BlockFunctions] | None = None
        children = block._modules.keys()
        self.attention = next(name for name in ATTENTION_NAMES if name in children)
        self.scales = _present(children, _SCALE_NAMES)
        self.drop_paths = _present(children, _DROP_PATH_NAMES)
        forms: dict[str, tuple[type[KnownPart], ...]] = {self.attention: attentions, "mlp": mlps}
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
