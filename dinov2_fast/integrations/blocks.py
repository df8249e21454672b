"""Blocks of other libraries that compute with this package's ops, on their own modules and parameters.

What a call asks for beyond a plain forward pass runs in the block's own code; so does its attention where the user
chose another implementation than torch's, or somebody looks on.
"""

from __future__ import annotations

import inspect
import re
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from dinov2_fast import ops
from dinov2_fast.integrations.joining import Joined, has_own_forward, join
from dinov2_fast.integrations.steps import (
    attend,
    attend_packed,
    drop_scale,
    hidden_gelu,
    is_layer_norm,
    is_nothing,
    is_watched,
    linear,
    normalise,
)

_CAPTURING = "transformers.utils.output_capturing"  # of the hooks with which transformers 5 records outputs
_NOTHING = nn.Identity()
_SUBSET_THRESHOLD = 0.1  # above this rate Meta's block computes a branch for a subset of the pictures only

Parts = dict[str, tuple[nn.Module, tuple[str, ...]]]  # role -> module, full names of the classes known to have it
NEEDED = ("attention", "self_attention", "mlp")  # roles in which a block must have known classes to be taken


class AcceleratedBlock(Joined):
    """One block: ``x + scale1(attention(norm1(x)))``, then ``x + scale2(mlp(norm2(x)))``, with stochastic depth."""

    norm1: Any
    norm2: Any
    mlp: Any
    gamma_name: ClassVar[str] = "gamma"
    irrelevant: ClassVar[frozenset[str]] = frozenset()  # keyword arguments that change nothing in a block

    # What each library's blocks say. The static methods take a block that is not accelerated yet.

    @staticmethod
    def parts_of(block: Any) -> Parts:
        raise NotImplementedError

    @staticmethod
    def attention_dropout(block: Any) -> float:
        """The probability of dropping an attention weight in training."""
        raise NotImplementedError

    @staticmethod
    def refuses(block: Any) -> str | None:
        """Why a block whose parts are known cannot be taken all the same, or None."""
        return None

    def declines(self, x: Any) -> bool:
        """Whether a call with `x` is for the block's own code."""
        return not isinstance(x, Tensor) or x.ndim != 3 or (self.training and self.attention_dropout(self) > 0)

    def attention_branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def mlp_branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def scales(self) -> tuple[nn.Module, nn.Module]:
        """LayerScale of the two branches."""
        raise NotImplementedError

    def drop_paths(self) -> tuple[nn.Module, nn.Module]:
        """Stochastic depth of the two branches."""
        raise NotImplementedError

    # What is the same for all

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        others = (*args[1:], *(value for name, value in kwargs.items() if name not in self.irrelevant))
        if not args or self.declines(args[0]) or any(other is not None and other is not False for other in others):
            return super().forward(*args, **kwargs)  # of the block's own class
        x: Tensor = args[0]
        (scale1, scale2), (drop1, drop2) = self.scales(), self.drop_paths()
        x, y = self._add_and_norm(x, self.attention_branch(normalise(self.norm1, x)), scale1, drop1)
        return self._add(x, self.mlp_branch(y), scale2, drop2)

    def is_known(self, module: nn.Module, role: str) -> bool:
        """Whether `module` is of the class that had this role when the block was accelerated, and nobody looks on."""
        return type(module) is self.kinds.get(role) and not is_watched(module)

    def _add_and_norm(self, x: Tensor, branch: Tensor, scale: nn.Module, drop_path: nn.Module) -> tuple[Tensor, Tensor]:
        norm = self.norm2
        if self._foldable(scale, drop_path) and is_layer_norm(norm) and not is_watched(norm):
            gamma = self._gamma(scale)
            drop = drop_scale(drop_path, branch, gamma)
            return ops.add_layer_norm(x, branch, gamma, drop, norm.weight, norm.bias, norm.eps)
        x = self._add(x, branch, scale, drop_path)
        return x, norm(x)

    def _add(self, x: Tensor, branch: Tensor, scale: nn.Module, drop_path: nn.Module) -> Tensor:
        if not self._foldable(scale, drop_path):
            return x + drop_path(scale(branch))
        gamma = self._gamma(scale)
        return ops.add_residual(x, branch, gamma, drop_scale(drop_path, branch, gamma))

    def _foldable(self, scale: nn.Module, drop_path: nn.Module) -> bool:
        pairs = ((scale, "scale"), (drop_path, "drop_path"))
        return all(is_nothing(module) or self.is_known(module, role) for module, role in pairs)

    def _gamma(self, scale: nn.Module) -> Tensor | None:
        return None if type(scale) is nn.Identity else getattr(scale, self.gamma_name)


