"""Registers kernels as torch ops, ``torch.ops.dinov2_fast.<name>``, for autograd, autocast and torch.compile.

Only kernels are registered; the torch references are called directly. A registered op has a schema, a kernel, a fake
(shapes and strides without data) and, where it can be differentiated, an `autograd.Function`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dinov2_fast.ops.implementation import carries_tangent, records_gradient
from dinov2_fast.torch_private import below_autograd, without_autocast

LIBRARY = torch.library.Library("dinov2_fast", "DEF")


def register(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: Callable[..., Any] | None = None,
    autocast: Callable[[str], torch.dtype | None] | None = None,
) -> Callable[..., Any]:
    """Defines ``dinov2_fast::<schema>`` and returns it.

    Args:
        schema: in torch's notation. The number of outputs is fixed, and no output is an input.
        kernel: computes the outputs, for tensors of any device.
        fake: allocates outputs of the same shapes, dtypes and strides.
        autograd: called where a gradient is recorded: runs the `apply` of an `autograd.Function`.
        autocast: maps a device type to the dtype to which autocast casts the floating-point inputs, or to None if it
            casts nothing.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    op = getattr(torch.ops.dinov2_fast, name).default
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dinov2_fast::{name}", fake, lib=LIBRARY)
    if autograd is not None:
        LIBRARY.impl(name, _recording(op, autograd), "Autograd")
    if autocast is not None:
        for device, key in (("cuda", "AutocastCUDA"), ("cpu", "AutocastCPU")):
            LIBRARY.impl(name, _casting(op, device, key, autocast), key)
    return op


def launcher(module: str, name: str) -> Callable[..., Any]:
    """A function of kernels/<module>.py. The first call imports the module, which imports Triton."""
    load = cache(lambda: getattr(import_module(f"dinov2_fast.kernels.{module}"), name))
    return lambda *args, **options: load()(*args, **options)


def _recording(op: Callable[..., Any], autograd: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        if carries_tangent(args):
            raise NotImplementedError(f"{op} has no forward-mode derivative: use the torch backend for it.")
        if records_gradient(args):
            return autograd(*args)
        with below_autograd():
            return op(*args)

    return run


def _casting(
    op: Callable[..., Any], device: str, key: str, autocast: Callable[[str], torch.dtype | None]
) -> Callable[..., Any]:
    uncast = without_autocast(key)

    def run(*args: Any) -> Any:
        dtype = autocast(device)
        with uncast():
            return op(*(_cast(arg, dtype) if dtype is not None else arg for arg in args))

    return run


def _cast(arg: Any, dtype: torch.dtype) -> Any:
    """An argument as autocast casts it. fp64 tensors stay as they are."""
    castable = isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != torch.float64
    return arg.to(dtype) if castable else arg
