"""Finds ops that make the host wait for the device. A call with such ops cannot be captured as a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dinov2_fast.torch_private import TorchDispatchMode, pytree

_aten = torch.ops.aten
TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # the host reads the result or its size
UNTAGGED = {
    _aten._linalg_check_errors.default,
    _aten.lift_fresh.default,  # for a tensor on the device: torch.tensor has just copied Python numbers to it
}
COPIES = {_aten._to_copy.default, _aten.copy_.default, _aten.copy.default}
GATHERS = {_aten.index.Tensor}
SCATTERS = {_aten.index_put.default, _aten.index_put_.default}


class ForbidDeviceSync(TorchDispatchMode):
    """Raises a `RuntimeError` where an op inside the context makes the host wait for `device`.

    Such ops are those that torch tags as data-dependent, those with a mask as index (torch counts its elements first),
    and copies from or to another device, including copies of the indices of an op. A CPU tensor without dimensions is
    passed to kernels as a number, so ops other than copies may take one. Ops on other devices are ignored.

    Not found are waits outside torch's ops: in another library, for an event, and in the index ``x[[0, 1]]``, whose
    numbers torch copies to the device before any op is dispatched.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device.type

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        tensors = [x for x in pytree.tree_leaves((args, kwargs, output)) if isinstance(x, Tensor)]
        others = [x for x in tensors if x.device.type != self._device]
        if len(others) == len(tensors):
            return output
        copied = bool(others) if func in COPIES else any(x.ndim for x in others)
        if copied or _reads(func, args):
            raise RuntimeError(f"{func} makes the host wait for the device")
        return output


def _reads(func: Any, args: Any) -> bool:
    """Whether the host reads the result of an op."""
    if func in GATHERS:
        return _has_mask(args[1])
    if func in SCATTERS:  # with a number as value, a mask is not counted
        return _has_mask(args[1]) and (args[2].ndim > 0 or args[2].device.type != "cpu")
    return func in UNTAGGED or not TAGS.isdisjoint(func.tags)


def _has_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
