"""Which implementation of an op runs: the only dispatch in the package.

An :class:`Op` holds a literal tuple of :class:`Implementation`, best first. The first that can run is chosen. A setting
can force one by name: for all ops (``"triton"``), for one op or for one form of it
(``"attention=triton,linear.gelu=cuda"``; the more specific name holds). Precedence: the `backend` argument of an op,
then :func:`use_backend`, then :func:`set_backend` and ``DINOV2_FAST_BACKEND``. A forced name holds for the ops that
have such an implementation for the mode (training or inference); the others take their default. If a forced
implementation cannot take an input, the default runs and a warning says why, once; with ``strict=True``, and for the
`backend` argument, that is a :class:`BackendError`.

A choice is made once for each form, device, dtype and mode, and kept with the setting. A call then costs one look-up.
Only `refuses` of the implementation that was kept, which depends on sizes, is asked in each call.
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

_PLAIN = frozenset((Tensor, nn.Parameter))  # for other classes, fake tensors among them, no choice is kept


class BackendError(Dinov2FastError, RuntimeError):
    """A backend was asked for by name and cannot run this input, or does not exist."""


class Setting(NamedTuple):
    """Backends asked for by name: for all ops ("" for none), and for single ops and forms ("linear", "linear.gelu").

    `choices` are the implementations chosen under this setting.
    """

    everywhere: str
    by_name: dict[str, str]
    strict: bool
    choices: dict[tuple[Any, ...], Implementation]

    def asked_for(self, op: str, form: str) -> str:
        """The backend asked for, or ""."""
        return self.by_name.get(f"{op}.{form}") or self.by_name.get(op) or self.everywhere


_OPS: dict[str, Op] = {}
# A plain global, process-wide like torch's own backend flags, which torch.compile guards on (no ContextVar is traced).
_setting = Setting("", {}, False, {})
# The settings of the blocks that run, in the order in which they began, after the process's own; the last holds.
_active: tuple[Setting, ...] = (_setting,)
_active_lock = threading.Lock()


@dataclass(eq=False)
class Op:
    """An op: a file in `ops/`, a name in settings, and its implementations, best first.

    `samples` makes, for each form, arguments of a ViT-S on a device in a dtype, with which `table` asks. For
    e4m3 these are the arguments with which the form reads or writes e4m3; None if it does not.
    """

    name: str
    implementations: tuple[Implementation, ...]
    samples: dict[str, Callable[[torch.device, torch.dtype], tuple[Any, ...] | None]]
    _warned: set[str] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        _OPS[self.name] = self
        self._has_inference_only = any(not implementation.trains for implementation in self.implementations)

    @property
    def trains(self) -> bool:
        """Whether any implementation has a backward; the other ops are the inference engine's."""
        return any(implementation.trains for implementation in self.implementations)

    def backends(self, form: str | None = None, dtype: torch.dtype | None = None) -> list[str]:
        """The names of its implementations, best first; of those that have a form, and are candidates for a dtype."""
        having = (i.backend for i in self.implementations if form is None or i.has(form, dtype))
        return list(dict.fromkeys(having))

    def choose(self, form: str, args: tuple[Any, ...], backend: str | None = None) -> Implementation:
        """The implementation that runs `form` on these arguments.

        Raises:
            BackendError: the implementation that was asked for cannot run them, or none can.
        """
        x = args[0][0] if type(args[0]) is list else args[0]
        if backend is None and type(x) in _PLAIN and not torch.compiler.is_compiling():
            setting = _setting
            key = self, form, x.device, x.dtype, self._has_inference_only and records_gradient(args)
            kept = setting.choices.get(key)
            if kept is None:
                self._keep(setting, key)
            elif kept.refuses is None or kept.refuses(*args) is None:
                return kept
        return self._choose(form, args, _setting, backend)

    def _keep(self, setting: Setting, key: tuple[Any, ...]) -> None:
        """Keeps the first implementation that takes arguments of a kind."""
        _, form, device, dtype, recorded = key
        forced = self._named(setting.asked_for(self.name, form), form, dtype, recorded)
        for implementation in self._ordered(form, dtype, forced):
            if implementation.reason_against_kind(device, dtype, recorded, implementation is forced) is None:
                setting.choices[key] = implementation
                return
            if implementation is forced and setting.strict:
                return

    def _choose(self, form: str, args: tuple[Any, ...], setting: Setting, backend: str | None = None) -> Implementation:
        if is_fx_traced():  # proxies have no device to ask about, and the graph holds standard ops, as an exported one
            return next(i for i in self.implementations if i.backend == "torch" and i.has(form))
        chosen, forced, refusals = self.select(form, args, setting, backend)
        if refusals and not torch.compiler.is_compiling():
            device = first_tensor(args).device
            surprising = [(i, reason) for i, reason in refusals if i is forced or i.is_for(device)]
            self._warn_of_fallback(form, chosen, _sentence(surprising))
        return chosen

    def select(
        self, form: str, args: tuple[Any, ...], setting: Setting, backend: str | None = None
    ) -> tuple[Implementation, Implementation | None, list[tuple[Implementation, str]]]:
        """The implementation that runs, the one that was asked for, and those before it with what they refuse.

        Raises:
            BackendError: as :meth:`choose`.
        """
        name = backend or setting.asked_for(self.name, form)
        dtype = first_tensor(args).dtype
        if backend and backend not in self.backends(form, dtype):
            names = ", ".join(self.backends(form, dtype))
            raise BackendError(f"{self.name_of(form)}: there is no backend {backend!r} for {dtype}, only {names}.")
        recorded = not backend and records_gradient(args)
        forced = self._named(name, form, dtype, recorded)
        refusals: list[tuple[Implementation, str]] = []
        for implementation in self._ordered(form, dtype, forced):
            reason = implementation.reason_against(args, implementation is forced)
            if reason is None:
                return implementation, forced, refusals
            if implementation is forced and (backend or setting.strict):
                raise BackendError(f"{self.name_of(form)}: backend {name!r} was asked for but cannot run: {reason}.")
            refusals.append((implementation, reason))
        raise BackendError(f"{self.name_of(form)}: no implementation runs this input: {_sentence(refusals)}.")

    def _named(self, name: str, form: str, dtype: torch.dtype, recorded: bool) -> Implementation | None:
        """The implementation of that name for a form and mode, if there is one; that for `dtype` if there are two."""
        named = [i for i in self.implementations if i.backend == name and i.has(form, dtype)]
        if recorded and self.trains:
            named = [i for i in named if i.trains]
        return next((i for i in named if i.dtypes is None or dtype in i.dtypes), named[0] if named else None)

    def _ordered(self, form: str, dtype: torch.dtype, forced: Implementation | None) -> Iterator[Implementation]:
        if form not in self.samples:
            raise InvalidValueError(f"{self.name} has no form {form!r}, only {', '.join(self.samples)}.")
        if forced is not None:
            yield forced
        for implementation in self.implementations:
            if implementation is not forced and implementation.has(form, dtype):
                yield implementation

    def name_of(self, form: str, e4m3: bool = False) -> str:
        """A form as settings have it, such as "linear.gelu"; in e4m3 "linear.gelu e4m3", which no setting names."""
        name = self.name if len(self.samples) == 1 else f"{self.name}.{form}"
        return f"{name} e4m3" if e4m3 else name

    def _warn_of_fallback(self, form: str, chosen: Implementation, message: str) -> None:
        """Says once for each reason that an implementation refused that was asked for or made for this device."""
        if message and message not in self._warned:
            self._warned.add(message)
            logger.warning("%s: falling back to %s: %s", self.name_of(form), chosen.backend, message)


