"""What modules are but for the values of their tensors, remembered, so that a later change is noticed."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any, cast

import torch
from torch import nn

from dinov2_fast.inference.checks import replaced_methods
from dinov2_fast.integrations.joining import ATTRIBUTE

# `forward` on an instance is looked for apart (`has_own_forward`); transformers' `__call__` alone reads the last.
_NO_SETTINGS = frozenset(vars(nn.Module())) | {ATTRIBUTE, "forward", "gradient_checkpointing"}

_TENSORS = ("_parameters", "_buffers")
_OTHERS = ("_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class ModuleWatch:
    """Notices any change of modules but another tensor in the place of one of the same type.

    That is: classes and what they define, attributes (the training mode is one) and those of a `config`, submodules and
    hooks, the names and types of tensors. Values of attributes are compared, not looked into. It holds no parameter, so
    a replaced one is freed. That of an engine, in `inference/weight_watch.py`, notices which tensors there are and what
    is written to them, but not the mode.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        own = list(map(vars, self._modules))
        self._tensors, others = (
            [each[name] for each in own for name in names if isinstance(each.get(name), dict)]
            for names in (_TENSORS, _OTHERS)
        )
        configs = [vars(each["config"]) for each in own if hasattr(each.get("config"), "__dict__")]
        classes = {base for module in self._modules for base in type(module).__mro__ if not issubclass(nn.Module, base)}
        self._now = [*own, *others, *configs, *map(vars, classes)]
        self._then = list(map(dict, self._now))
        self._types_then = self._types()

    def changed(self) -> bool:
        """Whether anything is not what it was."""
        try:
            return self._types() != self._types_then or self._now != self._then
        except Exception:  # arrays have no truth value
            return True

    def _types(self) -> list[Any]:
        """Names and types of tensors, and types of modules."""
        filled = list(filter(None, self._tensors))
        tensors = chain.from_iterable(map(dict.values, filled))
        return [*chain.from_iterable(filled), *map(type, tensors), *map(type, self._modules)]


class Settings:
    """The class of a module, or the base of it given as `kind`, that class's `forward`, and the attributes.

    What is noticed: another class or another `forward` of it; an attribute that has another value, is gone, or is new
    (a new private one only if it shadows one of the class). Values are compared, not looked into.
    """

    def __init__(self, module: nn.Module, kind: type | None = None) -> None:
        self.kind = cast(Any, kind or type(module))
        self.forward = self.kind.forward
        self.values = settings_of(module)
        self._of_class = tuple(_names_of_class(self.kind) - vars(module).keys())
        self._count = len(vars(module))

    def hold(self, module: Any) -> bool:
        """Whether `module` is what it was."""
        return type(module) is self.kind and self.hold_in_subclass(module)

    def hold_in_subclass(self, module: nn.Module) -> bool:
        """The same of a module whose class was made of that class."""
        if self.kind.forward is not self.forward:
            return False
        own = module.__dict__
        if torch.compiler.is_compiling():  # it traces neither views nor lengths of these dictionaries
            same = all(own.get(name) is value or own.get(name) == value for name, value in self.values.items())
            return same and not any(name in own for name in self._of_class)
        try:
            return self.values.items() <= own.items() and (len(own) == self._count or not self._new(module))
        except (RuntimeError, ValueError):  # of arrays that are compared as truth values
            return False

    def change(self, module: Any) -> str:
        """What is not as it was, in words."""
        if type(module) is not self.kind:
            return f"it is a {path(type(module))} now"
        return self.change_in_subclass(module)

    def change_in_subclass(self, module: nn.Module) -> str:
        """The same of a module whose class was made of that class."""
        if self.kind.forward is not self.forward:
            return "the forward of its class was replaced"
        own = vars(module)
        other = [name for name, value in self.values.items() if own.get(name) is not value and own.get(name) != value]
        return f"{', '.join(sorted({*other, *self._new(module)}))} was changed"

    def _new(self, module: nn.Module) -> list[str]:
        names = settings_of(module).keys() - self.values.keys()
        return [name for name in names if not name.startswith("_") or hasattr(self.kind, name)]


def settings_of(module: nn.Module) -> dict[str, Any]:
    """The attributes of `module` that are no tensors, submodules or hooks of its own."""
    return {name: value for name, value in vars(module).items() if name not in _NO_SETTINGS}


def shadowed_methods(module: nn.Module) -> list[str]:
    """Methods of the class that something set on the instance stands before, `forward` aside."""
    return [name for name in replaced_methods(module) if name != "forward"]


def path(kind: type) -> str:
    """The full name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _names_of_class(kind: type) -> set[str]:
    """What a class and its bases define beyond what every module has."""
    kinds = [each for each in kind.__mro__ if not issubclass(nn.Module, each)]
    return {name for each in kinds for name in vars(each) if not name.startswith("__")} - _NO_SETTINGS
