"""The parts of a block that our ops can compute.

A part is recognised by the names of its submodules, which only suggest what it computes: `block_check.py` tries that
on random input. Projects combine parts of several libraries, so a block may have any of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any, TypeVar

from torch import Tensor, nn

from dinov2_fast.integrations.changes import has_hooks
from dinov2_fast.integrations.module_ops import (
    Function,
    attend,
    attend_packed,
    compose,
    hidden_gelu,
    is_identity,
    linear,
    swiglu,
)


class KnownPart:
    """A part that our ops can compute. Its functions take modules of other libraries."""

    submodules: tuple[str, ...] = ()  # by which the part is recognised
    bypassed: tuple[str, ...] = ()  # those among them whose `forward` is not called

    def fits(self, module: nn.Module) -> bool:
        """Whether `module` may be such a part."""
        return set(self.submodules) <= module._modules.keys()

    def function(self, module: Any) -> Function:
        """The function that computes `module` as it is now."""
        raise NotImplementedError

    def compute(self, module: Any, x: Tensor) -> Tensor:
        return self.function(module)(x)

    def refuses(self, module: Any) -> str | None:
        """Why `module` has to be called as it is now, or None."""
        return None


class KnownAttention(KnownPart):
    """An attention that our ops can compute."""

    def dropout(self, module: Any) -> Any:
        """The probability of dropping an attention weight, or the module that drops."""
        raise NotImplementedError

    def extra_parts(self, module: Any) -> list[str]:
        """The names of submodules that DINOv2's attention does not have."""
        return []

    def refuses_dropout(self, module: Any) -> str | None:
        """A reason if `module` drops attention weights in this mode, or its dropout has hooks; else None."""
        dropout = self.dropout(module)
        if not isinstance(dropout, nn.Module):
            drops = module.training and dropout
        elif type(dropout) is nn.Dropout and not has_hooks(dropout):
            drops = dropout.p > 0 and (module.training or dropout.training)
        else:
            drops = not is_identity(dropout)
        return "it drops attention weights, or its attention dropout has hooks" if drops else None


class PackedAttention(KnownAttention):
    """One linear for queries, keys and values: timm's and Meta's."""

    submodules = ("qkv", "proj")

    def fits(self, module: nn.Module) -> bool:
        return super().fits(module) and hasattr(module, "num_heads")

    def function(self, module: Any) -> Function:
        num_heads, drop = module.num_heads, module._modules.get("proj_drop")
        return compose(linear(module.qkv), lambda qkv: attend_packed(qkv, num_heads), linear(module.proj), drop)

    def refuses(self, module: Any) -> str | None:
        if not getattr(module, "fused_attn", True):
            return "fused_attn is off"
        extra = self.extra_parts(module)
        if extra:
            return f"it has {' and '.join(extra)}"
        return self.refuses_dropout(module)

    def extra_parts(self, module: Any) -> list[str]:
        known = ("qkv", "attn_drop", "proj", "proj_drop")
        return [name for name, child in module._modules.items() if name not in known and not is_identity(child)]

    def dropout(self, module: Any) -> Any:
        return getattr(module, "attn_drop", None)


class SeparateAttention(KnownAttention):
    """One linear each for queries, keys, values and output, in one module: newer versions of transformers."""

    submodules = ("q_proj", "k_proj", "v_proj")

    def fits(self, module: nn.Module) -> bool:
        output = {"o_proj", "out_proj"} & module._modules.keys()
        return super().fits(module) and len(output) == 1 and hasattr(module, "config")

    def function(self, module: Any) -> Function:
        num_heads = module.__dict__.get("num_heads") or module.num_attention_heads
        out = module.o_proj if "o_proj" in module._modules else module.out_proj
        return compose(_attention(module.q_proj, module.k_proj, module.v_proj, num_heads), linear(out))

    def refuses(self, module: Any) -> str | None:
        # sdpa returns no weights, so hooks that record them get none; other implementations return them.
        implementation = module.config._attn_implementation
        if implementation != "sdpa":
            return f"its attention implementation is {implementation}"
        return self.refuses_dropout(module)

    def dropout(self, module: Any) -> Any:
        names = ("dropout_prob", "attention_dropout", "dropout")
        return next((module.__dict__[name] for name in names if name in module.__dict__), None)


class NestedAttention(KnownAttention):
    """As :class:`SeparateAttention`, in two modules, `attention` and `output`: older versions of transformers."""

    submodules = bypassed = ("attention", "output")
    _inner = SeparateAttention()

    def fits(self, module: Any) -> bool:
        return super().fits(module) and {"query", "key", "value"} <= module.attention._modules.keys()

    def function(self, module: Any) -> Function:
        inner, output = module.attention, module.output
        attention = _attention(inner.query, inner.key, inner.value, inner.num_attention_heads)
        return compose(attention, linear(output.dense), output.dropout)

    def refuses(self, module: Any) -> str | None:
        return self._inner.refuses(module.attention)

    def dropout(self, module: Any) -> Any:
        return self._inner.dropout(module.attention)


def _attention(query: nn.Module, key: nn.Module, value: nn.Module, num_heads: int) -> Function:
    q, k, v = map(linear, (query, key, value))
    return lambda x: attend(q(x), k(x), v(x), num_heads)


