"""How the engine's linears hold their weights, which depends on the backends that are chosen for them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from dinov2_fast.inference.plan import EnginePlan
from dinov2_fast.ops._fp8 import E4M3
from dinov2_fast.ops.dispatch import BackendError, current_setting
from dinov2_fast.ops.linear import LINEAR, sample_inputs
from dinov2_fast.torch_private import FakeTensorMode


class LinearLayout(NamedTuple):
    """How the linears of the blocks hold weights and biases.

    Attributes:
        interleaved: the gate and value rows of a SwiGLU alternate (`ops.linear.interleave`).
        defers_bias: linears that add to the residual stream have no bias. The norms that read the stream add the sum
            of the biases so far.
    """

    interleaved: bool
    defers_bias: bool


def layouts_for(plan: EnginePlan, device: torch.device, gated: bool) -> dict[torch.dtype, LinearLayout]:
    """The layouts for the backends that are chosen now, by the dtype of operands; `gated` models have SwiGLU."""
    dtypes = (plan.dtype, E4M3) if plan.e4m3 else (plan.dtype,)
    return {dtype: layout_for(device, dtype, plan.residual_dtype, gated) for dtype in dtypes}


def layout_for(device: torch.device, dtype: torch.dtype, residual_dtype: torch.dtype, gated: bool) -> LinearLayout:
    """The layout for the backends that are chosen now, for linears of operands in `dtype`."""
    with FakeTensorMode(), torch.no_grad():
        *swiglu, _ = sample_inputs("swiglu", device, dtype)
        x, weight, _, form, residual, *rest = sample_inputs("residual", device, dtype)
        bias, rest = residual.new_empty(len(weight)), [form, residual.to(residual_dtype), *rest]
        return LinearLayout(
            interleaved=gated and _chosen_refuses("swiglu", (*swiglu, None), (*swiglu, False)),
            defers_bias=_chosen_refuses("residual", (x, weight, None, *rest), (x, weight, bias, *rest)),
        )


def _chosen_refuses(form: str, given: tuple[Any, ...], asked: tuple[Any, ...]) -> bool:
    """Whether the implementation of `linear` that is chosen for the arguments `given` refuses the arguments `asked`."""
    try:
        chosen, *_ = LINEAR.select(form, given, current_setting())
    except BackendError:  # the first call will raise it
        return False
    return chosen.refuses is not None and chosen.refuses(*asked) is not None
