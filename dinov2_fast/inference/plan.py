"""The settings of an engine, as `optimize_for_inference` checked them. Every other file of the engine may read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

# The dtype of activations and outputs. With fp8 only operands of matrix products are in e4m3.
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.bfloat16}


class Scales(NamedTuple):
    """The powers of two by which two activations of a block are divided before they become e4m3.

    Manifests of features hold a hash of the `repr`, so the names of the class and of its fields must stay.
    """

    attention: float  # of the attention's output, which proj reads
    hidden: float  # of the MLP's hidden activation, which fc2 or w3 reads


@dataclass(frozen=True)
class Calibration:
    """What `Engine.calibrate` found."""

    scales: tuple[Scales, ...]  # of each block
    images: int  # how many they were measured on
    checksum: int  # of the model's weights at that time


@dataclass(frozen=True)
class EnginePlan:
    """The settings of an engine; `optimize_for_inference` explains them."""

    dtype: torch.dtype  # of activations and outputs
    residual_dtype: torch.dtype
    outputs: str
    mean: tuple[float, ...]  # of each channel, for uint8 images scaled to 0 to 1
    std: tuple[float, ...]  # likewise
    max_tokens: int | None = None
    e4m3: bool = False  # whether the linears of the blocks have e4m3 operands
    skip_layers: tuple[int, ...] = ()
    calibration: Calibration | None = None  # with `e4m3`: the scales of activations; None for constants
    cuda_graphs: bool | str = "auto"
    follow_weights: bool = True

    @property
    def precision(self) -> str:
        """The precision by the name that `optimize_for_inference` takes."""
        return "fp8" if self.e4m3 else precision_name(self.dtype)


def auto_precision(device: torch.device) -> str:
    """The precision that "auto" stands for on a device."""
    return "bf16" if device.type == "cuda" else "fp32"


def precision_name(dtype: torch.dtype) -> str:
    """The precision with this dtype, such as "bf16"; torch's name of the dtype if there is none."""
    return next((name for name, known in PRECISIONS.items() if known == dtype), str(dtype))
