"""The command ``dinov2-fast``.

Each subcommand is a module with its help texts, `add_options(parser)` and `run(args) -> exit code`, which calls one
function of the library and prints its result.
"""

from __future__ import annotations

import argparse
import errno
import sys
import warnings
from collections.abc import Sequence

import dinov2_fast
from dinov2_fast.cli import convert, export, extract, info, knn, linear, pretrain, search, show, verify
from dinov2_fast.cli.process import ABORTED, INTERRUPTED, ignored_output_errors, one_interrupt, usable_streams
from dinov2_fast.errors import Dinov2FastError

NO_SPACE = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
COMMANDS = (extract, show, search, knn, linear, pretrain, convert, verify, export, info)

DESCRIPTION = """\
DINOv2 on the command line: features of images, sheets that show what the model
sees in them, similar images, evaluation of features by their classes,
pretraining, and conversion and export of checkpoints.
"""
EPILOG = """\
examples:
  dinov2-fast extract photos/ --model dinov2_vits14 --out features/
  dinov2-fast show photos/ --model dinov2_vits14 --out sheets/
  dinov2-fast search features/ cat.jpg
  dinov2-fast knn train/ val/ --model dinov2_vits14
  dinov2-fast pretrain photos/ --config small --out runs/a
  dinov2-fast convert dinov2_vits14 small.safetensors --to timm
  dinov2-fast verify dinov2_vits14 small.safetensors photos/

`dinov2-fast COMMAND --help` describes a command and its options.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv`, by default that of the process, and returns the exit code."""
    with usable_streams(), one_interrupt(until_exit=argv is None) as handler:
        try:
            return _run(argv)
        except (KeyboardInterrupt, Exception) as error:
            if handler.received or isinstance(error, KeyboardInterrupt):  # libraries may turn it into another error
                print("dinov2-fast: interrupted", file=sys.stderr)
                # If the interrupt came inside exec() of a string, which importing a dataclass calls, `python -m` would
                # end by SIGINT and not with the exit code. CPython forgets that interrupt at the next exec().
                exec("")
                return INTERRUPTED
            if not isinstance(error, BrokenPipeError):  # the reader of the pipe has left, as `| head` does
                print(f"dinov2-fast: error: {_message(error)}", file=sys.stderr)
            with ignored_output_errors():
                return ABORTED


def _run(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # the commands report what they cannot read themselves
        code: int = args.run(args)
    if sys.stdout:
        sys.stdout.flush()  # a full disk is an error with an exit code here, but not at exit
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
        subparser = subparsers.add_parser(
            command.__name__.rpartition(".")[2],
            help=command.HELP,
            description=command.DESCRIPTION,
            epilog=command.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_options(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def _message(error: BaseException) -> str:
    """The text of the error; with its type if the text was not written for users."""
    text = str(error) or "no further information"
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        text += ". Make room and run the same command again; complete files are kept"
    written_for_users = isinstance(error, (Dinov2FastError, ValueError, OSError))
    return text if written_for_users else f"{type(error).__name__}: {text}"
