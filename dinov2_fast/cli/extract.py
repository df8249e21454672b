"""``dinov2-fast extract``: images to a folder of features."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from dinov2_fast import environment
from dinov2_fast.cli.options import (
    add_batches,
    add_device,
    add_model,
    add_size,
    add_stride,
    at_least,
    given,
    names,
)
from dinov2_fast.cli.process import OK, SOME_FAILED, ignored_output_errors
from dinov2_fast.cli.progress import ProgressLine, duration

if TYPE_CHECKING:
    from dinov2_fast.extraction.run import Progress

HELP = "extract the features of images to a folder"
DESCRIPTION = """\
Writes the features of images to the folder DIR: one row for each image, in
order, in shards (features-00000.parquet, ...) with the columns id, path, width,
height, sha256, error and the features. An image that cannot be read is a row
with an error and moves no other row. dinov2_fast.load_features(DIR) reads all.

PATH is an image (JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, and HEIC where the
package pillow_heif is installed), a folder that is searched for images, a glob
in quotes, a list (.txt with a path in each line; .csv, .tsv, .jsonl or .parquet
with a column path, image, url or file_name), a .tar archive as webdataset
writes them, a .zip, a .parquet file of Hugging Face's datasets with the images
in it, or a URL (s3://..., https://...) that fsspec can open. Files that are left
out because of their ending are counted on stderr.

After an interruption the same command makes what is missing. If DIR holds
features that were made in another way, the command says what differs and stops.
If no file of the first shard can be read (a disk may not be mounted), it stops
and writes no features."""

EPILOG = """\
examples:
  dinov2-fast extract photos/ --model dinov2_vits14 --out features/
  dinov2-fast extract 'shards/*.tar' --model dinov2_vitb14 --out out/ --batch-size 256
  dinov2-fast extract photos/ --model dinov2_vits14 --out dense/ --features patches --size 448
  dinov2-fast extract photos/ --model dinov2_vits14 --out features/ --add

Several GPUs or machines, a process for each part:
  CUDA_VISIBLE_DEVICES=0 dinov2-fast extract photos/ ... --out out/ --part 1/2 &
  CUDA_VISIBLE_DEVICES=1 dinov2-fast extract photos/ ... --out out/ --part 2/2

Exit codes: 0 all good, 1 aborted, 2 wrong usage, 3 finished but some images
failed, 130 interrupted (Ctrl-C or SIGTERM). After exit code 1 or 130 the shards
that are complete are kept."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("images", nargs="+", metavar="PATH", help="images, or where they are (see above)")
    what = parser.add_argument_group("what is extracted")
    add_model(what, required=True)
    what.add_argument(
        "--features",
        type=names,
        default=("cls", "patch_mean"),
        metavar="NAME,...",
        help="cls, patch_mean, patches, registers; cls@K, patch_mean@K, patches@K after block K, where 0 is the first "
        "(default: cls,patch_mean)",
    )
    add_size(what)
    what.add_argument(
        "--no-crop",
        dest="crop",
        action="store_false",
        help="squeeze whole images into --size instead of cutting out the centre",
    )
    what.add_argument(
        "--background",
        metavar="COLOUR",
        help="colour behind what is transparent, such as white (default: drop alpha, as Meta's code and timm do)",
    )
    add_stride(what)
    where = parser.add_argument_group("where it goes")
    where.add_argument("--out", required=True, metavar="DIR", help="output folder; made if it does not exist")
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
        help="keep the features in DIR, and write those of images with new paths into new shards after them",
    )
    where.add_argument("--overwrite", action="store_true", help="delete the features in DIR first")
    how = parser.add_argument_group("how it runs")
    add_device(how)
    how.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16", "fp8"),
        default="auto",
        help="of the computation, recorded in the manifest. auto is bf16 on a GPU and fp32 on a CPU; fp8 needs a GPU "
        "that has it, and its errors are several times those of bf16 (default: auto)",
    )
    how.add_argument(
        "--no-engine",
        dest="engine",
        action="store_false",
        help="run the model as it is, not its faster form for inference",
    )
    add_batches(how)
    how.add_argument(
        "--part",
        type=_part,
        default=(1, 1),
        metavar="I/N",
        help="make only part I of N of the shards (1/N to N/N), while other processes make the others",
    )
    how.add_argument(
        "--retry-failed",
        action="store_true",
        help="retry images with errors, and make each shard again in which one can now be decoded; with --add, retried "
        "images get new rows",
    )
    how.add_argument("--max-pixels", type=at_least(1), metavar="N", help="refuse larger images (default: 50000000)")
    how.add_argument(
        "--max-seconds",
        type=at_least(1),
        metavar="N",
        help="give up an image that took longer than N seconds to read and decode in two attempts; not with "
        "--workers 0 (default: 60)",
    )


def run(args: argparse.Namespace) -> int:
    """Extracts; OK if every image has features, otherwise SOME_FAILED."""
    if args.workers:
        environment.use_passive_openmp_threads()
    from dinov2_fast.extraction.extract import extract

    settings = given(args)  # each option has the name of an argument of `extract`
    report = ProgressReport()
    try:
        end = extract(**settings, announce=announce, progress=report)
    finally:
        report.end()
    if end.failures:
        failed = f"Failed:\n{end.reasons}\n" if len(end.reasons) else ""
        print(f"{failed}Run the same command with --retry-failed to try the failed images again.", file=sys.stderr)
    with ignored_output_errors():
        print(summary_text(end))
    return SOME_FAILED if end.failures else OK


def summary_text(end: Progress) -> str:
    """What was done, where the features are and how to read them, in three lines."""
    made = end.images - end.resumed
    resumed = f", {end.resumed} were there already" if end.resumed else ""
    speed = f"{made / end.seconds:.1f} images/s, model busy {end.busy:.0%}" if made else "nothing to do"
    return (
        f"{end.images} images, {end.failures} failed{resumed}, {end.seconds:.1f} s, {speed}\n"
        f"Features: {end.folder}\n"
        f"Read it:  import dinov2_fast; features = dinov2_fast.load_features({str(end.folder)!r})"
    )


def announce(begin: Progress) -> None:
    """Prints to stderr what will be done and how large it will be."""
    resumed = f", {begin.resumed} of them there already" if begin.resumed else ""
    shards = f"{begin.shards} shard{'s' * (begin.shards != 1)}"
    sizes = f"{_bytes(begin.nbytes)} of features in {shards} ({_bytes(begin.free)} free)"
    print(f"{begin.images} images{resumed}, {sizes}", file=sys.stderr, flush=True)


class ProgressReport(ProgressLine):
    """Prints the progress after each batch."""

    def __call__(self, progress: Progress) -> None:
        rate = (progress.done - progress.resumed) / progress.seconds
        left = duration((progress.images - progress.done) / rate)
        text = f"{progress.done}/{progress.images} images, {progress.failures} failed"
        text += f", {rate:.1f} images/s, {left} left, model busy {progress.busy:.0%}"
        self.show(text, last=progress.done == progress.images)


def _bytes(count: int) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1e3:.1f} kB"


def _part(text: str) -> tuple[int, int]:
    """(number, count) from ``I/N``."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N, such as 1/4")
    return int(number), int(count)
