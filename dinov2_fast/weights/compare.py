"""How far apart two checkpoints are, and two models on the same images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.layouts import Plan
from dinov2_fast.weights.architecture import read_tensor

Tokens = tuple[Tensor, Tensor]  # CLS (batch, hidden) and patches (batch, patches, hidden), after the final norm

# timm adds the CLS token's position into the CLS token of models with registers: only their sum can be compared.
CLS, POSITIONS = "cls_token + its position", "positions of the patches"


@dataclass(frozen=True)
class WeightDifference:
    """What differs between the tensors of two checkpoints, by the names of the layout "facebook".

    `worst` is the largest difference of an element, and `worst_key` where it is. `rounded` is ("a", "bfloat16") where
    the values of the first, rounded to that dtype, are those of the second in every tensor; "b" for the other way.
    """

    compared: int
    different: tuple[str, ...]
    misshapen: tuple[str, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    worst: float
    worst_key: str
    rounded: tuple[str, str] | None

    @property
    def is_same(self) -> bool:
        """Every tensor is in both and has the same values."""
        return not (self.different or self.misshapen or self.only_in_a or self.only_in_b)


def compare_weights(a: Plan, b: Plan) -> WeightDifference:
    """Compares the tensors of two checkpoints in whatever layouts they are, one at a time.

    A mask token that one of the layouts lacks is not compared.
    """
    merged = "timm" in (a.layout, b.layout)
    keys_a, keys_b = _keys(a, merged), _keys(b, merged)
    skipped = a.made_up | b.made_up
    different, misshapen, worst, worst_key = [], [], 0.0, ""
    roundings = {(side, dtype) for side in "ab" for dtype in (torch.float16, torch.bfloat16)}
    shared = [key for key in keys_a if key in keys_b and key not in skipped]
    for key in shared:
        x, y = _read(a, key), _read(b, key)
        if x.shape != y.shape:
            misshapen.append(f"{key} {tuple(x.shape)} and {tuple(y.shape)}")
            continue
        distance = (x.double() - y.double()).abs().max().item() if x.numel() else 0.0
        if distance == 0:
            continue
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


def _keys(plan: Plan, merged: bool) -> list[str]:
    names = {"cls_token": CLS, "pos_embed": POSITIONS} if merged else {}
    return [names.get(key, key) for key in plan.recipes]


def _read(plan: Plan, key: str) -> Tensor:
    if key == CLS:
        return read_tensor(plan, "cls_token") + read_tensor(plan, "pos_embed")[:, :1]
    return read_tensor(plan, "pos_embed")[:, 1:] if key == POSITIONS else read_tensor(plan, key)


def _is_rounded(side: str, dtype: torch.dtype, x: Tensor, y: Tensor) -> bool:
    """Whether the one called `side` becomes the other when it is rounded to `dtype`."""
    fine, coarse = (x, y) if side == "a" else (y, x)
    return torch.equal(fine.to(dtype).double(), coarse.double())


@dataclass(frozen=True)
class TokenDifference:
    """Tokens of two models: the worst and the mean difference of an element, as shares of `std`, and the cosines.

    `std` is the standard deviation of all elements of the second model's tokens.
    """

    worst: float
    mean: float
    std: float
    cosine_worst: float
    cosine_mean: float


@dataclass(frozen=True)
class FeatureDifference:
    """What two models make of the same images: of the CLS tokens, and of the patch tokens."""

    images: int
    cls: TokenDifference
    patches: TokenDifference

    @property
    def worst(self) -> float:
        """The larger of the two worst differences; NaN if there is one."""
        return math.nan if math.isnan(self.cls.worst) else max(self.patches.worst, self.cls.worst)


def compare_features(
    a: Callable[[Tensor], Tokens], b: Callable[[Tensor], Tokens], batches: Iterable[Tensor]
) -> FeatureDifference:
    """Runs two models on the same images.

    Args:
        a, b: from pixel values (batch, 3, height, width) to the normed CLS token (batch, hidden) and patch tokens
            (batch, patches, hidden).
        batches: pixel values.

    Raises:
        ValueError: the models' tokens differ in number or size, or there are no images.
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
    """What a `TokenDifference` needs, collected over batches in float64."""

    def __init__(self) -> None:
        self.worst = self.total = self.sum = self.square = self.cosine_total = 0.0
        self.cosine_worst = math.inf
        self.elements = self.tokens = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        if x.shape != y.shape:
            raise InvalidValueError(
                f"For the same images the models give tokens of the shapes {tuple(x.shape)} and {tuple(y.shape)}: "
                "they are models of different sizes."
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
        unit = std or 1.0  # a model that gives the same number everywhere
        return TokenDifference(
            worst=self.worst / unit,
            mean=self.total / self.elements / unit,
            std=std,
            cosine_worst=self.cosine_worst,
            cosine_mean=self.cosine_total / self.tokens,
        )
