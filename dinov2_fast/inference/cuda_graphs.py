"""CUDA graphs of an engine's calls: small batches end sooner if the host launches one graph instead of every kernel.

A graph repeats the launches of one call, in the memory of that call. So there is one for each method, shapes and dtypes
of its inputs, and whatever else decides what is launched; pictures are copied into its inputs and results out of it.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dinov2_fast.inference.waiting import NoWaiting
from dinov2_fast.ops import dispatch
from dinov2_fast.torch_private import is_in_dispatch_mode, is_jit_traced, pytree

if TYPE_CHECKING:
    from dinov2_fast.inference.backbone import FoldedBackbone

logger = logging.getLogger("dinov2_fast")

CHOICES = ("auto", True, False)
CACHED_GRAPHS = 16  # of an engine: each keeps inputs and outputs of its own, and shares the memory in between
WARM_UP = 2  # calls before a capture: libraries plan, Triton compiles
# With "auto" only calls of up to this many tokens x hidden^2 are captured. A block launches some ten kernels, for
# which the host takes 50 to 100 us; about here the 24 x tokens x hidden^2 operations of its matrix products take a GPU
# as long (5e10, at 5e14 a second), and beyond, the host waits for the GPU anyway. That is an estimate, which
# bench/results/NOTES.md asks to measure.
AUTO_WORK = 2**31
COSTLY = ("output_attentions", "output_hidden_states")  # copying those would take as long as computing them
CONFIGURED = (*COSTLY, "return_dict", "out_features", "apply_layernorm", "reshape_hidden_states")  # in Hugging Face's

_one_at_a_time = threading.Lock()  # a capture begins with synchronising the device, which would spoil another one
_own = threading.local()  # .held: what the graph that this thread captures reads, while it does


def is_captured(x: Tensor) -> bool:
    """Whether a graph is being captured on the current stream, by whomever, and `x` is on a GPU."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def held(tensors: Any) -> Any:
    """`tensors`, cached ones, if the graph that is captured at this moment will keep them alive; else None.

    Graphs of this module do. One that somebody else captures would go on reading them after they are gone.
    """
    holder = getattr(_own, "held", None)
    if holder is None or tensors is None:
        return None
    holder.append(tensors)
    return tensors


class Cuda:
    """The calls into torch.cuda, for one engine."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """What follows may be on another device."""
        self._side: torch.cuda.Stream | None = None  # captures that share memory must share a stream
        self._done: torch.cuda.Event | None = None  # when the last graph and the copies of its results are

    def serves(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def capture(self, run: Callable[[], Any], device: torch.device, pool: Any) -> tuple[Any, Any, list[Any]]:
        """Captures `run`, after warming it up.

        The last warm-up must not wait for the device. A capture that does fails, and torch 2.11 leaves it half ended:
        every later random number on the device raises ("Offset increment outside graph capture"), in any thread, and
        its allocator takes the capture for one still under way.

        Args:
            pool: of the graphs that this one shares memory with, or None.

        Returns:
            The graph, what `run` returned (memory of the graph), and what it holds (see :func:`held`).

        Raises:
            RuntimeError: the last warm-up waited for the device; no capture was begun.
        """
        current = torch.cuda.current_stream(device)
        self._side = side = self._side or torch.cuda.Stream(device)
        self._done = self._done or torch.cuda.Event()
        # The outer `stream` brings the caller's back also if the capture fails, which torch.cuda.graph does not.
        with _one_at_a_time, torch.cuda.device(device), torch.cuda.stream(side):
            side.wait_stream(current)
            for _ in range(WARM_UP - 1):
                run()
            with NoWaiting(device):
                run()
            graph = torch.cuda.CUDAGraph()
            holder: list[Any] = []
            _own.held = holder
            try:
                # thread_local: other threads may do meanwhile what a capture forbids, such as pinning memory.
                with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                    output = run()
            finally:
                _own.held = None
        current.wait_stream(side)
        return graph, output, holder

    def begin(self, device: torch.device) -> None:
        """Makes the current stream wait for the graph before, whose memory may be the same, on whatever stream."""
        if self._done is not None:
            torch.cuda.current_stream(device).wait_event(self._done)

    def end(self, device: torch.device) -> None:
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Until the device no longer uses any graph."""
        if self._done is not None:
            self._done.synchronize()


