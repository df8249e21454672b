"""``dinov2-fast knn``: how well the nearest neighbours of images predict their classes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from dinov2_fast.cli import evaluation, options

HELP = "evaluate features by their nearest neighbours"
DESCRIPTION = f"""\
Classifies the images of VAL by their nearest neighbours among those of TRAIN,
as DINOv2 is evaluated: the k nearest by the cosine of their CLS tokens vote for
their classes, each with a weight of exp(cosine / temperature). Without VAL each
image of TRAIN is classified by the others.

With VAL and --n-per-class only some images of TRAIN vote: that many of each
class, or all of a smaller class, chosen at random. The mean of --n-tries
choices is shown. k then takes the value of --n-per-class and each value of --k
below it.

{evaluation.SOURCES}
"""
EPILOG = """\
examples:
  dinov2-fast knn photos/train photos/val --model dinov2_vits14
  dinov2-fast knn photos/ --model dinov2_vits14 --k 5,20
  dinov2-fast knn photos/train photos/val --model dinov2_vits14 \\
      --n-per-class 1,5,all --n-tries 5
  dinov2-fast knn features/train features/val --json knn.json

Top 1 and top 5 are the percentages of images whose class comes first, and
among the first five. A tie counts as wrong.

Exit codes: 0 all good, 1 not possible, 2 wrong usage, 3 some images have no
features and are left out, 130 interrupted.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("train", metavar="TRAIN", help="the images that vote")
    parser.add_argument("val", nargs="?", metavar="VAL", help="the images to classify")
    parser.add_argument(
        "--k",
        dest="neighbours",
        type=options.counts,
        metavar="N,N",
        help="how many neighbours vote (default: those of 10,20,100,200 that TRAIN has)",
    )
    parser.add_argument("--temperature", type=options.positive, default=0.07, metavar="T", help="(default: 0.07)")
    parser.add_argument(
        "--n-per-class",
        type=options.counts_or_all,
        default=[None],
        metavar="N,N",
        help="how many images of each class of TRAIN vote (default: all)",
    )
    parser.add_argument(
        "--n-tries",
        type=options.at_least(1),
        default=1,
        metavar="N",
        help="random choices to average over (default: 1)",
    )
    evaluation.add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluates and prints the accuracies; 0, or 3 if images had to be left out."""
    from dinov2_fast.evaluation.evaluate import evaluate_knn

    sets, accuracies = evaluate_knn(**evaluation.keywords(args))
    rows = [
        {"n_per_class": number, "k": k, "top1": 100 * top1, "top5": 100 * top5}
        for number, by_k in accuracies.items()
        for k, (top1, top5) in by_k.items()
    ]
    settings = {"temperature": args.temperature, "n_tries": args.n_tries}
    return evaluation.print_results("knn", args, sets, table(rows), settings, {"results": rows})


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracies in percent by k, and by the number of images of each class where that was chosen."""
    few = any(row["n_per_class"] for row in rows)
    lines = ["per class " * few + f"{'k':>5} {'top 1':>7} {'top 5':>7}"]
    for row in rows:
        number = f"{row['n_per_class'] or 'all':>9} " * few
        lines.append(number + f"{row['k']:5d} {row['top1']:7.2f} {row['top5']:7.2f}")
    return "\n".join(lines)
