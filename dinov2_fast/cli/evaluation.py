"""What ``knn`` and ``linear`` share: the options of the model, progress on stderr, and the results as JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2_fast.cli import options
from dinov2_fast.errors import InvalidValueError

if TYPE_CHECKING:
    from dinov2_fast.evaluation.labelled import LabelledFeatures, ModelOptions

SECONDS_BETWEEN_LINES = 30.0
SOURCES = """\
Each of them holds a folder of images for each class, on which --model runs; or
it is a folder that `dinov2-fast extract` wrote, which needs no model. Archives,
globs and lists work too. The class of an image is the name of the folder that
it lies in."""


class ProgressLines:
    """Prints on stderr how much of a step is done: every 30 seconds, and when it is done."""

    def __init__(self) -> None:
        self._last_line = time.perf_counter()

    def __call__(self, step: str, done: int, total: int, unit: str) -> None:
        now = time.perf_counter()
        if done == total or now - self._last_line >= SECONDS_BETWEEN_LINES:
            print(f"{step}: {done}/{total} {unit}", file=sys.stderr, flush=True)
            self._last_line = now


def add_options(parser: Any) -> None:
    """Adds the options of the model, --device and --json."""
    model = parser.add_argument_group("the model, for images")
    options.add_model(model)
    options.add_size(model)
    model.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="auto is bf16 on a GPU and fp32 on a CPU (default: auto)",
    )
    options.add_batches(model)
    options.add_device(parser)
    parser.add_argument("--json", metavar="FILE", help="also write the results to FILE")


def model_options(args: argparse.Namespace) -> ModelOptions:
    """The values of `add_options`, for the library; and a file for --json that can be written.

    Raises:
        ValueError: the file cannot be written; it is not left for the end of the work.
    """
    from dinov2_fast.evaluation.labelled import ModelOptions

    if args.json:
        _check_writable(Path(args.json))
    return ModelOptions(
        args.model,
        args.weights,
        args.position_interpolation,
        args.size,
        args.precision,
        args.device,
        args.batch_size,
        args.workers,
    )


def print_results(
    args: argparse.Namespace, sets: Sequence[LabelledFeatures], table: str, results: dict[str, Any]
) -> None:
    """Prints the images and the table, on stderr the images that were left out; writes the file of --json."""
    for each in sets:
        if each.failures:
            print(f"Left out of {each.source}:\n{each.failures}", file=sys.stderr)
        counts = summary(each)
        failed = f", {counts['failures']} left out" if counts["failures"] else ""
        print(f"{each.source}: {counts['images']} images in {counts['classes']} classes{failed}")
    print(f"\n{table}")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def summary(features: LabelledFeatures) -> dict[str, Any]:
    """The source and its numbers of images, classes and failures, for JSON."""
    return {
        "folder": features.source,
        "images": len(features.classes),
        "classes": len(set(features.classes)),
        "failures": len(features.failures),
    }


def _check_writable(path: Path) -> None:
    """Makes the folder of a file, and raises `ValueError` if the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidValueError(f"--json: the folder {str(path.parent)!r} cannot be made: {error.strerror}.") from None
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InvalidValueError(f"--json: {str(path)!r} is a folder, or may not be written.")