class Results:
    """Copies what a graph wrote, so that the next replay changes nothing that was returned.

    As few copies as possible: results that together are as large as the memory they lie in (CLS, registers and patches
    of one norm) are copied with it at once, and are views of one tensor again.
    """

    def __init__(self, output: Any, inputs: list[Tensor]) -> None:
        leaves, self._spec = pytree.tree_flatten(output)
        self._bases: list[Tensor] = []  # what is copied
        self._makers: list[Callable[[list[Tensor], list[Tensor]], Any]] = []  # of each leaf, from inputs and copies
        places = {id(x): i for i, x in enumerate(inputs)}
        shared: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                shared.setdefault((leaf.untyped_storage().data_ptr(), leaf.dtype), []).append(leaf)
        whole: dict[int, int] = {}  # id of a leaf to the base that is all of its storage
        for group in shared.values():
            size = group[0].untyped_storage().nbytes() // group[0].itemsize
            if len(group) > 1 and sum(leaf.numel() for leaf in group) >= size:
                whole |= dict.fromkeys(map(id, group), len(self._bases))
                self._bases.append(group[0].as_strided((size,), (1,), 0))
        for leaf in leaves:
            if id(leaf) in places:
                self._makers.append(_given(places[id(leaf)]))
            elif not isinstance(leaf, Tensor):
                self._makers.append(_constant(leaf))
            elif id(leaf) in whole:
                self._makers.append(_view(whole[id(leaf)], leaf))
            else:
                self._makers.append(_copy(len(self._bases)))
                self._bases.append(leaf)

    def copied(self, given: list[Tensor]) -> Any:
        """The output of a call with the tensors `given`: those of them that it passes on, and copies of the rest."""
        copies = [base.clone() for base in self._bases]
        return pytree.tree_unflatten([make(given, copies) for make in self._makers], self._spec)


def _given(i: int) -> Callable[..., Any]:
    return lambda given, copies: given[i]


def _constant(value: Any) -> Callable[..., Any]:
    return lambda given, copies: value


def _copy(i: int) -> Callable[..., Any]:
    return lambda given, copies: copies[i]


def _view(i: int, leaf: Tensor) -> Callable[..., Any]:
    geometry = leaf.size(), leaf.stride(), leaf.storage_offset()
    return lambda given, copies: copies[i].as_strided(*geometry)


class Captured:
    """A graph, and how data get into it and out of it."""

    def __init__(self, graph: Any, inputs: list[Tensor], output: Any, holds: Any) -> None:
        self.graph = graph
        self._inputs, self._results, self._holds = inputs, Results(output, inputs), (output, holds)

    def replay(self, given: list[Tensor]) -> Any:
        for own, x in zip(self._inputs, given, strict=True):
            own.copy_(x)
        self.graph.replay()
        return self._results.copied(given)