class TransformersBlock(AcceleratedBlock):
    """`Dinov2Layer` and `Dinov2WithRegistersLayer`: three linears for queries, keys and values.

    Newer versions of transformers have them and the projection of the output in one module, older ones in two.
    """

    attention: Any
    layer_scale1: nn.Module
    layer_scale2: nn.Module
    drop_path: nn.Module
    gamma_name = "lambda1"
    irrelevant = frozenset({"output_attentions", "output_hidden_states", "return_dict", "num_items_in_batch"})

    @staticmethod
    def parts_of(block: Any) -> Parts:
        name = f"{type(block).__module__}.{type(block).__qualname__.removesuffix('Layer')}"
        parts: Parts = {
            "attention": (block.attention, (f"{name}Attention",)),
            "mlp": (block.mlp, (f"{name}MLP", f"{name}SwiGLUFFN")),
            "scale": (block.layer_scale1, (f"{name}LayerScale",)),
            "drop_path": (block.drop_path, (f"{name}DropPath",)),
        }
        if hasattr(block.attention, "attention"):
            parts["self_attention"] = block.attention.attention, (f"{name}SelfAttention",)
            parts["output"] = block.attention.output, (f"{name}SelfOutput",)
        return parts

    @staticmethod
    def attention_dropout(block: Any) -> float:
        attention = block.attention
        return attention.attention.dropout_prob if hasattr(attention, "attention") else attention.attention_dropout

    @staticmethod
    def refuses(block: Any) -> str | None:
        old = "output_attentions" in inspect.signature(type(block).forward).parameters
        return "it is of a transformers older than 4.57, whose blocks return tuples" if old else None

    def attention_branch(self, x: Tensor) -> Tensor:
        outer = self.attention
        inner = getattr(outer, "attention", outer)
        if not self._computes_sdpa(outer, inner):
            branch = outer(x)
            return branch[0] if isinstance(branch, tuple) else branch
        if inner is outer:
            projections: Any = outer.q_proj, outer.k_proj, outer.v_proj
        else:
            projections = inner.query, inner.key, inner.value
        q, k, v = (linear(projection, x) for projection in projections)
        out = attend(q, k, v, inner.num_attention_heads)
        if inner is outer:
            return linear(outer.o_proj, out)
        if not self.is_known(outer.output, "output"):
            return outer.output(out, x)
        return outer.output.dropout(linear(outer.output.dense, out))

    def _computes_sdpa(self, outer: Any, inner: Any) -> bool:
        """Whether this is torch's attention, which gives weights to nobody, not even to hooks that record them."""
        known = self.kinds["attention"], self.kinds.get("self_attention", self.kinds["attention"])
        if (type(outer), type(inner)) != known or inner.config._attn_implementation != "sdpa":
            return False
        return all(not is_watched(module) or is_recorded_only(module) for module in (outer, inner))

    def mlp_branch(self, x: Tensor) -> Tensor:
        mlp = self.mlp
        if not self.is_known(mlp, "mlp"):
            return mlp(x)
        if hasattr(mlp, "gate_proj"):  # gate and value lie apart, where our op reads them side by side
            return linear(mlp.down_proj, mlp.act_fn(linear(mlp.gate_proj, x)) * linear(mlp.up_proj, x))
        if hasattr(mlp, "weights_in"):
            return linear(mlp.weights_out, ops.swiglu(linear(mlp.weights_in, x)))
        activation = mlp.activation_fn if hasattr(mlp, "activation_fn") else mlp.activation
        return linear(mlp.fc2, hidden_gelu(mlp.fc1, activation, x))

    def scales(self) -> tuple[nn.Module, nn.Module]:
        return self.layer_scale1, self.layer_scale2

    def drop_paths(self) -> tuple[nn.Module, nn.Module]:
        return self.drop_path, self.drop_path


