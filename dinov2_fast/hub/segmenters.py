"""Backbones with a linear segmenter, trained on ADE20K (150 classes) or VOC2012 (20 classes and the background).

The reference publishes these heads as files of mmsegmentation, which is not needed here. Source:
facebookresearch/dinov2, dinov2/eval/segmentation; Oquab et al., arXiv:2304.07193, section 7.4.

The heads were tested on images resized to a shorter side of 512 pixels ("linear") or 640 ("ms", for multi-scale). For
"ms" the reference takes the mean of the probabilities at 1, 1.32, 1.73, 2.28 and 3 times that size, of each image and
its mirror image. A `Segmenter` runs once on the images that it is given, also with an "ms" head. A caller who wants
that mean passes `img_meta`, which rescales and mirrors the probabilities back to the original image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_fast.configs import BackboneConfig
from dinov2_fast.errors import InvalidValueError
from dinov2_fast.hub.backbones import choose_weights, fill_from_published, make_backbone
from dinov2_fast.hub.classifiers import check_layers
from dinov2_fast.hub.pixels import EncoderDecoder, mirror_back, resize, slide

CLASSES = {"ADE20K": 150, "VOC2012": 21}

# By the number of blocks: the names of the published heads, and (side, stride) of the windows they were tested with.
_FILES = {1: "linear", 4: "ms"}
_WINDOWS = {1: (512, 341), 4: (640, 320)}


class SegmenterWeights(Enum):
    """The data sets of the published segmenters."""

    ADE20K = "ADE20K"
    VOC2012 = "VOC2012"


class LinearSegmentationHead(nn.Module):
    """A batch norm and a linear layer on the patch tokens of `layers` blocks: the reference's BNHead.

    The reference's batch norm is synchronised between processes: `torch.nn.SyncBatchNorm.convert_sync_batchnorm` turns
    this one into that.
    """

    def __init__(self, embed_dim: int, layers: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv_seg = nn.Conv2d(embed_dim * layers, num_classes, kernel_size=1)
        self.bn = nn.BatchNorm2d(embed_dim * layers)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.get_parameter("conv_seg.bias"))

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """The logits (batch, classes, rows, columns), from the map (batch, hidden, rows, columns) of each block."""
        return self.conv_seg(self.bn(torch.cat(list(inputs), dim=1)))


class Segmenter(EncoderDecoder):
    """Computes the logits of each pixel's class: mmsegmentation's EncoderDecoder, without its training.

    Args:
        backbone, decode_head, out_index: as for `EncoderDecoder`.
        crop_size, stride: of the windows of `slide_inference`, (height, width) in pixels.
    """

    def __init__(
        self,
        backbone: nn.Module,
        decode_head: nn.Module,
        out_index: Sequence[int],
        crop_size: tuple[int, int] = (512, 512),
        stride: tuple[int, int] = (341, 341),
    ) -> None:
        super().__init__(backbone, decode_head, out_index)
        self.crop_size = crop_size
        self.stride = stride

    def extract_feat(self, img: Tensor) -> tuple[Tensor, ...]:
        """The normalised map (batch, hidden, rows, columns) of each block in `out_index`."""
        return self.backbone.get_intermediate_layers(self._pad(img), n=self.out_index, reshape=True)

    def encode_decode(self, img: Tensor, img_metas: Sequence[Mapping[str, Any]] | None = None) -> Tensor:
        """The logits (batch, classes, height, width) of whole images (batch, channels, height, width)."""
        return resize(self.decode_head(self.extract_feat(img)), img.shape[2:])

    def whole_inference(
        self, img: Tensor, img_meta: Sequence[Mapping[str, Any]] | None = None, rescale: bool = True
    ) -> Tensor:
        """`encode_decode`; with `rescale`, resized to "ori_shape" of the first `img_meta`.

        If that has "img_shape" too, pixels below and right of it are padding, and are cut off first.
        """
        return _rescale(self.encode_decode(img), img_meta if rescale else None)

    def slide_inference(
        self, img: Tensor, img_meta: Sequence[Mapping[str, Any]] | None = None, rescale: bool = True
    ) -> Tensor:
        """The mean logits over overlapping windows (see `slide`). The published heads were tested in this way."""
        return _rescale(slide(self.encode_decode, img, self.crop_size, self.stride), img_meta if rescale else None)

    def inference(
        self,
        img: Tensor,
        img_meta: Sequence[Mapping[str, Any]] | None = None,
        rescale: bool = True,
        mode: str = "slide",
    ) -> Tensor:
        """The probabilities (batch, classes, height, width), with windows ("slide") or without ("whole").

        Those of mirrored images ("flip" and "flip_direction" of the first `img_meta`) are mirrored back.
        """
        if mode not in ("slide", "whole"):
            raise InvalidValueError(f"There is no mode {mode!r}; choose one of slide, whole.")
        infer = self.slide_inference if mode == "slide" else self.whole_inference
        return mirror_back(infer(img, img_meta, rescale).softmax(dim=1), img_meta)


def _rescale(logits: Tensor, img_meta: Sequence[Mapping[str, Any]] | None) -> Tensor:
    if img_meta is None:
        return logits
    height, width = img_meta[0].get("img_shape", logits.shape[2:])[:2]
    return resize(logits[:, :, :height, :width], img_meta[0]["ori_shape"][:2])


def segmenter_entry_point(config: BackboneConfig) -> Callable[..., Segmenter]:
    def make(
        *,
        layers: int = 1,
        pretrained: bool = True,
        weights: SegmenterWeights | str = SegmenterWeights.ADE20K,
        **kwargs: Any,
    ) -> Segmenter:
        check_layers(layers)
        dataset = choose_weights(weights, SegmenterWeights).value
        backbone = make_backbone(config, pretrained, **kwargs)
        head = LinearSegmentationHead(backbone.embed_dim, layers, CLASSES[dataset])
        if pretrained:
            published = f"{dataset.lower()}_{_FILES[layers]}"
            fill_from_published(head, "decode_head.", config, published, backbone, **kwargs)
        side, stride = _WINDOWS[layers]
        out_index = range(config.depth - layers, config.depth)
        return Segmenter(backbone, head, out_index, (side, side), (stride, stride))

    make.__name__ = make.__qualname__ = f"{config.name}_ls"
    make.__doc__ = f"""Linear segmenter on a DINOv2 ViT-{config.name[10]}/14.

    Args:
        layers: how many of the last blocks it uses: 1 for the head published as "linear", 4 for "ms".
        pretrained: load the published weights of the backbone and the head; otherwise initialise at random.
        weights: the data set that the head was trained on, "ADE20K" or "VOC2012".
        **kwargs: as for the backbone's entry point.

    Returns:
        A `Segmenter` in training mode.
    """
    return make
