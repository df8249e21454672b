"""How much of what worker processes decode gets through an extraction: with a model so small that decoding limits.

Two rows of one setting: the pictures per second that the workers decode when nothing else is done with them, and those
of a whole extraction with as many workers. Passes alternate. The clock starts when two batches are there: starting
processes takes equally long in both, and in a short pass would hide everything else.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

import dinov2_fast.__main__ as command
from bench import records
from bench.harness import quantiles
from bench.model import Setting
from bench.peers import OURS
from dinov2_fast import optimize_for_inference
from dinov2_fast.configs import BACKBONES
from dinov2_fast.extraction.extract import Status, extract
from dinov2_fast.extraction.inputs import Picture
from dinov2_fast.extraction.outputs import without_normalization
from dinov2_fast.extraction.workers import decode_all
from dinov2_fast.image_processor import Dinov2ImageProcessor
from dinov2_fast.model import DinoVisionTransformer

TINY = dataclasses.replace(BACKBONES["dinov2_vits14"], name="tiny", embed_dim=32, depth=1, num_heads=1)
ALONE = dataclasses.replace(OURS, name="decoding alone")
PICTURES = 512  # at least, so that a pass takes seconds


def settings(like: Setting) -> list[dict[str, Any]]:
    """What the rows are about: a whole extraction, and decoding alone."""
    tiny = dataclasses.replace(like, config=TINY)
    return [tiny.row(OURS, "engine"), tiny.row(ALONE, "eager")]


@torch.inference_mode()
def measure(
    like: Setting, paths: Sequence[str], workers: int, passes: int, device: torch.device
) -> list[dict[str, Any]]:
    """The two rows, with the batch and precision of `like`."""
    model = DinoVisionTransformer(**TINY.constructor_arguments()).eval().to(device)
    engine = optimize_for_inference(model, like.precision, allow_slow=True)
    many = list(paths) * -(-PICTURES // len(paths))
    rates: tuple[list[float], list[float]] = ([], [])
    with as_the_command():
        for _ in range(passes):
            rates[0].append(extraction_rate(engine, many, like.batch, workers))
            rates[1].append(decoding_rate(many, like.batch, workers))
    about = {"workers": workers, "pictures": len(many), "pillow": records.version("pillow")}
    return [
        row | {"value": median, "p20": slow, "p80": fast, "unit": "images/s", "floor_share": None, "versions": about}
        for row, (slow, median, fast) in zip(settings(like), map(quantiles, rates), strict=True)
    ]


def extraction_rate(model: Any, paths: Sequence[str], batch: int, workers: int) -> float:
    """Pictures per second of an extraction, after its first two batches: one is handed out when the next has begun."""
    first: list[float] = []

    def begin(status: Status) -> None:
        if not first:
            first.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        done = extract(paths, model, folder, batch_size=batch, workers=workers, progress=begin)
        seconds = time.perf_counter() - first[0]
    if done.failures:
        raise ValueError(f"{done.failures} pictures have no features")
    return (len(paths) - 2 * batch) / seconds


def decoding_rate(paths: Sequence[str], batch: int, workers: int) -> float:
    """Pictures per second that the workers decode, after the first two batches."""
    processor = without_normalization(Dinov2ImageProcessor())
    begin = 0.0
    for place, decoded in enumerate(decode_all(map(Picture, paths), processor, workers=workers, ahead=2 * batch)):
        if decoded.error:
            raise ValueError(f"{paths[place]}: {decoded.error}")
        if place + 1 == 2 * batch:
            begin = time.perf_counter()
    return (len(paths) - 2 * batch) / (time.perf_counter() - begin)


@contextmanager
def as_the_command() -> Iterator[None]:
    """Spawned processes import the main module: here the command's, which is light, instead of this one with torch."""
    before, sys.modules["__main__"] = sys.modules["__main__"], command
    try:
        yield
    finally:
        sys.modules["__main__"] = before
