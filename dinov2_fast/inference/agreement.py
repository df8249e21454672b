"""Whether two models compute the same, tried on one small image: an engine and what it stands in for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dinov2_fast.errors import InvalidTypeError

# How far the outputs of two implementations may be apart, relative to their norm: some times what rounding does in a
# whole model, and less than what a changed setting does.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
SMALL = (3, 2)  # rows and columns of patches
FEW = 32  # tokens that go through the blocks, where an image of the one size that is taken has many


def small_image(patch_embed: Any, only_size: tuple[int, int] | None) -> Tensor:
    """An image of noise for a patch embedding of ours, the same each time, (1, channels, height, width).

    It is of three by two patches, or of the one size (height, width) that is taken.
    """
    size = only_size or tuple(count * patch for count, patch in zip(SMALL, patch_embed.patch_size, strict=True))
    return torch.randn(1, patch_embed.in_chans, *size, generator=torch.Generator().manual_seed(0))


def difference(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of `expected`; infinite where the shapes differ.

    Where `expected` is not finite there is nothing to compare, and the difference is 0.
    """
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    if not expected.isfinite().all():
        return 0.0
    return ((found - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float32).tiny)).item()


def mismatch(found: Any, expected: Any, allowed: float) -> str | None:
    """How outputs differ, in tensors or in the tuples, lists and dictionaries around them; None if they do not."""
    if type(found) is not type(expected):
        return f"returns a {type(expected).__name__} in place of a {type(found).__name__}"
    if isinstance(expected, Tensor):
        apart = difference(found, expected)
        if apart == float("inf"):
            return f"returns {tuple(expected.shape)} in place of {tuple(found.shape)}"
        return None if apart <= allowed else f"differs by {apart:.2g} of its norm on a small image"
    if isinstance(expected, dict):
        if found.keys() != expected.keys():
            return f"returns {', '.join(map(str, expected))} in place of {', '.join(map(str, found))}"
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list | tuple):
        if len(found) != len(expected):
            return f"returns {len(expected)} outputs in place of {len(found)}"
        parts = (mismatch(ours, theirs, allowed) for ours, theirs in zip(found, expected, strict=True))
        return next((part for part in parts if part), None)
    return f"fails on a small image ({expected})" if isinstance(expected, Exception) else None


@torch.no_grad()
def check_agreement(backbone: Any, folded: Any) -> None:
    """Compares the tokens of a folded backbone with those of the model's backbone, before the blocks and after them.

    With e4m3 operands only before: what the blocks lose depends on a calibration to come.

    Raises:
        TypeError: they differ by more than rounding explains.
    """
    if any(module.training for module in backbone.modules()):
        return  # what it drops is random
    embed = folded.patch_embed
    takes_one_size = getattr(embed, "strict_img_size", False)  # timm's
    image = small_image(embed, embed.img_size if takes_one_size else None)
    tokens, expected = (each.prepare_tokens_with_masks(image.to(each.cls_token)) for each in (folded, backbone))
    folded._sizes.clear()  # where it keeps what it made for the size of this image
    apart = [difference(tokens, expected)]
    if not folded.plan.e4m3:
        ran = (each.norm(each._run_blocks(x[:, :FEW])) for each, x in ((folded, tokens), (backbone, expected)))
        apart.append(difference(*ran))
    allowed = 3 * max(TOLERANCES.get(dtype, 0.0) for dtype in (folded.plan.dtype, backbone.cls_token.dtype))
    wrong = [found for found in apart if not found <= allowed]  # NaN is
    if wrong:
        raise InvalidTypeError(
            f"The engine's features of a small image differ from the model's by {wrong[0]:.2g} of their norm, and "
            f"rounding explains at most {allowed:g}: part of the model computes something else than its class, or its "
            "values are beyond the range of the precision. Use another precision, or the model itself."
        )
