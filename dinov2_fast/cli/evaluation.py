"""What ``knn`` and ``linear`` share: the options of the model, progress on stderr, and the results as JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2_fast.cli import options
from dinov2_fast.cli.process import OK, SECONDS_BETWEEN_LINES, SOME_FAILED
from dinov2_fast.errors import InvalidValueError

if TYPE_CHECKING:
    from dinov2_fast.evaluation.labelled import LabelledFeatures

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


def add_options(parser: argparse.ArgumentParser) -> None:
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


def keywords(args: argparse.Namespace) -> dict[str, Any]:
    """The options as `evaluate_knn` and `evaluate_linear` take them, and the progress."""
    from dinov2_fast.evaluation.labelled import ModelOptions

    if args.json:  # an error now is better than one after the work
        _check_writable(Path(args.json))
    names = [field.name for field in fields(ModelOptions)]
    model = ModelOptions(**{name: getattr(args, name) for name in names})
    return {**options.keywords(args, without=("json", *names)), "options": model, "progress": ProgressLines()}


def print_results(
    task: str,
    args: argparse.Namespace,
    sets: Sequence[LabelledFeatures],
    table: str,
    settings: dict[str, Any],
    results: dict[str, Any],
) -> int:
    """Prints the sets and the table, and writes the file of --json. Returns the exit code."""
    about: dict[str, Any] = {"train": None, "val": None}
    for name, each in zip(("train", "val", "test"), sets, strict=False):
        images, classes, left_out = len(each.classes), len(set(each.classes)), len(each.failures)
        about[name] = {"folder": each.source, "images": images, "classes": classes, "failures": left_out}
        if left_out:
            print(f"Left out of {each.source}:\n{each.failures}", file=sys.stderr)
        failed = f", {left_out} left out" if left_out else ""
        print(f"{each.source}: {images} images in {classes} classes{failed}")
    print(f"\n{table}")
    if args.json:
        model = {"model": sets[0].model, "weights": sets[0].weights}
        text = json.dumps({"task": task, **model, **settings, **about, **results}, indent=1)
        Path(args.json).write_text(text + "\n", encoding="utf-8")
    return SOME_FAILED if any(each.failures for each in sets) else OK


def _check_writable(path: Path) -> None:
    """Makes the folder of a file, and raises `ValueError` if the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidValueError(f"--json: the folder {str(path.parent)!r} cannot be made: {error.strerror}.") from None
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InvalidValueError(f"--json: {str(path)!r} is a folder, or may not be written.")
