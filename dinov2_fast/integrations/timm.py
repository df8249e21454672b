"""The blocks and backbones of timm: `VisionTransformer`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dinov2_fast.integrations.backbone import AcceleratedBackbone, are_whole_patches
from dinov2_fast.timm_adapter import TimmVisionTransformer
from dinov2_fast.weights.architecture import read_architecture


class TimmBackbone(AcceleratedBackbone):
    """`VisionTransformer`. An engine answers `forward_features` and `forward_intermediates`, which its others call."""

    patch_embed: Any
    dynamic_img_size: bool
    head_keys = ("head.", "fc_norm.")
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
            return "its patch embedding is not timm's PatchEmbed on a square grid"
        if type(backbone.norm_pre) is not nn.Identity or type(backbone.patch_drop) is not nn.Identity:
            return "it has a norm before the blocks, or drops patches"
        return None

    @staticmethod
    def make_model(backbone: Any, weights: dict[str, Tensor]) -> nn.Module:
        heads = backbone.blocks[0].attn.num_heads
        antialias = {"interpolate_antialias": True, "interpolate_offset": 0.0}
        model = TimmVisionTransformer(**read_architecture(weights) | {"num_heads": heads} | antialias)
        if type(backbone.norm) is nn.Identity:
            model.norm = nn.Identity()  # type: ignore[assignment]  # where timm normalises after pooling
        return model

    def takes(self, images: Tensor) -> bool:
        only_size = self.fixed_image_size(self)
        return are_whole_patches(images, self.patch_embed.patch_size) and only_size in (None, images.shape[2:])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)  # which calls `forward_features`

    def forward_features(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer("forward_features", args, kwargs)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer("forward_intermediates", args, kwargs)

    def _answer(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        masks = kwargs.get("attn_mask"), kwargs.get("is_causal")
        outputs = self.answer(method, lambda engine: getattr(engine, method)(*args, **kwargs), args[:1], *masks)
        return getattr(super(), method)(*args, **kwargs) if outputs is None else outputs