class PlainMlp(KnownPart):
    """Two linears with an activation in between, and the dropouts of timm and Meta."""

    submodules = ("fc1", "fc2")
    activation_names = ("act", "activation_fn", "activation")

    def fits(self, module: nn.Module) -> bool:
        gated = hasattr(module, "gate_last")  # timm's `GluMlp`
        return super().fits(module) and not gated and bool(set(self.activation_names) & module._modules.keys())

    def function(self, module: Any) -> Function:
        activation = next(module._modules[name] for name in self.activation_names if name in module._modules)
        return compose(hidden_gelu(module.fc1, activation), *_after_activation(module))


class GatedMlp(KnownPart):
    """timm's `GluMlp`, where its gate makes it a SwiGLU."""

    submodules = ("fc1", "act", "drop1", "norm", "fc2", "drop2")

    def fits(self, module: nn.Module) -> bool:
        return super().fits(module) and hasattr(module, "gate_last")

    def function(self, module: Any) -> Function:
        return compose(linear(module.fc1), swiglu, *_after_activation(module))

    def refuses(self, module: Any) -> str | None:
        is_swiglu = not module.gate_last and type(module.act) is nn.SiLU and not has_hooks(module.act)
        return None if is_swiglu else "its gate is not that of SwiGLU"


def _after_activation(module: Any) -> tuple[Function | None, ...]:
    """What an MLP applies to the hidden features."""
    part = module._modules.get
    return part("drop1", part("drop")), part("norm"), linear(module.fc2), part("drop2", part("drop"))


class PackedSwiGLU(KnownPart):
    """SwiGLU with one linear for gate and value: Meta's, and older versions of transformers."""

    def __init__(self, *submodules: str) -> None:
        self.submodules = submodules

    def function(self, module: Any) -> Function:
        packed, out = self.submodules
        return compose(linear(getattr(module, packed)), swiglu, linear(getattr(module, out)))


class SeparateSwiGLU(KnownPart):
    """SwiGLU with linears for gate and value: newer transformers. Our op, which reads both packed, does not fit."""

    submodules = ("gate_proj", "up_proj", "down_proj", "act_fn")

    def function(self, module: Any) -> Function:
        gate, activation, up = linear(module.gate_proj), module.act_fn, linear(module.up_proj)
        return compose(lambda x: activation(gate(x)) * up(x), linear(module.down_proj))


class LayerScale(KnownPart):
    """A factor for each feature, its only parameter."""

    def fits(self, module: nn.Module) -> bool:
        return not module._modules and list(module._parameters) in (["gamma"], ["lambda1"])


class DropPath(KnownPart):
    """Stochastic depth: it multiplies each image's branch by a random number."""

    def fits(self, module: nn.Module) -> bool:
        return not module._modules and not module._parameters and hasattr(module, "drop_prob")


class Norm(KnownPart):
    """Any norm; `is_layer_norm` of `module_ops.py` says which ones our op computes."""


# What the parts of a block are called and may be. Pairs of names are for its two branches.
_ATTENTION_NAMES = ("attention", "attn")
_SCALE_NAMES = (("layer_scale1", "layer_scale2"), ("ls1", "ls2"))
_DROP_PATH_NAMES = (("drop_path", "drop_path"), ("drop_path1", "drop_path2"))
PART_NAMES = {"norm1", "norm2", "mlp", *_ATTENTION_NAMES, *chain(*_SCALE_NAMES, *_DROP_PATH_NAMES)}
ATTENTIONS: tuple[KnownAttention, ...] = (NestedAttention(), SeparateAttention(), PackedAttention())
MLPS: tuple[KnownPart, ...] = (
    PlainMlp(),
    PackedSwiGLU("weights_in", "weights_out"),
    SeparateSwiGLU(),
    PackedSwiGLU("w12", "w3"),
    GatedMlp(),
)


def attention_name(block: nn.Module) -> str:
    """The name of the attention of `block`, or "" unless it has exactly one."""
    found = [name for name in _ATTENTION_NAMES if name in block._modules]
    return found[0] if len(found) == 1 else ""


def scale_names(block: nn.Module) -> tuple[str | None, str | None]:
    """The names of LayerScale in the two branches of `block`, or None."""
    return _first_present(block, _SCALE_NAMES)


def drop_path_names(block: nn.Module) -> tuple[str | None, str | None]:
    """The names of stochastic depth in the two branches of `block`, or None."""
    return _first_present(block, _DROP_PATH_NAMES)


def _first_present(block: nn.Module, pairs: Iterable[tuple[str, str]]) -> tuple[str | None, str | None]:
    return next((pair for pair in pairs if block._modules.keys() >= set(pair)), (None, None))


def known_branches(block: nn.Module) -> dict[str, KnownPart | None]:
    """The known part that the attention of `block` fits, and that of its MLP, by their names; None for no such part."""
    name = attention_name(block)
    return {name: match_part(getattr(block, name), ATTENTIONS), "mlp": match_part(block.mlp, MLPS)}


def known_parts(block: nn.Module) -> dict[str, KnownPart]:
    """The known parts that modules of `block` fit, by the names of the modules."""
    parts = known_branches(block) | {"norm1": Norm(), "norm2": Norm()}
    parts |= {name: match_part(getattr(block, name), [LayerScale()]) for name in scale_names(block) if name}
    parts |= {name: match_part(getattr(block, name), [DropPath()]) for name in drop_path_names(block) if name}
    return {name: part for name, part in parts.items() if part is not None}


Known = TypeVar("Known", bound=KnownPart)


def match_part(module: Any, candidates: Iterable[Known]) -> Known | None:
    """The first of `candidates` that `module` may be, or None."""
    return next((known for known in candidates if known.fits(module)), None)
