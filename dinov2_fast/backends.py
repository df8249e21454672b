"""Which implementation of an op runs: the only dispatch in the package.

An :class:`Op` holds a literal tuple of :class:`Implementation`, best first. Each says in a sentence why it would
refuse an input, from device, dtype, sizes, grad and determinism, never from data. Precedence: the `backend` argument
of an op, then :func:`use_backend`, then ``DINOV2_FAST_BACKEND``, then the first implementation that does not refuse. A
setting is one name for every op (``"triton"``) or one per op (``"attention=triton,layer_norm=torch"``). A forced name
holds for the ops that have such an implementation for the mode (training or inference); the others take their default.
A forced implementation that refuses raises.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dinov2_fast import environment
from dinov2_fast.tracing import is_fx_traced

logger = logging.getLogger("dinov2_fast")


class Setting(NamedTuple):
    """Backends asked for by name: one for every op ("" for none), and those of single ops."""

    everywhere: str
    by_word: dict[str, str]


_OPS: dict[str, Op] = {}
# A plain global, process-wide like torch's own backend flags, which torch.compile guards on (no ContextVar is traced).
_setting = Setting("", {})
# The settings of the blocks that run, in the order in which they began, after the process's own; the last holds.
_active: tuple[Setting, ...] = (_setting,)
_active_lock = threading.Lock()


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run this input, or does not exist."""


