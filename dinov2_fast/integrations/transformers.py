"""The blocks and backbones of transformers: `Dinov2*`, `Dinov2WithRegisters*`, and layers of other models like them."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from dinov2_fast import huggingface
from dinov2_fast.integrations.backbone import AcceleratedBackbone
from dinov2_fast.integrations.block import AcceleratedBlock


class TransformersBlock(AcceleratedBlock):
    """`Dinov2Layer` and the like."""

    # They are for the whole model, which passes them on to its blocks.
    ignored_arguments = frozenset({"output_attentions", "output_hidden_states", "return_dict", "num_items_in_batch"})


class TransformersBackbone(AcceleratedBackbone):
    """`Dinov2Model`, `Dinov2Backbone`, and the same two with registers."""

    config: Any
    compared_calls = (("forward", {}),)

    @staticmethod
    def make_model(backbone: Any, weights: dict[str, Tensor]) -> nn.Module:
        return getattr(huggingface, type(backbone).__name__)(backbone.config)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        others = dict(kwargs)
        return_dict = others.pop("return_dict", None)
        x = args[0] if args else others.pop("pixel_values", None)
        wants_more = self._wants_more_than_features(return_dict)
        outputs = self.answer("forward", lambda engine: engine(x), (x, *args[1:]), *others.values(), wants_more)
        if outputs is None:
            return super().forward(*args, **kwargs)
        library = sys.modules[self.class_swap.original.__module__]
        output = library.BackboneOutput if "Backbone" in type(self).__name__ else library.BaseModelOutputWithPooling
        return output(**outputs)

    def _wants_more_than_features(self, return_dict: bool | None) -> bool:
        """Whether the call or the config asks for a tuple, hidden states or attentions."""
        config = self.config
        if getattr(config, "output_hidden_states", False) or getattr(config, "output_attentions", False):
            return True
        return not (getattr(config, "return_dict", True) if return_dict is None else return_dict)
