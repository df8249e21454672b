"""Notices that a model's weights are no longer those it had."""

from __future__ import annotations

from torch import Tensor, nn


class Watch:
    """Remembers the parameters, buffers and submodules of a model.

    A tensor counts as changed if another object stands in its place (surgery), if its data lie elsewhere
    (``load_state_dict(assign=True)``, ``.to``), or if its version moved (an optimizer's step, `load_state_dict`, any
    write in place under autograd's eyes). A write through ``.data`` leaves no trace. No value is looked at.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._children = [(m._modules, name, child) for m in modules for name, child in m._modules.items()]
        self._tensors = [
            (slots, name, tensor, tensor.data_ptr(), _version(tensor))
            for module in modules
            for slots in (module._parameters, module._buffers)
            for name, tensor in slots.items()
            if tensor is not None
        ]

    def changed(self) -> bool:
        """Whether anything is not what it was."""
        for slots, name, child in self._children:
            if slots.get(name) is not child:
                return True
        for tensors, name, tensor, pointer, version in self._tensors:
            if tensors.get(name) is not tensor or tensor.data_ptr() != pointer or _version(tensor) != version:
                return True
        return False


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # tensors made in inference mode count no versions
