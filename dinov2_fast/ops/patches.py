"""Cuts images into patches, one row for each patch, for the matrix product that embeds them. Inference only.

    rows[b, i * columns + j] = values[b, :, i*s : i*s + p, j*t : j*t + p], flattened (channel, line, pixel), then zeros

p is the patch size and (s, t) the stride, which is (p, p) if patches do not overlap. ``rows @ weight.flatten(1).T`` is
then the convolution of `values` with `weight` and that stride. `values` are floating-point images, or uint8 images
minus 128.

Subtracting 128 is exact in every floating dtype. The engine folds the normalisation, (x / 255 - mean) / std, into the
weight and the bias (`inference.fold.fold_normalization`). Without the subtraction, the mean brightness of x in 0..255
would multiply the rounding error of every weight: the bias cancels the product with the exact weight only.
Source of the embedding: Dosovitskiy et al., arXiv:2010.11929.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_fast.errors import InvalidTypeError, InvalidValueError
from dinov2_fast.ops import _backends, _registry
from dinov2_fast.ops._fp8 import E4M3
from dinov2_fast.ops.dispatch import Op
from dinov2_fast.ops.implementation import Implementation

UINT8_SHIFT = 128


def patches(
    images: Tensor,
    patch_size: int,
    *,
    stride: tuple[int, int] | None = None,
    padded_to: int | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """Cuts images into patches.

    Args:
        images: (batch, channels, height, width), uint8 or floating point, read in place with any strides. Pass images
            whose channels are last, (batch, height, width, channels), as ``images.permute(0, 3, 1, 2)``.
        patch_size: height and width of a patch in pixels. The image's height and width are multiples of it, or the last
            patch ends at the edge.
        stride: pixels from one patch to the next, (down, across). By default the patch size, so patches do not overlap.
        padded_to: columns of the result; the columns after the patch are zeros. By default channels * patch_size ** 2,
            which is 588 for 3 x 14 x 14. 592 columns are a multiple of 16 bytes in every dtype.
        dtype: of the result. Values are computed in fp32 (fp64 if `dtype` is fp64) and rounded once.
        backend: the backend to use instead of the default.

    Returns:
        (batch, patches, padded_to), contiguous. A side of an image has (size - patch_size) // stride + 1 patches.

    Raises:
        ValueError: `images` has not four dimensions, a size does not fit the patch size and the stride, or `padded_to`
            is less than the size of a patch.
        TypeError: the dtype of `images`, or `dtype`, is not supported.
        BackendError: `backend` cannot take these arguments, or gradients are recorded.
    """
    if images.ndim != 4:
        raise InvalidValueError(f"patches takes (batch, channels, height, width), got shape {tuple(images.shape)}.")
    if images.dtype not in (torch.uint8, *_backends.FLOATS):
        raise InvalidTypeError(f"patches takes uint8 or floating-point images, got {images.dtype}.")
    if dtype not in _backends.FLOATS:
        raise InvalidTypeError(f"patches returns floating-point rows, not {dtype}.")
    stride = (patch_size, patch_size) if stride is None else stride
    for name, size, step in zip(("height", "width"), images.shape[2:], stride, strict=True):
        if (size % patch_size and (size - patch_size) % step) or size < patch_size:
            raise InvalidValueError(
                f"Image {name} {size} is not a multiple of the patch size {patch_size} (shape {tuple(images.shape)}, "
                "read as batch, channels, height, width; pass channels-last images as images.permute(0, 3, 1, 2))."
            )
    width = images.shape[1] * patch_size**2
    padded_to = width if padded_to is None else padded_to
    if padded_to < width:
        raise InvalidValueError(f"padded_to is {padded_to}, but a patch has {width} values.")
    args = images, patch_size, stride, padded_to, dtype
    return PATCHES.choose("patches", args, backend).function(*args)


def patches_torch(
    images: Tensor, patch_size: int, stride: tuple[int, int], padded_to: int, dtype: torch.dtype
) -> Tensor:
    values = images.to(torch.promote_types(dtype, torch.float32))
    if images.dtype == torch.uint8:
        values = values - UINT8_SHIFT
    cut = values.to(dtype).unfold(2, patch_size, stride[0]).unfold(3, patch_size, stride[1])
    rows = cut.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # (batch, rows * columns, channels * p * p)
    return F.pad(rows, (0, padded_to - rows.shape[-1]))


def _patches_fake(images: Tensor, patch_size: int, padded_to: int, dtype: torch.dtype) -> Tensor:
    batch, _, height, width = images.shape
    return images.new_empty(batch, height // patch_size * (width // patch_size), padded_to, dtype=dtype)


def _refuses(images: Tensor, patch_size: int, stride: tuple[int, int], *rest: object) -> str | None:
    fits = stride == (patch_size, patch_size)
    return None if fits else f"cuts patches without overlap only, got a stride of {stride}"


def _sample(device: torch.device, dtype: torch.dtype) -> tuple[object, ...] | None:
    if dtype == E4M3:
        return None
    return torch.empty(1, 3, 224, 224, device=device, dtype=dtype), 14, (14, 14), 592, dtype


_patches = _registry.register(
    "patches(Tensor images, int patch_size, SymInt padded_to, ScalarType dtype) -> Tensor",
    _registry.launcher("patches", "patches_forward"),
    _patches_fake,
)


def patches_triton(images: Tensor, patch_size: int, stride: object, padded_to: int, dtype: torch.dtype) -> Tensor:
    return _patches(images, patch_size, padded_to, dtype)


PATCHES = Op(
    "patches",
    (
        Implementation("torch", patches_torch, has_backward=False, why=_backends.UNMEASURED),
        _backends.triton(patches_triton, _refuses, has_backward=False),
    ),
    {"patches": _sample},
)
