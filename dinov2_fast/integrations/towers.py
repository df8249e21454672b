"""Backbones of other libraries whose plain calls an engine answers, through their own `forward`."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dinov2_fast import huggingface
from dinov2_fast.inference import Engine, optimize_for_inference
from dinov2_fast.inference.agreement import TOLERANCES, mismatch, small_image
from dinov2_fast.inference.fold import replaced_methods
from dinov2_fast.inference.watch import ModelWatch
from dinov2_fast.integrations.blocks import AcceleratedBlock, face_of, reason_against
from dinov2_fast.integrations.joining import BEHIND, Joined, has_own_forward, join, separate
from dinov2_fast.integrations.settings import path
from dinov2_fast.integrations.steps import is_exact_gelu, is_recorded_only, is_watched
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.timm_adapter import TimmVisionTransformer
from dinov2_fast.weights.architecture import read_architecture

logger = logging.getLogger("dinov2_fast")

_OUTSIDE = ("head.", "fc_norm.")  # keys of timm's model that are not its backbone's


class Behind:
    """What stands behind a backbone: the engine of our model on its weights, or the reason why there is none now.

    `unanswered` holds the methods that run their own code all the same, and why. It is no submodule, so that parameters
    and state dict stay the backbone's own. A copy or pickle makes it anew.

    Raises:
        ValueError: options that `optimize_for_inference` refuses.
    """

    def __init__(self, tower: nn.Module, options: dict[str, Any]) -> None:
        self._options = options
        self._watch: ModelWatch | None = None
        self._make(tower)

    def engine(self, tower: nn.Module, method: str) -> Any:
        """What answers a call of `method`: the engine for the weights that `tower` has now, or None."""
        if self._comparing:
            self._asked = True
            return self._compared
        if self._watch is None or self._watch.changed():
            self._make(tower)
            self.watch(tower)
            if self.reason:
                logger.warning("The accelerated blocks run in place of the engine: %s", self.reason)
        return None if method in self.unanswered else self._engine

    def watch(self, tower: nn.Module) -> None:
        """Remembers `tower` as it is now. In training mode it was not compared, so the next call makes all anew."""
        self._watch = None if tower.training else ModelWatch(tower)

    def _make(self, tower: nn.Module) -> None:
        self._engine: Engine | None = None
        self._comparing, self._compared = False, None
        self.unanswered: dict[str, str] = {}
        self.reason = _reason_against(tower)
        if self.reason is None:
            try:
                model = _ours(tower)
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                self.reason = f"its weights or settings are not those of a DINOv2 ({error})"
            else:
                self._make_engine(tower, model)

    def _make_engine(self, tower: nn.Module, model: nn.Module) -> None:
        if _eps_of(tower) != _eps_of(model):
            self.reason = f"its norms have eps {_eps_of(tower)} in place of {_eps_of(model)}"
            return
        if not tower.training:
            self._compare(tower, model)
        trials = _face_of(tower).trials
        if all(method in self.unanswered for method, _ in trials):
            self.reason = "; ".join(f"its {method} {why}" for method, why in self.unanswered.items())
            return
        try:
            self._engine = optimize_for_inference(model, **self._options)
        except TypeError as error:
            self.reason = str(error)

    def _compare(self, tower: Any, model: Any) -> None:
        """Calls the methods of `tower` on a small image, by their own code and answered by `model`."""
        face = _face_of(tower)
        image = small_image(model.patch_embed, face.only_size(tower)).to(model.cls_token)
        with torch.no_grad(), _joined(tower, self):
            for method, arguments in face.trials:
                self._asked = False
                answers = [self._tried(tower, method, image, arguments, by) for by in (model, None)]
                why = mismatch(answers[0], answers[1], TOLERANCES[image.dtype]) if self._asked else "needs no engine"
                if why:
                    self.unanswered.setdefault(method, why)

    def _tried(self, tower: Any, method: str, image: Tensor, arguments: dict[str, Any], by: Any) -> Any:
        """What a call of `tower` returns, or raises, when `by` answers it; with None, by its own code."""
        self._comparing, self._compared = True, by
        try:
            return getattr(tower, method)(image, **arguments)
        except Exception as error:
            return error
        finally:
            self._comparing, self._compared = False, None

    def __getstate__(self) -> dict[str, Any]:
        remade = {"_watch": None, "_engine": None, "_comparing": False, "_compared": None}
        return {**remade, "_options": self._options, "reason": self.reason, "unanswered": self.unanswered}


@contextmanager
def _joined(tower: Any, behind: Behind) -> Iterator[None]:
    """Has `behind` answer the calls of `tower` inside, also where it is not accelerated yet."""
    if isinstance(tower, AcceleratedTower):
        yield
        return
    accelerate_tower(tower, behind)
    try:
        yield
    finally:
        separate(tower)


class AcceleratedTower(Joined):
    """One backbone. The static methods take one that is not accelerated yet."""

    trials: ClassVar[tuple[tuple[str, dict[str, Any]], ...]]  # the methods that an engine can answer, and arguments

    @staticmethod
    def only_size(tower: Any) -> tuple[int, int] | None:
        """Height and width of the images that a backbone takes, None for any."""
        return None

    @staticmethod
    def refuses(tower: Any) -> str | None:
        """Why a backbone of this class is none that our model computes, or None."""
        return None

    @staticmethod
    def make(tower: Any, weights: dict[str, Tensor]) -> nn.Module:
        """Our model of the same settings."""
        raise NotImplementedError

    @property
    def behind(self) -> Behind:
        return self.__dict__[BEHIND]

    def engine_for(self, method: str, x: Any, *others: Any) -> Any:
        """The engine, if a call of `method` with images `x`, and `others`, is one that it answers; or None."""
        if self.training or torch.compiler.is_compiling() or torch._C._get_tracing_state():
            return None
        if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point() or x.requires_grad:
            return None
        if any(other is not None and other is not False for other in others):
            return None
        return self.behind.engine(self, method)

    def in_own_dtype(self, outputs: Any) -> Any:
        """Tensors, in tuples, lists and dictionaries too, in the dtype of this backbone's parameters."""
        if isinstance(outputs, dict):
            return {name: self.in_own_dtype(output) for name, output in outputs.items()}
        if isinstance(outputs, tuple | list):
            return type(outputs)(map(self.in_own_dtype, outputs))
        dtype = next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())
        return outputs.to(dtype) if isinstance(outputs, Tensor) else outputs


