"""The command ``dinov2-fast``. Each subcommand is a module with `add_parser(subparsers)` and `run(args) -> exit code`.

Exit codes: 0 all good, 1 aborted (or `verify` found a difference), 2 wrong usage, 3 finished but some images failed,
130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import sys
import warnings
from collections.abc import Sequence

import dinov2_fast
from dinov2_fast.cli import convert, export, extract, info, knn, linear, search, show, verify
from dinov2_fast.cli.exit_codes import ABORTED, INTERRUPTED
from dinov2_fast.cli.interrupts import one_interrupt
from dinov2_fast.cli.streams import losable_output, usable_streams

NO_SPACE = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
COMMANDS = (extract, show, search, knn, linear, convert, verify, export, info)

DESCRIPTION = """\
DINOv2 on the command line: features of images, sheets that show what the model
sees in them, images that are alike, how well features tell classes apart, and
checkpoints in the layouts of Meta's code, of Hugging Face transformers and of
timm, or exported.
"""
EPILOG = """\
examples:
  dinov2-fast extract photos/ --model dinov2_vits14 --out features/
  dinov2-fast show photos/ --model dinov2_vits14 --out sheets/
  dinov2-fast search features/ cat.jpg
  dinov2-fast knn train/ val/ --model dinov2_vits14
  dinov2-fast convert dinov2_vits14 small.safetensors --to timm
  dinov2-fast verify dinov2_vits14 small.safetensors photos/

`dinov2-fast COMMAND --help` says everything about a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (by default the process's) and returns its exit code."""
    with usable_streams(), one_interrupt(until_exit=argv is None) as interrupt:
        try:
            return _run(argv)
        except (KeyboardInterrupt, Exception) as error:
            if interrupt.has_come or isinstance(error, KeyboardInterrupt):  # libraries may make another error of it
                print("dinov2-fast: interrupted", file=sys.stderr)
                return INTERRUPTED
            if not isinstance(error, BrokenPipeError):  # its reader has left, as `| head` does
                print(f"dinov2-fast: error: {_message(error)}", file=sys.stderr)
            with losable_output():  # what is left of it, or the interpreter complains at its end
                return ABORTED


def _run(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # about odd files: a command reports what it cannot read
        code: int = args.run(args)
    if sys.stdout:
        sys.stdout.flush()  # here, where a full disk is an error with an exit code
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dinov2-fast",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dinov2_fast {dinov2_fast.__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def _message(error: BaseException) -> str:
    """The error's text; its type as well where the text was not written for the user."""
    text = str(error) or "no further information"
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        text += ". Make room and run the same command again; files that are complete stay"
    written_for_users = type(error).__module__.startswith("dinov2_fast") or isinstance(error, (ValueError, OSError))
    return text if written_for_users else f"{type(error).__name__}: {text}"
