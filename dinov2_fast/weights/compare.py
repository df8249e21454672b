"""The difference between two checkpoints, and between two models on the same images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.layouts import ConversionPlan
from dinov2_fast.weights.architecture import read_tensor

Tokens = tuple[Tensor, Tensor]  # CLS (batch, hidden) and patches (batch, patches, hidden), after the final norm

# In models with registers, timm adds the CLS token's position into the CLS token: only the sum can be compared.
CLS, POSITIONS = "cls_token + its position", "positions of the patches"


@dataclass(frozen=True)
class WeightDifference:
    """What differs between the tensors of two checkpoints, named as in the layout "facebook".

    Values are compared, not dtypes. `worst` is the largest difference between elements, and `worst_key` names its
    tensor. `rounded` is ("a", "bfloat16") if rounding the first checkpoint to bfloat16 gives the second; "b" is the
    opposite direction.
    """

    compared: int
    different: tuple[str, ...]
    misshapen: tuple[str, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    worst: float
    worst_key: str
    rounded: tuple[str, str] | None


def compare_weights(a: ConversionPlan, b: ConversionPlan) -> WeightDifference:
    """Compares two checkpoints, each in any layout, one tensor at a time.

    A mask token that one of the layouts lacks is not compared.
    """
    merged = "timm" in (a.layout, b.layout)
    keys_a, keys_b = _keys(a, merged), _keys(b, merged)
    skipped = a.not_in_source | b.not_in_source
    different, misshapen, worst, worst_key = [], [], 0.0, ""
    roundings = {(side, dtype) for side in "ab" for dtype in (torch.float16, torch.bfloat16)}
    shared = [key for key in keys_a if key in keys_b and key not in skipped]
    for key in shared:
        x, y = _read(a, key), _read(b, key)
        if x.shape != y.shape:
            misshapen.append(f"{key} {tuple(x.shape)} and {tuple(y.shape)}")
            continue
        if torch.allclose(x.double(), y.double(), rtol=0, atol=0, equal_nan=True):
            continue
        distance = (x.double() - y.double()).abs().max().item()
        different.append(key)
        if not (distance <= worst or math.isnan(worst)):  # NaN is the worst
            worst, worst_key = distance, key
        roundings = {(side, dtype) for side, dtype in roundings if _is_rounded(side, dtype, x, y)}
    proven = different and not misshapen and roundings
    return WeightDifference(
        compared=len(shared),
        different=tuple(different),
        misshapen=tuple(misshapen),
        only_in_a=tuple(key for key in keys_a if key not in keys_b and key not in skipped),
        only_in_b=tuple(key for key in keys_b if key not in keys_a and key not in skipped),
        worst=worst,
        worst_key=worst_key,
        rounded=min((side, str(dtype).removeprefix("torch.")) for side, dtype in roundings) if proven else None,
    )


def _keys(plan: ConversionPlan, merged: bool) -> list[str]:
    names = {"cls_token": CLS, "pos_embed": POSITIONS} if merged else {}
    return [names.get(key, key) for key in plan.recipes]


def _read(plan: ConversionPlan, key: str) -> Tensor:
    if key == CLS:
        return read_tensor(plan, "cls_token") + read_tensor(plan, "pos_embed")[:, :1]
    return read_tensor(plan, "pos_embed")[:, 1:] if key == POSITIONS else read_tensor(plan, key)


def _is_rounded(side: str, dtype: torch.dtype, x: Tensor, y: Tensor) -> bool:
    """Whether rounding the tensor of `side` to `dtype` gives the other tensor."""
    fine, coarse = (x, y) if side == "a" else (y, x)
    return torch.equal(fine.to(dtype).double(), coarse.double())


@dataclass(frozen=True)
class TokenDifference:
    """The difference between two models' tokens.

    `worst` and `mean` are the largest and the mean difference between elements, divided by `std`, the standard
    deviation of all elements of the second model's tokens. The cosines compare whole tokens.
    """

    worst: float
    mean: float
    std: float
    cosine_worst: float
    cosine_mean: float


@dataclass(frozen=True)
class FeatureDifference:
    """The difference between two models on the same images, for CLS tokens and for patch tokens."""

    images: int
    cls: TokenDifference
    patches: TokenDifference

    @property
    def worst(self) -> float:
        """The larger of the two worst differences; NaN if one of them is NaN."""
        return math.nan if math.isnan(self.cls.worst) else max(self.patches.worst, self.cls.worst)


def compare_features(
    a: Callable[[Tensor], Tokens], b: Callable[[Tensor], Tokens], batches: Iterable[Tensor]
) -> FeatureDifference:
    """Runs two models on the same images.

    Args:
        a, b: functions from pixel values (batch, 3, height, width) to the normalised CLS token (batch, hidden) and
            patch tokens (batch, patches, hidden).
        batches: pixel values.

    Raises:
        ValueError: the models' tokens differ in shape, or there are no images.
    """
    images, tallies = 0, (_Tally(), _Tally())
    for batch in batches:
        images += len(batch)
        with torch.inference_mode():
            for tally, x, y in zip(tallies, a(batch), b(batch), strict=True):
                tally.add(x, y)
    if not images:
        raise InvalidValueError("There are no images to compare the models on.")
    return FeatureDifference(images, *(tally.result() for tally in tallies))


class _Tally:
    """The sums that a `TokenDifference` is computed from, in float64, over all batches."""

    def __init__(self) -> None:
        self.worst = self.total = self.sum = self.square = self.cosine_total = 0.0
        self.cosine_worst = math.inf
        self.elements = self.tokens = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        if x.shape != y.shape:
            raise InvalidValueError(
                f"The models differ in size: for the same images their tokens have the shapes {tuple(x.shape)} and "
                f"{tuple(y.shape)}. Compare models of one size."
            )
        x, y = x.double(), y.double()
        difference = (x - y).abs()
        cosine = F.cosine_similarity(x, y, dim=-1)
        self.worst = torch.maximum(difference.max(), difference.new_tensor(self.worst)).item()  # keeps NaN
        self.cosine_worst = torch.minimum(cosine.min(), cosine.new_tensor(self.cosine_worst)).item()
        self.total += difference.sum().item()
        self.sum += y.sum().item()
        self.square += y.square().sum().item()
        self.cosine_total += cosine.sum().item()
        self.elements += y.numel()
        self.tokens += cosine.numel()

    def result(self) -> TokenDifference:
        mean = self.sum / self.elements
        std = math.sqrt(max(self.square / self.elements - mean * mean, 0.0))
        unit = std or 1.0  # std is 0 for a model whose output is constant
        return TokenDifference(
            worst=self.worst / unit,
            mean=self.total / self.elements / unit,
            std=std,
            cosine_worst=self.cosine_worst,
            cosine_mean=self.cosine_total / self.tokens,
        )
