"""Options that several commands have, and their types."""

from __future__ import annotations

import argparse
import os
from typing import Any

from dinov2_fast.data.image_processor import Dinov2ImageProcessor

POSITION_INTERPOLATIONS = ("offset", "size", "antialias")


def add_images_and_device(parser: Any, default_size: int) -> None:
    """Adds --size, --position-interpolation and --device."""
    parser.add_argument(
        "--size",
        type=size,
        default=(default_size, default_size),
        metavar="N|HxW",
        help=f"the images' size in pixels, a multiple of 14; the centre is cut out (default: {default_size})",
    )
    parser.add_argument(
        "--position-interpolation",
        choices=POSITION_INTERPOLATIONS,
        help="how positions are resampled (default: as Meta's code does; transformers: size, timm: antialias)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")


def add_stride(parser: Any) -> None:
    """Adds --stride."""
    parser.add_argument(
        "--stride",
        type=at_least(1),
        metavar="N",
        help="pixels from one patch to the next; below 14, patches overlap and maps are finer (default: 14)",
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


def at_least(lowest: int) -> Any:
    """The type of whole numbers from `lowest` on."""

    def number(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"must be at least {lowest}, got {value}")
        return value

    return number


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
    """Half the cores, since the model uses them as well; never more than 8."""
    return min(8, max(1, (os.cpu_count() or 1) // 2))
