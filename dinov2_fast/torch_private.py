"""The private names of torch that this package uses, in one place.

They may change with any version of torch: tests/model/test_torch_private.py has a test of each.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake
from torch.autograd import forward_ad
from torch.fx._symbolic_trace import is_fx_symbolic_tracing as is_fx_traced
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "FakeTensorMode",
    "TorchDispatchMode",
    "below_autograd",
    "constant_when_traced",
    "fused_by_onednn",
    "gelu_linear",
    "has_any_global_hook",
    "has_kernel",
    "has_tangent",
    "is_fake",
    "is_fake_mode_active",
    "is_fx_traced",
    "is_in_dispatch_mode",
    "is_jit_traced",
    "is_plain",
    "is_traced",
    "matmul_precision",
    "onednn_linear",
    "onednn_pack",
    "pytree",
    "softmax_backward",
    "without_autocast",
]

_FUSING = threading.Lock()  # what enables oneDNN's graphs is a setting of the process


# Tracing


def is_traced() -> bool:
    """Whether a graph is being made that will run on other inputs, by any tool of torch.

    These are torch.compile and torch.export, torch.jit.trace and the ONNX exporter built on it, and torch.fx, whose
    proxies (`is_fx_traced`) have no sizes, dtypes or devices.
    """
    return torch.compiler.is_compiling() or is_jit_traced() or is_fx_traced()


def is_jit_traced() -> bool:
    """Whether torch.jit.trace runs the code."""
    return torch._C._get_tracing_state() is not None


def is_in_dispatch_mode() -> bool:
    """Whether a `TorchDispatchMode` sees each operation."""
    return bool(torch._C._len_torch_dispatch_stack())


def is_fake_mode_active() -> bool:
    """Whether new tensors are fake."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def constant_when_traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compiler.assume_constant_result`, which would import torch._dynamo, and with it Triton, at once."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# Dispatch keys


def below_autograd() -> AbstractContextManager[Any]:
    """Inside, operators run without being recorded by autograd."""
    return torch._C._AutoDispatchBelowAutograd()


def without_autocast(key: str) -> Callable[[], AbstractContextManager[Any]]:
    """A context in which autocast, of the dispatch key "AutocastCUDA" or "AutocastCPU", casts nothing."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    return lambda: torch._C._ExcludeDispatchKeyGuard(keys)


def has_tangent(tensor: Tensor) -> bool:
    """Whether `tensor` carries a derivative of forward mode."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def is_plain(tensor: Tensor) -> bool:
    """Whether `tensor` is its memory and nothing else: no subclass, no wrapper of torch.func, no tangent."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return type(tensor) is Tensor and not wrapped and not has_tangent(tensor)


def has_kernel(name: str, device_type: str) -> bool:
    """Whether an operator has a kernel for a type of device."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, device_type.upper())


# Operators


def matmul_precision() -> str:
    """`torch.backends.cuda.matmul.fp32_precision`, at a quarter of its cost."""
    return torch._C._get_fp32_precision_getter("cuda", "matmul")


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """oneDNN's linear on a CPU, with "none" or the erf form of "gelu" behind it; contiguous operands, the weight
    packed or not."""
    algorithm = "none" if activation == "gelu" else ""  # not the tanh form
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)


def onednn_pack(weight: Tensor) -> Tensor:
    """A linear's weight in the blocks that oneDNN's products read, for `onednn_linear` alone.

    With AVX-512 they are the same for any number of rows, once they were asked for by as many as here.
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1024)


def fused_by_onednn(function: Callable[..., Tensor], *examples: Tensor) -> Callable[..., Tensor] | None:
    """`function` as one operation of oneDNN, for arguments with the sizes and strides of `examples`.

    It keeps to the number of threads that torch has now. Other arguments are computed by the operations of `function`.
    None if oneDNN cannot fuse them all, or if this torch has none of its graphs.
    """
    with _FUSING, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch deprecates torch.jit, but this is the only way to oneDNN's graphs
        before = torch._C._jit_llga_enabled()
        torch._C._jit_set_llga_enabled(True)
        try:
            fused = torch.jit.trace(function, examples, check_trace=False)
            for _ in range(2):  # the first run records sizes, the second one fuses
                fused(*examples)
            graph = str(torch._C._last_executed_optimized_graph())
        except Exception:  # oneDNN does not compile it, or TorchScript does not run on this version of Python
            return None
        finally:
            torch._C._jit_set_llga_enabled(before)
    return fused if "oneDNNFusionGroup" in graph else None


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """cuBLAS' linear of rows (rows, in_features) with GELU behind it: the tanh form on CUDA, the erf form on a CPU."""
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)


def softmax_backward(dp: Tensor, p: Tensor) -> Tensor:
    """The gradient of what went into a softmax over the last dimension, whose result was `p`."""
    return torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
