"""``dinov2-fast linear``: how well linear classifiers on frozen features tell classes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dinov2_fast.cli import labelled
from dinov2_fast.cli.extract import SOME_FAILED
from dinov2_fast.cli.options import at_least
from dinov2_fast.errors import InvalidValueError

if TYPE_CHECKING:
    from dinov2_fast.cli.labelled import Labelled
    from dinov2_fast.evaluation.evaluate import Accuracy, Probe, Tokens

DESCRIPTION = f"""\
Trains linear classifiers on frozen features of TRAIN, as DINOv2 is evaluated: a
grid of 13 learning rates, the CLS tokens of the last 1 and the last 4 blocks,
without and with the mean of the patches. The best on VAL is taken. Its figure
there is flattering, having been chosen by it: give --test to see it elsewhere.

The images are seen as they are, in features computed once. The original
trains on random crops and flips: its figures are not quite comparable.

{labelled.SOURCES}

What extract stores by itself is of the last block alone. For the last 4 it must
be told to store their class tokens, with a model of 12 blocks so:

  dinov2-fast extract photos/train --model dinov2_vits14 --out features/train \\
      --features {labelled.features_for(12, 4)}
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


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "linear",
        help="evaluate features by linear classifiers",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("train", metavar="TRAIN", help="what the classifiers are trained on")
    parser.add_argument("val", metavar="VAL", help="what the best is chosen by")
    parser.add_argument("--test", metavar="TEST", help="what the best is tested on")
    grid = parser.add_argument_group("the grid and the training")
    grid.add_argument(
        "--blocks",
        type=labelled.counts,
        metavar="N,N",
        help="numbers of last blocks (default: 1,4, or 1 where the class tokens of 4 are not there)",
    )
    grid.add_argument(
        "--learning-rates",
        type=_rates,
        metavar="R,R",
        help="for batches of 256, scaled to others (default: 13 from 1e-5 to 0.1)",
    )
    grid.add_argument("--steps", type=at_least(1), default=12500, metavar="N", help="updates (default: 12500)")
    grid.add_argument(
        "--step-images", type=at_least(1), default=128, metavar="N", help="images in an update (default: 128)"
    )
    grid.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="(default: 0)")
    labelled.add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trains and evaluates; 0, or 3 if images had to be left out."""
    from dinov2_fast.evaluation.evaluate import BLOCKS, LEARNING_RATES, linear_probes
    from dinov2_fast.inference.loading import find_device

    folders = [args.train, args.val, *([args.test] if args.test else [])]
    read = labelled.read_all(args, folders, blocks=max(args.blocks or BLOCKS))
    labels = labelled.classes_of(read)
    probes = linear_probes(
        _with_patch_mean_in_all(read),
        labels[0],
        blocks=_blocks(read, args.blocks),
        learning_rates=args.learning_rates or LEARNING_RATES,
        steps=args.steps,
        batch_size=args.step_images,
        seed=args.seed,
        device=find_device(args.device),
        progress=labelled.Progress("training", args.steps, "updates"),
    )
    accuracies = [probe.accuracy(read[1].tokens, labels[1]) for probe in probes]
    best = max(range(len(probes)), key=lambda row: accuracies[row].top1)
    test = probes[best].accuracy(read[2].tokens, labels[2]) if args.test else None

    rows = [{**_setting(probe), **_percent(each)} for probe, each in zip(probes, accuracies, strict=True)]
    results = {"task": "linear", **read[0].model.describe(), "steps": args.steps}
    results |= {"step_images": args.step_images, "seed": args.seed}
    results |= {name: each.describe() for name, each in zip(("train", "val", "test"), read, strict=False)}
    results |= {"results": rows, "best": rows[best], "best_on_test": _percent(test) if test else None}
    chosen = f"{_input(probes[best])}, learning rate {probes[best].learning_rate:g}"
    lines = [table(probes, accuracies), ""]
    lines += [f"Best on {args.val}: {chosen}: top 1 {rows[best]['top1']:.2f}, top 5 {rows[best]['top5']:.2f}"]
    if test:
        lines += [f"The same on {args.test}: top 1 {100 * test.top1:.2f}, top 5 {100 * test.top5:.2f}"]
    labelled.report(args, read, "\n".join(lines), results)
    return SOME_FAILED if any(each.failures for each in read) else 0


def _blocks(read: Sequence[Labelled], asked: Sequence[int] | None) -> list[int]:
    """Which numbers of last blocks are tried; on stderr those for which stored features lack class tokens.

    Raises:
        ValueError: one was asked for that is not there.
    """
    from dinov2_fast.evaluation.evaluate import BLOCKS

    least = min(read, key=lambda each: each.tokens.cls.shape[1])
    available, depth = least.tokens.cls.shape[1], least.model.blocks
    wanted = asked or [n for n in BLOCKS if n <= depth]
    if max(wanted) > depth:
        raise InvalidValueError(f"The model has {depth} blocks, asked for {', '.join(map(str, wanted))}.")
    if max(wanted) > available:
        held = f"{least.folder!r} has the class tokens of {_last(available)}"
        needed = f"dinov2-fast extract ... --features {labelled.features_for(depth, max(wanted))}"
        if asked:
            raise InvalidValueError(f"{held} alone, asked for {', '.join(map(str, asked))}. For more: {needed}")
        print(f"{held} alone, so n = {max(wanted)} is not tried. For more: {needed}", file=sys.stderr)
    return [n for n in wanted if n <= available]


def _last(blocks: int) -> str:
    return "the last block" if blocks == 1 else f"the last {blocks} blocks"


def _with_patch_mean_in_all(read: Sequence[Labelled]) -> Tokens:
    """The training tokens; without the patches' mean if other folders lack it, which is then said on stderr."""
    lacking = [each.folder for each in read if each.tokens.patch_mean is None]
    if lacking:
        print(f"{lacking[0]!r} has no patch_mean, so classifiers are tried without it alone.", file=sys.stderr)
    return replace(read[0].tokens, patch_mean=None) if lacking else read[0].tokens


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


def _setting(probe: Probe) -> dict[str, Any]:
    return {"blocks": probe.blocks, "avgpool": probe.avgpool, "learning_rate": probe.learning_rate}


def _percent(accuracy: Accuracy) -> dict[str, float]:
    return {"top1": 100 * accuracy.top1, "top5": 100 * accuracy.top5}


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, or several such as 0.01,0.1") from None
    if not all(0 < rate < float("inf") for rate in rates):
        raise argparse.ArgumentTypeError(f"learning rates must be above 0, got {text}")
    return rates