class Bound:
    """One form of an op for one caller, which chooses once: at its first call, and anew when the setting changes.

    For callers whose tensors keep their device, dtypes, and sizes but for batch and sequence, and of which no gradient
    is recorded: the parts of the inference engine.
    """

    __slots__ = ("_form", "_kept", "_op")

    def __init__(self, op: Op, form: str) -> None:
        self._op, self._form = op, form
        self._kept: tuple[Setting, Callable[..., Any]] | None = None

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or type(args[0]) not in _PLAIN:
            return self._op.choose(self._form, args).function(*args)
        kept, setting = self._kept, _setting  # each read once: another thread may change them
        if kept is None or kept[0] is not setting:
            kept = self._kept = setting, self._op._choose(self._form, args, setting).function
        return kept[1](*args)

    def __reduce__(self) -> Any:  # a copy chooses for itself
        return _bind, (self._op.name, self._form)


def _bind(name: str, form: str) -> Bound:
    return Bound(_OPS[name], form)


def refuse_gradient(name: str, args: Iterable[Any]) -> None:
    """Raises `BackendError` if autograd would record an op that has no backward."""
    if records_gradient(args):
        raise BackendError(f"{name} is for inference only, and gradients are recorded.")


def _sentence(refusals: list[tuple[Implementation, str]]) -> str:
    return "; ".join(f"{implementation.backend} {reason}" for implementation, reason in refusals)


