"""The blocks and backbones of timm."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dinov2_fast.integrations.backbone import AcceleratedBackbone, is_whole_patches
from dinov2_fast.integrations.module_ops import Function, compose, has_hooks, linear, swiglu
from dinov2_fast.integrations.parts import KnownPart, PlainMlp
from dinov2_fast.timm_adapter import TimmVisionTransformer
from dinov2_fast.weights.architecture import read_architecture


class GatedMlp(KnownPart):
    """timm's `GluMlp`, where it is SwiGLU."""

    submodules = ("fc1", "act", "drop1", "norm", "fc2", "drop2")

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return super().fits(module) and hasattr(module, "gate_last")

    @staticmethod
    def function(module: Any) -> Function:
        return compose(linear(module.fc1), swiglu, *PlainMlp.second(module))

    @staticmethod
    def refuses(module: Any) -> str | None:
        plain = not module.gate_last and type(module.act) is nn.SiLU and not has_hooks(module.act)
        return None if plain else "its gate is not that of SwiGLU"


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
