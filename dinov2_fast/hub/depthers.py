"""Backbones with a depth estimator, trained on NYU Depth v2 (indoors, to 10 m) or KITTI (streets, to 80 m).

Source: facebookresearch/dinov2, dinov2/hub/depthers.py; Oquab et al., arXiv:2304.07193, section 7.4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

from torch import Tensor

from dinov2_fast.configs import BackboneConfig
from dinov2_fast.errors import InvalidValueError
from dinov2_fast.hub.backbones import choose_weights, fill_from_published, make_backbone
from dinov2_fast.hub.classifiers import check_layers
from dinov2_fast.hub.depth_heads import DPTHead, LinearDepthHead
from dinov2_fast.hub.pixels import EncoderDecoder, mirror_back, resize, slide

# The four blocks whose tokens the heads take, by the backbone's number of blocks.
FOUR_BLOCKS = {12: (2, 5, 8, 11), 24: (4, 11, 17, 23), 40: (9, 19, 29, 39)}


class DepthWeights(Enum):
    """The data sets of the published depth estimators."""

    NYU = "NYU"
    KITTI = "KITTI"


class DepthEstimator(EncoderDecoder):
    """Computes depth maps in metres: the reference's DepthEncoderDecoder, without its training."""

    def extract_feat(self, img: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """The map (batch, hidden, rows, columns) and CLS token of each block in `out_index`, before the final norm."""
        return self.backbone.get_intermediate_layers(
            self._pad(img), n=self.out_index, reshape=True, return_class_token=True, norm=False
        )

    def encode_decode(
        self,
        img: Tensor,
        img_metas: Sequence[Mapping[str, Any]] | None = None,
        rescale: bool = True,
        size: Sequence[int] | None = None,
    ) -> Tensor:
        """The depth of whole images, without windows.

        Args:
            img: (batch, channels, height, width), normalised.
            img_metas: None, or dictionaries; "ori_shape" of the first is the size of the map.
            rescale: resize the map to `size`, to "ori_shape" or to the images' size. Otherwise it has the head's size.
            size: (height, width) of the map.

        Returns:
            (batch, 1, height, width), clamped to the head's `min_depth` and `max_depth`.
        """
        depth = self.decode_head(self.extract_feat(img))
        depth = depth.clamp(self.decode_head.min_depth, self.decode_head.max_depth)
        if not rescale:
            return depth
        if size is None:
            size = img_metas[0]["ori_shape"][:2] if img_metas is not None else img.shape[2:]
        return resize(depth, size)

    def whole_inference(
        self,
        img: Tensor,
        img_meta: Sequence[Mapping[str, Any]] | None = None,
        rescale: bool = True,
        size: Sequence[int] | None = None,
    ) -> Tensor:
        """`encode_decode` by the name that the reference's notebook calls."""
        return self.encode_decode(img, img_meta, rescale, size)

    def inference(
        self,
        img: Tensor,
        img_meta: Sequence[Mapping[str, Any]] | None = None,
        rescale: bool = True,
        size: Sequence[int] | None = None,
        mode: str = "whole",
    ) -> Tensor:
        """`whole_inference`. The depths of mirrored images ("flip" in `img_meta`) are mirrored back."""
        if mode != "whole":
            raise InvalidValueError(
                f"There is no mode {mode!r}, only whole; for windows call slide_inference with their size."
            )
        return mirror_back(self.whole_inference(img, img_meta, rescale, size), img_meta)

    def slide_inference(
        self,
        img: Tensor,
        img_meta: Sequence[Mapping[str, Any]] | None,
        rescale: bool,
        stride: tuple[int, int],
        crop_size: tuple[int, int],
    ) -> Tensor:
        """The mean depth over overlapping windows (see `slide`), always at the images' size."""
        return slide(self.encode_decode, img, crop_size, stride)


_ARGUMENTS = """pretrained: load the published weights of the backbone and the head; otherwise initialise at random.
        weights: the data set that the head was trained on, "NYU" or "KITTI".
        **kwargs: `depth_range`, the smallest and largest depth in metres; others as for the backbone's entry point.

    Returns:
        A `DepthEstimator` in training mode."""


def linear_depther_entry_point(config: BackboneConfig) -> Callable[..., DepthEstimator]:
    def make(
        *, layers: int = 4, pretrained: bool = True, weights: DepthWeights | str = DepthWeights.NYU, **kwargs: Any
    ) -> DepthEstimator:
        check_layers(layers)
        name = choose_weights(weights, DepthWeights).value.lower()
        depth_range = kwargs.pop("depth_range", None) or (0.001, 80.0)  # the reference's, for both data sets
        backbone = make_backbone(config, pretrained, **kwargs)
        head = LinearDepthHead(backbone.embed_dim, layers, *depth_range)
        if pretrained:
            published = f"{name}_linear" if layers == 1 else f"{name}_linear{layers}"
            fill_from_published(head, "decode_head.", config, published, backbone, **kwargs)
        out_index = FOUR_BLOCKS[config.depth] if layers == 4 else (config.depth - 1,)
        return DepthEstimator(backbone, head, out_index)

    make.__name__ = make.__qualname__ = f"{config.name}_ld"
    make.__doc__ = f"""Linear depth estimator on a DINOv2 ViT-{config.name[10]}/14.

    As in the reference, depths range from 0.001 to 80 m for both data sets. A head for NYU was trained with 10 m: its
    depths are in metres with ``depth_range=(0.001, 10.0)``, and 8 times too large without.

    Args:
        layers: how many blocks it uses, 1 or 4.
        {_ARGUMENTS}
    """
    return make


def dpt_depther_entry_point(config: BackboneConfig) -> Callable[..., DepthEstimator]:
    def make(
        *, pretrained: bool = True, weights: DepthWeights | str = DepthWeights.NYU, **kwargs: Any
    ) -> DepthEstimator:
        dataset = choose_weights(weights, DepthWeights)
        max_depth = 80.0 if pretrained and dataset is DepthWeights.KITTI else 10.0
        depth_range = kwargs.pop("depth_range", None) or (0.001, max_depth)
        backbone = make_backbone(config, pretrained, **kwargs)
        head = DPTHead(backbone.embed_dim, *depth_range)
        if pretrained:
            published = f"{dataset.value.lower()}_dpt"
            fill_from_published(head, "decode_head.", config, published, backbone, **kwargs)
        return DepthEstimator(backbone, head, FOUR_BLOCKS[config.depth])

    make.__name__ = make.__qualname__ = f"{config.name}_dd"
    make.__doc__ = f"""DPT depth estimator on a DINOv2 ViT-{config.name[10]}/14.

    As in the reference, depths range from 0.001 to 10 m, or to 80 m with the published head for KITTI.

    Args:
        {_ARGUMENTS}
    """
    return make