def _never(*args: Any, **kwargs: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    `refuses` takes the op's own arguments and returns the reason it cannot run them, or None. On a device whose type is
    not in `devices` (None: any) it is not a candidate at all, which is no reason for a warning; `elsewhere` says
    whether it can be forced to run on another device all the same. `trains` says whether it has a backward.
    """

    backend: str
    function: Callable[..., Any]
    refuses: Callable[..., str | None] = _never
    devices: tuple[str, ...] | None = None
    elsewhere: Callable[[torch.device], bool] = lambda device: False
    trains: bool = True

    def reason_against(self, *args: Any, forced: bool = False, **kwargs: Any) -> str | None:
        """Why this implementation cannot run the op on these arguments, or None."""
        device = device_of(args)
        if self.devices is not None and device.type not in self.devices and not (forced and self.elsewhere(device)):
            return f"needs a {' or '.join(self.devices)} tensor, got one on {device.type}"
        if not self.trains and records_gradient(args):
            return "is for inference only, and gradients are recorded"
        return self.refuses(*args, **kwargs)


@dataclass(eq=False)
class Op:
    """One schema of an op.

    `name` is the function, `word` the op (its file name and the key of per-op settings), `sample` makes arguments of a
    ViT-S on a device in a dtype, with which :func:`table` asks.
    """

    name: str
    word: str
    implementations: tuple[Implementation, ...]
    sample: Callable[[torch.device, torch.dtype], tuple[Any, ...]]
    _warned: set[str] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        _OPS[self.name] = self

    def backends(self) -> list[str]:
        return [implementation.backend for implementation in self.implementations]

    @property
    def trains(self) -> bool:
        """Whether any implementation has a backward; the others are ops of the inference engine."""
        return any(implementation.trains for implementation in self.implementations)

    def __call__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        return choose(self, *args, backend=backend, **kwargs).function(*args, **kwargs)


def choose(op: Op, *args: Any, backend: str | None = None, **kwargs: Any) -> Implementation:
    """The implementation of `op` that runs on these arguments.

    Raises:
        BackendError: the implementation that was asked for refuses, or all do.
    """
    if is_fx_traced():  # proxies have no device to ask about, and the graph holds standard ops, as an exported one
        return next(implementation for implementation in op.implementations if implementation.backend == "torch")
    name = backend or _setting.by_word.get(op.word) or _setting.everywhere
    if name:
        forced = next((i for i in op.implementations if i.backend == name), None)
        if forced is not None and not (op.trains and not forced.trains and not backend and records_gradient(args)):
            reason = forced.reason_against(*args, forced=True, **kwargs)
            if reason is not None:
                raise BackendError(f"{op.name}: backend {name!r} was asked for but cannot run: {reason}.")
            return forced
        if backend:
            raise BackendError(f"{op.name}: there is no backend {backend!r}, only {', '.join(op.backends())}.")
    refusals: list[tuple[Implementation, str]] = []
    for implementation in op.implementations:
        reason = implementation.reason_against(*args, **kwargs)
        if reason is None:
            if refusals and not torch.compiler.is_compiling():
                _warn_of_fallback(op, implementation, refusals, device_of(args).type)
            return implementation
        refusals.append((implementation, reason))
    raise BackendError(f"{op.name}: no implementation runs this input: {_sentence(refusals)}.")


def tensors_of(args: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments of an op, those in lists included."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, list | tuple):
            yield from tensors_of(arg)


def device_of(args: Iterable[Any]) -> torch.device:
    """The device of the first tensor."""
    return next(tensors_of(args)).device


def records_gradient(args: Iterable[Any]) -> bool:
    """Whether autograd records an op on these arguments."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors_of(args))


def _warn_of_fallback(op: Op, chosen: Implementation, refusals: list[tuple[Implementation, str]], device: str) -> None:
    """Says once for each op and reason that a faster implementation refused on a device it is made for."""
    surprising = [(i, reason) for i, reason in refusals if i.devices is None or device in i.devices]
    message = _sentence(surprising)
    if surprising and message not in op._warned:
        op._warned.add(message)
        logger.warning("%s: falling back to %s: %s", op.name, chosen.backend, message)


def _sentence(refusals: list[tuple[Implementation, str]]) -> str:
    return "; ".join(f"{implementation.backend} {reason}" for implementation, reason in refusals)


def parse_setting(setting: str) -> Setting:
    """Reads ``"triton"`` or ``"attention=triton,layer_norm=torch"``.

    Raises:
        BackendError: an op or backend that does not exist, or an empty part.
    """
    everywhere, by_word = "", {}
    for part in setting.split(","):
        word, equals, name = (text.strip() for text in part.rpartition("="))
        having = [op for op in _OPS.values() if not equals or op.word == word]
        backends = sorted({backend for op in having for backend in op.backends()})
        if not having:
            raise BackendError(
                f"Backend setting {setting!r}: there is no op {word!r}. The ops are {', '.join(words())}."
            )
        if name not in backends:
            where = f"of {word}" if equals else "of any op"
            raise BackendError(
                f"Backend setting {setting!r}: {name!r} is no backend {where}. There are: {', '.join(backends)}."
            )
        if equals:
            by_word[word] = name
        else:
            everywhere = name
    return Setting(everywhere, by_word)


@contextmanager
def use_backend(setting: str) -> Iterator[None]:
    """``with use_backend("triton")`` or ``"attention=triton,layer_norm=torch"``: forces backends inside the block.

    Holds for the whole process, not for one thread, as torch's own backend flags do. Where blocks of several threads or
    asyncio tasks overlap, that which began last decides; once all have ended nothing is forced.

    Raises:
        BackendError: an op or backend of that name does not exist.
    """
    mine = parse_setting(setting)
    with _changing_active():
        _activate((*_active, mine))
    try:
        yield
    finally:
        with _changing_active():
            _activate(tuple(other for other in _active if other is not mine))


def _changing_active() -> AbstractContextManager[Any]:
    """Keeps other threads from changing `_active`; torch.compile traces no lock."""
    return nullcontext() if torch.compiler.is_compiling() else _active_lock


def _activate(settings: tuple[Setting, ...]) -> None:
    global _active, _setting
    _active, _setting = settings, settings[-1]


def apply_environment() -> None:
    """Makes ``DINOV2_FAST_BACKEND`` the setting of this process; called once all ops are registered."""
    if environment.backend_setting():
        _activate((parse_setting(environment.backend_setting()),))


def ops() -> dict[str, Op]:
    """Every op, by the name of its function."""
    return dict(_OPS)


def words() -> list[str]:
    """The op words, sorted."""
    return sorted({op.word for op in _OPS.values()})


@dataclass(frozen=True)
class Row:
    """One implementation of one op, as `table` reports it; `reason` says why it was not chosen."""

    op: str
    backend: str
    chosen: bool
    reason: str | None


def table(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    training: bool = False,
    only_trainable: bool = False,
) -> list[Row]:
    """Every implementation of every op, which one runs for this device, dtype and mode, and why not the others.

    Asked with fake tensors, so no device is touched or needed. `only_trainable` leaves out the ops that only the
    inference engine uses.
    """
    rows: list[Row] = []
    with FakeTensorMode(), torch.set_grad_enabled(training):
        for op in _OPS.values():
            if op.trains or not only_trainable:
                rows += _rows(op, _recorded(op.sample(torch.device(device), dtype), training))
    return rows


def _rows(op: Op, arguments: tuple[Any, ...]) -> Iterator[Row]:
    try:
        chosen, error = choose(op, *arguments), None
    except BackendError as exception:
        chosen, error = None, str(exception)
    for implementation in op.implementations:
        reason = None
        if implementation is not chosen:
            reason = implementation.reason_against(*arguments) or error
            reason = reason or _outranked(op, implementation, chosen)
        yield Row(op.name, implementation.backend, implementation is chosen, reason)


def _recorded(arguments: Any, training: bool) -> Any:
    """The sample arguments as a training step would give them."""
    if isinstance(arguments, list | tuple):
        return type(arguments)(_recorded(argument, training) for argument in arguments)
    if isinstance(arguments, Tensor) and arguments.is_floating_point():
        return arguments.detach().requires_grad_(training)
    return arguments


def _outranked(op: Op, implementation: Implementation, chosen: Implementation | None) -> str:
    order = op.backends()
    if chosen is not None and order.index(chosen.backend) < order.index(implementation.backend):
        return f"{chosen.backend} comes first"
    return "another backend was asked for"
