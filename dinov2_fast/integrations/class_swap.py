"""Swaps the class of a module for a subclass of it that computes with this package's code.

The new class keeps the name, the Python module and the signature of `forward` of the old one. So state dict, hooks and
`isinstance` work as before, and so does code that goes by class names, such as sharding and the recording of outputs.
Copies and pickles work, too.
"""

from __future__ import annotations

from functools import cache, wraps
from typing import Any, ClassVar, NamedTuple

from torch import nn

from dinov2_fast.errors import InvalidValueError

STATE_ATTRIBUTE = "_dinov2_fast"  # where a module with a swapped class keeps what its new code needs


class ClassSwap(NamedTuple):
    """The classes that a new class is made of."""

    mixin: type[SwappedModule]  # this package's code
    original: Any  # the class that the module had
    replaced: Any  # the class whose `forward` the mixin replaces: `original` or a base of it


class SwappedModule(nn.Module):
    """The base of the mixins."""

    class_swap: ClassVar[ClassSwap]
    optional_methods: ClassVar[tuple[str, ...]] = ()  # methods that are hidden where the original class lacks them

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new_module, tuple(self.class_swap), *reduced[2:]) if _has_swapped_class(self) else reduced


def swap_class(module: nn.Module, mixin: type[SwappedModule], replaced: type | None = None) -> None:
    """Makes `module` compute with `mixin` in place of the `forward` of `replaced`, by default of its class.

    `replaced` may be a base of its class: what the classes between do, such as running `forward` again in the backward
    pass, stays.
    """
    _drop_class_forward(module)
    module.__class__ = _swapped_class(ClassSwap(mixin, type(module), replaced or type(module)))


def swap_back(module: SwappedModule) -> None:
    """Gives `module` its own class back.

    Raises:
        ValueError: FSDP or the like has subclassed the swapped class.
    """
    if not _has_swapped_class(module):
        raise InvalidValueError(
            f"{type(module).__name__} is a subclass of an accelerated class, made by FSDP or the like. "
            "Call unaccelerate before the model is wrapped."
        )
    _drop_class_forward(module)
    module.__dict__.pop(STATE_ATTRIBUTE, None)
    module.__class__ = module.class_swap.original


def has_own_forward(module: nn.Module) -> bool:
    """Whether a `forward` set on the instance replaces that of its class.

    After recording outputs, transformers 4 leaves the class's own `forward` on the instance. That one does not count.
    """
    return getattr(module.forward, "__func__", None) is not type(module).forward


def _has_swapped_class(module: nn.Module) -> bool:
    """Whether the class of `module` was made here and not subclassed since."""
    return "class_swap" in type(module).__dict__


def _drop_class_forward(module: nn.Module) -> None:
    """Removes the `forward` of the class from an instance that is about to change its class."""
    if not has_own_forward(module):
        module.__dict__.pop("forward", None)


@cache
def _swapped_class(swap: ClassSwap) -> Any:
    """A subclass of the mixin and the original class under the name of the latter; the same class each time."""
    mixin, original, replaced = swap

    @wraps(replaced.forward)  # for its signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return mixin.forward(self, *args, **kwargs)

    def subclass(named_after: type, bases: tuple[type, ...], **attributes: Any) -> type:
        names = {name: getattr(named_after, name) for name in ("__module__", "__qualname__", "__doc__")}
        return type(named_after.__name__, bases, names | attributes)

    hidden = {name: _HiddenMethod() for name in mixin.optional_methods if not hasattr(original, name)}
    own = {"forward": forward, **hidden}
    if replaced is original:
        return subclass(original, (mixin, original), **own, class_swap=swap)
    # In the order of methods, `original` comes before the inner class, and that before `replaced`.
    return subclass(original, (original, subclass(replaced, (mixin, replaced), **own)), class_swap=swap)


class _HiddenMethod:
    """A class attribute that looks as if it did not exist."""

    def __get__(self, module: Any, owner: type) -> Any:
        raise AttributeError


def _new_module(mixin: type[SwappedModule], original: type, replaced: type) -> Any:
    """An empty module, which `copy` and `pickle` fill."""
    swapped = _swapped_class(ClassSwap(mixin, original, replaced))
    return swapped.__new__(swapped)