class _PackedBlock(AcceleratedBlock):
    """What timm's and Meta's blocks have in common: one linear for queries, keys and values."""

    attn: Any
    ls1: nn.Module
    ls2: nn.Module
    drop_path1: nn.Module
    drop_path2: nn.Module

    def attention_branch(self, x: Tensor) -> Tensor:
        attn = self.attn
        if not (self.is_known(attn, "attention") and self.attends_plainly()):
            return attn(x)
        return attn.proj_drop(linear(attn.proj, attend_packed(linear(attn.qkv, x), attn.num_heads)))

    def attends_plainly(self) -> bool:
        """Whether the attention is torch's fused function, with nothing in between."""
        return True

    def scales(self) -> tuple[nn.Module, nn.Module]:
        return self.ls1, self.ls2


class TimmBlock(_PackedBlock):
    """The `Block` of timm's `VisionTransformer`."""

    @staticmethod
    def parts_of(block: Any) -> Parts:
        older = "timm.models.vision_transformer"  # where timm had them before
        return {
            "attention": (block.attn, ("timm.layers.attention.Attention", f"{older}.Attention")),
            "mlp": (block.mlp, ("timm.layers.mlp.Mlp", "timm.layers.mlp.GluMlp")),
            "scale": (block.ls1, ("timm.layers.layer_scale.LayerScale", f"{older}.LayerScale")),
            "drop_path": (block.drop_path1, ("timm.layers.drop.DropPath",)),
        }

    @staticmethod
    def attention_dropout(block: Any) -> float:
        return block.attn.attn_drop.p

    @staticmethod
    def refuses(block: Any) -> str | None:
        if not hasattr(block.attn, "fused_attn"):
            return "it is of a timm older than 0.9"
        present = [name for name, module in _between(block.attn).items() if not is_nothing(module)]
        return f"its attention has {' and '.join(present)}" if present else None

    def attends_plainly(self) -> bool:
        return self.attn.fused_attn and all(is_nothing(module) for module in _between(self.attn).values())

    def mlp_branch(self, x: Tensor) -> Tensor:
        mlp = self.mlp
        if not self.is_known(mlp, "mlp"):
            return mlp(x)
        if not hasattr(mlp, "gate_last"):
            hidden = hidden_gelu(mlp.fc1, mlp.act, x)
        elif not mlp.gate_last and type(mlp.act) is nn.SiLU and not is_watched(mlp.act):
            hidden = ops.swiglu(linear(mlp.fc1, x))
        else:
            return mlp(x)
        return mlp.drop2(linear(mlp.fc2, mlp.norm(mlp.drop1(hidden))))

    def drop_paths(self) -> tuple[nn.Module, nn.Module]:
        return self.drop_path1, self.drop_path2


