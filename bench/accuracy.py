"""The rule that results obey before they are timed: the same that the tests hold kernels to."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bench.workloads import E4M3

BITS = {E4M3: 4, torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}  # of precision


def worst_error(results: list[Tensor], reference: list[Tensor], usual: list[Tensor]) -> float:
    """The largest error of an element, relative to the largest element of its tensor.

    Raises:
        ValueError: an implementation's results are not those of the reference: another shape or dtype, or further from
            it than twice what torch in the same dtype (`usual`) is, and a rounding.
    """
    if [(y.shape, y.dtype) for y in results] != [(y.shape, y.dtype) for y in usual]:
        raise ValueError("the results have other shapes or dtypes than torch's")
    worst = 0.0
    for y, wide, plain in zip(results, reference, usual, strict=True):
        bits, largest, size = BITS[y.dtype], wide.double().abs().max().item(), wide.double().norm().item()
        wrong, allowed = (x.double() - wide.double() for x in (y, plain))
        ulp = 2.0 ** (math.floor(math.log2(max(largest, 1e-300))) + 1 - bits)
        if not wrong.abs().max() <= 2 * allowed.abs().max() + ulp:
            raise ValueError(f"an element is {wrong.abs().max():.3g} off, torch's worst {allowed.abs().max():.3g}")
        if not wrong.norm() <= 2 * allowed.norm() + size * 2.0**-bits:
            raise ValueError(
                f"the error is {wrong.norm() / size:.3g} of the result, torch's {allowed.norm() / size:.3g}"
            )
        worst = max(worst, wrong.abs().max().item() / max(largest, 1e-300))
    return worst
