"""Implementations of the backends `triton`, `cuda` and `onednn`, and the refusals that several ops share."""

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
    """Whether a package can be imported. It imports nothing, and a stub in `sys.modules` does not count."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ModuleNotFoundError, ValueError):  # ValueError: the module in sys.modules has no spec
        return False


HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32, torch.float64)
UNMEASURED = "our kernels have not been measured on a GPU yet"
TRITON_IS_INSTALLED = is_installed("triton")
# Both are read here because torch.compile traces neither call.
_HAS_ONEDNN = torch.backends.mkldnn.is_available()
HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"

_Refuses = Callable[..., str | None] | None


def triton(function: Callable[..., Any], refuses: _Refuses = None, **options: Any) -> Implementation:
    """The `triton` implementation of an op; `options` are those of :class:`Implementation`."""
    options |= {"refuses_device": _triton_refuses_device, "can_force_on": _interprets_on}
    return Implementation("triton", function, refuses, ("cuda",), **options)


def cuda(function: Callable[..., Any], refuses: _Refuses = None, **options: Any) -> Implementation:
    """The `cuda` implementation of an op, which launches kernels of the CUDA extension."""
    options |= {"refuses_device": _cuda_refuses_device, "can_force_on": _extension_runs_on}
    return Implementation("cuda", function, refuses, ("cuda",), **options)


def onednn(function: Callable[..., Any], refuses: _Refuses = None, **options: Any) -> Implementation:
    """The `onednn` implementation of an op. It is a default on CPUs with AVX-512; on others it can be forced."""
    devices = ("cpu",) if HAS_AVX512 else ("cpu with AVX-512",)
    options |= {"refuses_device": _onednn_refuses_device, "can_force_on": lambda device: device.type == "cpu"}
    return Implementation("onednn", function, refuses, devices, **options)


# Refusals of devices


def _triton_refuses_device(device: torch.device) -> str | None:
    return _kernels_refuse_device(device) if TRITON_IS_INSTALLED else "needs triton, which is not installed"


def _cuda_refuses_device(device: torch.device) -> str | None:
    reason = missing_extension()
    if reason is not None:
        return f"needs the CUDA extension, which is not available ({reason})"
    return _kernels_refuse_device(device)


def _onednn_refuses_device(device: torch.device) -> str | None:
    return refuses_export() if _HAS_ONEDNN else "needs a torch that is built with oneDNN"


def _kernels_refuse_device(device: torch.device) -> str | None:
    if device.type == "cuda" and capability(device.index) < (8, 0):
        return f"needs a device of sm_80 or newer, got {_sm(device)}"
    return refuses_export()


@constant_when_traced  # if it were traced, `is_exporting` would be True in torch.compile as well
def refuses_export() -> str | None:
    if torch.compiler.is_exporting():
        return "cannot be exported: an exported graph holds standard ops only"
    return None


@constant_when_traced
def missing_extension() -> str | None:
    """Why the CUDA extension is not available, or None."""
    return extension.load().reason


@constant_when_traced
def _extension_runs_on(device: torch.device) -> bool:
    """Whether the launches can be forced to run on a device other than a GPU. The tests build them for the CPU."""
    return missing_extension() is None and extension.is_built_for(device.type)


@constant_when_traced
def _interprets_on(device: torch.device) -> bool:
    """Whether Triton's interpreter runs kernels on `device`. The tests use it to run kernels without a GPU."""
    if device.type != "cpu" or not TRITON_IS_INSTALLED:
        return False
    from dinov2_fast.kernels import common

    return common.interpreting()


# Refusals of inputs, which several ops share


def refuses_e4m3(x: Tensor) -> str | None:
    """Why no kernel on the device of `x` can write or multiply e4m3, or None."""
    if x.is_cuda and capability(x.device.index) < (8, 9):
        return f"needs a device with e4m3, sm_89 or newer, got {_sm(x.device)}"
    return None


def refuses_other_than_sm_90(x: Tensor) -> str | None:
    """Why kernels of Hopper's instructions cannot run on the device of `x`, or None."""
    if x.is_cuda and capability(x.device.index) != (9, 0):
        return f"runs on sm_90 only, got {_sm(x.device)}"
    return None


def refuses_to_broadcast(
    x: Tensor, branch: Tensor, drop_scale: Tensor | None = None, **vectors: Tensor | None
) -> str | None:
    """Why a kernel that adds a branch to `x` (batch, seq_len, hidden) cannot take tensors of these shapes, or None."""
    shapes = {"branch": (branch, x.shape), "drop_scale": (drop_scale, x.shape[:1])}
    shapes |= {name: (vector, x.shape[-1:]) for name, vector in vectors.items()}
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tensor.shape != shape:
            return f"does not broadcast: takes {name} of shape {tuple(shape)}, got {tuple(tensor.shape)}"
    return None


@constant_when_traced
def capability(device: int | None) -> tuple[int, int]:
    """The compute capability of a GPU by its index; (9, 0) on machines without one."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (9, 0)


def _sm(device: torch.device) -> str:
    major, minor = capability(device.index)
    return f"sm_{major}{minor}"


def promoted(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of the sum or product of tensors, leaving out None."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors if tensor is not None))
