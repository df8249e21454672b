"""Notices changes of a module other than those of values of tensors: hooks, methods, attributes, submodules."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any, cast

import torch
from torch import nn

from dinov2_fast.inference.checks import replaced_methods
from dinov2_fast.integrations.class_swap import STATE_ATTRIBUTE, has_own_forward
from dinov2_fast.torch_private import has_any_global_hook

# `forward` has a check of its own, `has_own_forward`; only transformers' `__call__` reads `gradient_checkpointing`.
_IGNORED = frozenset(vars(nn.Module())) | {STATE_ATTRIBUTE, "forward", "gradient_checkpointing"}

_TENSORS = ("_parameters", "_buffers")
_OTHERS = ("_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_RECORDING = "transformers.utils.output_capturing"  # defines the hooks with which transformers 5 records outputs


def has_hooks(module: nn.Module, except_recording: bool = False) -> bool:
    """Whether hooks, or a `forward` set on the instance, make a call more than the computation of the class.

    `except_recording` leaves out the hooks with which transformers records outputs.
    """
    hooks: Any = module._forward_hooks
    if except_recording:
        hooks = [hook for hook in hooks.values() if getattr(hook, "__module__", "") != _RECORDING]
    hooks = hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or has_own_forward(module) or has_any_global_hook()


def shadowed_methods(module: nn.Module) -> list[str]:
    """The methods of the class that an attribute of the instance replaces, except `forward`."""
    return [name for name in replaced_methods(module) if name != "forward"]


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of `module` other than its tensors, submodules, hooks and mode."""
    return {name: value for name, value in vars(module).items() if name not in _IGNORED}


def class_path(module_class: type) -> str:
    """The full name of a class."""
    return f"{module_class.__module__}.{module_class.__qualname__}"


class ModuleSnapshot:
    """The class of a module, the `forward` of this class, and the attributes of the module.

    It notices another class, another `forward` of the class, and an attribute that has another value, is gone, or is
    new (a new private one only if it shadows one of the class), but not a list or the like that is changed in place.
    With `base`, a base of the module's class, it remembers the `forward` of `base`, and the class may change.
    """

    def __init__(self, module: nn.Module, base: type | None = None) -> None:
        self.module_class = cast(Any, base or type(module))
        self.allows_subclass = base is not None
        self.forward = self.module_class.forward
        self.values = plain_attributes(module)
        self._names_of_class = tuple(_names_defined_by(self.module_class) - vars(module).keys())
        self._count = len(vars(module))

    def matches(self, module: Any) -> bool:
        """Whether `module` is as it was."""
        if not self._has_same_class(module) or self.module_class.forward is not self.forward:
            return False
        own = module.__dict__
        if torch.compiler.is_compiling():  # it cannot trace views and lengths of these dictionaries
            same = all(own.get(name) is value or own.get(name) == value for name, value in self.values.items())
            return same and not any(name in own for name in self._names_of_class)
        try:
            return self.values.items() <= own.items() and (len(own) == self._count or not self._new_names(module))
        except (RuntimeError, ValueError):  # arrays have no truth value
            return False

    def change(self, module: Any) -> str:
        """What has changed, in words."""
        if not self._has_same_class(module):
            return f"it is a {class_path(type(module))} now"
        if self.module_class.forward is not self.forward:
            return "the forward of its class was replaced"
        own = vars(module)
        other = [name for name, value in self.values.items() if own.get(name) is not value and own.get(name) != value]
        names = sorted({*other, *self._new_names(module)})
        return f"{', '.join(names)} {'was' if len(names) == 1 else 'were'} changed"

    def _has_same_class(self, module: Any) -> bool:
        return self.allows_subclass or type(module) is self.module_class

    def _new_names(self, module: nn.Module) -> list[str]:
        names = plain_attributes(module).keys() - self.values.keys()
        return [name for name in names if not name.startswith("_") or hasattr(self.module_class, name)]


class StructureWatch:
    """Notices every change of modules except a tensor that replaces one of the same type.

    It notices changes of classes and what they define, of attributes (the training mode is one) and those of a
    `config`, of submodules and hooks, and of names and types of tensors, but not a list or the like that is changed in
    place. It holds no parameter, so a replaced one is freed.
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
        """Whether anything has changed."""
        try:
            return self._types() != self._types_then or self._now != self._then
        except Exception:  # arrays have no truth value
            return True

    def _types(self) -> list[Any]:
        """Names and types of tensors, and types of modules."""
        filled = list(filter(None, self._tensors))
        tensors = chain.from_iterable(map(dict.values, filled))
        return [*chain.from_iterable(filled), *map(type, tensors), *map(type, self._modules)]


def _names_defined_by(module_class: type) -> set[str]:
    """The names that a class and its bases define in addition to those of `nn.Module`."""
    classes = [each for each in module_class.__mro__ if not issubclass(nn.Module, each)]
    return {name for each in classes for name in vars(each) if not name.startswith("__")} - _IGNORED
