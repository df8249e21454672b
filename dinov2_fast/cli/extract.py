"""``dinov2-fast extract``: pictures in files and folders to a Parquet file of features."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2_fast.image_processor import CONFIG_NAME, Dinov2ImageProcessor

if TYPE_CHECKING:
    from dinov2_fast.extraction.extract import Summary

SOME_FAILED = 3
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SECONDS_BETWEEN_LINES = 10.0


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "extract",
        help="extract the features of pictures into a Parquet file",
        description="Writes one row for each picture, in order, to DIR/features.parquet: id, path, width, height, "
        "error, cls and patch_mean. A picture that cannot be read is a row with its error.",
        epilog="Exit codes: 0 all good, 1 aborted (nothing written), 2 wrong usage, 3 finished but some pictures "
        "failed, 130 interrupted.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="pictures, or folders to search for pictures")
    parser.add_argument("--model", required=True, help="dinov2_vit{s,b,l,g}14[_reg], or a file, folder or hub id")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the output, made where it is missing")
    parser.add_argument("--weights", metavar="FILE|random:SEED", help="checkpoint file, or seeded random weights")
    parser.add_argument(
        "--dialect",
        choices=("offset", "size", "antialias"),
        help="how positions are resampled (default: as Meta's code does; transformers: size, timm: antialias)",
    )
    parser.add_argument("--size", type=_size, metavar="N|HxW", help="pixels, a multiple of 14 (default: 224)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument(
        "--precision",
        choices=("auto", *DTYPES, "fp8"),
        default="auto",
        help="of the computation; features are stored in fp32, and the file says which it was. auto is bf16 on a GPU "
        "and fp32 on a CPU; fp8 needs a GPU that has it, and its errors are several times those of bf16 "
        "(default: auto)",
    )
    parser.add_argument(
        "--engine",
        choices=("on", "off"),
        default="on",
        help="off runs the model as it is, instead of its faster form for inference (default: on)",
    )
    parser.add_argument("--batch-size", type=_at_least(1), default=32, metavar="N", help="(default: 32)")
    parser.add_argument(
        "--workers",
        type=_at_least(0),
        default=_default_workers(),
        metavar="N",
        help="processes that decode pictures, 0 for none (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace features that are there already")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Extracts; 0 if every picture has features, 3 if some have not."""
    from dinov2_fast.extraction.features_file import output_path
    from dinov2_fast.extraction.images import list_images

    output_path(args.out, overwrite=args.overwrite)
    files = list_images(args.paths)
    if not files:
        raise ValueError(f"There are no pictures in {', '.join(map(repr, args.paths))}.")
    processor = _processor(args)

    import torch

    import dinov2_fast
    from dinov2_fast.extraction.extract import extract

    device = _device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    precision = args.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    if precision == "fp8" and args.engine == "off":
        raise ValueError("--precision fp8 exists in the engine only: leave out --engine off.")
    if args.engine == "on":
        _refuse_slow(precision, device)
    dtype = "float32" if args.engine == "on" else DTYPES[precision]  # the engine folds weights in fp32
    model = dinov2_fast.load(args.model, weights=args.weights, device=device, dtype=dtype, dialect=args.dialect)
    runs: Any = model
    if args.engine == "on":
        mean, std = processor.image_mean, processor.image_std
        runs = dinov2_fast.optimize_for_inference(model, precision, mean=mean, std=std)
    progress = Progress(len(files))
    summary = extract(
        files,
        runs,
        args.out,
        processor=processor,
        batch_size=args.batch_size,
        workers=args.workers,
        overwrite=args.overwrite,
        metadata={"model": args.model, "weights": model.loaded_from},
        progress=progress,
    )
    progress.end()
    print(describe(summary))
    return SOME_FAILED if summary.failures else 0


def describe(summary: Summary) -> str:
    """What was done, where the file is and how to read it, in three lines."""
    rate = summary.pictures / summary.seconds
    return (
        f"{summary.pictures} pictures, {summary.failures} failed, {summary.seconds:.1f} s, {rate:.1f} pictures/s\n"
        f"Features: {summary.path}\n"
        f"Read it:  import pyarrow.parquet as pq; table = pq.read_table({str(summary.path)!r})"
    )


class Progress:
    """How far it is, on stderr: one line rewritten on a terminal, otherwise a line now and then."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.start = time.perf_counter()
        self._terminal = sys.stderr.isatty()
        self._last_line = self.start
        self._width = 0
        self(0, 0)

    def __call__(self, done: int, failures: int) -> None:
        now = time.perf_counter()
        text = f"{done}/{self.total} pictures, {failures} failed"
        if done:
            text += f", {done / (now - self.start):.1f} pictures/s"
        if self._terminal:
            print(f"\r{text.ljust(self._width)}", end="", file=sys.stderr, flush=True)
            self._width = len(text)
        elif done in (0, self.total) or now - self._last_line >= SECONDS_BETWEEN_LINES:
            print(text, file=sys.stderr, flush=True)
            self._last_line = now

    def end(self) -> None:
        """Leaves the cursor on a fresh line."""
        if self._terminal:
            print(file=sys.stderr)


def _processor(args: argparse.Namespace) -> Dinov2ImageProcessor:
    if args.size:
        return Dinov2ImageProcessor.for_size(args.size)
    if (Path(args.model) / CONFIG_NAME).is_file():
        return Dinov2ImageProcessor.from_pretrained(args.model)
    return Dinov2ImageProcessor()


def _refuse_slow(precision: str, device: Any) -> None:
    """What the engine would refuse, in the words of the command line and before any weights are read.

    Raises:
        ValueError: the precision is slower on the device than one of more bits.
    """
    from dinov2_fast.inference.engine import why_slow

    reason = why_slow(precision, device)
    if reason:
        instead, otherwise = ("bf16", "") if device.type == "cuda" else ("fp32", ", or a GPU with --device cuda")
        raise ValueError(
            f"--precision {precision} would be slower than {instead} here: {reason}. Use --precision "
            f"{instead}{otherwise}."
        )


def _device(name: str) -> Any:
    """torch's device of that name.

    Raises:
        ValueError: there is no such device.
    """
    import torch

    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"There is no device {name!r}; give cpu, cuda or cuda:1, for instance.") from None


def _size(text: str) -> tuple[int, int]:
    try:
        sides = [int(side) for side in text.split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of pixels nor HEIGHTxWIDTH")
    size = sides[0], sides[-1]
    try:
        Dinov2ImageProcessor.for_size(size)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return size


def _at_least(lowest: int) -> Any:
    def number(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"must be at least {lowest}, got {value}")
        return value

    return number


def _default_workers() -> int:
    """Half the cores, since the model uses them as well; never more than 8."""
    return min(8, max(1, (os.cpu_count() or 1) // 2))
