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
    """What `Engine.calibrate` found.

    Attributes:
        scales: of each block.
        images: how many images they were measured on.
        checksum: of the model's weights at that time.
    """

    scales: tuple[Scales, ...]
    images: int
    checksum: int


@dataclass(frozen=True)
class EnginePlan:
    """The settings of an engine.

    Attributes:
        dtype: of activations and outputs.
        residual_dtype: of the residual stream.
        outputs: "auto", "cls" or "all".
        mean, std: of each channel, for the normalisation of uint8 images scaled to 0 to 1.
        max_tokens: how many tokens of a list run at a time, None for all.
        e4m3: whether the linears of the blocks have e4m3 operands.
        skip_layers: with `e4m3`, the indices of blocks that stay in `dtype`.
        calibration: with `e4m3`, where the scales of activations come from; None for constants.
        cuda_graphs: "auto", True or False.
        follow_weights: whether calls notice changes of the model.
    """

    dtype: torch.dtype
    residual_dtype: torch.dtype
    outputs: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    max_tokens: int | None = None
    e4m3: bool = False
    skip_layers: tuple[int, ...] = ()
    calibration: Calibration | None = None
    cuda_graphs: bool | str = "auto"
    follow_weights: bool = True

    @property
    def precision(self) -> str:
        """The precision by the name that `optimize_for_inference` takes."""
        return "fp8" if self.e4m3 else precision_name(self.dtype)


def precision_name(dtype: torch.dtype) -> str:
    """The precision with this dtype, such as "bf16"; torch's name of the dtype if there is none."""
    return next((name for name, known in PRECISIONS.items() if known == dtype), str(dtype))
