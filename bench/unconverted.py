"""The ops that `dinov2_fast.backends` still dispatches, as forms: to be deleted with it."""

from __future__ import annotations

from dinov2_fast import backends
from dinov2_fast.ops import dispatch
from dinov2_fast.ops.dispatch import Implementation

FUNCTIONS = {
    "linear.none": "linear",
    "linear.none e4m3": "linear_fp8",
    "linear.gelu": "linear_gelu",
    "linear.gelu e4m3": "linear_gelu_fp8",
    "linear.swiglu": "linear_swiglu",
    "linear.swiglu e4m3": "linear_swiglu_fp8",
    "linear.residual": "linear_residual_",
    "linear.residual e4m3": "linear_residual_fp8_",
}


def implementations(name: str) -> list[Implementation]:
    old = backends.ops()[FUNCTIONS[name]].implementations
    return [Implementation(i.backend, i.function, i.refuses, i.devices, elsewhere=i.elsewhere) for i in old]


def op_names() -> list[str]:
    """The names of all ops."""
    return sorted({*dispatch.names(), *backends.words()})
