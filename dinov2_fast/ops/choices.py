"""The table of what runs each form of each op, and why: what `print(model)` and ``dinov2-fast info`` show."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinov2_fast.ops._fp8 import E4M3
from dinov2_fast.ops.dispatch import BackendError, Op, current_setting, ops
from dinov2_fast.ops.implementation import first_tensor
from dinov2_fast.torch_private import FakeTensorMode


@dataclass(frozen=True)
class Row:
    """What runs one form of an op in one dtype, and why."""

    op: str
    form: str
    dtype: torch.dtype
    backend: str
    because: str

    @property
    def name(self) -> str:
        """The form as settings have it."""
        return ops()[self.op].name_of(self.form)

    @property
    def label(self) -> str:
        """The form with its precision, where that is e4m3: no other row of an engine has the same."""
        return ops()[self.op].name_of(self.form, self.dtype == E4M3)


def table(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    training: bool = False,
    only_trainable: bool = False,
) -> list[Row]:
    """What runs each form of each op on this device, in this dtype and mode.

    Asked with fake tensors, so no device is touched or needed. `only_trainable` leaves out the ops that only the
    inference engine uses. With e4m3 as `dtype` it has the forms that read or write e4m3.
    """
    rows: list[Row] = []
    with FakeTensorMode(), torch.set_grad_enabled(training):
        for op in ops().values():
            for form, sample in op.samples.items():
                args = sample(torch.device(device), dtype)
                if args is not None and (op.trains or not (training or only_trainable)):
                    rows.append(_row(op, form, dtype, _recorded(args, training)))
    return rows


def _row(op: Op, form: str, dtype: torch.dtype, args: tuple[Any, ...]) -> Row:
    try:
        chosen, forced, refusals = op.select(form, args, current_setting())
    except BackendError as error:
        return Row(op.name, form, dtype, "nothing", str(error))
    x = first_tensor(args)
    others = [i for i in op.implementations if i.has(form, x.dtype) and i is not chosen]
    if chosen is forced:
        because = "was asked for"
    elif forced is not None:
        because = f"{refusals[0][0].backend} was asked for, but {refusals[0][1]}"
    elif any(other.is_for(x.device) for other in others):
        because = chosen.why or "is the first that can run"
    else:
        because = "the others need a GPU" if others else "there is no other"
    return Row(op.name, form, dtype, chosen.backend, because)


def _recorded(arguments: Any, training: bool) -> Any:
    """The sample arguments as a training step would give them."""
    if isinstance(arguments, list | tuple):
        return type(arguments)(_recorded(argument, training) for argument in arguments)
    if isinstance(arguments, Tensor) and arguments.is_floating_point():
        return arguments.detach().requires_grad_(training)
    return arguments


def _forms(op: str, dtype: torch.dtype) -> set[str]:
    """Those that an op has in a dtype."""
    meta = torch.device("meta")
    return {form for form, sample in ops()[op].samples.items() if sample(meta, dtype) is not None}


def summary(rows: Iterable[Row]) -> list[str]:
    """A short table of what runs and why; forms of an op that run alike share a line."""
    alike: dict[tuple[str, bool, str, str], list[str]] = {}
    for row in rows:
        alike.setdefault((row.op, row.dtype == E4M3, row.backend, row.because), []).append(row.form)
    lines = [("operation", "run by", "because")]
    for (op, e4m3, backend, because), forms in alike.items():
        what = op if set(forms) == _forms(op, E4M3 if e4m3 else torch.float32) else f"{op} ({', '.join(forms)})"
        lines.append((f"{what} in e4m3" if e4m3 else what, backend, because))
    widths = [max(len(line[i]) for line in lines) for i in range(2)]
    return [f"{what:{widths[0]}}  {backend:{widths[1]}}  {because}" for what, backend, because in lines]
