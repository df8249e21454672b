"""Notices that a model is no longer what it was when an engine was made of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import cache
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

T = TypeVar("T")

_version = attrgetter("_version")
_END = object()


def run_up_to_date(
    run: Callable[[], T], changed: Callable[[], bool], renew: Callable[[], None], device: torch.device
) -> T:
    """What `run` returns once `renew` was called if `changed`.

    Where kernels are asynchronous, `run` comes first, and `changed` is asked while the device computes. If it says yes,
    what `run` returned or raised is dropped, and it runs again.
    """
    if not is_asynchronous(device):
        if changed():
            renew()
        return run()
    try:
        result = run()
    except Exception:
        if not changed():
            raise
    else:
        if not changed():
            return result
        del result  # its memory serves the second run
    renew()
    return run()


def is_asynchronous(device: torch.device) -> bool:
    """Whether a call returns before the device has computed its result."""
    return device.type == "cuda"


class ModelWatch:
    """Remembers what a model computes with: its weights and its settings.

    A weight counts as changed if its data lie elsewhere (``.to``), if its version moved (any write in place that
    autograd sees), or if an optimizer of torch made a step on it (fused ones move no version). For settings see
    `SettingsWatch`. Not seen are writes through ``.data``, a NumPy view or the storage, since no value is looked at,
    and functions of a library replaced in its Python modules.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._settings = SettingsWatch(modules)
        places = [place for m in modules for place in (m._parameters, m._buffers, vars(m))]
        found = [value for place in places for value in place.values() if isinstance(value, Tensor)]
        self._tensors = list({id(tensor): tensor for tensor in found}.values())
        self._pointers = list(map(Tensor.data_ptr, self._tensors))
        self._counting = [tensor for tensor in self._tensors if not tensor.is_inference()]  # others have no version
        self._versions = list(map(_version, self._counting))
        self._stepped = False
        _follow_optimizers().add(self)

    def changed(self) -> bool:
        """Whether anything is not what it was."""
        return self._weights_changed() or self._settings.changed()

    def _weights_changed(self) -> bool:
        """Whether a tensor was written to or moved."""
        return (
            self._stepped
            or list(map(_version, self._counting)) != self._versions
            or list(map(Tensor.data_ptr, self._tensors)) != self._pointers
        )

    def see_step(self, parameters: set[int]) -> None:
        """Learns that an optimizer wrote to the tensors with these identities."""
        self._stepped = self._stepped or not parameters.isdisjoint(map(id, self._tensors))


class SettingsWatch:
    """Remembers what modules are, but for the values of their tensors.

    That is: which tensors, submodules and forward hooks there are, the attributes of modules and of their `config`, and
    the classes of modules with what these define. Modules inside them are watched only if they are given, too.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = modules = list(modules)
        self._kinds = list(map(type, modules))
        hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        slots = [slots for m in modules for slots in (m._parameters, m._buffers, m._modules)]
        self._empty = [holder for holder in (*hooks, *slots) if not holder]
        self._views = [holder.values() for holder in (*hooks, *slots) if holder]
        self._held = [*chain.from_iterable(self._views), _END]
        self._namespaces = list(map(vars, modules))
        self._sizes = list(map(len, self._namespaces))
        self._attributes = [*_group(self._namespaces, _of_torch()), *_group(_configs(modules), frozenset())]
        self._classes = [(kind, dict(vars(kind))) for kind in _classes(self._kinds)]

    def changed(self) -> bool:
        """Whether anything is not what it was."""
        return (
            any(self._empty)
            or list(map(len, self._namespaces)) != self._sizes
            or list(map(type, self._modules)) != self._kinds
            or not all(map(is_, chain(chain.from_iterable(self._views), (_END,)), self._held))
            or any(each.changed() for each in self._attributes)
            or any(vars(kind) != attributes for kind, attributes in self._classes)
        )


class _Attributes:
    """The values of some names, at least one, in namespaces; of lists, dictionaries and sets, what is in them."""

    __slots__ = ("_get", "_namespaces", "_values")

    def __init__(self, names: tuple[str, ...], namespaces: list[dict[str, Any]]) -> None:
        self._get: Any = itemgetter(*names)
        self._namespaces = namespaces
        values = map(self._get, namespaces)
        self._values = [tuple(map(_kept, each)) if len(names) > 1 else _kept(each) for each in values]

    def changed(self) -> bool:
        try:
            return list(map(self._get, self._namespaces)) != self._values
        except Exception:  # an attribute was deleted, or is another array, which has no truth value
            return True


def _group(namespaces: Iterable[dict[str, Any]], ignored: frozenset[str]) -> list[_Attributes]:
    """Their attributes, but for the names `ignored`; those with the same names together, to be read at once."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for namespace in namespaces:
        groups.setdefault(tuple(name for name in namespace if name not in ignored), []).append(namespace)
    return [_Attributes(names, alike) for names, alike in groups.items() if names]


def _kept(value: Any) -> Any:
    return copy.copy(value) if type(value) in (list, dict, set) else value


def _configs(modules: list[nn.Module]) -> list[dict[str, Any]]:
    """The namespaces of the configurations that modules of transformers share."""
    configs = (vars(module).get("config") for module in modules)
    return list({id(config): vars(config) for config in configs if hasattr(config, "__dict__")}.values())


def _classes(kinds: Iterable[type]) -> Iterable[type]:
    """The classes of modules and their bases, torch's own left out."""
    for base in {base for kind in set(kinds) for base in kind.__mro__}:
        if base.__module__.split(".")[0] not in ("torch", "builtins"):
            yield base


@cache
def _of_torch() -> frozenset[str]:
    """The attributes that every module has, and what compiling it leaves there."""
    return frozenset((*vars(nn.Module()), "_compiled_call_impl"))


@cache
def _follow_optimizers() -> WeakSet[ModelWatch]:
    """The watches that learn of each step of an optimizer."""
    watches: WeakSet[ModelWatch] = WeakSet()

    def tell(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        written = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for watch in tuple(watches):
            watch.see_step(written)

    register_optimizer_step_post_hook(tell)
    return watches
