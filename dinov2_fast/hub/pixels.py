"""`EncoderDecoder`: a backbone and a head that decodes its feature maps to one map per image, of depths or classes.

Source: facebookresearch/dinov2, dinov2/hub/utils.py and dinov2/hub/depth/encoder_decoder.py, and the model of the same
name in mmsegmentation, on which the reference's segmenters are built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_fast.errors import InvalidTypeError, InvalidValueError


class CenterPadding(nn.Module):
    """Pads images (..., height, width) with zeros to multiples of a size. An odd pixel goes to the bottom and right."""

    def __init__(self, multiple: int) -> None:
        super().__init__()
        self.multiple = multiple

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (-size % self.multiple for size in x.shape[-2:])
        return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))

    def extra_repr(self) -> str:
        return f"multiple={self.multiple}"


def resize(x: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """Maps (batch, channels, height, width), resized bilinearly to `size` (height, width)."""
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=align_corners)


def mirror_back(x: Tensor, img_meta: Sequence[Mapping[str, Any]] | None) -> Tensor:
    """Maps (batch, channels, height, width), mirrored back if the first `img_meta` has a true "flip".

    "flip_direction" is "vertical" or "horizontal", the default.
    """
    if img_meta is None or not img_meta[0].get("flip"):
        return x
    return x.flip(2 if img_meta[0].get("flip_direction") == "vertical" else 3)


class EncoderDecoder(nn.Module):
    """Computes maps of the size of the images, which may have any size.

    An image is padded on all sides to whole patches, and the map of the padded image is resized to the size of the
    image. The padding is not cut off before, as in the reference.

    Args:
        backbone: a `DinoVisionTransformer`, or its engine.
        decode_head: a module that takes the output of `extract_feat`.
        out_index: the blocks whose outputs the head takes.
    """

    def __init__(self, backbone: nn.Module, decode_head: nn.Module, out_index: Sequence[int]) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.decode_head: Any = decode_head
        self.out_index = tuple(out_index)

    def extract_feat(self, img: Tensor) -> tuple[Any, ...]:
        """The input of the head, for images (batch, channels, height, width)."""
        raise NotImplementedError

    def encode_decode(self, img: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The map of whole images, without windows."""
        raise NotImplementedError

    def forward(self, img: Tensor) -> Tensor:
        """The map (batch, maps, height, width) of whole images (batch, channels, height, width)."""
        return self.encode_decode(img)

    def _pad(self, img: Tensor) -> Tensor:
        padded = CenterPadding(self.backbone.patch_size)(img)
        if padded.shape != img.shape and not img.is_floating_point():
            raise InvalidTypeError(
                f"Images of {tuple(img.shape[-2:])} pixels must be padded with zeros to multiples of "
                f"{self.backbone.patch_size}, after they are normalised. These are {img.dtype}: normalise them first."
            )
        return padded


def slide(
    decode: Callable[[Tensor], Tensor], img: Tensor, crop_size: tuple[int, int], stride: tuple[int, int]
) -> Tensor:
    """The mean of `decode` over overlapping windows.

    Args:
        decode: a function from (batch, channels, h, w) to (batch, maps, h, w).
        img: (batch, channels, height, width). Windows are cut to its size if it is smaller.
        crop_size: height and width of a window, in pixels.
        stride: vertical and horizontal distance between windows, in pixels. The last window of a row or column ends
            with the image.

    Returns:
        (batch, maps, height, width).

    Raises:
        ValueError: a window is empty, or the stride is larger than the window.
    """
    for size, step in zip(crop_size, stride, strict=True):
        if not 0 < step <= size:
            raise InvalidValueError(f"Windows of {crop_size} pixels every {stride} do not cover an image.")
    height, width = img.shape[-2:]
    total, count = None, img.new_zeros(height, width)
    for rows in _windows(height, crop_size[0], stride[0]):
        for columns in _windows(width, crop_size[1], stride[1]):
            part = decode(img[:, :, rows, columns])
            if total is None:
                total = part.new_zeros(*part.shape[:2], height, width)
            total[:, :, rows, columns] += part
            count[rows, columns] += 1
    assert total is not None  # there is at least one window
    return total / count


def _windows(length: int, size: int, step: int) -> Iterator[slice]:
    for first in range(0, max(length - size + step - 1, 0) + 1, step):
        end = min(first + size, length)
        yield slice(max(end - size, 0), end)
