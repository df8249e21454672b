"""One way to compute an op, and on what it can run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinov2_fast.ops._fp8 import E4M3
from dinov2_fast.torch_private import has_tangent

_DTYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    E4M3: "e4m3",
}


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Args:
        backend: its name.
        function: takes the arguments of the op, in the order in which the op's public function passes them on.
        refuses: of the same arguments, why it cannot run them, or None. It looks at sizes and options, never at data.
        devices: types of the devices it is made for; None for any. On others it is not chosen, without a warning.
        dtypes: of the first tensor, those it takes; None for any. An op on e4m3 tensors is another one to choose: only
            implementations that take e4m3 are its candidates, and one for e4m3 alone is none for other dtypes.
        forms: of the op, those it has; None for all.
        trains: whether it has a backward.
        unavailable: why it cannot run on a device of this machine, or None.
        elsewhere: whether it can be forced to run on a device it is not made for.
        why: why it is preferred to those after it, to be shown to users.
    """

    backend: str
    function: Callable[..., Any]
    refuses: Callable[..., str | None] | None = None
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    forms: tuple[str, ...] | None = None
    trains: bool = True
    unavailable: Callable[[torch.device], str | None] = lambda device: None
    elsewhere: Callable[[torch.device], bool] = lambda device: False
    why: str = ""

    def reason_against(self, args: tuple[Any, ...], forced: bool = False) -> str | None:
        """Why it cannot run the op on these arguments, or None."""
        x = first_tensor(args)
        reason = self.reason_against_kind(x.device, x.dtype, records_gradient(args), forced)
        return reason or (self.refuses(*args) if self.refuses is not None else None)

    def reason_against_kind(
        self, device: torch.device, dtype: torch.dtype, recorded: bool, forced: bool = False
    ) -> str | None:
        """The same for any arguments of this kind; `recorded` says whether gradients are."""
        if not self.is_for(device) and not (forced and self.elsewhere(device)):
            return f"needs a {' or '.join(self.devices or ())} tensor, got one on {device.type}"
        if not self.trains and recorded:
            return "is for inference only, and gradients are recorded"
        if self.dtypes is not None and dtype not in self.dtypes:
            *others, last = (_DTYPES.get(known, str(known)) for known in self.dtypes)
            return f"takes {', '.join(others)}{' and ' if others else ''}{last}, got {dtype}"
        return self.unavailable(device)

    def is_for(self, device: torch.device) -> bool:
        return self.devices is None or device.type in self.devices

    def has(self, form: str, dtype: torch.dtype | None = None) -> bool:
        """Whether it has a form, and where `dtype` is given, whether it is a candidate for it."""
        if self.forms is not None and form not in self.forms:
            return False
        if dtype is None or self.dtypes is None:
            return True
        return E4M3 in self.dtypes if dtype == E4M3 else self.dtypes != (E4M3,)


def tensors_of(args: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments of an op, those in lists included."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, list | tuple):
            yield from tensors_of(arg)


def first_tensor(args: Iterable[Any]) -> Tensor:
    return next(tensors_of(args))


def records_gradient(args: Iterable[Any]) -> bool:
    """Whether autograd records an op on these arguments."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors_of(args))


def carries_tangent(args: Iterable[Any]) -> bool:
    """Whether one of these arguments has a derivative of forward mode."""
    return any(map(has_tangent, tensors_of(args)))
