"""What runs each form of each op, and why: shown by `print(model)`, `model.backends()` and ``dinov2-fast info``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinov2_fast.ops._fp8 import E4M3
from dinov2_fast.ops.dispatch import BackendError, Op, all_ops, current_setting
from dinov2_fast.ops.implementation import first_tensor
from dinov2_fast.torch_private import FakeTensorMode


@dataclass(frozen=True)
class BackendChoice:
    """What runs one form of an op in one dtype, and why."""

    op: str
    form: str
    dtype: torch.dtype
    backend: str  # "nothing" if no implementation can run the form
    because: str

    @property
    def name(self) -> str:
        """The name of the form in settings."""
        return all_ops()[self.op].name_of(self.form)

    @property
    def label(self) -> str:
        """The name of the form, with "e4m3" if that is its dtype. It is unique among the choices of an engine."""
        return all_ops()[self.op].name_of(self.form, self.dtype == E4M3)


def backend_choices(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    training: bool = False,
    in_model: bool = False,
) -> list[BackendChoice]:
    """What runs each form of each op on this device, in this dtype and mode.

    The ops are asked with fake tensors, so no device is touched or needed. With e4m3 as `dtype`, only the forms that
    read or write e4m3 are listed. `in_model` leaves out the ops that only the inference engine or pretraining use.
    """
    choices: list[BackendChoice] = []
    with FakeTensorMode(), torch.set_grad_enabled(training):
        for op in all_ops().values():
            for form, sample in op.sample_inputs.items():
                args = sample(torch.device(device), dtype)
                is_used = op.has_backward and op.in_model if in_model else op.has_backward or not training
                if args is not None and is_used:
                    choices.append(_choice(op, form, dtype, _recorded(args, training)))
    return choices


def _choice(op: Op, form: str, dtype: torch.dtype, args: tuple[Any, ...]) -> BackendChoice:
    try:
        chosen, forced, refusals = op.select(form, args, current_setting())
    except BackendError as error:
        return BackendChoice(op.name, form, dtype, "nothing", str(error))
    x = first_tensor(args)
    others = [i for i in op.implementations if i.is_candidate(form, x.dtype) and i is not chosen]
    if chosen is forced:
        because = "was asked for"
    elif forced is not None:
        because = f"{refusals[0][0].backend} was asked for, but {refusals[0][1]}"
    elif any(other.is_for(x.device) for other in others):
        because = chosen.why or "is the first that can run"
    else:
        need = "a GPU" if all(other.devices == ("cuda",) for other in others) else "a GPU or a CPU with AVX-512"
        because = f"the others need {need}" if others else "is the only one"
    return BackendChoice(op.name, form, dtype, chosen.backend, because)


def _recorded(arguments: Any, training: bool) -> Any:
    """The sample arguments as a training step would give them."""
    if isinstance(arguments, list | tuple):
        return type(arguments)(_recorded(argument, training) for argument in arguments)
    if isinstance(arguments, Tensor) and arguments.is_floating_point():
        return arguments.detach().requires_grad_(training)
    return arguments


def _forms(op: str, dtype: torch.dtype) -> set[str]:
    """The forms that an op has in a dtype."""
    meta = torch.device("meta")
    return {form for form, sample in all_ops()[op].sample_inputs.items() if sample(meta, dtype) is not None}


def format_choices(choices: Iterable[BackendChoice]) -> list[str]:
    """The choices as the lines of a table. Forms of an op that run alike share a line."""
    alike: dict[tuple[str, bool, str, str], list[str]] = {}
    for choice in choices:
        alike.setdefault((choice.op, choice.dtype == E4M3, choice.backend, choice.because), []).append(choice.form)
    lines = [("operation", "run by", "because")]
    for (op, e4m3, backend, because), forms in alike.items():
        what = op if set(forms) == _forms(op, E4M3 if e4m3 else torch.float32) else f"{op} ({', '.join(forms)})"
        lines.append((f"{what} in e4m3" if e4m3 else what, backend, because))
    widths = [max(len(line[i]) for line in lines) for i in range(2)]
    return [f"{what:{widths[0]}}  {backend:{widths[1]}}  {because}" for what, backend, because in lines]
