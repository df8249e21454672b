"""``dinov2-fast extract``: images to a folder of features."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2_fast import environment
from dinov2_fast.cli.options import POSITION_INTERPOLATIONS, add_stride, at_least, default_workers, names, size
from dinov2_fast.cli.streams import losable_output
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.errors import InvalidValueError

if TYPE_CHECKING:
    from dinov2_fast.extraction.extract import Announcement, Status, Summary

SOME_FAILED = 3
SECONDS_BETWEEN_LINES = 30.0

DESCRIPTION = """\
Writes the features of images to the folder DIR: one row for each image, in
order, in shards (features-00000.parquet, ...) with the columns id, path, width,
height, sha256, error and the features. An image that cannot be read is a row
with its error, and shifts no other. Read it all with
dinov2_fast.load_features(DIR).

PATH is an image (JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, and HEIC where the
package pillow_heif is installed), a folder that is searched for images, a glob
in quotes, a list (.txt with a path in each line; .csv, .tsv, .jsonl or .parquet
with a column path, image, url or file_name), a .tar archive as webdataset
writes them, a .zip, a .parquet file of Hugging Face's datasets with the images
in it, or a URL (s3://..., https://...) that fsspec can open. Files that are left
out because of their ending are counted on stderr.

When it is interrupted, the same command does what is missing. When DIR holds
features that were made otherwise, it says what differs and stops. When not one
image can be read, as where a disk is not mounted, it stops and writes nothing."""

EPILOG = """\
examples:
  dinov2-fast extract photos/ --model dinov2_vits14 --out features/
  dinov2-fast extract 'shards/*.tar' --model dinov2_vitb14 --out out/ --batch-size 256
  dinov2-fast extract photos/ --model dinov2_vits14 --out dense/ --features patches --size 448
  dinov2-fast extract photos/ --model dinov2_vits14 --out features/ --add

Several GPUs or machines, a process for each part:
  CUDA_VISIBLE_DEVICES=0 dinov2-fast extract photos/ ... --out out/ --shard 1/2 &
  CUDA_VISIBLE_DEVICES=1 dinov2-fast extract photos/ ... --out out/ --shard 2/2

Exit codes: 0 all good, 1 aborted, 2 wrong usage, 3 finished but some images
failed, 130 interrupted (Ctrl-C or SIGTERM). After 1 and 130 whole shards stay."""


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "extract",
        help="extract the features of images to a folder",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="images, or where they are (see above)")
    what = parser.add_argument_group("what is extracted")
    what.add_argument("--model", required=True, help="dinov2_vit{s,b,l,g}14[_reg], or a file, folder or hub id")
    what.add_argument("--weights", metavar="FILE|random:SEED", help="checkpoint file, or seeded random weights")
    what.add_argument(
        "--features",
        type=names,
        default=("cls", "patch_mean"),
        metavar="NAME,...",
        help="cls, patch_mean, patches, registers; cls@K, patch_mean@K, patches@K after block K, of which 0 is the "
        "first (default: cls,patch_mean)",
    )
    what.add_argument("--size", type=size, metavar="N|HxW", help="pixels, a multiple of 14 (default: 224)")
    what.add_argument(
        "--no-crop", action="store_true", help="squeeze whole images into --size instead of cutting out the centre"
    )
    what.add_argument(
        "--background",
        metavar="COLOUR",
        help="put it behind what is transparent, for example white (default: drop alpha, as Meta's code and timm do)",
    )
    what.add_argument(
        "--position-interpolation",
        choices=POSITION_INTERPOLATIONS,
        help="how positions are resampled (default: as Meta's code does; transformers: size, timm: antialias)",
    )
    add_stride(what)
    where = parser.add_argument_group("where it goes")
    where.add_argument("--out", required=True, metavar="DIR", help="folder of the output, made where it is missing")
    where.add_argument("--format", choices=("parquet", "npy"), default="parquet", help="(default: parquet)")
    where.add_argument(
        "--dtype",
        choices=("auto", "fp32", "fp16"),
        default="auto",
        help="of the stored features; auto is fp16 for patches and registers, fp32 for the others (default: auto)",
    )
    where.add_argument(
        "--shard-size", type=at_least(1), metavar="N", help="rows of a shard (default: 8192, fewer above 256 MB)"
    )
    where.add_argument(
        "--add",
        action="store_true",
        help="keep features that are there, and add those of images whose paths are new, in shards behind them",
    )
    where.add_argument("--overwrite", action="store_true", help="delete features that are there, and begin anew")
    how = parser.add_argument_group("how it runs")
    how.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    how.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16", "fp8"),
        default="auto",
        help="of the computation; the manifest says which it was. auto is bf16 on a GPU and fp32 on a CPU; fp8 needs a "
        "GPU that has it, and its errors are several times those of bf16 (default: auto)",
    )
    how.add_argument(
        "--engine",
        choices=("on", "off"),
        default="on",
        help="off runs the model as it is, instead of its faster form for inference (default: on)",
    )
    how.add_argument("--batch-size", type=at_least(1), default=32, metavar="N", help="(default: 32)")
    how.add_argument(
        "--workers",
        type=at_least(0),
        default=default_workers(),
        metavar="N",
        help="processes that decode images, 0 for none (default: %(default)s)",
    )
    how.add_argument(
        "--shard", type=_part, default=(0, 1), metavar="I/N", help="do the shards of part I of N (1/N to N/N) alone"
    )
    how.add_argument(
        "--retry-failed",
        action="store_true",
        help="try images that failed anew, and do shards again in which one succeeds; with --add they get new rows",
    )
    how.add_argument("--max-pixels", type=at_least(1), metavar="N", help="refuse larger images (default: 50000000)")
    how.add_argument(
        "--max-seconds",
        type=at_least(1),
        metavar="N",
        help="give up images that take longer to read and decode, twice; not with --workers 0 (default: 60)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Extracts; 0 if every image has features, 3 if some have not."""
    if args.workers:
        environment.let_idle_threads_sleep()
    from dinov2_fast.data.sources import find_images

    if args.engine == "off" and args.precision == "fp8":
        raise InvalidValueError("--precision fp8 exists in the engine only: leave out --engine off.")
    if args.no_crop and not args.size:
        raise InvalidValueError("--no-crop needs --size.")
    images = find_images(args.paths)
    first = next(images, None)
    if first is None:
        raise InvalidValueError(
            f"There are no images in {', '.join(map(repr, args.paths))}. Archives and lists in a folder must be "
            "named, as in 'folder/*.tar'."
        )
    return _extract(args, first, images)


def _extract(args: argparse.Namespace, first: Any, rest: Iterator[Any]) -> int:
    from itertools import chain

    from dinov2_fast.extraction.extract import check_folder, extract
    from dinov2_fast.inference.loading import find_device, load_model, processor_for

    check_folder(Path(args.out))
    if args.engine == "on" and args.precision != "auto":
        _refuse_slow(args.precision, find_device(args.device))
    processor = processor_for(args.model, args.size)
    if args.no_crop:
        processor = Dinov2ImageProcessor.for_size(args.size, crop=False)
    if args.background:
        processor = Dinov2ImageProcessor(**{**processor.settings(), "background": args.background})
    model = load_model(
        args.model,
        processor,
        weights=args.weights,
        position_interpolation=args.position_interpolation,
        device=args.device,
        precision=args.precision,
        engine=args.engine == "on",
        stride=args.stride,
    )
    progress = Progress()
    limits = {"max_pixels": args.max_pixels, "max_seconds": args.max_seconds}
    try:
        summary = extract(
            chain([first], rest),
            model,
            args.out,
            processor=processor,
            features=args.features,
            dtype=args.dtype,
            batch_size=args.batch_size,
            shard_size=args.shard_size,
            workers=args.workers,
            part=args.shard,
            format=args.format,
            overwrite=args.overwrite,
            add=args.add,
            retry_failed=args.retry_failed,
            metadata={"model": args.model, "weights": _source(model)},
            announce=announce,
            progress=progress,
            **{name: limit for name, limit in limits.items() if limit is not None},
        )
    finally:
        progress.end()
    if summary.failures:
        print(describe_failures(summary), file=sys.stderr)
    with losable_output():
        print(describe(summary))
    return SOME_FAILED if summary.failures else 0


def _source(model: Any) -> Any:
    return getattr(model, "loaded_from", None)


def describe(summary: Summary) -> str:
    """What was done, where the features are and how to read them, in three lines."""
    made = summary.images - summary.resumed
    resumed = f", {summary.resumed} were there already" if summary.resumed else ""
    speed = f"{made / summary.seconds:.1f} images/s, model busy {summary.busy:.0%}" if made else "nothing to do"
    return (
        f"{summary.images} images, {summary.failures} failed{resumed}, {summary.seconds:.1f} s, {speed}\n"
        f"Features: {summary.path}\n"
        f"Read it:  import dinov2_fast; features = dinov2_fast.load_features({str(summary.path)!r})"
    )


def describe_failures(summary: Summary) -> str:
    """Which images failed in this run and why, and what can be done."""
    failed = f"Failed:\n{summary.reasons}\n" if len(summary.reasons) else ""
    return f"{failed}To try what failed anew, run the same command with --retry-failed."


def announce(about: Announcement) -> None:
    """Says on stderr what will be done and how large it will be."""
    there = f", {about.done} of them there already" if about.done else ""
    shards = f"{about.shards} shard{'s' * (about.shards != 1)}"
    sizes = f"{_bytes(about.bytes)} of features in {shards} ({_bytes(about.free)} free)"
    print(f"{about.images} images{there}, {sizes}", file=sys.stderr, flush=True)


class Progress:
    """How far it is, on stderr: one line rewritten on a terminal, otherwise a line now and then."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._last_line = time.perf_counter()
        self._width = 0

    def __call__(self, status: Status) -> None:
        text = f"{status.done}/{status.total} images, {status.failures} failed"
        rate = (status.done - status.resumed) / status.seconds
        text += f", {rate:.1f} images/s, {_time((status.total - status.done) / rate)} left"
        text += f", model busy {status.busy:.0%}"
        now = time.perf_counter()
        if self._terminal:
            print(f"\r{text.ljust(self._width)}", end="", file=sys.stderr, flush=True)
            self._width = len(text)
        elif status.done == status.total or now - self._last_line >= SECONDS_BETWEEN_LINES:
            print(text, file=sys.stderr, flush=True)
            self._last_line = now

    def end(self) -> None:
        """Leaves the cursor on a fresh line."""
        if self._width:
            print(file=sys.stderr)


def _bytes(count: int) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1e3:.1f} kB"


def _refuse_slow(precision: str, device: Any) -> None:
    """What the engine would refuse, in the words of the command line and before any weights are read.

    Raises:
        ValueError: the precision is slower on the device than one of more bits.
    """
    from dinov2_fast.inference.optimize import why_slow

    reason = why_slow(precision, device)
    if reason:
        instead, otherwise = ("bf16", "") if device.type == "cuda" else ("fp32", ", or a GPU with --device cuda")
        raise InvalidValueError(
            f"--precision {precision} would be slower than {instead} here: {reason}. Use --precision "
            f"{instead}{otherwise}."
        )


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _part(text: str) -> tuple[int, int]:
    """I/N, from 1 on, as (index from 0, count)."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N, such as 1/4")
    return int(number) - 1, int(count)
