"""Gives a module a class of two: what this package computes, joined to the class that the module has.

The joined class has the name, the module and the signature of `forward` of the old one and is a subclass of it. So
state dict, hooks, `isinstance` and whatever goes by class names (sharding, recording of outputs) stay as they are;
copies and pickles work, too.
"""

from __future__ import annotations

from functools import wraps
from typing import Any, ClassVar

from torch import nn

from dinov2_fast.errors import InvalidValueError

STATE_ATTRIBUTE = "_dinov2_fast"  # the attribute in which a joined module keeps what belongs to it alone


class SwappedModule(nn.Module):
    """The first of the two classes. `origin`: it, the class the module had, and the one whose `forward` it replaces."""

    origin: ClassVar[tuple[type[SwappedModule], type, type]]
    optional: ClassVar[tuple[str, ...]] = ()  # its methods that the other class may not have: then it has none either

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return (_empty, self.origin, *reduced[2:]) if is_swapped(self) else reduced


def is_swapped(module: nn.Module) -> bool:
    """Whether the class of `module` was made here, and none was made of that."""
    return "origin" in type(module).__dict__


def swap_class(module: nn.Module, first: type[SwappedModule], replaced_class: type | None = None) -> None:
    """Makes `module` compute as `first` says, in place of the `forward` of `replaced_class`, a base of its class.

    A class between the two, as a wrapper that runs `forward` again in the backward pass, goes on doing what it does.
    Without `replaced_class` it is the `forward` of the module's class that is replaced.
    """
    _drop_class_forward(module)
    module.__class__ = mixed_class(first, type(module), replaced_class or type(module))


def swap_back(module: SwappedModule) -> None:
    """Gives `module` its own class back.

    Raises:
        ValueError: something has made a class of the joined one.
    """
    if not is_swapped(module):
        raise InvalidValueError(
            f"A {type(module).__name__} was made of an accelerated class, by FSDP or the like: restore the model "
            "before it is wrapped."
        )
    _drop_class_forward(module)
    module.__dict__.pop(STATE_ATTRIBUTE, None)
    module.__class__ = module.origin[1]


def has_own_forward(module: nn.Module) -> bool:
    """Whether a `forward` set on the instance stands before that of its class.

    transformers 4 leaves the class's own on an instance when it has recorded outputs, which changes nothing.
    """
    return getattr(module.forward, "__func__", None) is not type(module).forward


def _drop_class_forward(module: nn.Module) -> None:
    """Removes from the instance the `forward` of a class that it is about to lose."""
    if not has_own_forward(module):
        module.__dict__.pop("forward", None)


def mixed_class(first: type[SwappedModule], original: Any, replaced_class: Any) -> Any:
    """A subclass of `first` and `original`, under the name of `original`; the same one each time."""
    made = _classes.get((first, original, replaced_class))
    if made is None:
        made = _classes[first, original, replaced_class] = _mix_classes(first, original, replaced_class)
    return made


_classes: dict[tuple[type[SwappedModule], type, type], type] = {}


def _mix_classes(first: type[SwappedModule], original: Any, replaced_class: Any) -> type:
    @wraps(replaced_class.forward)  # for its signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return first.forward(self, *args, **kwargs)

    def of(kind: type, bases: tuple[type, ...], **own: Any) -> type:
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        return type(kind.__name__, bases, {**names, **own})

    own = {"forward": forward, **{name: _Missing() for name in first.optional if not hasattr(original, name)}}
    origin = first, original, replaced_class
    if replaced_class is original:
        return of(original, (first, original), **own, origin=origin)
    # In the order of methods, `original` comes before this class, and this before `replaced_class`.
    return of(original, (original, of(replaced_class, (first, replaced_class), **own)), origin=origin)


class _Missing:
    """In a class, an attribute that is not there."""

    def __get__(self, module: Any, kind: type) -> Any:
        raise AttributeError


def _empty(first: type[SwappedModule], original: type, replaced_class: type) -> Any:
    """What `copy` and `pickle` start from."""
    kind = mixed_class(first, original, replaced_class)
    return kind.__new__(kind)