class FacebookBlock(_PackedBlock):
    """Meta's `Block` and `NestedTensorBlock`, from torch.hub or copied into another project."""

    sample_drop_ratio: float

    @staticmethod
    def parts_of(block: Any) -> Parts:
        home = type(block).__module__.rpartition(".")[0]
        mlps = ("mlp.Mlp", "swiglu_ffn.SwiGLUFFN", "swiglu_ffn.SwiGLUFFNFused")
        return {
            "attention": (block.attn, (f"{home}.attention.MemEffAttention", f"{home}.attention.Attention")),
            "mlp": (block.mlp, tuple(f"{home}.{mlp}" for mlp in mlps)),
            "scale": (block.ls1, (f"{home}.layer_scale.LayerScale",)),
            "drop_path": (block.drop_path1, (f"{home}.drop_path.DropPath",)),
        }

    @staticmethod
    def attention_dropout(block: Any) -> float:
        return getattr(block.attn.attn_drop, "p", block.attn.attn_drop)  # a module in older copies

    @staticmethod
    def refuses(block: Any) -> str | None:
        unknown = {name for name, _ in block.attn.named_children()} - {"qkv", "proj", "attn_drop", "proj_drop"}
        return f"its attention has {' and '.join(sorted(unknown))}" if unknown else None

    def declines(self, x: Any) -> bool:
        return super().declines(x) or (self.training and self.sample_drop_ratio > _SUBSET_THRESHOLD)

    def mlp_branch(self, x: Tensor) -> Tensor:
        mlp = self.mlp
        if not self.is_known(mlp, "mlp"):
            return mlp(x)
        if hasattr(mlp, "w12"):
            return linear(mlp.w3, ops.swiglu(linear(mlp.w12, x)))
        return mlp.drop(linear(mlp.fc2, mlp.drop(hidden_gelu(mlp.fc1, mlp.act, x))))

    def drop_paths(self) -> tuple[nn.Module, nn.Module]:
        if not (self.training and self.sample_drop_ratio):
            return _NOTHING, _NOTHING  # the reference does not call them then
        return self.drop_path1, self.drop_path1  # twice the first, as the reference does


class Face(NamedTuple):
    """Where a library defines its blocks: patterns for the module and the name of their class."""

    block: type[AcceleratedBlock]
    module: str
    name: str


FACES = (
    Face(
        TransformersBlock,
        r"transformers\.models\.(dinov2|dinov2_with_registers)\.modeling_\1",
        "Dinov2Layer|Dinov2WithRegistersLayer",
    ),
    Face(TimmBlock, r"timm\.models\.vision_transformer", "Block"),
    Face(FacebookBlock, r"(?!dinov2_fast\.).*dinov2.*\.block", "Block|NestedTensorBlock"),
)


def face_of(module: nn.Module) -> type[AcceleratedBlock] | None:
    """The class here that accelerates blocks of the class of `module`, or None if it is no block known here."""
    kind = type(module)
    for face in FACES:
        if re.fullmatch(face.module, kind.__module__) and re.fullmatch(face.name, kind.__qualname__):
            return face.block
    return None


def reason_against(block: nn.Module) -> str | None:
    """Why `block`, of a class known here, cannot be accelerated; or None."""
    face = face_of(block)
    assert face is not None
    if has_own_forward(block):
        return "it has a forward of its own, set on the instance"
    try:
        parts = face.parts_of(block)
    except AttributeError as error:
        return f"it is built otherwise than the blocks known here ({error})"
    for role in NEEDED:
        module, known = parts.get(role, (None, ()))
        if module is not None and path(type(module)) not in known:
            return f"its {role.replace('_', '-')} is a {path(type(module))}"
    if block.training and face.attention_dropout(block) > 0:
        return f"it is in training mode and drops attention weights (p = {face.attention_dropout(block)})"
    return face.refuses(block)


def accelerate_block(block: nn.Module) -> None:
    """Gives `block`, which :func:`reason_against` takes, the class that computes with our ops."""
    face = face_of(block)
    assert face is not None
    parts = face.parts_of(block).items()
    join(block, face, tuple((role, type(module)) for role, (module, known) in parts if path(type(module)) in known))


def path(kind: type) -> str:
    """The full name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _between(attention: Any) -> dict[str, nn.Module | None]:
    """What timm's attention can have between its two linears, and DINOv2's has not."""
    return {name: getattr(attention, name, None) for name in ("q_norm", "k_norm", "norm", "gate")}


def is_recorded_only(module: nn.Module) -> bool:
    """Whether all that hangs on `module` are the hooks with which transformers records outputs."""
    if has_own_forward(module) or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    return all(getattr(hook, "__module__", "") == _CAPTURING for hook in module._forward_hooks.values())
