"""The blocks and backbones of Meta's torch.hub code, and of the projects that copied it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dinov2_fast.block import SUBSET_THRESHOLD
from dinov2_fast.integrations.backbone import AcceleratedBackbone, are_whole_patches
from dinov2_fast.integrations.block import AcceleratedBlock
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.weights.architecture import read_architecture


class FacebookBlock(AcceleratedBlock):
    """`Block` and `NestedTensorBlock`, which have their own rule for stochastic depth."""

    sample_drop_ratio: float

    def needs_own_code(self, x: Any) -> bool:
        # Above this rate the reference computes a branch for a subset of the images only.
        return super().needs_own_code(x) or (self.training and self.sample_drop_ratio > SUBSET_THRESHOLD)

    def active_drop_paths(self) -> tuple[str | None, str | None]:
        if not (self.training and self.sample_drop_ratio):
            return None, None  # the reference does not call them then
        first = self.accelerated_parts.drop_paths[0]
        return first, first  # the reference, too, calls the first for both branches


class FacebookBackbone(AcceleratedBackbone):
    """`DinoVisionTransformer`."""

    head: nn.Module
    patch_size: int
    head_keys = ("head.",)
    optional_methods = ("forward_features", "get_intermediate_layers")
    compared_calls = (
        ("forward", {}),
        ("forward_features", {}),
        ("get_intermediate_layers", {"n": 1}),
        ("get_intermediate_layers", {"n": [0], "reshape": True, "return_class_token": True, "norm": False}),
    )

    @staticmethod
    def make_model(backbone: Any, weights: dict[str, Tensor]) -> nn.Module:
        names = ("num_heads", "interpolate_antialias", "interpolate_offset")
        return DinoVisionTransformer(**read_architecture(weights) | {name: getattr(backbone, name) for name in names})

    def takes(self, images: Tensor) -> bool:
        return are_whole_patches(images, (self.patch_size, self.patch_size))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        has_head = type(self.head) is not nn.Identity
        outputs = self.answer("forward", lambda engine: engine(args[0]), args, *kwargs.values(), has_head)
        return super().forward(*args, **kwargs) if outputs is None else outputs

    def forward_features(self, *args: Any, **kwargs: Any) -> Any:
        method = "forward_features"
        outputs = self.answer(method, lambda engine: engine.forward_features(args[0]), args, *kwargs.values())
        return super().forward_features(*args, **kwargs) if outputs is None else outputs  # type: ignore[misc]

    def get_intermediate_layers(self, *args: Any, **kwargs: Any) -> Any:
        method = "get_intermediate_layers"
        outputs = self.answer(method, lambda engine: engine.get_intermediate_layers(*args, **kwargs), args[:1])
        return super().get_intermediate_layers(*args, **kwargs) if outputs is None else outputs  # type: ignore[misc]
