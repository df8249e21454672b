"""Pairs of a model of this package and timm's own, with the same random weights, to compare them on."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dinov2_fast import create_model
from dinov2_fast.weights.load import RandomWeights

NAMES = ("vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_giant_patch14_dinov2")
SMALL = {"embed_dim": 128, "depth": 4, "num_heads": 2}
TOLERANCE = {"atol": 5e-5, "rtol": 0.0}  # torch resamples positions in fp32, see tests/helpers/huggingface_peers.py


class Pair(NamedTuple):
    ours: Any
    theirs: Any


def make_pair(name: str = NAMES[0], **kwargs: Any) -> Pair:
    """Small models of both libraries with the same random weights, in eval mode."""
    timm = pytest.importorskip("timm", reason="compares with timm, which is not installed")
    timms = {"mlp_ratio": 688 / 128} if "giant" in name else {}  # timm does not round up to a multiple of 8
    theirs = timm.create_model(name, **SMALL, **timms, **{"dynamic_img_size": True, **kwargs}).eval()
    theirs.load_state_dict(dict(RandomWeights(theirs, 0)))
    ours = create_model(name, **SMALL, **kwargs).eval()
    ours.load_state_dict(theirs.state_dict())
    return Pair(ours, theirs)


def images(height: int, width: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(height + width)
    return torch.randn(batch, 3, height, width, generator=generator)


def assert_close(ours: Any, theirs: Any) -> None:
    """Compares tensors, and lists, tuples and dictionaries of them, which must be of the same kind."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert_close(ours[key], theirs[key])
    else:
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_close(one, other)
