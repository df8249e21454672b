"""``dinov2-fast knn``: how well the nearest neighbours of pictures tell their classes."""

from __future__ import annotations

import argparse
from typing import Any

from dinov2_fast.cli import labelled
from dinov2_fast.cli.extract import SOME_FAILED
from dinov2_fast.cli.options import at_least

DESCRIPTION = f"""\
Classifies the pictures of VAL by their nearest neighbours among those of TRAIN,
as DINOv2 is evaluated: the k nearest by the cosine of their CLS tokens vote for
their classes, each with a weight of exp(cosine / temperature). Without VAL each
picture of TRAIN is classified by the others.

{labelled.SOURCES}
"""
EPILOG = """\
examples:
  dinov2-fast knn photos/train photos/val --model dinov2_vits14
  dinov2-fast knn photos/ --model dinov2_vits14 --k 5,20
  dinov2-fast knn features/train features/val --json knn.json

Top 1 and top 5 are the percentages of pictures whose class comes first, and
among the first five. A tie counts against.

Exit codes: 0 all good, 1 not possible, 2 wrong usage, 3 some pictures have no
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
        type=_numbers,
        metavar="N,N",
        help="how many neighbours vote (default: those of 10,20,100,200 that TRAIN has)",
    )
    parser.add_argument("--temperature", type=float, default=0.07, metavar="T", help="(default: 0.07)")
    labelled.add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluates; 0, or 3 if pictures had to be left out."""
    from dinov2_fast.evaluate import NEIGHBOURS, knn
    from dinov2_fast.extraction.extractor import find_device

    folders = [args.train] if args.val is None else [args.train, args.val]
    read, weights = labelled.read_all(args, folders, blocks=1)
    labels = labelled.classes_of(read[0], read[1:])
    features = [each.tokens.cls[:, -1] for each in read]
    most = len(read[0].names) - (len(read) == 1)
    neighbours = args.k or [k for k in NEIGHBOURS if k <= most] or [most]
    pairs = [value for pair in zip(features, labels, strict=True) for value in pair]
    found = knn(*pairs, neighbours=neighbours, temperature=args.temperature, device=find_device(args.device))

    rows = [{"k": k, "top1": 100 * top1, "top5": 100 * top5} for k, (top1, top5) in found.items()]
    results = {"task": "knn", "model": args.model, "weights": weights, "temperature": args.temperature}
    results |= {"train": read[0].describe(), "val": read[1].describe() if args.val else None, "results": rows}
    labelled.report(args, read, results)
    print(f"{'k':>5} {'top 1':>7} {'top 5':>7}")
    for row in rows:
        print(f"{row['k']:5d} {row['top1']:7.2f} {row['top5']:7.2f}")
    return SOME_FAILED if any(each.failures for each in read) else 0


def _numbers(text: str) -> list[int]:
    return [at_least(1)(part) for part in text.split(",")]
