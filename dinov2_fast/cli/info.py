"""``dinov2-fast info``: versions, devices, the implementation of each op and why it is chosen, and cached weights."""

from __future__ import annotations

import argparse

from dinov2_fast.cli.process import OK

HELP = "show versions, device, ops and cache"
DESCRIPTION = """\
Shows versions, devices, which implementation of each op runs and why, and the
cached weights.
"""
EPILOG = None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--device", help="for the table of ops: cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="for the table of ops (default: float32)",
    )
    parser.add_argument("--training", action="store_true", help="show the table of ops for training")


def run(args: argparse.Namespace) -> int:
    """Prints the report to stdout; 0."""
    import torch

    from dinov2_fast.installation import installation_report

    print(installation_report(args.device, getattr(torch, args.dtype), training=args.training))
    return OK
