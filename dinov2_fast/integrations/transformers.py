"""The blocks and backbones of transformers: `Dinov2*`, `Dinov2WithRegisters*`, and layers of other models like them."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from dinov2_fast import huggingface
from dinov2_fast.integrations.backbone import AcceleratedBackbone
from dinov2_fast.integrations.block import AcceleratedBlock
from dinov2_fast.integrations.module_ops import Function, attend, compose, linear, swiglu
from dinov2_fast.integrations.parts import DROPS_WEIGHTS, KnownAttention, KnownPart


class SeparateAttention(KnownAttention):
    """One linear each for queries, keys, values and output, in one module: newer versions."""

    submodules = ("q_proj", "k_proj", "v_proj")

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        output = {"o_proj", "out_proj"} & module._modules.keys()
        return super().fits(module) and len(output) == 1 and hasattr(module, "config")

    @staticmethod
    def function(module: Any) -> Function:
        num_heads = module.__dict__.get("num_heads") or module.num_attention_heads
        out = module.o_proj if "o_proj" in module._modules else module.out_proj
        return compose(_attention(module.q_proj, module.k_proj, module.v_proj, num_heads), linear(out))

    @staticmethod
    def refuses(module: Any) -> str | None:
        # sdpa returns no weights, so hooks that record them get none; other implementations return them.
        implementation = module.config._attn_implementation
        if implementation != "sdpa":
            return f"its attention implementation is {implementation}"
        return DROPS_WEIGHTS if module.training and SeparateAttention.dropout(module) else None

    @staticmethod
    def dropout(module: Any) -> Any:
        names = ("dropout_prob", "attention_dropout", "dropout")
        return next((module.__dict__[name] for name in names if name in module.__dict__), None)


class NestedAttention(KnownAttention):
    """As :class:`SeparateAttention`, in two modules, `attention` and `output`: older versions."""

    submodules = bypassed = ("attention", "output")

    @classmethod
    def fits(cls, module: Any) -> bool:
        return super().fits(module) and {"query", "key", "value"} <= module.attention._modules.keys()

    @staticmethod
    def function(module: Any) -> Function:
        inner, output = module.attention, module.output
        attention = _attention(inner.query, inner.key, inner.value, inner.num_attention_heads)
        return compose(attention, linear(output.dense), output.dropout)

    @staticmethod
    def refuses(module: Any) -> str | None:
        return SeparateAttention.refuses(module.attention)

    @staticmethod
    def dropout(module: Any) -> Any:
        return SeparateAttention.dropout(module.attention)


def _attention(query: nn.Module, key: nn.Module, value: nn.Module, num_heads: int) -> Function:
    q, k, v = map(linear, (query, key, value))
    return lambda x: attend(q(x), k(x), v(x), num_heads)


class PackedSwiGLU(KnownPart):
    """SwiGLU with one linear for gate and value: older versions."""

    submodules = ("weights_in", "weights_out")

    @staticmethod
    def function(module: Any) -> Function:
        return compose(linear(module.weights_in), swiglu, linear(module.weights_out))


class SeparateSwiGLU(KnownPart):
    """SwiGLU with two linears, for gate and value: newer versions. Our op, which reads both packed, does not fit."""

    submodules = ("gate_proj", "up_proj", "down_proj", "act_fn")

    @staticmethod
    def function(module: Any) -> Function:
        gate, activation, up = linear(module.gate_proj), module.act_fn, linear(module.up_proj)
        return compose(lambda x: activation(gate(x)) * up(x), linear(module.down_proj))


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