# Settings


def parse_setting(setting: str, strict: bool = False) -> Setting:
    """Reads ``"triton"`` or ``"attention=triton,linear.gelu=cuda"``.

    Raises:
        BackendError: an op, form or backend that does not exist, or an empty part.
    """
    everywhere, by_name = "", {}
    for part in setting.split(","):
        asked, equals, backend = (text.strip() for text in part.rpartition("="))
        op, dot, form = asked.partition(".")
        having = [known for known in _OPS.values() if not equals or known.name == op]
        if not having:
            raise BackendError(f"Backend setting {setting!r}: there is no op {op!r}. The ops are {', '.join(names())}.")
        if dot and form not in having[0].samples:
            forms = ", ".join(having[0].samples)
            raise BackendError(f"Backend setting {setting!r}: {op} has no form {form!r}, only {forms}.")
        backends = sorted({name for known in having for name in known.backends(form or None)})
        if backend not in backends:
            where = f"of {asked}" if equals else "of any op"
            raise BackendError(
                f"Backend setting {setting!r}: {backend!r} is no backend {where}. There are: {', '.join(backends)}."
            )
        if equals:
            by_name[asked] = backend
        else:
            everywhere = backend
    return Setting(everywhere, by_name, strict, {})


@contextmanager
def use_backend(setting: str, *, strict: bool = False) -> Iterator[None]:
    """``with use_backend("triton")`` or ``"attention=triton,linear.gelu=cuda"``: forces backends inside the block.

    Holds for the whole process, not for one thread, as torch's own backend flags do. Where blocks of several threads or
    asyncio tasks overlap, that which began last decides; once all have ended nothing is forced.

    Args:
        setting: a backend for all ops that have it, or backends of single ops and forms.
        strict: raise where a backend cannot take an input. By default another one takes it, and a warning says so.

    Raises:
        BackendError: an op, form or backend of that name does not exist.
    """
    mine = parse_setting(setting, strict)
    with _changing_active():
        _activate((*_active, mine))
    try:
        yield
    finally:
        with _changing_active():
            _activate(tuple(other for other in _active if other is not mine))


def set_backend(setting: str | None, *, strict: bool = False) -> None:
    """:func:`use_backend` for the rest of the process, in place of ``DINOV2_FAST_BACKEND``; None forces nothing."""
    mine = Setting("", {}, strict, {}) if setting is None else parse_setting(setting, strict)
    with _changing_active():
        _activate((mine, *_active[1:]))


def _changing_active() -> AbstractContextManager[Any]:
    """Keeps other threads from changing `_active`; torch.compile traces no lock."""
    return nullcontext() if torch.compiler.is_compiling() else _active_lock


def _activate(settings: tuple[Setting, ...]) -> None:
    global _active, _setting
    _active, _setting = settings, settings[-1]


def apply_environment() -> None:
    """Makes ``DINOV2_FAST_BACKEND`` the setting of this process; called once all ops are registered."""
    if environment.backend_setting():
        set_backend(environment.backend_setting())


def current_setting() -> Setting:
    """The setting that holds now."""
    return _setting


def ops() -> dict[str, Op]:
    """Every op, by its name."""
    return dict(_OPS)


def names() -> list[str]:
    """The names of the ops, sorted."""
    return sorted(_OPS)
