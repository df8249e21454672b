"""CUDA graphs of an engine's calls: the host launches one graph instead of every kernel.

A graph repeats the launches of one call, in the memory of that call. So there is one for each method, shapes and dtypes
of its inputs, and whatever else decides what is launched; images are copied into its inputs and results out of it.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dinov2_fast.inference.device_sync import NoWaiting
from dinov2_fast.ops import dispatch
from dinov2_fast.torch_private import has_tangent, is_in_dispatch_mode, is_jit_traced, matmul_precision, pytree

if TYPE_CHECKING:
    from dinov2_fast.inference.backbone import FoldedBackbone

logger = logging.getLogger("dinov2_fast")

CHOICES = ("auto", True, False)
CACHED_GRAPHS = 16  # of an engine: each keeps inputs and outputs of its own, and shares the memory in between
WARM_UP = 2  # calls before a capture: libraries plan, Triton compiles
# With "auto" only calls of up to this many tokens x hidden^2 are captured. Python takes up to 0.5 ms to launch a block.
# At this bound the 24 x tokens x hidden^2 operations of its matrix products take a GPU 0.8 ms (4e11, at 5e14 a second),
# so beyond it the host is ahead of the GPU also without a graph. This is an estimate, which bench/results/NOTES.md asks
# to measure. A graph at the bound is of 28 (ViT-g) to 453 images (ViT-S) of 224 x 224. If they are in fp32, and all
# tokens are returned in bf16, it keeps 60 to 450 MB.
AUTO_WORK = 2**34
NOT_CAPTURED = object()  # in place of an output
COSTLY = ("output_attentions", "output_hidden_states")  # copying those would take as long as computing them
CONFIGURED = (*COSTLY, "return_dict", "out_features", "apply_layernorm", "reshape_hidden_states")  # in Hugging Face's

_VALUES = frozenset((type(None), bool, int, float, str))  # classes of arguments whose repr says all
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

    def begin(self, device: torch.device) -> Any:
        """Makes the current stream wait for the graph before, whose memory may be the same, on whatever stream.

        Returns:
            The stream, for `end`.
        """
        stream = torch.cuda.current_stream(device)
        if self._done is not None:
            stream.wait_event(self._done)
        return stream

    def end(self, stream: Any) -> None:
        """Notes that the graph and the copies of its results were launched on `stream`."""
        if self._done is not None:
            self._done.record(stream)

    def wait(self) -> None:
        """Until the device no longer uses any graph."""
        if self._done is not None:
            self._done.synchronize()


Maker = Callable[[list[Tensor], list[Tensor]], Any]  # makes a part of an output from a call's tensors and the copies


class Results:
    """Copies what a graph wrote, so that the next replay changes nothing that was returned.

    As few copies as possible: results that together are as large as the memory they lie in (CLS, registers and patches
    of one norm) are copied with it at once, and are views of one tensor again. How an output is made of the copies is
    worked out once.
    """

    def __init__(self, output: Any, inputs: list[Tensor]) -> None:
        self._bases: list[Tensor] = []  # what is copied
        self._places = {id(x): i for i, x in enumerate(inputs)}
        self._whole: dict[int, int] = {}  # id of a leaf to the base that is all of its storage
        shared: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor):
                shared.setdefault((leaf.untyped_storage().data_ptr(), leaf.dtype), []).append(leaf)
        for group in shared.values():
            size = group[0].untyped_storage().nbytes() // group[0].itemsize
            if len(group) > 1 and sum(leaf.numel() for leaf in group) >= size:
                self._whole |= dict.fromkeys(map(id, group), len(self._bases))
                self._bases.append(group[0].as_strided((size,), (1,), 0))
        self._make = self._maker(output)

    def copied(self, given: list[Tensor]) -> Any:
        """The output of a call with the tensors `given`: those of them that it passes on, and copies of the rest."""
        return self._make(given, [base.clone() for base in self._bases])

    def _maker(self, part: Any) -> Maker:
        """What makes a part of an output: without pytree where it is a dictionary, list or tuple of Python's."""
        if type(part) is dict:
            named = {key: self._maker(value) for key, value in part.items()}
            return lambda given, copies: {key: make(given, copies) for key, make in named.items()}
        if type(part) in (list, tuple):
            kind, makers = type(part), [self._maker(value) for value in part]
            return lambda given, copies: kind([make(given, copies) for make in makers])
        leaves, spec = pytree.tree_flatten(part)
        if spec.is_leaf():
            return self._leaf_maker(part)
        makers = [self._leaf_maker(leaf) for leaf in leaves]
        return lambda given, copies: pytree.tree_unflatten([make(given, copies) for make in makers], spec)

    def _leaf_maker(self, leaf: Any) -> Maker:
        if id(leaf) in self._places:
            i = self._places[id(leaf)]
            return lambda given, copies: given[i]
        if not isinstance(leaf, Tensor):
            return lambda given, copies: leaf
        if id(leaf) in self._whole:
            base, geometry = self._whole[id(leaf)], (leaf.size(), leaf.stride(), leaf.storage_offset())
            return lambda given, copies: copies[base].as_strided(*geometry)
        self._bases.append(leaf)
        own = len(self._bases) - 1
        return lambda given, copies: copies[own]


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

    def replay(self, folded: Any, device: torch.device, method: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """The output of ``folded.method(*args, **kwargs)`` by its graph; `NOT_CAPTURED` if there is none.

        This is all that a captured call does in Python: it finds the graph, copies in, replays and copies out.

        Args:
            device: of the weights.
        """
        if not self._kinds:
            return NOT_CAPTURED
        key = self._key(folded, device, method, args, kwargs)
        with self._lock:
            captured = self._kinds.get(key)
            if captured is None:
                return NOT_CAPTURED
            self._kinds.move_to_end(key)
            return self._replay(captured, device, args, kwargs)

    def run(self, folded: Any, backbone: FoldedBackbone, method: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """``folded.method(*args, **kwargs)``, as a graph where that is wanted and possible.

        With "auto" a kind of call is captured when it comes again while it is remembered, so that a stream of images
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
                return self._replay(captured, device, args, kwargs)
        output = function(*args, **kwargs)  # which raises what is wrong with the arguments
        if failure:
            self._give_up(failure)
        return output

    def _replay(self, captured: Captured, device: torch.device, args: Any, kwargs: dict[str, Any]) -> Any:
        """The caller holds the lock."""
        stream = self._cuda.begin(device)
        output = captured.replay(_tensors(args, kwargs))
        self._cuda.end(stream)
        return output

    def _kind(self, folded: Any, backbone: Any, method: str, args: Any, kwargs: dict[str, Any]) -> Hashable | None:
        """The key of a call's graph; None for a call that is to run eagerly."""
        device = backbone.cls_token.device
        if self.mode is False or self._failure or not self._cuda.serves(device):
            return None
        tensors = _tensors(args, kwargs)
        images = next((x for x in tensors if x.ndim == 4), None)
        if images is None or not all(x.numel() for x in tensors):
            return None
        if self.mode == "auto" and _tokens(images, backbone) * backbone.embed_dim**2 > AUTO_WORK:
            return None
        named = dict(zip(_positional(folded.__class__, method), args, strict=False)) | kwargs
        asked = [named[name] if named.get(name) is not None else _configured(folded, name) for name in COSTLY]
        if any(asked) or named.get("labels") is not None:
            return None
        return self._key(folded, device, method, args, kwargs)

    def _key(
        self, folded: Any, device: torch.device, method: str, args: Any, kwargs: dict[str, Any]
    ) -> Hashable | None:
        """Everything that decides what a call launches and returns; None for a call that no graph may answer now."""
        if self._device not in (None, device) or is_jit_traced() or is_in_dispatch_mode():
            return None
        arguments: list[Hashable] = []
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                if not _is_plain(value, device) or is_captured(value):
                    return None
                arguments.append((value.shape, value.dtype))
            else:
                arguments.append(_described(value))
        if None in arguments:
            return None
        # As long as a graph of `folded` is kept, no other object has its id.
        return id(folded), method, (*kwargs,), (*arguments,), _configuration(folded), _settings()

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
            which = f"calls of up to {most} tokens, where launching may take longest, from the second of a kind on"
        with self._lock:
            count = sum(captured is not None for captured in self._kinds.values())
        return f"for {which}; {count} captured, at most {CACHED_GRAPHS}"


def _tensors(args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]


def _is_plain(x: Tensor, device: torch.device) -> bool:
    """Not on another device, of a class that computes in a way of its own, or with a derivative."""
    if type(x) is not Tensor or x.device != device:
        return False
    return not (x.requires_grad and torch.is_grad_enabled()) and not has_tangent(x)


def _configured(folded: Any, name: str) -> Any:
    """An attribute of the model's configuration; None if there is none."""
    return getattr(vars(folded).get("config"), name, None)


def _configuration(folded: Any) -> str | None:
    """What a model of the Hugging Face face takes from its configuration in a call."""
    config = vars(folded).get("config")
    return None if config is None else str([getattr(config, name, None) for name in CONFIGURED])


def _tokens(images: Tensor, backbone: Any) -> int:
    rows, columns = backbone.grid(images)
    return len(images) * (1 + backbone.num_register_tokens + rows * columns)


def _described(value: Any) -> str | None:
    """What an argument that is no tensor is; None if there is no telling."""
    if type(value) in _VALUES:
        return repr(value)
    numbers = isinstance(value, list | tuple | range) and all(isinstance(part, int) for part in value)
    return repr(value) if numbers or isinstance(value, bool | int | float | str) else None


def _settings() -> Hashable:
    """Of the process: those that decide which kernels run."""
    setting, cuda = dispatch.current_setting(), torch.backends.cuda
    return (
        setting.everywhere,
        setting.strict,
        (*sorted(setting.by_name.items()),),
        torch.are_deterministic_algorithms_enabled(),
        matmul_precision(),
        cuda.cudnn_sdp_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
    )


@cache
def _positional(kind: Any, method: str) -> tuple[str, ...]:
    """Names of the arguments of a method that can be given by position."""
    parameters = inspect.signature(getattr(kind, "forward" if method == "__call__" else method)).parameters
    return tuple(name for name, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD)[
        1:
    ]