class TransformersTower(AcceleratedTower):
    """`Dinov2Model`, `Dinov2Backbone` and the two with registers."""

    config: Any
    trials = (("forward", {}),)

    @staticmethod
    def make(tower: Any, weights: dict[str, Tensor]) -> nn.Module:
        return getattr(huggingface, type(tower).__name__)(tower.config)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(kwargs)
        dictionary = given.pop("return_dict", None)
        x = args[0] if args else given.pop("pixel_values", None)
        engine = self.engine_for("forward", x, *args[1:], *given.values(), self._asks_for_more(dictionary))
        if engine is None:
            return super().forward(*args, **kwargs)
        library = sys.modules[self.origin[1].__module__]
        output = library.BackboneOutput if "Backbone" in type(self).__name__ else library.BaseModelOutputWithPooling
        return output(**self.in_own_dtype(engine(x)))

    def _asks_for_more(self, dictionary: bool | None) -> bool:
        """Whether a tuple is asked for, or the config asks for more than features."""
        config = self.config
        if getattr(config, "output_hidden_states", False) or getattr(config, "output_attentions", False):
            return True
        return not (getattr(config, "return_dict", True) if dictionary is None else dictionary)


class TimmTower(AcceleratedTower):
    """timm's `VisionTransformer`: the two methods that all others of it call."""

    patch_embed: Any
    dynamic_img_size: bool
    trials = (
        ("forward", {}),
        ("forward_features", {}),
        ("forward_intermediates", {}),
        ("forward_intermediates", {"indices": [0], "return_prefix_tokens": True, "norm": True, "output_fmt": "NLC"}),
    )

    @staticmethod
    def only_size(tower: Any) -> tuple[int, int] | None:
        return None if tower.dynamic_img_size else tower.patch_embed.img_size

    @staticmethod
    def refuses(tower: Any) -> str | None:
        embed = tower.patch_embed
        if type(embed).__name__ != "PatchEmbed" or embed.grid_size[0] != embed.grid_size[1]:
            return "its pictures are not cut into patches on a square grid of positions"
        if type(tower.norm_pre) is not nn.Identity or type(tower.patch_drop) is not nn.Identity:
            return "it has a norm before the blocks or drops patches"
        return None

    @staticmethod
    def make(tower: Any, weights: dict[str, Tensor]) -> nn.Module:
        heads = tower.blocks[0].attn.num_heads
        antialias = {"interpolate_antialias": True, "interpolate_offset": 0.0}
        model = TimmVisionTransformer(**read_architecture(weights) | {"num_heads": heads} | antialias)
        if type(tower.norm) is nn.Identity:
            model.norm = nn.Identity()  # type: ignore[assignment]  # where timm normalises after pooling
        return model

    def forward_features(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer("forward_features", args, kwargs)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer("forward_intermediates", args, kwargs)

    def _answer(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        masks = kwargs.get("attn_mask"), kwargs.get("is_causal")
        engine = self.engine_for(method, args[0], *masks) if args and self._takes_size(args[0]) else None
        if engine is None:
            return getattr(super(), method)(*args, **kwargs)
        return self.in_own_dtype(getattr(engine, method)(*args, **kwargs))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)

    def _takes_size(self, x: Any) -> bool:
        """Whether these are sizes that timm takes as they are; for others it raises or pads."""
        embed = self.patch_embed
        if not isinstance(x, Tensor) or x.ndim != 4:
            return False
        only_size = self.only_size(self)
        return is_whole(x, embed.patch_size) and only_size in (None, tuple(x.shape[2:]))


class FacebookTower(AcceleratedTower):
    """Meta's `DinoVisionTransformer`."""

    head: nn.Module
    patch_size: int
    optional = ("forward_features", "get_intermediate_layers")
    trials = (
        ("forward", {}),
        ("forward_features", {}),
        ("get_intermediate_layers", {"n": 1}),
        ("get_intermediate_layers", {"n": [0], "reshape": True, "return_class_token": True, "norm": False}),
    )

    @staticmethod
    def make(tower: Any, weights: dict[str, Tensor]) -> nn.Module:
        names = ("num_heads", "interpolate_antialias", "interpolate_offset")
        return DinoVisionTransformer(**read_architecture(weights) | {name: getattr(tower, name) for name in names})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        engine = None
        if type(self.head) is nn.Identity:
            engine = self._engine_of_call("forward", args, kwargs)
        if engine is None:
            return super().forward(*args, **kwargs)
        return self.in_own_dtype(engine(args[0]))

    def forward_features(self, *args: Any, **kwargs: Any) -> Any:
        engine = self._engine_of_call("forward_features", args, kwargs)
        if engine is None:
            return super().forward_features(*args, **kwargs)  # type: ignore[misc]
        return self.in_own_dtype(engine.forward_features(args[0]))

    def get_intermediate_layers(self, *args: Any, **kwargs: Any) -> Any:
        engine = self._engine_of_call("get_intermediate_layers", args[:1], {})
        if engine is None:
            return super().get_intermediate_layers(*args, **kwargs)  # type: ignore[misc]
        return self.in_own_dtype(engine.get_intermediate_layers(*args, **kwargs))

    def _engine_of_call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args or not isinstance(args[0], Tensor) or not is_whole(args[0], (self.patch_size, self.patch_size)):
            return None
        return self.engine_for(method, *args, *kwargs.values())


class Face(NamedTuple):
    """Where a library defines its backbones: patterns for the module and the name of their class."""

    tower: type[AcceleratedTower]
    module: str
    name: str


FACES = (
    Face(
        TransformersTower,
        r"transformers\.models\.(dinov2|dinov2_with_registers)\.modeling_\1",
        "Dinov2(WithRegisters)?(Model|Backbone)",
    ),
    Face(TimmTower, r"timm\.models\.vision_transformer", "VisionTransformer"),
    Face(FacebookTower, r"(?!dinov2_fast\.).*dinov2.*", "DinoVisionTransformer"),
)


def is_tower(module: nn.Module) -> bool:
    """Whether `module` is a backbone whose calls are known here."""
    return any(_matches(face, module) for face in FACES)


def accelerate_tower(tower: nn.Module, behind: Behind) -> None:
    """Lets the engine in `behind` answer the plain calls of `tower` as it is now."""
    tower.__dict__[BEHIND] = behind
    if not isinstance(tower, AcceleratedTower):
        join(tower, _face_of(tower))
    behind.watch(tower)


def is_whole(x: Tensor, patch_size: tuple[int, int]) -> bool:
    """Whether pictures are whole patches, at least one."""
    return all(size >= patch and size % patch == 0 for size, patch in zip(x.shape[-2:], patch_size, strict=True))


def _matches(face: Face, module: nn.Module) -> bool:
    kind = type(module)
    return bool(re.fullmatch(face.module, kind.__module__) and re.fullmatch(face.name, kind.__qualname__))


def _face_of(tower: nn.Module) -> type[AcceleratedTower]:
    return next(face.tower for face in FACES if _matches(face, tower))


def _reason_against(tower: Any) -> str | None:
    """Why no engine can stand behind this backbone, or None."""
    if any(tensor.is_meta for tensor in tower.state_dict().values()):
        return "its weights are on the meta device: load them first"
    for name, module in tower.named_modules():
        replaced = set(replaced_methods(module))
        if module is tower and has_own_forward(module):  # it may call the methods that an engine answers
            replaced.discard("forward")
            watched = bool(module._forward_hooks or module._forward_pre_hooks)
        else:
            watched = is_watched(module) and not is_recorded_only(module)
        if watched:
            return f"{name or 'it'} has a hook or a forward of its own, which an engine would pass over"
        if replaced:
            return f"{name or 'it'} has a {min(replaced)} of its own, set on the instance"
        if not _is_home(module, tower):
            return f"{name} is a {path(type(module))}, which no engine knows: merge it into the weights, or remove it"
    for name, module in tower.named_modules():
        if isinstance(module, AcceleratedBlock) or face_of(module) is not None:
            reason = module.change() if isinstance(module, AcceleratedBlock) else reason_against(module)
            if reason or not _has_known_activation(module.mlp):
                return f"{name}: {reason or 'its activation is neither the exact GELU nor SwiGLU'}"
    return _face_of(tower).refuses(tower)


def _is_home(module: nn.Module, tower: nn.Module) -> bool:
    """Whether the class of `module` is torch's or of the library that `tower` is of."""
    home = type(module).__module__
    return home.startswith("torch.nn.modules.") or home.split(".")[0] == type(tower).__module__.split(".")[0]


def _has_known_activation(mlp: Any) -> bool:
    gated = "SwiGLU" in type(mlp).__name__ or getattr(mlp, "gate_last", True) is False
    inside = [module for module in mlp.children() if not isinstance(module, nn.Linear | nn.Dropout | nn.Identity)]
    if gated:
        return all(type(module).__name__ in ("SiLU", "SiLUActivation") for module in inside)
    return all(is_exact_gelu(module) for module in inside)


def _ours(tower: Any) -> nn.Module:
    """Our model on the weights of `tower`, which it shares where the layouts pack them alike."""
    weights = {key: tensor for key, tensor in tower.state_dict().items() if not key.startswith(_OUTSIDE)}
    with torch.device("meta"):
        model = _face_of(tower).make(tower, weights)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _eps_of(model: nn.Module) -> list[float]:
    return sorted({module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)})
