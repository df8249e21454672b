"""What all benchmarks share: how implementations are timed, and the options of the commands.

Each implementation is made ready and its results are checked. Then all are timed in turn, A B C A B C, so that a change
of the device's speed affects all alike. An implementation that fails is left out; the others go on.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench import records
from dinov2_fast.configs import BACKBONES, BackboneConfig
from tests.reference import assert_obeys_rule

# The rule of the tests, but with a largest error of three times torch's, where tests allow two. A largest error is a
# matter of chance, the inputs of an op differ from run to run, and a class token has few values. Of 75 random inputs,
# each gives oneDNN's linears in fp32 1.4 times the norm of torch's errors, but a largest error of 1.3 to 2.6 times.
obeys_rule = partial(assert_obeys_rule, largest_error=3.0)

Run = Callable[[], Any]
Name = TypeVar("Name", bound=Hashable)

ROUNDS = 5  # timings of each run, at least
# Bytes written between timings: more than any L2 cache. On a GPU that takes long enough for Python to prepare the next
# launch meanwhile.
FLUSH = {"cpu": 64 << 20, "cuda": 1 << 30}
# On a CPU a run repeats untimed for this many seconds before each timing, unless it takes longer than LONG. The threads
# of the run before spin for some milliseconds, and threads that have just woken may share a core until the scheduler's
# next tick, 4 ms later.
UNTIMED, LONG = 0.05, 1.0
STEADY = 0.1  # a run is warm when two timings in a row differ by less than this share
PATIENCE = 10.0  # seconds after which a run counts as warm in any case
ATTEMPTS = 100  # timings after which it does: those of a run of microseconds may vary for long
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt


def in_turn(
    runs: Mapping[Name, Run],
    device: torch.device,
    seconds: float,
    *,
    flush: bool = False,
    calls: Mapping[Name, int] | None = None,
    stop: Callable[[Name, Exception], None] | None = None,
) -> dict[Name, list[float]]:
    """Times runs in turn, for about `seconds` in all; gives the seconds of one call, for each timing of each run.

    Args:
        flush: fill the L2 cache with other data before each timing.
        calls: calls in one timing of each run, queued without waiting; one by default.
        stop: is told of a run that raises, which is then left out of the result. Without it the exception is raised.
    """
    keep_freed_memory()
    cold = torch.empty(FLUSH[device.type], dtype=torch.uint8, device=device) if flush else None
    times: dict[Name, list[float]] = {name: [] for name in runs}
    order, start = list(runs), time.perf_counter()
    while order and (len(times[order[0]]) < ROUNDS or time.perf_counter() - start < seconds):
        for name in order:
            count = calls[name] if calls else 1
            try:
                if device.type == "cpu" and not (times[name] and times[name][-1] > LONG):
                    _go_on(runs[name])
                if cold is not None:
                    cold.zero_()
                times[name].append(elapsed(runs[name], device, count) / count)
            except Exception as exception:
                if stop is None:
                    raise
                del times[name]
                stop(name, exception)
        order = [name for name in order[1:] + order[:1] if name in times]
    return times


def _go_on(run: Run) -> None:
    begin = time.perf_counter()
    while time.perf_counter() - begin < UNTIMED:
        run()


@cache
def keep_freed_memory() -> None:
    """Has glibc's malloc keep freed memory, which it would partly return to the system.

    How much it returns depends on what the process did before, and getting it back takes a part of a forward pass on a
    CPU that differs from run to run. With this every implementation has its best case.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def warm_up(run: Run, device: torch.device) -> float:
    """Runs until the time is steady, since libraries plan and compile at first; gives the last one, in seconds."""
    before, last = elapsed(run, device), elapsed(run, device)
    start = time.perf_counter()
    for _ in range(ATTEMPTS):
        if abs(last - before) <= STEADY * last or time.perf_counter() - start >= PATIENCE:
            break
        before, last = last, elapsed(run, device)
    return last


