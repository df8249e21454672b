"""Checks that the engine, or another library, computes what a model computes.

Folded parts no longer run their own code, so a model may have only parts whose computation is known. What two
implementations compute is also compared on one small image.
"""

from __future__ import annotations

from inspect import isroutine
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_fast.errors import InvalidTypeError
from dinov2_fast.layers import has_hooks

# How much the outputs of two implementations may differ, relative to their norm: more than rounding does in a whole
# model, less than a changed setting does.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
MAX_TOKENS = 32  # the most that go through the blocks, also if the only size that the model takes has more


def expect(module: nn.Module, name: str, *kinds: type[nn.Module]) -> Any:
    """Returns `module` if its class is one of `kinds`. A subclass is refused, since it may compute something else."""
    if type(module) not in kinds:
        raise InvalidTypeError(
            f"{name} is a {type(module).__name__}; the engine can fold {' or '.join(kind.__name__ for kind in kinds)} "
            "only. Merge what was added to the model into its weights first, or use the model itself."
        )
    return module


def refuse_edits(model: nn.Module) -> None:
    """Refuses a model with hooks, or with methods replaced on an instance: the engine would not run them.

    A backbone may have its own `interpolate_pos_encoding`, which the engine calls.
    """
    for name, module in model.named_modules():
        where = name or "the model"
        if has_hooks(module):
            raise InvalidTypeError(
                f"{where} has a hook or its own forward, which the engine would not run; remove it first."
            )
        replaced = set(replaced_methods(module)) - {"interpolate_pos_encoding"}
        if replaced:
            raise InvalidTypeError(
                f"{where} has its own {min(replaced)}, set on the instance, which the engine would not run; remove it "
                "first, or use the model itself."
            )


def replaced_methods(module: nn.Module) -> list[str]:
    """The names of the methods of the class that an attribute of the instance replaces."""
    return [
        name
        for name, value in vars(module).items()
        if isroutine(defined := getattr(type(module), name, None)) and getattr(value, "__func__", None) is not defined
    ]


def refuse_tensors(model: nn.Module) -> None:
    """Refuses parameters and buffers of a tensor subclass (quantised, sharded) and those on the meta device."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if type(tensor) not in (Tensor, nn.Parameter):
            raise InvalidTypeError(
                f"{name} is a {type(tensor).__name__}; the engine can fold plain tensors only. Give the model as it "
                "was before it was quantised or sharded, or use the model itself."
            )
        if tensor.is_meta:
            raise InvalidTypeError(
                f"{name} is on the meta device, where tensors have no values, so there is nothing to fold: load the "
                "weights first, with load_state_dict(..., assign=True) or after to_empty."
            )


def small_image(patch_embed: Any, only_size: tuple[int, int] | None) -> Tensor:
    """An image of noise for one of our patch embeddings, always the same, (1, channels, height, width).

    It has three by two patches, or the size `only_size` (height, width) if the model takes no other.
    """
    size = only_size or tuple(count * patch for count, patch in zip((3, 2), patch_embed.patch_size, strict=True))
    return torch.randn(1, patch_embed.in_chans, *size, generator=torch.Generator().manual_seed(0))


def difference(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference divided by the norm of `expected`.

    It is infinite if the shapes differ, and 0 if `expected` is not finite, since then nothing can be compared.
    """
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    if not expected.isfinite().all():
        return 0.0
    return ((found - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float32).tiny)).item()


def mismatch(ours: Any, theirs: Any, allowed: float) -> str | None:
    """How the output of another library's method differs from that of our model, as a phrase; None if it does not.

    Outputs are tensors, tuples, lists or dictionaries of them, or exceptions that were raised. `allowed` is the largest
    `difference` that tensors may have.
    """
    if isinstance(theirs, Exception):
        return f"fails on a small image ({theirs})"
    if isinstance(ours, Exception):
        return f"takes an image that our model refuses ({ours})"
    if type(ours) is not type(theirs):
        return f"returns a {type(theirs).__name__} in place of a {type(ours).__name__}"
    if isinstance(theirs, Tensor):
        if ours.shape != theirs.shape:
            return f"returns {tuple(theirs.shape)} in place of {tuple(ours.shape)}"
        apart = difference(ours, theirs)
        return None if apart <= allowed else f"differs by {apart:.2g} of its norm on a small image"
    if isinstance(theirs, dict):
        if ours.keys() != theirs.keys():
            return f"returns {', '.join(map(str, theirs))} in place of {', '.join(map(str, ours))}"
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(theirs, list | tuple):
        if len(ours) != len(theirs):
            return f"returns {len(theirs)} outputs in place of {len(ours)}"
        parts = (mismatch(one, other, allowed) for one, other in zip(ours, theirs, strict=True))
        return next((part for part in parts if part), None)
    return None


@torch.no_grad()
def check_agreement(backbone: Any, folded: Any) -> None:
    """Compares the tokens of a folded backbone with those of the model's backbone, before and after the blocks.

    With e4m3 operands they are compared only before the blocks, since the errors of blocks depend on the calibration.
    """
    if any(module.training for module in backbone.modules()):
        return  # it drops paths at random
    embed = folded.patch_embed
    takes_one_size = getattr(embed, "strict_img_size", False)  # timm's
    image = small_image(embed, embed.img_size if takes_one_size else None)
    tokens, expected = (each.prepare_tokens_with_masks(image.to(each.cls_token)) for each in (folded, backbone))
    folded._sizes.clear()  # frees the position embeddings for the size of this image
    apart = [difference(tokens, expected)]
    if not folded.plan.e4m3:
        ran = (each.norm(each._run_blocks(x[:, :MAX_TOKENS])) for each, x in ((folded, tokens), (backbone, expected)))
        apart.append(difference(*ran))
    allowed = 3 * max(TOLERANCES.get(dtype, 0.0) for dtype in (folded.plan.dtype, backbone.cls_token.dtype))
    wrong = [found for found in apart if not found <= allowed]  # also NaN
    if wrong:
        raise InvalidTypeError(
            f"The engine's features of a small image differ from the model's by {wrong[0]:.2g} of their norm, and "
            f"rounding explains at most {allowed:g}: part of the model does not compute what its class does, or its "
            "values are beyond the range of the precision. Use another precision, or the model itself."
        )
