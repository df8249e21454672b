"""Finds the ops of a call for which the host waits for the device: a CUDA graph of it cannot be captured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dinov2_fast.torch_private import TorchDispatchMode, pytree

_aten = torch.ops.aten
TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # the host reads the result, or its size
UNTAGGED = {
    _aten._linalg_check_errors.default,
    _aten.lift_fresh.default,  # of a tensor on the device: torch.tensor has copied numbers of Python's to it
}
COPIES = {_aten._to_copy.default, _aten.copy_.default, _aten.copy.default}
GATHERS = {_aten.index.Tensor}
SCATTERS = {_aten.index_put.default, _aten.index_put_.default}


class NoWaiting(TorchDispatchMode):
    """Raises a `RuntimeError` where an op inside waits for `device`; ops on other devices may do anything.

    That is so for ops that torch tags as such, for masks as indices, which are counted first, and for copies from or to
    another device, also of the indices of an op. Kernels take a CPU tensor without dimensions as a number, so ops other
    than copies may have one. Not seen is what waits without an op of torch's: another library, an event, and the index
    ``x[[0, 1]]``, whose numbers torch copies to the device out of sight.
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
    """Whether the host reads what an op computed."""
    if func in GATHERS:
        return _has_mask(args[1])
    if func in SCATTERS:  # a number goes to what a mask selects without counting
        return _has_mask(args[1]) and (args[2].ndim > 0 or args[2].device.type != "cpu")
    return func in UNTAGGED or not TAGS.isdisjoint(func.tags)


def _has_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
