"""``dinov2-fast verify``: compares two checkpoints, or a checkpoint and another implementation, on images."""

from __future__ import annotations

import argparse
import math
import sys
from typing import TYPE_CHECKING

from dinov2_fast.cli import options
from dinov2_fast.cli.process import ABORTED, OK, SOME_FAILED

if TYPE_CHECKING:
    from dinov2_fast.verify import Verification
    from dinov2_fast.weights.compare import FeatureDifference, WeightDifference

TOLERANCE = 1e-3
ROUNDING = 1e-4  # what fp32 reaches when the same sums are taken in another order
HELP = "compare two checkpoints, or one and another implementation"
DESCRIPTION = """\
Compares two DINOv2 checkpoints, in any layout, or a checkpoint and another
implementation: their weights, and their features of your images.

A and B are checkpoint files, folders, hub ids, or names such as dinov2_vits14.
B may be `transformers` or `timm` instead: that library's own model with the
weights of A. With `transformers:MODEL` and `timm:MODEL` the library loads
MODEL itself.

Both run in fp32 on the same pixels. Differences of features are in standard
deviations of B's, so they mean the same for every model.
"""
EPILOG = """\
examples:
  dinov2-fast verify original.pth converted.safetensors photos/
  dinov2-fast verify dinov2_vits14 transformers photos/
  dinov2-fast verify my-finetuned/ facebook/dinov2-base photo.jpg --size 518

Exit codes: 0 the same within the tolerance, 1 different (or not comparable:
the reason is on stderr), 2 wrong usage, 3 the same, but some images cannot be
read and were left out, 130 interrupted.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("a", metavar="A", help="a checkpoint")
    parser.add_argument("b", metavar="B", help="a checkpoint, transformers[:MODEL] or timm[:MODEL]")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="images, or where they are, as for extract")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="X",
        help="largest difference of one element, in standard deviations, that counts as the same "
        f"(default: {TOLERANCE:g}; rounding in fp32 usually stays below {ROUNDING:g})",
    )
    options.add_size(parser, default=224)
    options.add_position_interpolation(parser)
    options.add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Compares and prints what differs; 0 or 3 if the features are the same within the tolerance, else 1."""
    from dinov2_fast.verify import verify

    found = verify(**options.keywords(args))
    print(f"A: {found.a}\nB: {found.b}")
    if found.weights is not None:
        print(f"Weights: {in_words(found.weights)}")
    if found.features is None:
        assert found.error is not None
        raise found.error
    print(f"\n{_table(found, found.features, args.size)}\n\n{_verdict(found.features, args.tolerance)}")
    if found.failures:
        print(f"\nLeft out:\n{found.failures}", file=sys.stderr)
    if found.features.worst <= args.tolerance:
        return SOME_FAILED if found.failures else OK
    if found.agreeing:
        name, worst = found.agreeing
        print(
            "Only the resampling of positions differs: A resamples them as "
            f"{found.position_interpolation!r}, and with\n--position-interpolation {name} it agrees with B (worst "
            f"difference {worst:.2g})."
        )
    return ABORTED


def in_words(weights: WeightDifference) -> str:
    """What differs between two sets of weights."""
    parts = []
    if weights.misshapen:
        parts.append(f"of other shapes: {_some(weights.misshapen)}")
    for side, keys in (("A", weights.only_in_a), ("B", weights.only_in_b)):
        if keys:
            parts.append(f"only in {side}: {_some(keys)}")
    if weights.rounded is not None:
        fine, dtype = weights.rounded
        coarse = "B" if fine == "a" else "A"
        parts.append(f"{coarse} has the values of {fine.upper()} rounded to {dtype}")
    elif weights.different == ("mask_token",):
        parts.append("the same except for the mask token, which is used only where patches are masked")
    elif weights.different:
        parts.append(
            f"{len(weights.different)} of {weights.compared} tensors differ ({_some(weights.different)}), at most by "
            f"{weights.worst:.3g} in {weights.worst_key}"
        )
    if not weights.different and not weights.misshapen:
        parts.append(f"{weights.compared} tensors have the same values")
    return "; ".join(parts)


def _verdict(difference: FeatureDifference, tolerance: float) -> str:
    worst = difference.worst
    if worst == 0:
        return "The features are the same, bit for bit."
    if math.isnan(worst):
        return "DIFFERENT: some features are NaN."
    if worst > tolerance:
        return f"DIFFERENT: the worst difference is {worst:.2g}, the tolerance {tolerance:g}."
    if worst <= ROUNDING:
        return f"The features are the same up to rounding: the worst difference is {worst:.2g}."
    return f"The features are the same within the tolerance of {tolerance:g}: the worst difference is {worst:.2g}."


def _table(found: Verification, difference: FeatureDifference, size: tuple[int, int]) -> str:
    lines = [
        f"{difference.images} image(s) of {size[0]} x {size[1]}, fp32, {found.device}; differences in "
        "standard deviations of B",
        f"{'':14}{'worst':>10}{'mean':>10}{'cosine: smallest':>19}{'mean':>10}{'std of B':>11}",
    ]
    for name, tokens in (("CLS token", difference.cls), ("patch tokens", difference.patches)):
        lines.append(
            f"{name:14}{tokens.worst:>10.2g}{tokens.mean:>10.2g}{tokens.cosine_worst:>19.6f}{tokens.cosine_mean:>10.6f}"
            f"{tokens.std:>11.3g}"
        )
    return "\n".join(lines)


def _some(keys: tuple[str, ...]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
