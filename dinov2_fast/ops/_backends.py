"""The backends that run kernels, and the devices that they refuse."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from dinov2_fast import extension
from dinov2_fast.ops.implementation import Implementation
from dinov2_fast.torch_private import constant_when_traced


def is_installed(package: str) -> bool:
    """Whether a package could be imported; nothing is. A stub that somebody put into `sys.modules` is none."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ModuleNotFoundError, ValueError):  # ValueError: what is there has no spec
        return False


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
UNMEASURED = "our kernels have not been measured on a GPU yet"
TRITON_IS_INSTALLED = is_installed("triton")


def triton(
    function: Callable[..., Any], refuses: Callable[..., str | None] | None = None, **rest: Any
) -> Implementation:
    """The `triton` implementation of an op; `rest` as :class:`Implementation` has it."""
    return Implementation(
        "triton", function, refuses, devices=("cuda",), unavailable=_triton_is_absent, elsewhere=_interprets, **rest
    )


def cuda(function: Callable[..., Any], refuses: Callable[..., str | None] | None = None, **rest: Any) -> Implementation:
    """The `cuda` implementation of an op, whose launches are the extension's; `rest` as for :func:`triton`."""
    return Implementation(
        "cuda", function, refuses, devices=("cuda",), unavailable=_cuda_is_absent, elsewhere=_extension_runs_on, **rest
    )


def _triton_is_absent(device: torch.device) -> str | None:
    return _refuses_any_kernel(device) if TRITON_IS_INSTALLED else "needs triton, which is not installed"


def _cuda_is_absent(device: torch.device) -> str | None:
    absent = _extension_is_absent()
    if absent is not None:
        return f"needs the CUDA extension, which is not available ({absent})"
    return _refuses_any_kernel(device)


def _refuses_any_kernel(device: torch.device) -> str | None:
    if device.type == "cuda" and _capability(device.index) < (8, 0):
        major, minor = _capability(device.index)
        return f"needs a device of sm_80 or newer, got sm_{major}{minor}"
    if _is_exporting():
        return "does not export: an exported graph holds standard ops only"
    return None


@constant_when_traced
def _extension_is_absent() -> str | None:
    return extension.load().reason


@constant_when_traced
def _extension_runs_on(device: torch.device) -> bool:
    """Whether the launches can be forced to run on a device that is none of CUDA's: those the tests build for a CPU."""
    return _extension_is_absent() is None and extension.is_built_for(device.type)


def promoted(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of the sum or product of tensors (None: left out)."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors if tensor is not None))


def refuses_to_broadcast(
    x: Tensor, branch: Tensor, drop_scale: Tensor | None = None, **vectors: Tensor | None
) -> str | None:
    """Why a kernel that adds a branch to `x` (batch, seq_len, hidden) takes none of these shapes, or None."""
    shapes = {"branch": (branch, x.shape), "drop_scale": (drop_scale, x.shape[:1])}
    shapes |= {name: (vector, x.shape[-1:]) for name, vector in vectors.items()}
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tensor.shape != shape:
            return f"broadcasts nothing: takes {name} of shape {tuple(shape)}, got {tuple(tensor.shape)}"
    return None


def refuses_e4m3(x: Tensor) -> str | None:
    """Why no kernel on the device of `x` can write or multiply e4m3, or None."""
    if x.is_cuda and _capability(x.device.index) < (8, 9):
        major, minor = _capability(x.device.index)
        return f"needs a device with e4m3, sm_89 or newer, got sm_{major}{minor}"
    return None


@constant_when_traced
def _capability(device: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (9, 0)


@constant_when_traced  # itself traced, `is_exporting` would be True in torch.compile as well
def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


@constant_when_traced
def _interpreting() -> bool:
    if not TRITON_IS_INSTALLED:
        return False
    from dinov2_fast.kernels import common

    return common.interpreting()


def _interprets(device: torch.device) -> bool:
    """Whether Triton's interpreter runs kernels on `device`: the tests' way to run them without a GPU."""
    return device.type == "cpu" and _interpreting()
