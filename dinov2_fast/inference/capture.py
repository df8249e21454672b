"""Captures a call as a CUDA graph and replays it.

A graph repeats the launches of one call, on the memory of that call: the tensors of a later call are copied into its
inputs, and its results are copied out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dinov2_fast.torch_private import TorchDispatchMode, pytree

WARM_UP = 2  # calls before a capture: libraries plan, Triton compiles

_capture_lock = threading.Lock()  # a capture begins by synchronising the device, which would break another capture
_capturing = threading.local()  # .kept: the tensors that the graph captured by this thread must keep alive

# How ops make the host wait for the device, see ForbidDeviceSync.
_aten = torch.ops.aten
TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # the host reads the result or its size
UNTAGGED = {
    _aten._linalg_check_errors.default,
    _aten.lift_fresh.default,  # for a tensor on the device: torch.tensor has just copied Python numbers to it
}
COPIES = {_aten._to_copy.default, _aten.copy_.default, _aten.copy.default}
GATHERS = {_aten.index.Tensor}
SCATTERS = {_aten.index_put.default, _aten.index_put_.default}


def is_captured(x: Tensor) -> bool:
    """Whether `x` is on a GPU and the current stream is being captured, by this module or by anyone else."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def keep_alive(tensors: Any) -> Any:
    """Returns `tensors` if the graph that this thread is capturing can keep them alive, and makes it do so.

    It returns None if `tensors` is None, and if the capture is not one of this module: such a graph would still read
    the tensors after they are freed.
    """
    kept = getattr(_capturing, "kept", None)
    if kept is None or tensors is None:
        return None
    kept.append(tensors)
    return tensors


class CudaRuntime:
    """Captures the graphs of one engine and orders their replays, by torch.cuda."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Drops the stream and the event: the next graphs may be on another device."""
        self._side: torch.cuda.Stream | None = None  # graphs that share memory must be captured on one stream
        self._done: torch.cuda.Event | None = None  # the end of the last replay and of the copies of its results

    def supports(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def capture(self, run: Callable[[], Any], device: torch.device, pool: Any) -> tuple[Any, Any, list[Any]]:
        """Captures `run`, after warm-up calls.

        The last warm-up call must not synchronise with the device, since a capture that does fails. After such a
        failure torch 2.11 is left in a broken state: every later random number on the device raises ("Offset increment
        outside graph capture"), in any thread, and the allocator acts as if the capture went on.

        `pool` is the memory pool of the graphs that this one shares memory with, or None. The result is the graph, the
        output of `run` (in memory of the graph), and the tensors of `keep_alive`.
        """
        current = torch.cuda.current_stream(device)
        self._side = side = self._side or torch.cuda.Stream(device)
        self._done = self._done or torch.cuda.Event()
        # The outer `stream` restores the caller's stream also if the capture fails, which torch.cuda.graph does not.
        with _capture_lock, torch.cuda.device(device), torch.cuda.stream(side):
            side.wait_stream(current)
            for _ in range(WARM_UP - 1):
                run()
            with ForbidDeviceSync(device):
                run()
            graph = torch.cuda.CUDAGraph()
            kept: list[Any] = []
            _capturing.kept = kept
            try:
                # thread_local: other threads may still do what a capture forbids, such as pinning memory.
                with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                    output = run()
            finally:
                _capturing.kept = None
        current.wait_stream(side)
        return graph, output, kept

    def begin(self, device: torch.device) -> Any:
        """Returns the current stream, which waits for the last replay: the memory may be in use on another stream."""
        stream = torch.cuda.current_stream(device)
        if self._done is not None:
            stream.wait_event(self._done)
        return stream

    def end(self, stream: Any) -> None:
        """Records that a replay and the copies of its results were launched on `stream`."""
        if self._done is not None:
            self._done.record(stream)

    def wait(self) -> None:
        """Waits until the device has finished all replays."""
        if self._done is not None:
            self._done.synchronize()


Builder = Callable[[list[Tensor], list[Tensor]], Any]  # builds a part of an output from a call's tensors and the copies


class OutputCopier:
    """Copies the output of a graph, so that the next replay does not overwrite what a caller holds.

    Tensors that together fill the memory they share (CLS, registers and patches of one norm) are copied at once and
    are views of one tensor again. How an output is built from the copies is decided once, at the capture. Where the
    output contains one of the captured call's `inputs`, a replay returns the caller's tensor.
    """

    def __init__(self, output: Any, inputs: list[Tensor]) -> None:
        self._sources: list[Tensor] = []  # the tensors to copy
        self._inputs = {id(x): i for i, x in enumerate(inputs)}
        self._shared: dict[int, int] = {}  # the id of a tensor to the index of the source that is all of its storage
        groups: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor):
                groups.setdefault((leaf.untyped_storage().data_ptr(), leaf.dtype), []).append(leaf)
        for group in groups.values():
            size = group[0].untyped_storage().nbytes() // group[0].itemsize
            if len(group) > 1 and sum(leaf.numel() for leaf in group) >= size:
                self._shared |= dict.fromkeys(map(id, group), len(self._sources))
                self._sources.append(group[0].as_strided((size,), (1,), 0))
        self._build = self._builder(output)

    def copy(self, given: list[Tensor]) -> Any:
        """The output of a call with the tensors `given`: copies, and those of `given` that the call returns."""
        return self._build(given, [source.clone() for source in self._sources])

    def _builder(self, part: Any) -> Builder:
        """Builds a part of an output; pytree, which is slow, is used for other classes than dict, list and tuple."""
        if type(part) is dict:
            named = {key: self._builder(value) for key, value in part.items()}
            return lambda given, copies: {key: build(given, copies) for key, build in named.items()}
        if type(part) in (list, tuple):
            kind, builders = type(part), [self._builder(value) for value in part]
            return lambda given, copies: kind([build(given, copies) for build in builders])
        leaves, spec = pytree.tree_flatten(part)
        if spec.is_leaf():
            return self._leaf_builder(part)
        builders = [self._leaf_builder(leaf) for leaf in leaves]
        return lambda given, copies: pytree.tree_unflatten([build(given, copies) for build in builders], spec)

    def _leaf_builder(self, leaf: Any) -> Builder:
        if id(leaf) in self._inputs:
            i = self._inputs[id(leaf)]
            return lambda given, copies: given[i]
        if not isinstance(leaf, Tensor):
            return lambda given, copies: leaf
        if id(leaf) in self._shared:
            source, geometry = self._shared[id(leaf)], (leaf.size(), leaf.stride(), leaf.storage_offset())
            return lambda given, copies: copies[source].as_strided(*geometry)
        self._sources.append(leaf)
        last = len(self._sources) - 1
        return lambda given, copies: copies[last]


