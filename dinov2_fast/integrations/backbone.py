"""Backbones of other libraries whose plain calls an engine answers, through their own `forward`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dinov2_fast import huggingface
from dinov2_fast.integrations.attached_engine import AttachedEngine
from dinov2_fast.integrations.class_swap import STATE_ATTRIBUTE, SwappedModule
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.timm_adapter import TimmVisionTransformer
from dinov2_fast.torch_private import is_jit_traced
from dinov2_fast.weights.architecture import read_architecture


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
    def attached_engine(self) -> AttachedEngine:
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


class TransformersBackbone(AcceleratedBackbone):
    """`Dinov2Model`, `Dinov2Backbone` and the two with registers."""

    config: Any
    compared_calls = (("forward", {}),)

    @staticmethod
    def make(backbone: Any, weights: dict[str, Tensor]) -> nn.Module:
        return getattr(huggingface, type(backbone).__name__)(backbone.config)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(kwargs)
        dictionary = given.pop("return_dict", None)
        x = args[0] if args else given.pop("pixel_values", None)
        others = *args[1:], *given.values(), self._asks_for_more(dictionary)
        outputs = self.answer("forward", lambda engine: engine(x), x, *others)
        if outputs is None:
            return super().forward(*args, **kwargs)
        library = sys.modules[self.origin[1].__module__]
        output = library.BackboneOutput if "Backbone" in type(self).__name__ else library.BaseModelOutputWithPooling
        return output(**outputs)

    def _asks_for_more(self, dictionary: bool | None) -> bool:
        """Whether a tuple is asked for, or the config asks for more than features."""
        config = self.config
        if getattr(config, "output_hidden_states", False) or getattr(config, "output_attentions", False):
            return True
        return not (getattr(config, "return_dict", True) if dictionary is None else dictionary)


class TimmBackbone(AcceleratedBackbone):
    """timm's `VisionTransformer`: the two methods that all others of it call."""

    patch_embed: Any
    dynamic_img_size: bool
    compared_calls = (
        ("forward", {}),
        ("forward_features", {}),
        ("forward_intermediates", {}),
        ("forward_intermediates", {"indices": [0], "return_prefix_tokens": True, "norm": True, "output_fmt": "NLC"}),
    )

    @staticmethod
    def fixed_image_size(backbone: Any) -> tuple[int, int] | None:
        return None if backbone.dynamic_img_size else backbone.patch_embed.img_size

    @staticmethod
    def refuses(backbone: Any) -> str | None:
        embed = backbone.patch_embed
        if type(embed).__name__ != "PatchEmbed" or embed.grid_size[0] != embed.grid_size[1]:
            return "its images are not cut into patches on a square grid of positions"
        if type(backbone.norm_pre) is not nn.Identity or type(backbone.patch_drop) is not nn.Identity:
            return "it has a norm before the blocks or drops patches"
        return None

    @staticmethod
    def make(backbone: Any, weights: dict[str, Tensor]) -> nn.Module:
        heads = backbone.blocks[0].attn.num_heads
        antialias = {"interpolate_antialias": True, "interpolate_offset": 0.0}
        model = TimmVisionTransformer(**read_architecture(weights) | {"num_heads": heads} | antialias)
        if type(backbone.norm) is nn.Identity:
            model.norm = nn.Identity()  # type: ignore[assignment]  # where timm normalises after pooling
        return model

    def forward_features(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer("forward_features", args, kwargs)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer("forward_intermediates", args, kwargs)

    def _answer(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        outputs = None
        if args and self._takes_size(args[0]):
            masks = kwargs.get("attn_mask"), kwargs.get("is_causal")
            outputs = self.answer(method, lambda engine: getattr(engine, method)(*args, **kwargs), args[0], *masks)
        return getattr(super(), method)(*args, **kwargs) if outputs is None else outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)

    def _takes_size(self, x: Any) -> bool:
        """Whether these are sizes that timm takes as they are; for others it raises or pads."""
        embed = self.patch_embed
        if not isinstance(x, Tensor) or x.ndim != 4:
            return False
        fixed_image_size = self.fixed_image_size(self)
        return is_whole_patches(x, embed.patch_size) and fixed_image_size in (None, tuple(x.shape[2:]))


class FacebookBackbone(AcceleratedBackbone):
    """Meta's `DinoVisionTransformer`."""

    head: nn.Module
    patch_size: int
    optional = ("forward_features", "get_intermediate_layers")
    compared_calls = (
        ("forward", {}),
        ("forward_features", {}),
        ("get_intermediate_layers", {"n": 1}),
        ("get_intermediate_layers", {"n": [0], "reshape": True, "return_class_token": True, "norm": False}),
    )

    @staticmethod
    def make(backbone: Any, weights: dict[str, Tensor]) -> nn.Module:
        names = ("num_heads", "interpolate_antialias", "interpolate_offset")
        return DinoVisionTransformer(**read_architecture(weights) | {name: getattr(backbone, name) for name in names})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = None
        if type(self.head) is nn.Identity:
            outputs = self._answer("forward", lambda engine: engine(args[0]), args, *kwargs.values())
        return super().forward(*args, **kwargs) if outputs is None else outputs

    def forward_features(self, *args: Any, **kwargs: Any) -> Any:
        ask = lambda engine: engine.forward_features(args[0])  # noqa: E731
        outputs = self._answer("forward_features", ask, args, *kwargs.values())
        return super().forward_features(*args, **kwargs) if outputs is None else outputs  # type: ignore[misc]

    def get_intermediate_layers(self, *args: Any, **kwargs: Any) -> Any:
        ask = lambda engine: engine.get_intermediate_layers(*args, **kwargs)  # noqa: E731
        outputs = self._answer("get_intermediate_layers", ask, args[:1])
        return super().get_intermediate_layers(*args, **kwargs) if outputs is None else outputs  # type: ignore[misc]

    def _answer(self, method: str, ask: Callable[[Any], Any], args: tuple[Any, ...], *others: Any) -> Any:
        if (
            not args
            or not isinstance(args[0], Tensor)
            or not is_whole_patches(args[0], (self.patch_size, self.patch_size))
        ):
            return None
        return self.answer(method, ask, *args, *others)


class Face(NamedTuple):
    """Where a library defines its backbones: patterns for the module and the name of their class."""

    backbone: type[AcceleratedBackbone]
    module: str
    name: str


FACES = (
    Face(
        TransformersBackbone,
        r"transformers\.models\.(dinov2|dinov2_with_registers)\.modeling_\1",
        "Dinov2(WithRegisters)?(Model|Backbone)",
    ),
    Face(TimmBackbone, r"timm\.models\.vision_transformer", "VisionTransformer"),
    Face(FacebookBackbone, r"(?!dinov2_fast\.).*dinov2.*", "DinoVisionTransformer"),
)


def is_backbone(module: nn.Module) -> bool:
    """Whether `module` is a backbone whose calls are known here."""
    return any(_matches(face, module) for face in FACES)


def make_engine(backbone: nn.Module, options: dict[str, Any]) -> AttachedEngine:
    """An engine for the calls of `backbone`, not attached yet."""
    return AttachedEngine(backbone, _face_of(backbone), options)


def is_whole_patches(x: Tensor, patch_size: tuple[int, int]) -> bool:
    """Whether images are whole patches, at least one."""
    return all(size >= patch and size % patch == 0 for size, patch in zip(x.shape[-2:], patch_size, strict=True))


def _matches(face: Face, module: nn.Module) -> bool:
    kind = type(module)
    return bool(re.fullmatch(face.module, kind.__module__) and re.fullmatch(face.name, kind.__qualname__))


def _face_of(backbone: nn.Module) -> type[AcceleratedBackbone]:
    return next(face.backbone for face in FACES if _matches(face, backbone))
