"""Options that the benchmarks share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import records
from dinov2_fast.configs import BACKBONES, BackboneConfig

# A backbone by its letter, or by the name of its hub entry point.
MODELS = {letter: BACKBONES[f"dinov2_vit{letter.lower()}14"] for letter in "SBLg"} | BACKBONES
TINY = replace(BACKBONES["dinov2_vits14"], name="tiny", embed_dim=64, num_heads=1)  # only its Python takes time

# pixels; on a CPU the smaller two
SIZES = {"throughput": [224, 518, 1036], "latency": [224, 518], "training": [224], "host": [28]}
BATCHES = {
    "throughput": {"cpu": {224: [8], 518: [2]}, "cuda": {224: [256], 518: [64], 1036: [16]}},
    "latency": {"cpu": {224: [1], 518: [1]}, "cuda": {224: [1, 4, 16], 518: [1, 4, 16]}},
    "training": {"cpu": {224: [3]}, "cuda": {224: [64]}},  # of 3, stochastic depth of 0.3 keeps 2
    "host": {"cpu": {28: [1]}, "cuda": {28: [1]}},
}


def some_of(known: Any, unit: str = "") -> Callable[[str], list[Any]]:
    """Parses names with commas between them; `known` holds the values, or maps names to them."""
    names = known if isinstance(known, dict) else {str(value): value for value in known}

    def parse(text: str) -> list[Any]:
        unknown = [name for name in text.split(",") if name not in names]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: there are {', '.join(names)}{unit}")
        return [names[name] for name in text.split(",")]

    return parse


def numbers(text: str) -> list[int]:
    """Parses positive integers with commas between them."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text}: positive numbers with commas between them are wanted")
    return [int(part) for part in parts]


def pixels(text: str) -> list[int]:
    """Parses sizes of pictures that consist of whole patches."""
    sizes = numbers(text)
    if wrong := [str(size) for size in sizes if size % 14]:
        raise argparse.ArgumentTypeError(f"{', '.join(wrong)}: a size is a multiple of 14")
    return sizes


def parser(module: str, docstring: str) -> argparse.ArgumentParser:
    """A parser with the options of :class:`bench.records.Recorder`."""
    made = argparse.ArgumentParser(
        prog=f"python -m bench.{module}", description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made.add_argument("--device", default=device, choices=["cpu", "cuda"], help="default here: %(default)s")
    made.add_argument("--write", action="store_true", help="keep the rows, in a folder for this device")
    made.add_argument("--results", type=Path, default=records.RESULTS, help="where that is (default: bench/results)")
    made.add_argument("--commit", help="what is measured (default: the commit that git names)")
    made.add_argument("--resume", action="store_true", help="leave out what --results hold of this commit")
    return made


def add_models(made: argparse.ArgumentParser) -> None:
    """``--models``: None unless given."""
    made.add_argument("--models", type=some_of(MODELS), help="some of S,B,L,g, or names such as dinov2_vits14_reg")


def add_peers(made: argparse.ArgumentParser, names: Sequence[str] = ()) -> None:
    """``--reference-path``, and where there are `names` to choose from, ``--implementations``: None unless given."""
    made.add_argument("--reference-path", type=Path, help="a checkout of facebookresearch/dinov2, as two more peers")
    if names:
        made.add_argument("--implementations", type=some_of(names), help=f"some of {','.join(names)} (default: all)")


def sizes(task: str, device: str) -> list[int]:
    """Pixels that a task takes unless others are asked for."""
    return SIZES[task] if device == "cuda" else [size for size in SIZES[task] if size <= 518]


def batches(task: str, device: str, resolution: int) -> list[int]:
    """Pictures in a batch, likewise: as many as keep a device busy, or few for latency."""
    return BATCHES[task][device].get(resolution, [1])


def models(device: str) -> list[BackboneConfig]:
    """Backbones, likewise."""
    return [MODELS[letter] for letter in ("SB" if device == "cpu" else "SBLg")]


def title(config: BackboneConfig) -> str:
    """As people write it: `ViT-S/14`, `ViT-S/14 reg`."""
    size = config.name.removeprefix("dinov2_vit")[0]
    return f"ViT-{size if size == 'g' else size.upper()}/14{' reg' if config.num_register_tokens else ''}"