class CapturedCall:
    """A graph with the inputs that it reads, its output, and what else must live as long as the graph."""

    def __init__(self, graph: Any, inputs: list[Tensor], output: Any, kept: Any) -> None:
        self.graph = graph
        self._inputs, self._copier, self._kept = inputs, OutputCopier(output, inputs), (output, kept)

    def replay(self, given: list[Tensor]) -> Any:
        """The output of the call for the tensors `given`."""
        for own, x in zip(self._inputs, given, strict=True):
            own.copy_(x)
        self.graph.replay()
        return self._copier.copy(given)


class ForbidDeviceSync(TorchDispatchMode):
    """Raises a `RuntimeError` where an op inside the context makes the host wait for `device`.

    Such ops are those that torch tags as data-dependent, those with a mask as index (torch counts its elements first),
    and copies from or to another device, including copies of the indices of an op. A CPU tensor without dimensions is
    passed to kernels as a number, so ops other than copies may take one. Ops on other devices are ignored.

    It does not find waits outside torch's ops: in another library, for an event, and in the index ``x[[0, 1]]``, whose
    numbers torch copies to the device before any op is dispatched.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device.type

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        tensors = [x for x in pytree.tree_leaves((args, kwargs, output)) if isinstance(x, Tensor)]
        others = [x for x in tensors if x.device.type != self._device]
        if len(others) == len(tensors):
            return output
        copied = bool(others) if func in COPIES else any(x.ndim for x in others)
        if copied or _reads(func, args):
            raise RuntimeError(f"{func} makes the host wait for the device")
        return output


def _reads(func: Any, args: Any) -> bool:
    """Whether the host reads values that an op takes or returns, or their number."""
    if func in GATHERS:
        return _has_mask(args[1])
    if func in SCATTERS:  # with a number as value, a mask is not counted
        return _has_mask(args[1]) and (args[2].ndim > 0 or args[2].device.type != "cpu")
    return func in UNTAGGED or not TAGS.isdisjoint(func.tags)


def _has_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
