"""Checks that a model has only parts whose computation is known, since folded parts no longer run their own code."""

from __future__ import annotations

from inspect import isroutine
from typing import Any

from torch import Tensor, nn

from dinov2_fast.errors import InvalidTypeError
from dinov2_fast.layers import has_hooks


def expect(module: nn.Module, name: str, *kinds: type[nn.Module]) -> Any:
    """Returns `module` if its class is one of `kinds`. A subclass is refused, since it may compute something else.

    Raises:
        TypeError: it is of another class.
    """
    if type(module) not in kinds:
        raise InvalidTypeError(
            f"{name} is a {type(module).__name__}; the engine can fold {' or '.join(kind.__name__ for kind in kinds)} "
            "only. Merge what was added to the model into its weights first, or use the model itself."
        )
    return module


def refuse_edits(model: nn.Module) -> None:
    """Refuses a model with hooks, or with methods replaced on an instance: the engine would not run them.

    A backbone may have its own `interpolate_pos_encoding`, which the engine calls.

    Raises:
        TypeError: the model has some.
    """
    for name, module in model.named_modules():
        where = name or "the model"
        if has_hooks(module):
            raise InvalidTypeError(
                f"{where} has a hook or its own forward, which the engine would not run; remove it first."
            )
        replaced = set(replaced_methods(module)) - {"interpolate_pos_encoding"}
        if replaced:
            raise InvalidTypeError(
                f"{where} has its own {min(replaced)}, set on the instance, which the engine would not run; remove it "
                "first, or use the model itself."
            )


def replaced_methods(module: nn.Module) -> list[str]:
    """The names of methods that an attribute of the instance replaces."""
    return [name for name, value in vars(module).items() if _replaces(value, getattr(type(module), name, None))]


def _replaces(value: Any, defined: Any) -> bool:
    """Whether an attribute replaces what its class has `defined`: a method, and the attribute is another function."""
    return isroutine(defined) and getattr(value, "__func__", None) is not defined


def refuse_tensors(model: nn.Module) -> None:
    """Refuses parameters and buffers of a tensor subclass (quantised, sharded) and those on the meta device.

    Raises:
        TypeError: the model has some.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if type(tensor) not in (Tensor, nn.Parameter):
            raise InvalidTypeError(
                f"{name} is a {type(tensor).__name__}; the engine can fold plain tensors only. Give the model as it "
                "was before it was quantised or sharded, or use the model itself."
            )
        if tensor.is_meta:
            raise InvalidTypeError(
                f"{name} is on the meta device, where tensors have no values, so there is nothing to fold: load the "
                "weights first, with load_state_dict(..., assign=True) or after to_empty."
            )
