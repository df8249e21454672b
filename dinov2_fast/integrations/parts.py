"""The parts of a block that our ops can compute, and what watches such a part once its block is accelerated.

A part is recognised by the names of its submodules, which only suggest what it computes: `block_check.py` tries that
on random input. Later changes are noticed by a `ModuleSnapshot`. Here are the parts that several libraries have; those
of one library are in its own file.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple, TypeVar

from torch import Tensor, nn

from dinov2_fast.integrations.changes import ModuleSnapshot, has_hooks, shadowed_methods
from dinov2_fast.integrations.module_ops import Function, attend_packed, compose, hidden_gelu, is_identity, linear

DROPS_WEIGHTS = "it drops attention weights, or its attention dropout has hooks"


class KnownPart:
    """A part that our ops can compute. Its functions take modules of other libraries."""

    submodules: ClassVar[tuple[str, ...]] = ()  # by which the part is recognised
    bypassed: ClassVar[tuple[str, ...]] = ()  # those among them whose `forward` is not called

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether `module` may be such a part."""
        return set(cls.submodules) <= module._modules.keys()

    @staticmethod
    def function(module: Any) -> Function:
        """The function that computes `module` as it is now."""
        raise NotImplementedError

    @classmethod
    def compute(cls, module: Any, x: Tensor) -> Tensor:
        return cls.function(module)(x)

    @staticmethod
    def refuses(module: Any) -> str | None:
        """Why `module` has to be called as it is now, or None."""
        return None


class KnownAttention(KnownPart):
    """An attention that our ops can compute."""

    @staticmethod
    def dropout(module: Any) -> Any:
        """The probability of dropping an attention weight, or the module that drops."""
        raise NotImplementedError

    @staticmethod
    def extra_parts(module: Any) -> list[str]:
        """The names of submodules that DINOv2's attention does not have."""
        return []


class BlockSpec(NamedTuple):
    """What the parts of a block are called and may be. Fields list alternatives; names in pairs are for both branches.

    All blocks have `norm1`, `norm2` and `mlp`.
    """

    attention_names: tuple[str, ...]
    scale_names: tuple[tuple[str, str], ...]
    drop_path_names: tuple[tuple[str, str], ...]
    attentions: tuple[type[KnownAttention], ...]
    mlps: tuple[type[KnownPart], ...]

    def part_names(self) -> set[str]:
        """The names that parts of a block may have."""
        pairs = (*self.scale_names, *self.drop_path_names)
        return {"norm1", "norm2", "mlp", *self.attention_names, *(name for pair in pairs for name in pair)}

    def attention_name(self, block: nn.Module) -> str:
        """The name of the attention of `block`, or "" unless it has exactly one."""
        found = [name for name in self.attention_names if name in block._modules]
        return found[0] if len(found) == 1 else ""

    def branches(self, block: nn.Module) -> dict[str, tuple[type[KnownPart], ...]]:
        """The names of the attention and the MLP of `block`, and what they may be."""
        return {self.attention_name(block): self.attentions, "mlp": self.mlps}


class AcceleratedPart:
    """A part of an accelerated block: what computes it, and what it was when the block was accelerated."""

    def __init__(self, module: Any, known: type[KnownPart]) -> None:
        self.known = known
        bypassed = [(name, ModuleSnapshot(getattr(module, name))) for name in known.bypassed]
        self._snapshots = [("", ModuleSnapshot(module)), *bypassed]
        shadowed = [name for _, each in self._modules_of(module) for name in shadowed_methods(each)]
        self._shadowed = f"methods were set on the instance: {', '.join(shadowed)}" if shadowed else None

    def why_called(self, module: Any) -> str | None:
        """Why `module` has to be called, or None if our ops compute it."""
        if self._shadowed:
            return self._shadowed
        for snapshot, each in self._modules_of(module):
            if not snapshot.matches(each):
                return "it was changed after it was accelerated"
            if has_hooks(each, except_recording=True):
                return "it has hooks, or a forward was set on the instance"
        return self.known.refuses(module)

    def change(self, module: Any) -> str | None:
        """What was changed since the block was accelerated, or None."""
        changed = (snapshot.change(each) for snapshot, each in self._modules_of(module) if not snapshot.matches(each))
        return next(changed, None)

    def _modules_of(self, module: Any) -> list[tuple[ModuleSnapshot, Any]]:
        return [(snapshot, getattr(module, name, None) if name else module) for name, snapshot in self._snapshots]


Known = TypeVar("Known", bound=type[KnownPart])


def match_part(module: nn.Module, candidates: Iterable[Known]) -> Known | None:
    """The first of `candidates` that `module` may be, or None."""
    return next((known for known in candidates if known.fits(module)), None)


def drops_weights(dropout: Any, training: bool) -> bool:
    """Whether a dropout of attention weights, a module or a probability, drops any in this mode or has hooks."""
    if not isinstance(dropout, nn.Module):
        return bool(training and dropout)
    if is_identity(dropout):
        return False
    if type(dropout) is not nn.Dropout or has_hooks(dropout):
        return True
    return dropout.p > 0 and (training or dropout.training)


class PackedAttention(KnownAttention):
    """One linear for queries, keys and values: timm's and Meta's."""

    submodules = ("qkv", "proj")

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return super().fits(module) and hasattr(module, "num_heads")

    @staticmethod
    def function(module: Any) -> Function:
        num_heads, drop = module.num_heads, module._modules.get("proj_drop")
        return compose(linear(module.qkv), lambda qkv: attend_packed(qkv, num_heads), linear(module.proj), drop)

    @staticmethod
    def refuses(module: Any) -> str | None:
        if not getattr(module, "fused_attn", True):
            return "fused_attn is off"
        extra = PackedAttention.extra_parts(module)
        if extra:
            return f"it has {' and '.join(extra)}"
        return DROPS_WEIGHTS if drops_weights(PackedAttention.dropout(module), module.training) else None

    @staticmethod
    def extra_parts(module: Any) -> list[str]:
        known = ("qkv", "attn_drop", "proj", "proj_drop")
        return [name for name, child in module._modules.items() if name not in known and not is_identity(child)]

    @staticmethod
    def dropout(module: Any) -> Any:
        return getattr(module, "attn_drop", None)


class PlainMlp(KnownPart):
    """Two linears with an activation in between, and the dropouts of timm and Meta."""

    submodules = ("fc1", "fc2")
    activation_names: ClassVar[tuple[str, ...]] = ("act", "activation_fn", "activation")

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        gated = hasattr(module, "gate_last")  # timm's `GluMlp`
        return super().fits(module) and not gated and bool(set(cls.activation_names) & module._modules.keys())

    @staticmethod
    def function(module: Any) -> Function:
        activation = next(module._modules[name] for name in PlainMlp.activation_names if name in module._modules)
        return compose(hidden_gelu(module.fc1, activation), *PlainMlp.after_activation(module))

    @staticmethod
    def after_activation(module: Any) -> tuple[Function | None, ...]:
        """What is applied to the hidden features."""
        part = module._modules.get
        return part("drop1", part("drop")), part("norm"), linear(module.fc2), part("drop2", part("drop"))


class LayerScale(KnownPart):
    """A factor for each feature, its only parameter."""

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return not module._modules and list(module._parameters) in (["gamma"], ["lambda1"])


class DropPath(KnownPart):
    """Stochastic depth: it multiplies each image's branch by a random number."""

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return not module._modules and not module._parameters and hasattr(module, "drop_prob")


class Norm(KnownPart):
    """Any norm; `module_ops.is_layer_norm` says which ones our op computes."""

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return True
