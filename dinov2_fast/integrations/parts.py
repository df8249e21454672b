"""The forms that the parts of a block have in the libraries, and what computes each from its own submodules.

Names of submodules tell only what a part may be. That a form computes what the part does is shown by `block.py` on
random input; that the part is still what it was then, by its `ModuleSnapshot`.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from dinov2_fast.integrations.changes import ModuleSnapshot, shadowed_methods
from dinov2_fast.integrations.module_ops import (
    Function,
    attend_packed,
    compose,
    has_hooks,
    has_only_recording_hooks,
    hidden_gelu,
    is_identity,
    linear,
)

_CHANGED = "it is not what it was when it was accelerated"
DROPS = "it drops attention weights, or has hooks where it would"


class KnownPart:
    """One form of a part. Its functions take modules of other libraries."""

    submodules: ClassVar[tuple[str, ...]] = ()  # which a module of this form has
    bypassed: ClassVar[tuple[str, ...]] = ()  # those among them whose own code `function` passes over

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return set(cls.submodules) <= module._modules.keys()

    @staticmethod
    def function(module: Any) -> Function:
        """What computes `module` as it is now, with its submodules."""
        raise NotImplementedError

    @classmethod
    def compute(cls, module: Any, x: Tensor) -> Tensor:
        """What `module` gives for `x`."""
        return cls.function(module)(x)

    @staticmethod
    def refuses(module: Any) -> str | None:
        """Why `module` has to be called, as it is now."""
        return None


class AcceleratedPart:
    """A part of a block: its form, if our code can compute it, and what it was when it was accelerated."""

    def __init__(self, module: Any, form: type[KnownPart]) -> None:
        self.form = form
        self._settings = [
            ("", ModuleSnapshot(module)),
            *((name, ModuleSnapshot(getattr(module, name))) for name in form.bypassed),
        ]
        shadowed = [name for _, each in self._each(module) for name in shadowed_methods(each)]
        self._shadowed = f"{', '.join(shadowed)} was set on the instance" if shadowed else None

    def why_called(self, module: Any) -> str | None:
        """Why `module` is to be called, or None if our code computes it."""
        if self._shadowed:
            return self._shadowed
        for settings, each in self._each(module):
            if not settings.matches(each):
                return _CHANGED
            if has_hooks(each) and not has_only_recording_hooks(each):
                return "it has hooks or a forward of its own"
        return self.form.refuses(module)

    def reason(self, module: Any) -> str | None:
        """As :meth:`why_called`, with the names of what changed."""
        why = self.why_called(module)
        return self.change(module) if why is _CHANGED else why

    def change(self, module: Any) -> str | None:
        """What of it is not as it was when it was accelerated."""
        return next((s.change(each) for s, each in self._each(module) if not s.matches(each)), None)

    def _each(self, module: Any) -> list[tuple[ModuleSnapshot, Any]]:
        return [(settings, getattr(module, name, None) if name else module) for name, settings in self._settings]


Kind = TypeVar("Kind", bound=type[KnownPart])


def match_part(module: nn.Module, forms: tuple[Kind, ...]) -> Kind | None:
    """The one of `forms` that `module` has."""
    return next((form for form in forms if form.fits(module)), None)


class Attention(KnownPart):
    @staticmethod
    def dropout(module: Any) -> Any:
        """The probability of dropping an attention weight, or the module that does."""
        raise NotImplementedError

    @staticmethod
    def others(module: Any) -> list[str]:
        """What stands between the linears that DINOv2's attention has not."""
        return []


class PackedAttention(Attention):
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
        if PackedAttention.others(module):
            return "it has parts between its linears"
        return DROPS if drops(PackedAttention.dropout(module), module.training) else None

    @staticmethod
    def others(module: Any) -> list[str]:
        known = ("qkv", "attn_drop", "proj", "proj_drop")
        return [name for name, child in module._modules.items() if name not in known and not is_identity(child)]

    @staticmethod
    def dropout(module: Any) -> Any:
        return getattr(module, "attn_drop", None)


def drops(rate: Any, training: bool) -> bool:
    """Whether dropout of attention weights, a module or a probability, is more than nothing in this mode."""
    if not isinstance(rate, nn.Module):
        return bool(training and rate)
    if is_identity(rate):
        return False
    return type(rate) is not nn.Dropout or has_hooks(rate) or (rate.p > 0 and (training or rate.training))


class PlainMlp(KnownPart):
    """Two linears with an activation in between, and the dropouts that timm and Meta have."""

    submodules = ("fc1", "fc2")
    activations: ClassVar[tuple[str, ...]] = ("act", "activation_fn", "activation")  # the first that is there

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return super().fits(module) and bool(set(PlainMlp.activations) & module._modules.keys())

    @staticmethod
    def function(module: Any) -> Function:
        activation = next(module._modules[name] for name in PlainMlp.activations if name in module._modules)
        return compose(hidden_gelu(module.fc1, activation), *PlainMlp.second(module))

    @staticmethod
    def second(module: Any) -> tuple[Function | None, ...]:
        """What comes after the hidden features."""
        part = module._modules.get
        return part("drop1", part("drop")), part("norm"), linear(module.fc2), part("drop2", part("drop"))


class LayerScale(KnownPart):
    """LayerScale: a factor for each feature, the one parameter."""

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return not module._modules and list(module._parameters) in (["gamma"], ["lambda1"])


class DropPath(KnownPart):
    """Stochastic depth, which multiplies each image's branch by a random number."""

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return not module._modules and not module._parameters and hasattr(module, "drop_prob")


class Norm(KnownPart):
    """A norm; which are computed by our op, `module_ops.is_layer_norm` says."""

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return True
