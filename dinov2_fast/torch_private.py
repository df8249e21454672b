"""All private functions and classes of torch that this package uses, but not private attributes of `nn.Module`.

They may change with any version of torch, so tests/model/test_torch_private.py tests each.
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

# torch's own names that other files import from here.
__all__ = ["FakeTensorMode", "TorchDispatchMode", "has_any_global_hook", "is_fake", "is_fx_traced", "pytree"]

_FUSING = threading.Lock()  # the setting that enables oneDNN's graphs belongs to the process


# Tracing


def is_traced() -> bool:
    """Whether a tool of torch is tracing a graph that will run on other inputs.

    The tools are torch.compile and torch.export, torch.jit.trace and the ONNX exporter built on it, and torch.fx, whose
    proxies (`is_fx_traced`) have no sizes, dtypes or devices.
    """
    return torch.compiler.is_compiling() or is_jit_traced() or is_fx_traced()


def is_jit_traced() -> bool:
    """Whether torch.jit.trace is running this code."""
    return torch._C._get_tracing_state() is not None


def is_in_dispatch_mode() -> bool:
    """Whether a `TorchDispatchMode` sees each operation."""
    return bool(torch._C._len_torch_dispatch_stack())


def is_fake_mode_active() -> bool:
    """Whether new tensors are fake."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def constant_when_traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compiler.assume_constant_result` without its import of torch._dynamo, which imports Triton."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# Dispatch keys


def below_autograd() -> AbstractContextManager[Any]:
    """A context in which autograd does not record operators."""
    return torch._C._AutoDispatchBelowAutograd()


def without_autocast(key: str) -> Callable[[], AbstractContextManager[Any]]:
    """A context without the autocast of the dispatch key "AutocastCUDA" or "AutocastCPU"."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    return lambda: torch._C._ExcludeDispatchKeyGuard(keys)


def has_tangent(tensor: Tensor) -> bool:
    """Whether `tensor` carries a forward-mode derivative."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def is_plain(tensor: Tensor) -> bool:
    """Whether `tensor` is an ordinary tensor: no subclass, no wrapper of torch.func, no forward-mode derivative."""
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
    """oneDNN's linear on a CPU, followed by `activation`: "none", or "gelu" in its erf form.

    The operands are contiguous; the weight may be packed by `onednn_pack`.
    """
    algorithm = "none" if activation == "gelu" else ""  # not the tanh form
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)


def onednn_pack(weight: Tensor) -> Tensor:
    """A linear's weight in oneDNN's blocked layout, which only `onednn_linear` can read.

    The layout is chosen for a number of rows. With AVX-512 the one chosen for 1024 rows serves any number.
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1024)


def fused_by_onednn(function: Callable[..., Tensor], *examples: Tensor) -> Callable[..., Tensor] | None:
    """`function` fused to one operation of oneDNN, for arguments with the sizes and strides of `examples`.

    It always uses the number of threads that torch has now. For other arguments the operations run one by one. Returns
    None if oneDNN cannot fuse all of them, or if this build of torch lacks oneDNN's graphs.
    """
    with _FUSING, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, but the only way to oneDNN's graphs
        before = torch._C._jit_llga_enabled()
        torch._C._jit_set_llga_enabled(True)
        try:
            fused = torch.jit.trace(function, examples, check_trace=False)
            for _ in range(2):  # the first run records sizes, the second one fuses
                fused(*examples)
            graph = str(torch._C._last_executed_optimized_graph())
        except Exception:  # oneDNN cannot compile it, or TorchScript does not run on this version of Python
            return None
        finally:
            torch._C._jit_set_llga_enabled(before)
    return fused if "oneDNNFusionGroup" in graph else None


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear of rows (rows, in_features) followed by GELU: cuBLAS' tanh form on CUDA, the erf form on a CPU."""
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)


def softmax_backward(dp: Tensor, p: Tensor) -> Tensor:
    """The gradient of the input of a softmax over the last dimension, from its output `p` and the gradient `dp`."""
    return torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
