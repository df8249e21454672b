"""Pairs of a model of this package and of transformers with the same random weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from dinov2_fast import huggingface
from tests.helpers.small_models import filled

# The four kinds of DINOv2: with and without registers, with an MLP and with SwiGLU.
FAMILIES = ("Dinov2", "Dinov2WithRegisters")
KINDS = [(family, swiglu) for family in FAMILIES for swiglu in (False, True)]
KIND_NAMES = [f"{family}-{'swiglu' if swiglu else 'mlp'}" for family, swiglu in KINDS]
SIZES = [(224, 224), (518, 518), (224, 336), (98, 98), (60, 60)]  # 60 is no multiple of the patch size

# Nearly all of the difference comes from bicubic interpolation: torch computes the step between positions in float32,
# this package in float64, which makes 2e-5 on a position table of unit noise. All else agrees to 2e-6.
TOLERANCE = 3e-5


class Pair(NamedTuple):
    ours: Any
    theirs: Any

    @property
    def registers(self) -> int:
        return getattr(self.ours.config, "num_register_tokens", 0)


def small_config(swiglu: bool = False, **fields: Any) -> dict[str, Any]:
    """Heads of 64 channels, the published patch size and position table, few channels and blocks."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
    return {**sizes, "image_size": 518, "patch_size": 14, "use_swiglu_ffn": swiglu, **fields}


def our_class(family: str, task: str) -> Any:
    return getattr(huggingface, family + task)


def their_class(family: str, task: str) -> Any:
    return getattr(transformers, family + task)


def make_pair(family: str, task: str = "Model", **fields: Any) -> Pair:
    """Both models in eval mode, with `fields` of the configuration in place of those of `small_config`."""
    config = small_config(**fields)
    their_config = their_class(family, "Config")(**config, attn_implementation="eager")
    theirs = their_class(family, task)(their_config).eval()
    filled(theirs)
    ours = our_class(family, task)(our_class(family, "Config")(**config)).eval()
    ours.load_state_dict(theirs.state_dict())
    return Pair(ours, theirs)


def both(pair: Pair, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """The outputs of both models, without gradients."""
    with torch.no_grad():
        return pair.ours(*args, **kwargs), pair.theirs(*args, **kwargs)


def images(height: int, width: int | None = None, batch: int = 2, channels: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, height, width or height, generator=generator)


def worst(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two tensors, which must have the same shape and dtype."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    return (ours - theirs).abs().max().item() if ours.numel() else 0.0


def assert_close(ours: Any, theirs: Any, tolerance: float = TOLERANCE) -> None:
    """Compares tensors, or tuples of them, element by element."""
    if isinstance(theirs, Tensor):
        assert worst(ours, theirs) <= tolerance
        return
    assert type(ours) is type(theirs)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, tolerance)
