"""One way to compute an op: its function, the backend it belongs to, and the inputs that it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinov2_fast.ops._fp8 import E4M3
from dinov2_fast.torch_private import has_tangent

_DTYPE_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    E4M3: "e4m3",
}


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Refusals are the ends of sentences that begin with the backend's name. Users read them in errors, in warnings and in
    the output of ``dinov2-fast info``.

    Args:
        backend: the name of the backend.
        function: takes the arguments of the op, in the order in which the op's public function passes them on.
        refuses: takes the same arguments and returns why it cannot run them, or None. It looks at sizes and options,
            never at data.
        devices: the types of devices that it is made for; None for any. On other devices it is passed over, with a
            warning only if a setting names it.
        dtypes: the dtypes of the first tensor that it takes; None for any. An op on e4m3 tensors has candidates of its
            own: the implementations that take e4m3. One that takes e4m3 alone is not a candidate for other dtypes.
        forms: the forms of the op that it computes; None for all.
        has_backward: whether it can be differentiated.
        refuses_device: returns why it cannot run on a device of this machine, or None.
        can_force_on: whether it can run, if it is named, on a device that it is not made for.
        why: why it is preferred to those after it, for users.
    """

    backend: str
    function: Callable[..., Any]
    refuses: Callable[..., str | None] | None = None
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    forms: tuple[str, ...] | None = None
    has_backward: bool = True
    refuses_device: Callable[[torch.device], str | None] = lambda device: None
    can_force_on: Callable[[torch.device], bool] = lambda device: False
    why: str = ""

    def refusal(self, args: tuple[Any, ...], forced: bool = False) -> str | None:
        """Why it cannot run the op on these arguments, or None."""
        x = first_tensor(args)
        reason = self.refusal_of_kind(x.device, x.dtype, records_gradient(args), forced)
        return reason or (self.refuses(*args) if self.refuses is not None else None)

    def refusal_of_kind(
        self, device: torch.device, dtype: torch.dtype, recorded: bool, forced: bool = False
    ) -> str | None:
        """Why it can run no arguments on this device and of this dtype, or None.

        `recorded` says whether autograd records the call, `forced` whether this implementation was named.
        """
        if not self.is_for(device) and not (forced and self.can_force_on(device)):
            return f"needs a {' or '.join(self.devices or ())} tensor, got one on {device.type}"
        if not self.has_backward and recorded:
            return "is for inference only, and gradients are recorded"
        if self.dtypes is not None and dtype not in self.dtypes:
            *others, last = (_DTYPE_NAMES.get(known, str(known)) for known in self.dtypes)
            return f"takes {', '.join(others)}{' and ' if others else ''}{last}, got {dtype}"
        return self.refuses_device(device)

    def is_for(self, device: torch.device) -> bool:
        """Whether it is made for this type of device."""
        return self.devices is None or device.type in self.devices

    def is_candidate(self, form: str, dtype: torch.dtype | None = None) -> bool:
        """Whether it computes a form of the op, and if `dtype` is given, whether it is a candidate for that dtype."""
        if self.forms is not None and form not in self.forms:
            return False
        if dtype is None or self.dtypes is None:
            return True
        return E4M3 in self.dtypes if dtype == E4M3 else self.dtypes != (E4M3,)


def tensors_of(args: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments of an op, including those in lists."""
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
    """Whether one of these arguments carries a forward-mode derivative."""
    return any(map(has_tangent, tensors_of(args)))
