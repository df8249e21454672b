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

ATTRIBUTE = "_dinov2_fast"  # the attribute in which a joined module keeps what belongs to it alone


class Joined(nn.Module):
    """The first of the two classes. `origin`: it, the class the module had, and the one whose `forward` it replaces."""

    origin: ClassVar[tuple[type[Joined], type, type]]
    optional: ClassVar[tuple[str, ...]] = ()  # its methods that the other class may not have: then it has none either

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return (_empty, self.origin, *reduced[2:]) if is_joined(self) else reduced


def is_joined(module: nn.Module) -> bool:
    """Whether the class of `module` was made here, and none was made of that."""
    return "origin" in type(module).__dict__


def join(module: nn.Module, first: type[Joined], below: type | None = None) -> None:
    """Makes `module` compute as `first` says, in place of the `forward` of `below`, a base of its class.

    A class between the two, as a wrapper that runs `forward` again in the backward pass, goes on doing what it does.
    Without `below` it is the `forward` of the module's class that is replaced.
    """
    _drop_class_forward(module)
    module.__class__ = joined_class(first, type(module), below or type(module))


def separate(module: Joined) -> None:
    """Gives `module` its own class back.

    Raises:
        ValueError: something has made a class of the joined one.
    """
    if not is_joined(module):
        raise InvalidValueError(
            f"A {type(module).__name__} was made of an accelerated class, by FSDP or the like: restore the model "
            "before it is wrapped."
        )
    _drop_class_forward(module)
    module.__dict__.pop(ATTRIBUTE, None)
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


def joined_class(first: type[Joined], original: Any, below: Any) -> Any:
    """A subclass of `first` and `original`, under the name of `original`; the same one each time."""
    made = _classes.get((first, original, below))
    if made is None:
        made = _classes[first, original, below] = _join_classes(first, original, below)
    return made


_classes: dict[tuple[type[Joined], type, type], type] = {}


def _join_classes(first: type[Joined], original: Any, below: Any) -> type:
    @wraps(below.forward)  # for its signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return first.forward(self, *args, **kwargs)

    def of(kind: type, bases: tuple[type, ...], **own: Any) -> type:
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        return type(kind.__name__, bases, {**names, **own})

    own = {"forward": forward, **{name: _Missing() for name in first.optional if not hasattr(original, name)}}
    origin = first, original, below
    if below is original:
        return of(original, (first, original), **own, origin=origin)
    # In the order of methods, `original` comes before this class, and this before `below`.
    return of(original, (original, of(below, (first, below), **own)), origin=origin)


class _Missing:
    """In a class, an attribute that is not there."""

    def __get__(self, module: Any, kind: type) -> Any:
        raise AttributeError


def _empty(first: type[Joined], original: type, below: type) -> Any:
    """What `copy` and `pickle` start from."""
    kind = joined_class(first, original, below)
    return kind.__new__(kind)
