"""The CUDA graphs of an engine: which calls are captured, and which graph replays a call.

With a graph the host launches one graph in place of every kernel. There is a graph for each method, for the shapes and
dtypes of its inputs, and for every other setting that decides what a call launches.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections import OrderedDict
from collections.abc import Hashable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dinov2_fast.inference.backbone import FoldedBackbone
from dinov2_fast.inference.capture import CapturedCall, CudaRuntime, is_captured
from dinov2_fast.ops import dispatch
from dinov2_fast.torch_private import has_tangent, is_in_dispatch_mode, is_jit_traced, matmul_precision, pytree

logger = logging.getLogger("dinov2_fast")

CACHED_GRAPHS = 16  # of an engine: each has its own inputs and outputs, all share the memory in between
# With "auto" only calls of up to this many tokens x hidden^2 are captured. Python takes up to 0.5 ms to launch a block.
# At this bound the 24 x tokens x hidden^2 operations of its matrix products take a GPU 0.8 ms (4e11, at 5e14 a second),
# so beyond it the host is ahead of the GPU also without a graph. This is an estimate, which bench/results/NOTES.md asks
# to measure. At the bound a call has 28 (ViT-g) to 453 images (ViT-S) of 224 x 224. If images are in fp32, and all
# tokens are returned in bf16, its graph keeps 60 to 450 MB.
AUTO_WORK = 2**34
NOT_CAPTURED = object()  # in place of an output
COSTLY = ("output_attentions", "output_hidden_states")  # copying these would take as long as computing them
CONFIGURED = (*COSTLY, "return_dict", "out_features", "apply_layernorm", "reshape_hidden_states")  # of Hugging Face

_VALUES = frozenset((type(None), bool, int, float, str))  # classes of arguments that are equal if their repr is


class GraphCache:
    """The graphs of one engine, for the `CACHED_GRAPHS` kinds of call that were used last."""

    def __init__(self, mode: bool | str, cuda: Any = None) -> None:
        self.mode = mode  # "auto", True or False, see `optimize_for_inference`
        self._cuda = cuda or CudaRuntime()  # tests without a GPU give another
        self._calls: OrderedDict[Hashable, CapturedCall | None] = OrderedDict()  # None: called once, not captured
        self._lock = threading.Lock()
        self._device: torch.device | None = None  # of all graphs; replicas of the engine on other devices run eagerly
        self._failure = self._logged = ""

    def replay(self, folded: Any, device: torch.device, method: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """Computes ``folded.method(*args, **kwargs)`` by its graph; returns `NOT_CAPTURED` if there is none.

        This is all that a captured call does in Python: find the graph, copy the inputs, replay, copy the results.
        """
        if not self._calls:
            return NOT_CAPTURED
        key = self._key(folded, device, method, args, kwargs)
        with self._lock:
            captured = self._calls.get(key)
            if captured is None:
                return NOT_CAPTURED
            self._calls.move_to_end(key)
            return self._replay(captured, device, args, kwargs)

    def run(self, folded: Any, backbone: FoldedBackbone, method: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """Computes ``folded.method(*args, **kwargs)``, with a graph where the mode asks for one and it is possible.

        With "auto" a kind of call is captured when it comes for the second time. Images whose size always changes are
        thus not slowed down by captures.
        """
        function = getattr(folded, method)
        key = self._key_to_capture(folded, backbone, method, args, kwargs)
        if key is None:
            return function(*args, **kwargs)
        device, failure = backbone.cls_token.device, ""
        with self._lock:
            wanted = self.mode is True or key in self._calls
            captured = self._calls.pop(key, None)
            self._make_room()
            if captured is None and wanted:
                self._device = device
                try:
                    captured = self._capture(function, args, kwargs, device)
                except Exception as error:
                    failure = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            if not failure:
                self._calls[key] = captured
            if captured is not None:
                return self._replay(captured, device, args, kwargs)
        output = function(*args, **kwargs)  # raises the error if the arguments are wrong
        if failure:
            self._give_up(failure)
        return output

    def _replay(self, captured: CapturedCall, device: torch.device, args: Any, kwargs: dict[str, Any]) -> Any:
        """Replays a graph; the caller holds the lock."""
        stream = self._cuda.begin(device)
        output = captured.replay(_tensors(args, kwargs))
        self._cuda.end(stream)
        return output

    def _key_to_capture(
        self, folded: Any, backbone: Any, method: str, args: Any, kwargs: dict[str, Any]
    ) -> Hashable | None:
        """The key of a call that may be captured; None for a call that must run eagerly."""
        device = backbone.cls_token.device
        if self.mode is False or self._failure or not self._cuda.supports(device):
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
        """All that decides what a call launches and returns; None for a call that no graph may replay now."""
        if self._device not in (None, device) or is_jit_traced() or is_in_dispatch_mode():
            return None
        arguments: list[Hashable] = []
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                if not _is_plain(value, device) or is_captured(value):
                    return None
                arguments.append((value.shape, value.dtype))
            else:
                arguments.append(_argument_key(value))
        if None in arguments:
            return None
        # The graph keeps `folded` alive, so no other object gets its id.
        return id(folded), method, (*kwargs,), (*arguments,), _configuration_key(folded), _process_key()

    def _capture(self, function: Any, args: Any, kwargs: dict[str, Any], device: torch.device) -> CapturedCall:
        other = next((captured for captured in self._calls.values() if captured is not None), None)
        pool = None if other is None else other.graph.pool()
        with torch.inference_mode(False), torch.no_grad():
            args, kwargs = pytree.tree_map_only(Tensor, lambda x: torch.empty_like(x).copy_(x), (args, kwargs))
            graph, output, kept = self._cuda.capture(lambda: function(*args, **kwargs), device, pool)
            return CapturedCall(graph, _tensors(args, kwargs), output, (function, kept))

    def _make_room(self) -> None:
        while len(self._calls) >= CACHED_GRAPHS:
            _, captured = self._calls.popitem(last=False)
            if captured is not None:
                self._cuda.wait()  # before its memory is freed

    def _give_up(self, failure: str) -> None:
        self.clear()
        self._failure = failure
        if failure != self._logged:
            self._logged = failure
            logger.warning("CUDA graphs of an engine are off, it runs eagerly: capturing one failed: %s", failure)

    def clear(self) -> None:
        """Drops all graphs, since the tensors they read are replaced, and allows captures again after a failure."""
        with self._lock:
            self._cuda.wait()
            self._calls.clear()
            self._cuda.forget()
            self._device, self._failure = None, ""

    def status(self, backbone: FoldedBackbone) -> str:
        """Which calls run as graphs, and why."""
        device = backbone.cls_token.device
        if self.mode is False or not self._cuda.supports(device):
            return "none, " + ("as asked" if self.mode is False else f"since the engine is on {device}")
        if self._failure:
            return f"none, since capturing one failed: {self._failure}"
        most = AUTO_WORK // backbone.embed_dim**2
        which = "every call that can be captured"
        if self.mode == "auto":
            which = f"calls of up to {most} tokens, where launching may take longest, from the second of a kind on"
        with self._lock:
            count = sum(captured is not None for captured in self._calls.values())
        return f"for {which}; {count} captured, at most {CACHED_GRAPHS}"


def _tensors(args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]


def _is_plain(x: Tensor, device: torch.device) -> bool:
    """Whether `x` is a plain tensor on `device` without gradient or tangent."""
    if type(x) is not Tensor or x.device != device:
        return False
    return not (x.requires_grad and torch.is_grad_enabled()) and not has_tangent(x)


def _configured(folded: Any, name: str) -> Any:
    """An attribute of a Hugging Face model's configuration; None if there is none."""
    return getattr(vars(folded).get("config"), name, None)


def _configuration_key(folded: Any) -> str | None:
    """The settings that a call of a Hugging Face model reads from its configuration."""
    config = vars(folded).get("config")
    return None if config is None else str([getattr(config, name, None) for name in CONFIGURED])


def _tokens(images: Tensor, backbone: Any) -> int:
    rows, columns = backbone.grid(images)
    return len(images) * (1 + backbone.num_register_tokens + rows * columns)


def _argument_key(value: Any) -> str | None:
    """The value of an argument that is not a tensor; None for classes whose repr does not show the whole value."""
    if type(value) in _VALUES:
        return repr(value)
    numbers = isinstance(value, list | tuple | range) and all(isinstance(part, int) for part in value)
    return repr(value) if numbers or isinstance(value, bool | int | float | str) else None


def _process_key() -> Hashable:
    """The settings of the process that decide which kernels run."""
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
    """The names of the arguments of a method that may be given by position."""
    parameters = inspect.signature(getattr(kind, "forward" if method == "__call__" else method)).parameters
    positional = [name for name, each in parameters.items() if each.kind is each.POSITIONAL_OR_KEYWORD]
    return tuple(positional[1:])  # without self
