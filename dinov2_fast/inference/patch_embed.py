"""The engine's patch embedding: one matrix product, for normalised images and for uint8 ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_fast import ops
from dinov2_fast.errors import InvalidTypeError, InvalidValueError
from dinov2_fast.inference.checks import expect
from dinov2_fast.inference.fold import FoldedLinear, FoldedModule, clone_without_tensors, fold_normalization, rounded
from dinov2_fast.inference.plan import EnginePlan
from dinov2_fast.layers import PatchEmbed
from dinov2_fast.timm_adapter.layers import TimmPatchEmbed

ALIGNMENT = 16  # the values of a patch are padded to a multiple of this (588 to 592), for aligned loads of the kernels


class FoldedPatchEmbed(FoldedModule, PatchEmbed):
    """The patch embedding as one matrix product."""

    proj: FoldedLinear  # type: ignore[assignment]  # for normalised images; a convolution in the model
    proj_uint8: FoldedLinear | None  # for uint8 images, with the normalisation; None for other than three channels
    stride: Any = None  # of the model's convolution, (vertical, horizontal)

    @classmethod
    def of(cls, module: nn.Module, plan: EnginePlan) -> FoldedPatchEmbed:
        """Folds the patch embedding of a model."""
        convolution = _plain_convolution(expect(module, "patch_embed", PatchEmbed, TimmPatchEmbed))
        made = clone_without_tensors(module, cls)
        made.in_chans, made.stride = convolution.in_channels, module.stride
        weight, bias = convolution.weight.double(), convolution.bias
        padded_to = -(-weight[0].numel() // ALIGNMENT) * ALIGNMENT
        rows = F.pad(weight.flatten(1), (0, padded_to - weight[0].numel()))
        constant = torch.zeros(len(rows)).to(rows) if bias is None else bias.double()
        made.proj = FoldedLinear(rounded(rows, plan.dtype), rounded(constant, torch.float32))
        made.proj_uint8 = None
        if len(plan.mean) == made.in_chans:
            mean, std = (torch.tensor(values).to(rows) for values in (plan.mean, plan.std))
            folded = fold_normalization(weight.detach(), bias, mean, std, plan.dtype, padded_to)
            made.proj_uint8 = FoldedLinear(folded[0], rounded(folded[1], torch.float32))
        return made

    def proj_for(self, x: Tensor) -> FoldedLinear:
        """The projection for images of the dtype of `x`."""
        if x.dtype != torch.uint8:
            return self.proj
        if self.proj_uint8 is None:
            raise InvalidValueError(
                f"The engine normalises uint8 images of 3 channels, and this model takes {self.in_chans}: give it "
                "normalised images in a floating-point dtype."
            )
        return self.proj_uint8

    def project(self, x: Tensor) -> Tensor:
        """The patches of images multiplied by the weight of `proj_for`, without its bias: (batch, patches, hidden)."""
        self.check(torch.empty(x.shape, device="meta") if x.dtype == torch.uint8 else x)
        weight = self.proj_for(x).weight
        rows = ops.patches(x, self.patch_size[0], stride=self.stride, padded_to=weight.shape[1], dtype=weight.dtype)
        return ops.linear(rows, weight, None)

    def forward(self, x: Tensor) -> Tensor:
        patches, bias = self.project(x), self.proj_for(x).bias
        return patches if bias is None else patches + bias.to(patches.dtype)


def _plain_convolution(module: PatchEmbed) -> nn.Conv2d:
    """The convolution of a patch embedding. Raises `TypeError` unless it multiplies square patches by a matrix."""
    convolution = expect(module.proj, "patch_embed.proj", nn.Conv2d)
    expect(module.norm, "patch_embed.norm", nn.Identity)
    size = module.patch_size
    square = convolution.kernel_size == size and size[0] == size[1]
    plain = convolution.padding == (0, 0) and convolution.dilation == (1, 1) and convolution.groups == 1
    if not (square and plain and (module.flatten_embedding or type(module) is TimmPatchEmbed)):
        raise InvalidTypeError(
            f"patch_embed.proj is {convolution} for patches of {size}; the engine needs a kernel of one "
            "square patch without padding, dilation or groups, and flatten_embedding=True."
        )
    return convolution
