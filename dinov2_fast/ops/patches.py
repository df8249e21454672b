"""Images cut into rows, one for each patch, ready for the matrix product that embeds them. Inference only.

    rows[b, i * columns + j] = values[b, :, i*s : i*s + p, j*t : j*t + p], flattened (channel, line, pixel), then zeros

so that ``rows @ weight.flatten(1).T`` is what the convolution with `weight` and stride (s, t) computes; without overlap
s and t are the patch size p. The values are those of floating-point images, and x - 128 of uint8 images.

x - 128 is exact in every floating dtype. The engine moves the normalisation, (x / 255 - mean) / std, into the weight
and the bias (`inference.fold.fold_normalization`). The shift matters: on raw x in 0..255 the mean brightness, which the
bias has to take away again, multiplies the rounding error of every weight.
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
        images: (batch, channels, height, width), uint8 or floating point, with any strides: they are read in place, so
            images that lie channels last, (batch, height, width, channels), go in as ``images.permute(0, 3, 1, 2)``.
        patch_size: of square patches, in pixels; height and width are multiples of it, or end with a patch.
        stride: pixels from one patch to the next, down and across; default the patch size, that is no overlap.
        padded_to: columns of the result, the rest being zeros; default channels * patch_size ** 2 (588 for 3 x 14 x
            14; 592 is a multiple of 16 bytes in every dtype).
        dtype: of the result; the values are computed in fp32 (fp64 if it is fp64) and rounded once.
        backend: the implementation to use instead of the default.

    Returns:
        (batch, patches, padded_to), contiguous; along a side there are (size - patch_size) // stride + 1 patches.

    Raises:
        ValueError: wrong rank, a size that does not fit the patch size and the stride, or `padded_to` below the size of
            a patch.
        TypeError: `images` or `dtype` of an unsupported dtype.
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


def _patches_kernel(images: Tensor, patch_size: int, padded_to: int, dtype: torch.dtype) -> Tensor:
    from dinov2_fast.kernels.patches import patches_forward

    return patches_forward(images, patch_size, padded_to, dtype)


def _patches_fake(images: Tensor, patch_size: int, padded_to: int, dtype: torch.dtype) -> Tensor:
    batch, _, height, width = images.shape
    return images.new_empty(batch, height // patch_size * (width // patch_size), padded_to, dtype=dtype)


def _refuses(images: Tensor, patch_size: int, stride: tuple[int, int], *rest: object) -> str | None:
    return None if stride == (patch_size, patch_size) else f"cuts no patches that overlap, got a stride of {stride}"


def _sample(device: torch.device, dtype: torch.dtype) -> tuple[object, ...] | None:
    if dtype == E4M3:
        return None
    return torch.empty(1, 3, 224, 224, device=device, dtype=dtype), 14, (14, 14), 592, dtype


_patches = _registry.register(
    "patches(Tensor images, int patch_size, SymInt padded_to, ScalarType dtype) -> Tensor",
    _patches_kernel,
    _patches_fake,
)

PATCHES = Op(
    "patches",
    (
        Implementation("torch", patches_torch, trains=False, why=_backends.UNMEASURED),
        _backends.triton(lambda images, size, stride, *rest: _patches(images, size, *rest), _refuses, trains=False),
    ),
    {"patches": _sample},
)
