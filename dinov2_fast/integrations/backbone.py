"""Backbones of other libraries whose plain calls an engine answers, through their own `forward`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dinov2_fast.integrations.class_swap import STATE_ATTRIBUTE, SwappedModule
from dinov2_fast.torch_private import is_jit_traced


class AcceleratedBackbone(SwappedModule):
    """One backbone. The static methods take one that is not accelerated yet."""

    compared_calls: ClassVar[
        tuple[tuple[str, dict[str, Any]], ...]
    ]  # the methods that an engine can answer, and arguments

    @staticmethod
    def fixed_image_size(backbone: Any) -> tuple[int, int] | None:
        """Height and width of the images that a backbone takes, None for any."""
        return None

    @staticmethod
    def refuses(backbone: Any) -> str | None:
        """Why a backbone of this class is none that our model computes, or None."""
        return None

    @staticmethod
    def make(backbone: Any, weights: dict[str, Tensor]) -> nn.Module:
        """Our model of the same settings."""
        raise NotImplementedError

    @property
    def attached_engine(self) -> Any:
        return self.__dict__[STATE_ATTRIBUTE]

    def answer(self, method: str, ask: Callable[[Any], Any], x: Any, *others: Any) -> Any:
        """What `ask` gets from the engine, in the dtype of this backbone.

        None where a call of `method` with images `x`, and `others`, is none that an engine answers.
        """
        if self.training or torch.compiler.is_compiling() or is_jit_traced():
            return None
        if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point() or x.requires_grad:
            return None
        if any(other is not None and other is not False for other in others):
            return None
        outputs = self.attached_engine.answer(self, method, ask, x.device)
        return None if outputs is None else self._in_own_dtype(outputs)

    def _in_own_dtype(self, outputs: Any) -> Any:
        """Tensors, in tuples, lists and dictionaries too, in the dtype of this backbone's parameters."""
        if isinstance(outputs, dict):
            return {name: self._in_own_dtype(output) for name, output in outputs.items()}
        if isinstance(outputs, tuple | list):
            return type(outputs)(map(self._in_own_dtype, outputs))
        dtype = next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())
        return outputs.to(dtype) if isinstance(outputs, Tensor) else outputs


def is_whole_patches(x: Tensor, patch_size: tuple[int, int]) -> bool:
    """Whether images are whole patches, at least one."""
    return all(size >= patch and size % patch == 0 for size, patch in zip(x.shape[-2:], patch_size, strict=True))
