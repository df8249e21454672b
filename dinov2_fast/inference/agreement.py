"""Whether an engine computes what its model does, tried on one small image when the engine is made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# How far features may be from those of the model, relative to their norm: many times the rounding errors of a dtype,
# and less than what a changed setting does.
TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 0.15}


def small_image(patch_size: tuple[int, int], channels: int = 3) -> Tensor:
    """Noise of three by two patches, (1, channels, height, width)."""
    height, width = 3 * patch_size[0], 2 * patch_size[1]
    return torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0))


def difference(features: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of `expected`; infinite where the shapes differ.

    Where `expected` is not finite there is nothing to compare, and the difference is 0.
    """
    if features.shape != expected.shape:
        return float("inf")
    features, expected = features.detach().double().cpu(), expected.detach().double().cpu()
    if not expected.isfinite().all():
        return 0.0
    return ((features - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float32).tiny)).item()


@torch.no_grad()
def check_agreement(backbone: Any, folded: Any) -> None:
    """Compares the tokens of a folded backbone with those of the model's backbone.

    With e4m3 operands these are the tokens before the blocks: what the blocks lose depends on a calibration to come.

    Raises:
        TypeError: they differ by more than rounding explains.
    """
    if any(module.training for module in backbone.modules()):
        return  # what it drops is random
    plan, dtype = folded.plan, backbone.cls_token.dtype
    image = small_image(backbone.patch_embed.patch_size, folded.patch_embed.in_chans)
    tokens, expected = (each.prepare_tokens_with_masks(image.to(each.cls_token)) for each in (folded, backbone))
    folded._sizes.clear()  # where it keeps what it made for the size of this image
    if not plan.e4m3:
        tokens, expected = (each.norm(each._run_blocks(x)) for each, x in ((folded, tokens), (backbone, expected)))
    found, allowed = difference(tokens, expected), max(TOLERANCES[plan.dtype], TOLERANCES.get(dtype, 0.0))
    if not found <= allowed:
        raise TypeError(
            f"The engine's features of a small image differ from the model's by {found:.2g} of their norm, and "
            f"rounding explains at most {allowed:g}: part of the model computes something else than its class, or its "
            "values are beyond the range of the precision. Use another precision, or the model itself."
        )
