"""A backbone of another library whose plain calls an engine answers, through its own `forward`.

A backbone is the model from images to features: what a vision-language model calls its vision tower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dinov2_fast.integrations.class_swap import STATE_ATTRIBUTE, SwappedModule
from dinov2_fast.torch_private import is_jit_traced


class AcceleratedBackbone(SwappedModule):
    """One backbone. The static methods take a backbone that is not accelerated yet."""

    # The methods that an engine can answer, each with the arguments of calls that are compared beforehand.
    compared_calls: ClassVar[tuple[tuple[str, dict[str, Any]], ...]]
    head_keys: ClassVar[tuple[str, ...]] = ()  # prefixes of the keys of weights that belong to a head

    @staticmethod
    def fixed_image_size(backbone: Any) -> tuple[int, int] | None:
        """Height and width of the images if the backbone takes only one size, or None."""
        return None

    @staticmethod
    def refuses(backbone: Any) -> str | None:
        """Why our model cannot compute a backbone of this class, or None."""
        return None

    @staticmethod
    def make_model(backbone: Any, weights: dict[str, Tensor]) -> nn.Module:
        """Our model with the settings of `backbone`."""
        raise NotImplementedError

    @property
    def attached_engine(self) -> Any:
        """Its `AttachedEngine`."""
        return self.__dict__[STATE_ATTRIBUTE]

    def takes(self, images: Tensor) -> bool:
        """Whether the backbone computes images of this size as they are. It refuses or pads images of other sizes."""
        return True

    def answer(self, method: str, ask: Callable[[Any], Any], args: tuple[Any, ...], *others: Any) -> Any:
        """The engine's outputs for a call of `method`, in the dtype of this backbone; None if it does not answer it.

        `ask` calls the engine that it is given. `args` begin with the images; all others have to be None or False.
        """
        x, *more = args or (None,)
        if self.training or torch.compiler.is_compiling() or is_jit_traced():
            return None
        if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point() or x.requires_grad:
            return None
        if any(other is not None and other is not False for other in (*more, *others)) or not self.takes(x):
            return None
        outputs = self.attached_engine.answer(self, method, ask, x.device)
        return None if outputs is None else self._in_own_dtype(outputs)

    def _in_own_dtype(self, outputs: Any) -> Any:
        """The tensors, also in tuples, lists and dictionaries, in the dtype of this backbone's parameters."""
        if isinstance(outputs, dict):
            return {name: self._in_own_dtype(output) for name, output in outputs.items()}
        if isinstance(outputs, tuple | list):
            return type(outputs)(map(self._in_own_dtype, outputs))
        dtype = next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())
        return outputs.to(dtype) if isinstance(outputs, Tensor) else outputs


def are_whole_patches(images: Tensor, patch_size: tuple[int, int]) -> bool:
    """Whether height and width of `images` are multiples of the patch size."""
    return all(size >= patch and size % patch == 0 for size, patch in zip(images.shape[-2:], patch_size, strict=True))
