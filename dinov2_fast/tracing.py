"""Whether what runs now is recorded as a graph.

``is_fx_traced()`` is True while torch.fx runs the code on proxies, whose sizes, dtypes and devices are unknown.
"""

from __future__ import annotations

import torch
from torch.fx._symbolic_trace import is_fx_symbolic_tracing as is_fx_traced

__all__ = ["is_fx_traced", "is_traced"]


def is_traced() -> bool:
    """Whether a graph is being made that will run on other inputs, by any tool of torch.

    These are torch.compile and torch.export, torch.jit.trace and the ONNX exporter built on it, and torch.fx.
    """
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or is_fx_traced()
