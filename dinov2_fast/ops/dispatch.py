"""Which implementation of an op runs. No other file of the package decides this.

An :class:`Op` holds a tuple of :class:`Implementation`, best first. The first one that can run is chosen.

A setting names a backend for all ops (``"triton"``), for one op (``"attention=triton"``) or for one form of an op
(``"linear.gelu=cuda"``); the most specific name wins. The `backend` argument of an op comes before
:func:`use_backend`, which comes before :func:`set_backend` and ``DINOV2_FAST_BACKEND``.

A setting applies to the ops that have such an implementation for the mode (training or inference). The other ops run
their default. If the named implementation refuses an input, the default runs and a warning gives the reason once. With
``strict=True``, and for the `backend` argument, that is a :class:`BackendError` instead.

The choice for each form, device, dtype and mode is made once and cached with the setting, so that a call costs one
look-up. Each call asks only `refuses` of the cached implementation, which depends on sizes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinov2_fast import environment
from dinov2_fast.errors import Dinov2FastError, InvalidValueError
from dinov2_fast.ops.implementation import Implementation, first_tensor, records_gradient
from dinov2_fast.torch_private import is_fx_traced

logger = logging.getLogger("dinov2_fast")

_PLAIN_TENSORS = frozenset((Tensor, nn.Parameter))  # no choice is cached for subclasses, such as fake tensors


class BackendError(Dinov2FastError, RuntimeError):
    """A backend that was named does not exist, or cannot run this input."""


class BackendSetting(NamedTuple):
    """The backends that a user named.

    `everywhere` is the backend for all ops, "" for none. `by_name` holds those of single ops and forms ("linear",
    "linear.gelu"). `cache` holds the implementations that were chosen under this setting.
    """

    everywhere: str
    by_name: dict[str, str]
    strict: bool
    cache: dict[tuple[Any, ...], Implementation]

    def backend_of(self, op: str, form: str) -> str:
        """The backend named for a form of an op, or ""."""
        return self.by_name.get(f"{op}.{form}") or self.by_name.get(op) or self.everywhere


_OPS: dict[str, Op] = {}
# The setting in force. It is a plain global of the process, as torch's own backend flags are, because torch.compile
# guards on globals and traces no ContextVar.
_setting = BackendSetting("", {}, False, {})
# The setting of the process, followed by those of the running blocks, oldest first. The last one is in force.
_active: tuple[BackendSetting, ...] = (_setting,)
_active_lock = threading.Lock()


@dataclass(eq=False)
class Op:
    """An op: one file in `ops/` and one name in settings. Its implementations are ordered best first.

    `sample_inputs` has a function for each form of the op. It makes the arguments of a ViT-S on a device and in a
    dtype, which `choices` uses to ask what would run. For e4m3 these are arguments with which the form reads or writes
    e4m3, or None if it does neither. `in_model` is False for an op of pretraining that can be differentiated.
    """

    name: str
    implementations: tuple[Implementation, ...]
    sample_inputs: dict[str, Callable[[torch.device, torch.dtype], tuple[Any, ...] | None]]
    in_model: bool = True
    _warned: set[str] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        _OPS[self.name] = self
        self._has_inference_only = any(not implementation.has_backward for implementation in self.implementations)

    @property
    def has_backward(self) -> bool:
        """Whether any implementation can be differentiated. The model uses no other ops."""
        return any(implementation.has_backward for implementation in self.implementations)

    def backends(self, form: str | None = None, dtype: torch.dtype | None = None) -> list[str]:
        """The names of its backends, best first; only the candidates for `form` and `dtype` where these are given."""
        candidates = (i.backend for i in self.implementations if form is None or i.is_candidate(form, dtype))
        return list(dict.fromkeys(candidates))

    def choose(self, form: str, args: tuple[Any, ...], backend: str | None = None) -> Implementation:
        """The implementation that runs `form` on these arguments.

        Raises:
            BackendError: the backend that was named cannot run them, or no implementation can.
        """
        x = args[0][0] if type(args[0]) is list else args[0]
        if backend is None and type(x) in _PLAIN_TENSORS and not torch.compiler.is_compiling():
            setting = _setting
            key = self, form, x.device, x.dtype, self._has_inference_only and records_gradient(args)
            cached = setting.cache.get(key)
            if cached is None:
                self._cache_choice(setting, key)
            elif cached.refuses is None or cached.refuses(*args) is None:
                return cached
        return self._choose(form, args, _setting, backend)

    def _cache_choice(self, setting: BackendSetting, key: tuple[Any, ...]) -> None:
        """Caches the first implementation that takes arguments of this kind."""
        _, form, device, dtype, recorded = key
        forced = self._named(setting.backend_of(self.name, form), form, dtype, recorded)
        for implementation in self._ordered(form, dtype, forced):
            if implementation.refusal_of_kind(device, dtype, recorded, implementation is forced) is None:
                setting.cache[key] = implementation
                return
            if implementation is forced and setting.strict:
                return

    def _choose(
        self, form: str, args: tuple[Any, ...], setting: BackendSetting, backend: str | None = None
    ) -> Implementation:
        if is_fx_traced():  # proxies have no device; and as in an exported graph, there should be standard ops only
            return next(i for i in self.implementations if i.backend == "torch" and i.is_candidate(form))
        chosen, forced, refusals = self.select(form, args, setting, backend)
        if refusals and not torch.compiler.is_compiling():
            device = first_tensor(args).device
            unexpected = _sentence([(i, reason) for i, reason in refusals if i is forced or i.is_for(device)])
            if unexpected and unexpected not in self._warned:
                self._warned.add(unexpected)
                logger.warning("%s: falling back to %s: %s", self.name_of(form), chosen.backend, unexpected)
        return chosen

    def select(
        self, form: str, args: tuple[Any, ...], setting: BackendSetting, backend: str | None = None
    ) -> tuple[Implementation, Implementation | None, list[tuple[Implementation, str]]]:
        """The implementation that runs, the named one or None, and the refusals of those tried before it.

        Raises:
            BackendError: as :meth:`choose`.
        """
        name = backend or setting.backend_of(self.name, form)
        dtype = first_tensor(args).dtype
        if backend and backend not in self.backends(form, dtype):
            names = ", ".join(self.backends(form, dtype))
            raise BackendError(f"{self.name_of(form)} has no backend {backend!r} for {dtype}. It has: {names}.")
        recorded = not backend and records_gradient(args)
        forced = self._named(name, form, dtype, recorded)
        refusals: list[tuple[Implementation, str]] = []
        for implementation in self._ordered(form, dtype, forced):
            reason = implementation.refusal(args, implementation is forced)
            if reason is None:
                return implementation, forced, refusals
            if implementation is forced and (backend or setting.strict):
                raise BackendError(f"{self.name_of(form)}: backend {name!r} was asked for but cannot run: {reason}.")
            refusals.append((implementation, reason))
        raise BackendError(f"{self.name_of(form)}: no implementation can run this input: {_sentence(refusals)}.")

    def _named(self, name: str, form: str, dtype: torch.dtype, recorded: bool) -> Implementation | None:
        """The implementation of that name for a form and mode, or None. Of two, the one that takes `dtype`."""
        named = [i for i in self.implementations if i.backend == name and i.is_candidate(form, dtype)]
        if recorded and self.has_backward:
            named = [i for i in named if i.has_backward]
        return next((i for i in named if i.dtypes is None or dtype in i.dtypes), named[0] if named else None)

    def _ordered(self, form: str, dtype: torch.dtype, forced: Implementation | None) -> Iterator[Implementation]:
        """The candidates in the order in which they are tried."""
        if form not in self.sample_inputs:
            raise InvalidValueError(f"{self.name} has no form {form!r}, only {', '.join(self.sample_inputs)}.")
        if forced is not None:
            yield forced
        for implementation in self.implementations:
            if implementation is not forced and implementation.is_candidate(form, dtype):
                yield implementation

    def name_of(self, form: str, e4m3: bool = False) -> str:
        """The name of a form in settings, such as "linear.gelu".

        With `e4m3` it is "linear.gelu e4m3", which tells the two apart but cannot be used in a setting.
        """
        name = self.name if len(self.sample_inputs) == 1 else f"{self.name}.{form}"
        return f"{name} e4m3" if e4m3 else name


class BoundOp:
    """One form of an op for one caller. It chooses at the first call, and again when the setting changes.

    For the parts of the inference engine: their tensors keep their device and dtypes, and their sizes except for batch
    and sequence length, and no gradients are recorded.
    """

    __slots__ = ("_cached", "_form", "_op")

    def __init__(self, op: Op, form: str) -> None:
        self._op, self._form = op, form
        self._cached: tuple[BackendSetting, Callable[..., Any]] | None = None

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or type(args[0]) not in _PLAIN_TENSORS:
            return self._op.choose(self._form, args).function(*args)
        cached, setting = self._cached, _setting  # read once, because another thread may change them
        if cached is None or cached[0] is not setting:
            cached = self._cached = setting, self._op._choose(self._form, args, setting).function
        return cached[1](*args)

    def __reduce__(self) -> Any:  # a copy chooses for itself
        return _bind, (self._op.name, self._form)


def _bind(name: str, form: str) -> BoundOp:
    return BoundOp(_OPS[name], form)


def refuse_gradient(name: str, args: Iterable[Any]) -> None:
    """Raises `BackendError` if autograd would record an op that has no backward."""
    if records_gradient(args):
        raise BackendError(f"{name} is for inference only, and gradients are recorded.")


def _sentence(refusals: list[tuple[Implementation, str]]) -> str:
    return "; ".join(f"{implementation.backend} {reason}" for implementation, reason in refusals)


# Settings


def parse_setting(setting: str, strict: bool = False) -> BackendSetting:
    """Reads ``"triton"`` or ``"attention=triton,linear.gelu=cuda"``.

    Raises:
        BackendError: an op, form or backend does not exist, or a part is empty.
    """
    everywhere, by_name = "", {}
    for part in setting.split(","):
        target, equals, backend = (text.strip() for text in part.rpartition("="))
        name, dot, form = target.partition(".")
        targets = [op for op in _OPS.values() if not equals or op.name == name]
        if not targets:
            ops = ", ".join(sorted(_OPS))
            raise BackendError(f"Backend setting {setting!r}: there is no op {name!r}. The ops are {ops}.")
        if dot and form not in targets[0].sample_inputs:
            forms = ", ".join(targets[0].sample_inputs)
            raise BackendError(f"Backend setting {setting!r}: {name} has no form {form!r}, only {forms}.")
        backends = sorted({known for op in targets for known in op.backends(form or None)})
        if backend not in backends:
            where = target if equals else "any op"
            raise BackendError(
                f"Backend setting {setting!r}: {backend!r} is not a backend of {where}. The backends are: "
                f"{', '.join(backends)}."
            )
        if equals:
            by_name[target] = backend
        else:
            everywhere = backend
    return BackendSetting(everywhere, by_name, strict, {})


@contextmanager
def use_backend(setting: str, *, strict: bool = False) -> Iterator[None]:
    """``with use_backend("triton")`` or ``"attention=triton,linear.gelu=cuda"``: forces backends inside the block.

    It applies to the whole process, not to one thread, as torch's own backend flags do. Where blocks of several threads
    or asyncio tasks overlap, the block that began last decides. Once all have ended, :func:`set_backend` decides.

    Args:
        setting: a backend for all ops that have it, or backends of single ops and forms.
        strict: raise a `BackendError` if a named backend refuses an input; by default, warn once and run another one.

    Raises:
        BackendError: no op, form or backend has that name.
    """
    mine = parse_setting(setting, strict)
    with _lock_active():
        _activate((*_active, mine))
    try:
        yield
    finally:
        with _lock_active():
            _activate(tuple(other for other in _active if other is not mine))


def set_backend(setting: str | None, *, strict: bool = False) -> None:
    """Sets the backends outside of blocks of :func:`use_backend`, in place of ``DINOV2_FAST_BACKEND``.

    `strict` and errors are those of :func:`use_backend`. With None as `setting`, nothing is forced.
    """
    mine = BackendSetting("", {}, strict, {}) if setting is None else parse_setting(setting, strict)
    with _lock_active():
        _activate((mine, *_active[1:]))


def _lock_active() -> AbstractContextManager[Any]:
    """Keeps other threads from changing `_active`. torch.compile cannot trace a lock."""
    return nullcontext() if torch.compiler.is_compiling() else _active_lock


def _activate(settings: tuple[BackendSetting, ...]) -> None:
    global _active, _setting
    _active, _setting = settings, settings[-1]


def apply_environment() -> None:
    """Makes ``DINOV2_FAST_BACKEND`` the setting of this process. Called once, when all ops are registered."""
    if environment.backend_setting():
        set_backend(environment.backend_setting())


def current_setting() -> BackendSetting:
    """The setting in force."""
    return _setting


def all_ops() -> dict[str, Op]:
    """Every op, by its name."""
    return dict(_OPS)