def elapsed(run: Run, device: torch.device, calls: int = 1) -> float:
    """Seconds that some calls take: between events on a GPU, by the clock on a CPU."""
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        return time.perf_counter() - begin
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(calls):
        run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """The 20th percentile, the median and the 80th."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def contest(
    rows: Mapping[Name, dict[str, Any]],
    ready: Callable[[Name], Run],
    device: torch.device,
    seconds: float,
    sample: float = 0.0,
    *,
    flush: bool = False,
) -> dict[Name, list[float]]:
    """Makes entrants ready and times them as :func:`in_turn` does.

    Args:
        rows: one for each entrant. An entrant whose row already says why it has no value takes no part. The row of one
            that fails gets the reason.
        ready: gives the run of an entrant, or raises.
        sample: least seconds of one timing, which has as many calls as that takes.
        flush: as in :func:`in_turn`.

    Raises:
        records.DeviceLost: an entrant left the device unusable.
    """
    runs: dict[Name, Run] = {}
    calls: dict[Name, int] = {}

    def stop(name: Name, exception: Exception) -> None:
        records.stop([rows[name]], exception, device)

    for name in rows:
        if records.reason(rows[name]):
            continue
        try:
            run = ready(name)
            calls[name] = max(1, round(sample / warm_up(run, device)))
            runs[name] = run
        except Exception as exception:  # what stops one must not stop the others
            stop(name, exception)
    return in_turn(runs, device, seconds, flush=flush, calls=calls, stop=stop) if runs else {}


# Backbones by letter and by the name of their hub entry point.
MODELS = {letter: BACKBONES[f"dinov2_vit{letter.lower()}14"] for letter in "SBLg"} | BACKBONES
TINY = replace(BACKBONES["dinov2_vits14"], name="tiny", embed_dim=64, num_heads=1)  # its time is Python's
MODELS["tiny"] = TINY

# Defaults.
OF_DEVICE = {"cpu": {"models": "S,B", "sizes": "224,518"}, "cuda": {"models": "S,B,L,g", "sizes": "224,518,1036"}}
BATCHES = {
    "throughput": {"cpu": {224: [8], 518: [8]}, "cuda": {224: [256], 518: [64], 1036: [16]}},
    "latency": {"cpu": {224: [1], 518: [1]}, "cuda": {224: [1, 4, 16], 518: [1, 4, 16]}},
    "training": {"cpu": {224: [3]}, "cuda": {224: [64]}},  # of 3, stochastic depth of 0.3 keeps 2
    "memory": {"cpu": {224: [2]}, "cuda": {224: [64]}},
    "mixed": {"cpu": {"112-224": [4]}, "cuda": {"224-518": [64]}},
    "host": {"cpu": {28: [1]}, "cuda": {28: [1]}},
}


def some_of(known: Any) -> Callable[[str], list[Any]]:
    """Parses names with commas between them; `known` holds the values, or maps names to them."""
    names = known if isinstance(known, dict) else {str(value): value for value in known}

    def parse(text: str) -> list[Any]:
        unknown = [name for name in text.split(",") if name not in names]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: there are {', '.join(names)}")
        return [names[name] for name in text.split(",")]

    return parse


def numbers(text: str) -> list[int]:
    """Parses positive integers with commas between them."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text}: positive numbers with commas between them are wanted")
    return [int(part) for part in parts]


def pixels(text: str) -> list[int]:
    """Parses sizes of images that consist of whole patches."""
    sizes = numbers(text)
    if wrong := [str(size) for size in sizes if size % 14]:
        raise argparse.ArgumentTypeError(f"{', '.join(wrong)}: a size is a multiple of 14")
    return sizes


def parser(module: str, docstring: str) -> argparse.ArgumentParser:
    """A parser with the options of :class:`bench.records.Recorder`, and the backbones."""
    made = argparse.ArgumentParser(
        prog=f"python -m bench.{module}", description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made.add_argument("--device", default=device, choices=["cpu", "cuda"], help="default here: %(default)s")
    made.add_argument("--write", action="store_true", help="keep the rows, in a folder for this device")
    made.add_argument("--results", type=Path, default=records.RESULTS, help="where that is (default: bench/results)")
    made.add_argument("--commit", help="what is measured (default: the commit that git names)")
    made.add_argument("--resume", action="store_true", help="leave out what --results hold of this commit")
    made.add_argument("--models", type=some_of(MODELS), help="some of S,B,L,g, or names such as dinov2_vits14_reg")
    return made


def parse(
    made: argparse.ArgumentParser, arguments: list[str] | None, **of_device: dict[str, Any]
) -> argparse.Namespace:
    """The options, with defaults that depend on the device."""
    device = made.parse_known_args(arguments)[0].device
    made.set_defaults(**(OF_DEVICE[device] | of_device.get(device, {})))
    return made.parse_args(arguments)


def batches(task: str, device: str, resolution: int | str) -> list[int]:
    """Batch sizes of a task: as many images as keep a device busy, or few for latency."""
    return BATCHES[task][device].get(resolution, [2 if task == "mixed" else 1])


def title(config: BackboneConfig) -> str:
    """As people write it: `ViT-S/14`, `ViT-S/14 reg`."""
    size = config.name.removeprefix("dinov2_vit")[0]
    return f"ViT-{size if size == 'g' else size.upper()}/14{' reg' if config.num_register_tokens else ''}"