class Graphs:
    """The graphs of one engine: those of the `CACHED_GRAPHS` kinds of call that were used last.

    Args:
        mode: one of `CHOICES`.
        cuda: makes the graphs.
    """

    def __init__(self, mode: bool | str, cuda: Any = None) -> None:
        self.mode = mode
        self._cuda = cuda or Cuda()
        self._kinds: OrderedDict[Hashable, Captured | None] = OrderedDict()  # None: called, but not captured yet
        self._lock = threading.Lock()
        self._device: torch.device | None = None  # of all of them: replicas of an engine elsewhere run eagerly
        self._failure = self._said = ""

    def run(self, folded: Any, backbone: FoldedBackbone, method: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """``folded.method(*args, **kwargs)``, as a graph where that is wanted and possible.

        With "auto" a kind of call is captured when it comes again while it is remembered, so that a stream of pictures
        of ever other sizes is not slowed down by captures.
        """
        function = getattr(folded, method)
        key = self._kind(folded, backbone, method, args, kwargs)
        if key is None:
            return function(*args, **kwargs)
        device, failure = backbone.cls_token.device, ""
        with self._lock:
            wanted = self.mode is True or key in self._kinds
            captured = self._kinds.pop(key, None)
            if captured is None and wanted:
                self._make_room()
                self._device = device
                try:
                    captured = self._capture(function, args, kwargs, device)
                except Exception as error:
                    failure = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            if not failure:
                self._make_room()
                self._kinds[key] = captured
            if captured is not None:
                self._cuda.begin(device)
                output = captured.replay(_tensors(args, kwargs))
                self._cuda.end(device)
                return output
        output = function(*args, **kwargs)  # which raises what is wrong with the arguments
        if failure:
            self._give_up(failure)
        return output

    def _kind(self, folded: Any, backbone: Any, method: str, args: Any, kwargs: dict[str, Any]) -> Hashable | None:
        """Everything that decides what a call launches and returns; None for a call that is to run eagerly."""
        if self.mode is False or self._failure or is_jit_traced():
            return None
        device, tensors = backbone.cls_token.device, _tensors(args, kwargs)
        pictures = next((x for x in tensors if x.ndim == 4), None)
        if not self._cuda.serves(device) or pictures is None or not all(_is_plain(x, device) for x in tensors):
            return None
        if self._device not in (None, device):
            return None
        if self.mode == "auto" and _tokens(pictures, backbone) * backbone.embed_dim**2 > AUTO_WORK:
            return None
        if is_in_dispatch_mode() or is_captured(pictures):
            return None
        config = getattr(folded, "config", None)
        configured = {name: getattr(config, name, None) for name in CONFIGURED}
        named = dict(zip(_positional(folded.__class__, method), args, strict=False)) | kwargs
        asked = [named[name] if named.get(name) is not None else configured[name] for name in COSTLY]
        if any(asked) or named.get("labels") is not None:
            return None
        arguments = [_described(value) for value in (*args, *kwargs.values())]
        if None in arguments:
            return None
        # As long as a graph of `folded` is kept, no other object has its id.
        return id(folded), method, (*kwargs,), (*arguments,), str(configured), (*_settings(),)

    def _capture(self, function: Any, args: Any, kwargs: dict[str, Any], device: torch.device) -> Captured:
        other = next((captured for captured in self._kinds.values() if captured is not None), None)
        pool = None if other is None else other.graph.pool()
        with torch.inference_mode(False), torch.no_grad():
            args, kwargs = pytree.tree_map_only(Tensor, lambda x: torch.empty_like(x).copy_(x), (args, kwargs))
            graph, output, holds = self._cuda.capture(lambda: function(*args, **kwargs), device, pool)
            return Captured(graph, _tensors(args, kwargs), output, (function, holds))

    def _make_room(self) -> None:
        while len(self._kinds) >= CACHED_GRAPHS:
            _, captured = self._kinds.popitem(last=False)
            if captured is not None:
                self._cuda.wait()  # before its memory is given to others

    def _give_up(self, failure: str) -> None:
        self.clear()
        self._failure = failure
        if failure != self._said:
            self._said = failure
            logger.warning("CUDA graphs of an engine are off, it runs eagerly: capturing one failed: %s", failure)

    def clear(self) -> None:
        """Drops all graphs, when what they read is no longer there; a failure before counts no more."""
        with self._lock:
            self._cuda.wait()
            self._kinds.clear()
            self._cuda.forget()
            self._device, self._failure = None, ""

    def describe(self, backbone: FoldedBackbone) -> str:
        """Whether graphs are used, and why."""
        device = backbone.cls_token.device
        if self.mode is False or not self._cuda.serves(device):
            return "none, " + ("as asked" if self.mode is False else f"since the engine is on {device}")
        if self._failure:
            return f"none, since capturing one failed: {self._failure}"
        most = AUTO_WORK // backbone.embed_dim**2
        which = "every call that can be captured"
        if self.mode == "auto":
            which = f"calls of up to {most} tokens, where launching takes longest, from the second of a kind on"
        with self._lock:
            count = sum(captured is not None for captured in self._kinds.values())
        return f"for {which}; {count} captured, at most {CACHED_GRAPHS}"


def _tensors(args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]


def _is_plain(x: Tensor, device: torch.device) -> bool:
    """Not on another device, empty, or of a class that computes in a way of its own."""
    return type(x) is Tensor and x.device == device and x.numel() > 0


def _tokens(pictures: Tensor, backbone: Any) -> int:
    rows, columns = backbone.grid(pictures)
    return len(pictures) * (1 + backbone.num_register_tokens + rows * columns)


def _described(value: Any) -> Hashable | None:
    """What of an argument decides what is launched; None if there is no telling."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    numbers = isinstance(value, list | tuple | range) and all(isinstance(part, int) for part in value)
    return repr(value) if numbers or value is None or isinstance(value, bool | int | float | str) else None


def _settings() -> Iterator[Hashable]:
    """Of the process: those that decide which kernels run."""
    setting, cuda = dispatch.current_setting(), torch.backends.cuda
    yield setting.everywhere
    yield setting.strict
    yield from sorted(setting.by_name.items())
    yield torch.are_deterministic_algorithms_enabled()
    yield cuda.matmul.fp32_precision
    yield cuda.cudnn_sdp_enabled()
    yield cuda.flash_sdp_enabled()
    yield cuda.mem_efficient_sdp_enabled()
    yield cuda.math_sdp_enabled()


@cache
def _positional(kind: Any, method: str) -> tuple[str, ...]:
    """Names of the arguments of a method that can be given by position."""
    parameters = inspect.signature(getattr(kind, "forward" if method == "__call__" else method)).parameters
    return tuple(name for name, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD)[
        1:
    ]
