"""``dinov2-fast linear``: how well linear classifiers on frozen features predict classes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dinov2_fast.cli import evaluation, options

if TYPE_CHECKING:
    from dinov2_fast.evaluation.linear import Probe
    from dinov2_fast.evaluation.metrics import Accuracy

HELP = "evaluate features by linear classifiers"
DESCRIPTION = f"""\
Trains linear classifiers on frozen features of TRAIN, as DINOv2 is evaluated: a
grid of 13 learning rates, the CLS tokens of the last 1 and the last 4 blocks,
without and with the mean of the patches. The best on VAL is chosen. Since it
was chosen by VAL, its accuracy there is too high: give --test for a fair one.

Features are computed once, of images as they are. The original trains on
random crops and flips, with 128 images in an update on each of its GPUs, so its
figures differ slightly.

{evaluation.SOURCES}

By default, extract stores features of the last block only. To evaluate the last
4 of a model with 12 blocks, store their CLS tokens:

  dinov2-fast extract photos/train --model dinov2_vits14 --out features/train \\
      --features cls@8,cls@9,cls@10,cls,patch_mean
"""
EPILOG = """\
examples:
  dinov2-fast linear photos/train photos/val --model dinov2_vits14
  dinov2-fast linear photos/train photos/val --test photos/test --model dinov2_vits14
  dinov2-fast linear features/train features/val --steps 2000 --json linear.json

The table shows the percentage of images of VAL that are classified right,
by learning rate, number of last blocks, and without or with the patches' mean.

Exit codes: 0 all good, 1 not possible, 2 wrong usage, 3 some images have no
features and are left out, 130 interrupted.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("train", metavar="TRAIN", help="the images to train on")
    parser.add_argument("val", metavar="VAL", help="the images by which the best classifier is chosen")
    parser.add_argument("--test", metavar="TEST", help="the images on which the best classifier is tested")
    grid = parser.add_argument_group("the grid and the training")
    grid.add_argument(
        "--blocks",
        type=options.counts,
        metavar="N,N",
        help="numbers of last blocks (default: 1,4, or 1 where the CLS tokens of 4 are not stored)",
    )
    grid.add_argument(
        "--learning-rates",
        type=options.positives,
        metavar="R,R",
        help="learning rates for 256 images in an update; scaled linearly with --step-images (default: 13 from 1e-5 "
        "to 0.1)",
    )
    grid.add_argument("--steps", type=options.at_least(1), default=12500, metavar="N", help="updates (default: 12500)")
    grid.add_argument(
        "--step-images", type=options.at_least(1), default=128, metavar="N", help="images in an update (default: 128)"
    )
    grid.add_argument(
        "--seed",
        type=options.at_least(0),
        default=0,
        metavar="N",
        help="seed of the initial weights and of the order of the images (default: 0)",
    )
    evaluation.add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Trains, evaluates and prints the accuracies; 0, or 3 if images had to be left out."""
    from dinov2_fast.evaluation.evaluate import evaluate_linear

    found = evaluate_linear(**evaluation.keywords(args))
    probe, test = found.probes[found.best], found.test
    rows = [
        {"blocks": probe.blocks, "avgpool": probe.avgpool, "learning_rate": probe.learning_rate, **_percent(each)}
        for probe, each in zip(found.probes, found.accuracies, strict=True)
    ]
    best = rows[found.best]
    chosen = f"{_input(probe)}, learning rate {probe.learning_rate:g}"
    lines = [table(found.probes, found.accuracies), ""]
    lines += [f"Best on {args.val}: {chosen}: top 1 {best['top1']:.2f}, top 5 {best['top5']:.2f}"]
    if test:
        lines += [f"The same on {args.test}: top 1 {100 * test.top1:.2f}, top 5 {100 * test.top5:.2f}"]
    settings = {name: getattr(args, name) for name in ("steps", "step_images", "seed")}
    results = {"results": rows, "best": best, "best_on_test": _percent(test) if test else None}
    return evaluation.print_results("linear", args, found.sets, "\n".join(lines), settings, results)


def table(probes: Sequence[Probe], accuracies: Sequence[Accuracy]) -> str:
    """Top 1 in percent, a row for each learning rate and a column for each input."""
    cells = {(probe.learning_rate, _input(probe)): each.top1 for probe, each in zip(probes, accuracies, strict=True)}
    rates, inputs = dict.fromkeys(rate for rate, _ in cells), dict.fromkeys(name for _, name in cells)
    widths = {name: max(len(name), 6) + 2 for name in inputs}
    lines = ["learning rate" + "".join(f"{name:>{width}}" for name, width in widths.items())]
    lines += [
        f"{rate:<13g}" + "".join(f"{100 * cells[rate, name]:{width}.2f}" for name, width in widths.items())
        for rate in rates
    ]
    return "\n".join(lines)


def _input(probe: Probe) -> str:
    return f"{probe.blocks} block{'s' * (probe.blocks > 1)}" + (" + mean" if probe.avgpool else "")


def _percent(accuracy: Accuracy) -> dict[str, float]:
    return {"top1": 100 * accuracy.top1, "top5": 100 * accuracy.top5}
