"""Detects that a model's weights or settings have changed since an engine was made from it."""

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
# The attributes of every module, and that of `nn.Module.compile`; not the dictionaries of hooks, which users replace.
_OF_TORCH = frozenset((*vars(nn.Module()), "_compiled_call_impl")) - {"_forward_hooks", "_forward_pre_hooks"}


def run_up_to_date(
    run: Callable[[], T], changed: Callable[[], bool], renew: Callable[[], None], device: torch.device
) -> T:
    """Calls `renew` if `changed`, and returns the result of `run`.

    On devices that compute asynchronously `run` is called first, so that `changed` runs while the device computes. If
    there was a change, the result or error of `run` is dropped, and it runs again after `renew`.
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
        del result  # frees its memory for the second run
    renew()
    return run()


def is_asynchronous(device: torch.device) -> bool:
    """Whether calls return before the device has computed their results."""
    return device.type == "cuda"


class WeightWatch:
    """Detects changes of a model's weights and, by a `SettingsWatch`, of its settings.

    A weight has changed if its data pointer is another one (``.to``), if its version is (any write in place that
    autograd sees), or if a torch optimizer made a step on it (fused optimizers leave the version as it is). Values are
    not compared, so writes through ``.data``, a NumPy view or the storage are not detected. Nor are functions that
    somebody replaced in the Python modules of a library.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._settings = SettingsWatch(modules)
        places = [place for m in modules for place in (m._parameters, m._buffers, vars(m))]
        found = [value for place in places for value in place.values() if isinstance(value, Tensor)]
        self._tensors = list({id(tensor): tensor for tensor in found}.values())
        self._pointers = list(map(Tensor.data_ptr, self._tensors))
        self._versioned = [tensor for tensor in self._tensors if not tensor.is_inference()]  # others have no version
        self._versions = list(map(_version, self._versioned))
        self._stepped = False
        _watches_of_optimizers().add(self)

    def changed(self) -> bool:
        """Whether a weight or a setting has changed."""
        return (
            self._stepped
            or list(map(_version, self._versioned)) != self._versions
            or list(map(Tensor.data_ptr, self._tensors)) != self._pointers
            or self._settings.changed()
        )

    def record_step(self, parameters: set[int]) -> None:
        """Records that an optimizer wrote to the tensors with these ids."""
        self._stepped = self._stepped or not parameters.isdisjoint(map(id, self._tensors))


class SettingsWatch:
    """Detects changes of modules other than writes to their tensors.

    It compares which tensors, submodules and forward hooks modules have, the attributes of modules and of their
    `config`, the classes of modules, and the attributes of these classes. Submodules are compared only if `modules`
    contains them.
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
        self._attributes = [*_group(self._namespaces, _OF_TORCH), *_group(_configs(modules), frozenset())]
        self._classes = [(kind, dict(vars(kind))) for kind in _classes(self._kinds)]

    def changed(self) -> bool:
        """Whether a setting has changed."""
        return (
            any(self._empty)
            or list(map(len, self._namespaces)) != self._sizes
            or list(map(type, self._modules)) != self._kinds
            or not all(map(is_, chain(chain.from_iterable(self._views), (_END,)), self._held))
            or any(each.changed() for each in self._attributes)
            or any(vars(kind) != attributes for kind, attributes in self._classes)
        )


class _Attributes:
    """The values of one or more names in namespaces. Lists, dictionaries and sets are copied to compare their items."""

    __slots__ = ("_get", "_namespaces", "_values")

    def __init__(self, names: tuple[str, ...], namespaces: list[dict[str, Any]]) -> None:
        self._get: Any = itemgetter(*names)
        self._namespaces = namespaces
        values = map(self._get, namespaces)
        self._values = [tuple(map(_kept, each)) if len(names) > 1 else _kept(each) for each in values]

    def changed(self) -> bool:
        try:
            return list(map(self._get, self._namespaces)) != self._values
        except Exception:  # an attribute was deleted, or is a new array, whose comparison has no truth value
            return True


def _group(namespaces: Iterable[dict[str, Any]], ignored: frozenset[str]) -> list[_Attributes]:
    """The attributes without the names `ignored`, grouped by equal names, so that one call reads a group."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for namespace in namespaces:
        groups.setdefault(tuple(name for name in namespace if name not in ignored), []).append(namespace)
    return [_Attributes(names, alike) for names, alike in groups.items() if names]


def _kept(value: Any) -> Any:
    return copy.copy(value) if type(value) in (list, dict, set) else value


def _configs(modules: list[nn.Module]) -> list[dict[str, Any]]:
    """The namespaces of the configurations of modules; modules of transformers share one."""
    configs = (vars(module).get("config") for module in modules)
    return list({id(config): vars(config) for config in configs if hasattr(config, "__dict__")}.values())


def _classes(kinds: Iterable[type]) -> Iterable[type]:
    """The classes of modules and their bases, without those of torch."""
    for base in {base for kind in set(kinds) for base in kind.__mro__}:
        if base.__module__.split(".")[0] not in ("torch", "builtins"):
            yield base


@cache
def _watches_of_optimizers() -> WeakSet[WeightWatch]:
    """The watches whose `record_step` is called after each step of an optimizer."""
    watches: WeakSet[WeightWatch] = WeakSet()

    def report_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        written = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for watch in tuple(watches):
            watch.record_step(written)

    register_optimizer_step_post_hook(report_step)
    return watches
