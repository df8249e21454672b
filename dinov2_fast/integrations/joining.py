"""Gives a module a class of two: what this package computes, joined to the class that the module has.

The joined class has the name, the module and the signature of `forward` of the old one and is a subclass of it. So
state dict, hooks, `isinstance` and whatever goes by class names (sharding, recording of outputs) stay as they are;
copies and pickles work, too.
"""

from __future__ import annotations

from functools import wraps
from types import MethodType
from typing import Any, ClassVar

from torch import nn

BEHIND = "_dinov2_fast"  # the attribute in which a joined module keeps what belongs to it alone

Kinds = tuple[tuple[str, type], ...]  # role -> class of the part that has it


class Joined(nn.Module):
    """The first of the two classes. `kinds` are the classes of its parts when it was joined, by role."""

    kinds: ClassVar[dict[str, type]]
    origin: ClassVar[tuple[type[Joined], type, Kinds]]
    optional: ClassVar[tuple[str, ...]] = ()  # its methods that the other class may not have: then it has none either

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return (_empty, self.origin, *reduced[2:]) if is_joined(self) else reduced


def is_joined(module: nn.Module) -> bool:
    """Whether the class of `module` was made here, and none was made of that."""
    return "origin" in type(module).__dict__


def join(module: nn.Module, first: type[Joined], kinds: Kinds = ()) -> None:
    """Makes `module` compute as `first` says."""
    _drop_class_forward(module)
    module.__class__ = joined_class(first, type(module), kinds)


def separate(module: Joined) -> None:
    """Gives `module` its own class back.

    Raises:
        ValueError: something has made a class of the joined one.
    """
    if not is_joined(module):
        raise ValueError(
            f"A {type(module).__name__} was made of an accelerated class, by FSDP or the like: restore the model "
            "before it is wrapped."
        )
    _drop_class_forward(module)
    module.__dict__.pop(BEHIND, None)
    module.__class__ = module.origin[1]


def has_own_forward(module: nn.Module) -> bool:
    """Whether a `forward` set on the instance stands before that of its class.

    transformers 4 leaves the class's own on an instance when it has recorded outputs, which changes nothing.
    """
    own = module.__dict__.get("forward")
    return own is not None and not (isinstance(own, MethodType) and own.__func__ is type(module).forward)


def _drop_class_forward(module: nn.Module) -> None:
    """Removes from the instance the `forward` of a class that it is about to lose."""
    if not has_own_forward(module):
        module.__dict__.pop("forward", None)


def joined_class(first: type[Joined], original: Any, kinds: Kinds) -> Any:
    """A subclass of both, under the name of `original`; the same one each time."""
    made = _classes.get((first, original, kinds))
    if made is None:
        made = _classes[first, original, kinds] = _join_classes(first, original, kinds)
    return made


_classes: dict[tuple[type[Joined], type, Kinds], type] = {}


def _join_classes(first: type[Joined], original: Any, kinds: Kinds) -> type:
    @wraps(original.forward)  # for its signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return first.forward(self, *args, **kwargs)

    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    own = {**names, "forward": forward, "kinds": dict(kinds), "origin": (first, original, kinds)}
    own |= {name: _Missing() for name in first.optional if not hasattr(original, name)}
    return type(original.__name__, (first, original), own)


class _Missing:
    """In a class, an attribute that is not there."""

    def __get__(self, module: Any, kind: type) -> Any:
        raise AttributeError


def _empty(first: type[Joined], original: type, kinds: Kinds) -> Any:
    """What `copy` and `pickle` start from."""
    kind = joined_class(first, original, kinds)
    return kind.__new__(kind)
