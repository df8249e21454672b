"""``dinov2-fast knn``: how well the nearest neighbours of images tell their classes."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

from dinov2_fast.cli import labelled
from dinov2_fast.cli.extract import SOME_FAILED
from dinov2_fast.cli.options import at_least
from dinov2_fast.errors import InvalidValueError

DESCRIPTION = f"""\
Classifies the images of VAL by their nearest neighbours among those of TRAIN,
as DINOv2 is evaluated: the k nearest by the cosine of their CLS tokens vote for
their classes, each with a weight of exp(cosine / temperature). Without VAL each
image of TRAIN is classified by the others.

With --n-per-class few images of TRAIN vote: so many of each class, or all of
a smaller one, chosen at random, with the mean of --n-tries choices. k is then
that number, and the values of --k below it.

{labelled.SOURCES}
"""
EPILOG = """\
examples:
  dinov2-fast knn photos/train photos/val --model dinov2_vits14
  dinov2-fast knn photos/ --model dinov2_vits14 --k 5,20
  dinov2-fast knn photos/train photos/val --model dinov2_vits14 \\
      --n-per-class 1,5,all --n-tries 5
  dinov2-fast knn features/train features/val --json knn.json

Top 1 and top 5 are the percentages of images whose class comes first, and
among the first five. A tie counts against.

Exit codes: 0 all good, 1 not possible, 2 wrong usage, 3 some images have no
features and are left out, 130 interrupted.
"""


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "knn",
        help="evaluate features by their nearest neighbours",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("train", metavar="TRAIN", help="the neighbours")
    parser.add_argument("val", nargs="?", metavar="VAL", help="what they classify")
    parser.add_argument(
        "--k",
        type=labelled.counts,
        metavar="N,N",
        help="how many neighbours vote (default: those of 10,20,100,200 that TRAIN has)",
    )
    parser.add_argument("--temperature", type=_positive, default=0.07, metavar="T", help="(default: 0.07)")
    parser.add_argument(
        "--n-per-class",
        type=_shots,
        default=[None],
        metavar="N,N",
        help="how many images of each class of TRAIN vote (default: all)",
    )
    parser.add_argument(
        "--n-tries", type=at_least(1), default=1, metavar="N", help="choices of these images (default: 1)"
    )
    labelled.add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluates; 0, or 3 if images had to be left out."""
    from dinov2_fast.evaluation.evaluate import NEIGHBOURS, knn
    from dinov2_fast.inference.loading import find_device

    if args.val is None and args.n_per_class != [None]:
        raise InvalidValueError("--n-per-class needs VAL: without it all images of TRAIN but one vote.")
    read = labelled.read_all(args, [args.train] if args.val is None else [args.train, args.val], blocks=1)
    labels = labelled.classes_of(read)
    pairs = [value for each, numbers in zip(read, labels, strict=True) for value in (each.tokens.cls[:, -1], numbers)]
    most = len(read[0].names) - (args.val is None)
    rows = []
    for n_per_class in args.n_per_class:
        found = knn(
            *pairs,
            neighbours=args.k or ([k for k in NEIGHBOURS if k <= most] or [most]),
            temperature=args.temperature,
            n_per_class=n_per_class,
            n_tries=args.n_tries,
            device=find_device(args.device),
        )
        rows += [
            {"n_per_class": n_per_class, "k": k, "top1": 100 * top1, "top5": 100 * top5}
            for k, (top1, top5) in found.items()
        ]
    results = {"task": "knn", **read[0].model.describe(), "temperature": args.temperature, "n_tries": args.n_tries}
    results |= {"train": read[0].describe(), "val": read[1].describe() if args.val else None, "results": rows}
    labelled.report(args, read, table(rows), results)
    return SOME_FAILED if any(each.failures for each in read) else 0


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracies in percent by k, and by the number of images of a class where that was chosen."""
    few = any(row["n_per_class"] for row in rows)
    lines = ["per class " * few + f"{'k':>5} {'top 1':>7} {'top 5':>7}"]
    for row in rows:
        number = f"{row['n_per_class'] or 'all':>9} " * few
        lines.append(number + f"{row['k']:5d} {row['top1']:7.2f} {row['top5']:7.2f}")
    return "\n".join(lines)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _shots(text: str) -> list[int | None]:
    """Numbers of images with commas between them; None for ``all``."""
    return [number for part in text.split(",") for number in ([None] if part == "all" else labelled.counts(part))]
