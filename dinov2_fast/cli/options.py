"""Options that several commands have, and their types. This file imports no torch, so that --help is quick."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Collection
from typing import Any

from dinov2_fast import environment
from dinov2_fast.data.image_processor import Dinov2ImageProcessor

POSITION_INTERPOLATIONS = ("offset", "size", "antialias")


def keywords(args: argparse.Namespace, without: Collection[str] = ()) -> dict[str, Any]:
    """The values of all options but `without`, for a function whose parameters have the options' names."""
    return {name: value for name, value in vars(args).items() if name not in ("run", *without)}


def given(args: argparse.Namespace, without: Collection[str] = ()) -> dict[str, Any]:
    """`keywords` without the options that are None: for them the function has its own defaults."""
    return {name: value for name, value in keywords(args, without).items() if value is not None}


def add_model(parser: Any, *, required: bool = False) -> None:
    """Adds --model, --weights and --position-interpolation."""
    parser.add_argument("--model", required=required, help="dinov2_vit{s,b,l,g}14[_reg], or a file, folder or hub id")
    parser.add_argument("--weights", metavar="FILE|random:SEED", help="checkpoint file, or seeded random weights")
    add_position_interpolation(parser)


def add_position_interpolation(parser: Any) -> None:
    """Adds --position-interpolation."""
    parser.add_argument(
        "--position-interpolation",
        choices=POSITION_INTERPOLATIONS,
        help="how positions are resampled (default: as Meta's code does; transformers: size, timm: antialias)",
    )


def add_size(parser: Any, default: int | None = None, help: str | None = None) -> None:
    """Adds --size; without a default it is None if it is not given."""
    parser.add_argument(
        "--size",
        type=size,
        default=None if default is None else (default, default),
        metavar="N|HxW",
        help=help
        or f"size of the images in pixels, a multiple of 14; the centre is cut out (default: {default or 224})",
    )


def add_stride(parser: Any) -> None:
    """Adds --stride."""
    parser.add_argument(
        "--stride",
        type=at_least(1),
        metavar="N",
        help="pixels from one patch to the next; below 14, patches overlap and maps are finer (default: 14)",
    )


def add_device(parser: Any) -> None:
    """Adds --device."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")


def add_batches(parser: Any, batch_size: int = 32) -> None:
    """Adds --batch-size and --workers."""
    parser.add_argument(
        "--batch-size", type=at_least(1), default=batch_size, metavar="N", help="(default: %(default)s)"
    )
    add_workers(parser, "processes that decode images, 0 for none")


def add_workers(parser: Any, help: str) -> None:
    """Adds --workers."""
    parser.add_argument(
        "--workers", type=at_least(0), default=default_workers(), metavar="N", help=f"{help} (default: %(default)s)"
    )


def size(text: str) -> tuple[int, int]:
    """(height, width) from ``N`` or ``HEIGHTxWIDTH``."""
    try:
        sides = [int(side) for side in text.split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of pixels nor HEIGHTxWIDTH")
    both = sides[0], sides[-1]
    try:
        Dinov2ImageProcessor.for_size(both)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return both


def at_least(lowest: int) -> Callable[[str], int]:
    """The type of whole numbers from `lowest` on."""

    def number(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"must be at least {lowest}, got {value}")
        return value

    return number


def counts(text: str) -> list[int]:
    """Whole numbers from 1 on with commas between them."""
    try:
        return [at_least(1)(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, or several such as 1,4") from None


def counts_or_all(text: str) -> list[int | None]:
    """As `counts`, with None for ``all``."""
    return [number for part in text.split(",") for number in ([None] if part == "all" else counts(part))]


def positive(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def positives(text: str) -> list[float]:
    """Numbers above 0 with commas between them."""
    return [positive(part) for part in text.split(",")]


def indices(text: str) -> tuple[int, ...] | None:
    """Whole numbers with commas between them; None for ``all``."""
    if text == "all":
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 'all' nor numbers such as 2,5,11") from None


def names(text: str) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(name.strip() for name in text.split(","))


def default_workers() -> int:
    """Half the cores, since the model uses them as well, shared among torchrun's processes; never more than 8."""
    return min(8, max(1, (os.cpu_count() or 1) // 2 // environment.local_world_size()))
