"""Runs copies of modules with random weights on a random input, to compare what the modules compute.

The modules themselves are not called. Their weights are not read, so they may be on the meta device, sharded or
quantised. Other objects in their attributes are shared with the copies. No hooks run, and the states of the process'
random generators are the same afterwards.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from dinov2_fast.integrations.changes import plain_attributes, shadowed_methods
from dinov2_fast.ops.dispatch import use_backend

_SEED = 1
_BATCH, _TOKENS = 2, 7
# Relative to the largest element. In fp64 two orders of the same sums agree to 1e-13; where a library computes in fp32
# nevertheless, such as a softmax, to 1e-7. GELU by tanh, or an eps of 1e-5 instead of 1e-6, is off by 1e-5 or more.
_TOLERANCE = 1e-6
_FP32_TOLERANCE = 1e-5

Call = Callable[[Any, Tensor], Any]


class TrialRun(NamedTuple):
    """What happened when a module ran on the random input."""

    output: Any  # the result, or the error that was raised
    calls: Counter[str]  # how often each linear was called, by its name, in the forward and the backward pass
    changed: tuple[str, ...]  # the names of attributes that the call set or changed, on the module or inside it


@torch.inference_mode(False)
def copy_with_random_weights(module: nn.Module, device: str, dtype: torch.dtype) -> nn.Module:
    """A copy without hooks and without methods set on instances; its random weights are the same in every copy.

    Every other kind of linear (quantised, or with an adapter) becomes a plain one of the same size.
    """
    return _copy(module, _RandomTensors(device, dtype), {})


@torch.inference_mode(False)
def run_copy(module: nn.Module, training: bool, call: Call = lambda module, x: module(x)) -> TrialRun:
    """Calls a copy made by :func:`copy_with_random_weights`; in training mode, also runs the backward pass."""
    weight = next(module.parameters())
    x = _RandomTensors(weight.device, weight.dtype).tensor((_BATCH, _TOKENS, weight.shape[-1]), 1.0)
    module.train(training)
    calls: Counter[str] = Counter()
    handles = [
        each.register_forward_pre_hook(lambda each, args, name=name: calls.update([name]))
        for name, each in module.named_modules()
        if isinstance(each, nn.Linear)
    ]
    before = _attributes_inside(module)
    try:
        with _isolated_from_process(weight.device, training):
            output = call(module, x.requires_grad_(training))
            if isinstance(output, Tensor):
                if training:
                    output.square().sum().backward()
                output = output.detach()
    except Exception as error:  # the code of other projects may raise anything
        output = error
    for handle in handles:
        handle.remove()
    return TrialRun(output, calls, _changed(before, _attributes_inside(module)))


def error_beyond_rounding(found: Any, wanted: Tensor) -> float | None:
    """The largest difference over the largest element of `wanted`, or None if rounding explains it."""
    if not isinstance(found, Tensor) or found.shape != wanted.shape:
        return float("inf")
    error = float((found - wanted).abs().max() / wanted.abs().max())
    return None if error <= (_TOLERANCE if wanted.dtype == torch.float64 else _FP32_TOLERANCE) else error


class _RandomTensors:
    """Random tensors from their own generator."""

    def __init__(self, device: Any, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator().manual_seed(_SEED)

    def tensor(self, shape: Any, scale: float) -> Tensor:
        noise = torch.randn(tuple(shape), generator=self._generator, dtype=self.dtype, device="cpu")
        return (scale * noise).to(self.device)

    def parameter(self, like: Tensor) -> nn.Parameter:
        """Matrices preserve the scale of their input. Vectors have a mean of 1, so a LayerScale removes no branch."""
        if like.ndim > 1:
            return nn.Parameter(self.tensor(like.shape, like.shape[-1] ** -0.5))
        return nn.Parameter(1 + self.tensor(like.shape, 0.3))

    def buffer(self, like: Tensor) -> Tensor:
        if like.is_meta:
            return torch.zeros(like.shape, dtype=like.dtype, device=self.device)
        return like.detach().to(self.device, self.dtype if like.is_floating_point() else like.dtype, copy=True)


def _copy(module: Any, weights: _RandomTensors, copies: dict[int, nn.Module]) -> nn.Module:
    """The copy of `module`: the one in `copies`, by the identity of the module, or a new one."""
    if id(module) in copies:
        return copies[id(module)]
    source = _plain_linear(module) or module
    source_class: Any = type(source)
    copied = source_class.__new__(source_class)
    copied.__dict__ |= vars(nn.Module())
    shadowed = shadowed_methods(source)
    for name, value in plain_attributes(source).items():
        if name not in shadowed:
            copied.__dict__[name] = copy.copy(value) if isinstance(value, list | dict | set) else value
    for name, parameter in source._parameters.items():
        copied._parameters[name] = None if parameter is None else weights.parameter(parameter)
    for name, buffer in source._buffers.items():
        copied._buffers[name] = None if buffer is None else weights.buffer(buffer)
    for name, child in source._modules.items():
        copied._modules[name] = None if child is None else _copy(child, weights, copies)
    copies[id(module)] = copied
    return copied


def _plain_linear(module: Any) -> nn.Linear | None:
    """torch's linear of the same sizes if `module` is another kind of linear, or None."""
    is_linear = all(hasattr(module, name) for name in ("weight", "in_features", "out_features"))
    if type(module) is nn.Linear or not is_linear:
        return None
    bias = getattr(module, "bias", None) is not None
    return nn.Linear(module.in_features, module.out_features, bias, device="meta")


@contextmanager
def _isolated_from_process(device: torch.device, training: bool) -> Iterator[None]:
    """Inside, autocast, grad mode, backends, global hooks and random states of the process have no effect."""
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.set_grad_enabled(training),
        torch.autocast(device.type, enabled=False),
        use_backend("torch"),
        _no_global_hooks(),
    ):
        torch.default_generator.manual_seed(_SEED)  # torch.manual_seed would also seed every GPU
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(_SEED)
        yield


@contextmanager
def _no_global_hooks() -> Iterator[None]:
    names = [name for name in vars(torch_module) if name.startswith("_global_") and name.endswith("_hooks")]
    stashed = [(hooks, dict(hooks)) for hooks in map(vars(torch_module).__getitem__, names)]
    for hooks, _ in stashed:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, kept in stashed:
            hooks.update(kept)


def _attributes_inside(module: nn.Module) -> dict[str, tuple[Any, int]]:
    """By name: the value of each attribute, and its length if it is a container that can grow."""
    return {
        f"{name}.{key}".lstrip("."): (value, len(value) if isinstance(value, list | dict | set) else 0)
        for name, each in module.named_modules()
        for key, value in plain_attributes(each).items()
    }


def _changed(before: dict[str, tuple[Any, int]], after: dict[str, tuple[Any, int]]) -> tuple[str, ...]:
    """The names of attributes that are new or have another value or length."""
    then = {name: before.get(name, (None, -1)) for name in after}
    return tuple(n for n, (value, length) in after.items() if then[n][0] is not value or then[n][1] != length)
