"""What all benchmarks share: how implementations are timed, and the options of the commands.

Each implementation is prepared and its results are checked. Then all are timed in turn, A B C B C A, so that a change
of the device's speed affects all of them alike. An implementation that fails is left out, and the others continue.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench import records
from bench.records import Row
from dinov2_fast.configs import BACKBONES, BackboneConfig
from tests.reference import assert_obeys_rule

# The rule of the tests, except that the largest error may be three times torch's, where tests allow two. The largest
# error is a matter of chance: the inputs of an op differ from run to run, and a class token has few values. On 75
# random inputs, the norm of the errors of oneDNN's fp32 linears was always 1.4 times torch's, but their largest error
# was 1.3 to 2.6 times torch's.
obeys_rule = partial(assert_obeys_rule, largest_error=3.0)

Run = Callable[[], Any]
Name = TypeVar("Name", bound=Hashable)

ROUNDS = 5  # timings of each run, at least
# Bytes written between timings: more than any L2 cache. On a GPU this takes long enough for Python to prepare the next
# launch in the meantime.
FLUSH_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
# On a CPU, a run is repeated for this many seconds before each timing, unless a single run takes longer than
# LONG_RUN_SECONDS. The threads of the previous run spin for some milliseconds, and threads that have just woken may
# share a core until the scheduler's next tick, 4 ms later.
UNTIMED_SECONDS, LONG_RUN_SECONDS = 0.05, 1.0
STEADY_CHANGE = 0.1  # a run is warm when two timings in a row differ by less than this share
WARM_UP_SECONDS = 10.0  # after this time a run counts as warm in any case
WARM_UP_RUNS = 100  # and after this many timings: those of a run of microseconds may vary for a long time
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt


def time_in_turn(
    runs: Mapping[Name, Run],
    device: torch.device,
    seconds: float,
    *,
    flush: bool = False,
    calls: Mapping[Name, int] | None = None,
    on_error: Callable[[Name, Exception], None] | None = None,
) -> dict[Name, list[float]]:
    """Times runs in turn, for about `seconds` in all. Returns the seconds of one call, for each timing of each run.

    With `flush` the L2 cache is filled with other data before each timing. The `calls` of one timing (by default one)
    are queued without waiting. A run that raises is left out of the result if there is `on_error`.
    """
    keep_freed_memory()
    other_data = torch.empty(FLUSH_BYTES[device.type], dtype=torch.uint8, device=device) if flush else None
    times: dict[Name, list[float]] = {name: [] for name in runs}
    order, start = list(runs), time.perf_counter()
    while order and (len(times[order[0]]) < ROUNDS or time.perf_counter() - start < seconds):
        for name in order:
            count = calls[name] if calls else 1
            try:
                if device.type == "cpu" and not (times[name] and times[name][-1] > LONG_RUN_SECONDS):
                    _run_untimed(runs[name])
                if other_data is not None:
                    other_data.zero_()
                times[name].append(elapsed(runs[name], device, count) / count)
            except Exception as exception:
                if on_error is None:
                    raise
                del times[name]
                on_error(name, exception)
        order = [name for name in order[1:] + order[:1] if name in times]
    return times


def _run_untimed(run: Run) -> None:
    begin = time.perf_counter()
    while time.perf_counter() - begin < UNTIMED_SECONDS:
        run()


@cache
def keep_freed_memory() -> None:
    """Makes glibc's malloc keep freed memory. By default it returns a part of it to the system.

    How much it returns depends on what the process did before, and getting it back takes a varying share of a forward
    pass on a CPU. With this setting every implementation has its best case.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def warm_up(run: Run, device: torch.device) -> float:
    """Repeats a run until its time is steady, since libraries plan and compile at first. Returns the last time."""
    before, last = elapsed(run, device), elapsed(run, device)
    start = time.perf_counter()
    for _ in range(WARM_UP_RUNS):
        if abs(last - before) <= STEADY_CHANGE * last or time.perf_counter() - start >= WARM_UP_SECONDS:
            break
        before, last = last, elapsed(run, device)
    return last


def elapsed(run: Run, device: torch.device, calls: int = 1) -> float:
    """The seconds that some calls take: between events on a GPU, by the clock on a CPU."""
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


def speed(seconds: Sequence[float], unit: str, images: int = 1) -> Row:
    """The keys of a row with the median and its spread: of times in ms or us, or of images/s in runs on `images`."""
    fifths = statistics.quantiles(seconds if len(seconds) > 1 else 2 * seconds, n=5, method="inclusive")
    median, low, high = statistics.median(seconds), fifths[0], fifths[3]
    if unit == "images/s":
        return {"value": images / median, "p20": images / high, "p80": images / low, "unit": unit}
    scale = {"ms": 1e3, "us": 1e6}[unit]
    return {"value": scale * median, "p20": scale * low, "p80": scale * high, "unit": unit}


def time_implementations(
    rows: Mapping[Name, Row],
    make_run: Callable[[Name], Run],
    device: torch.device,
    seconds: float,
    min_seconds: float = 0.0,
    *,
    flush: bool = False,
) -> dict[Name, list[float]]:
    """Prepares implementations and times them as :func:`time_in_turn` does. A timing takes about `min_seconds` or more.

    An implementation whose row has a reason not to be measured is skipped. If `make_run` or the run raises, the reason
    is written into the row.

    Raises:
        records.DeviceLost: an implementation left the device unusable.
    """
    runs: dict[Name, Run] = {}
    calls: dict[Name, int] = {}

    def on_error(name: Name, exception: Exception) -> None:
        records.record_failure(rows[name], exception, device)

    for name in rows:
        if records.reason(rows[name]):
            continue
        try:
            run = make_run(name)
            calls[name] = max(1, round(min_seconds / warm_up(run, device)))
            runs[name] = run
        except Exception as exception:  # the failure of one must not stop the others
            on_error(name, exception)
    return time_in_turn(runs, device, seconds, flush=flush, calls=calls, on_error=on_error) if runs else {}


# Backbones by letter and by the name of their hub entry point.
MODELS = {letter: BACKBONES[f"dinov2_vit{letter.lower()}14"] for letter in "SBLg"} | BACKBONES
TINY = replace(BACKBONES["dinov2_vits14"], name="tiny", embed_dim=64, num_heads=1)  # Python takes most of its time
MODELS["tiny"] = TINY

# Defaults of options.
DEFAULTS = {"cpu": {"models": "S,B", "sizes": "224,518"}, "cuda": {"models": "S,B,L,g", "sizes": "224,518,1036"}}
BATCH_SIZES = {
    "throughput": {"cpu": {224: [8], 518: [8]}, "cuda": {224: [256], 518: [64], 1036: [16]}},
    "latency": {"cpu": {224: [1], 518: [1]}, "cuda": {224: [1, 4, 16], 518: [1, 4, 16]}},
    "training": {"cpu": {224: [3]}, "cuda": {224: [64]}},  # of 3, stochastic depth of 0.3 keeps 2
    "memory": {"cpu": {224: [2]}, "cuda": {224: [64]}},
    "mixed": {"cpu": {"112-224": [4]}, "cuda": {"224-518": [64]}},
    "host": {"cpu": {28: [1]}, "cuda": {28: [1]}},
}


def list_of(known: Any) -> Callable[[str], list[Any]]:
    """A parser of comma-separated names. `known` holds the values, or maps names to them."""
    names = known if isinstance(known, dict) else {str(value): value for value in known}

    def parse(text: str) -> list[Any]:
        unknown = [name for name in text.split(",") if name not in names]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; choose from {', '.join(names)}")
        return [names[name] for name in text.split(",")]

    return parse


def positive_integers(text: str) -> list[int]:
    """Parses comma-separated positive integers."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text} is not a comma-separated list of positive integers")
    return [int(part) for part in parts]


def image_sizes(text: str) -> list[int]:
    """Parses comma-separated sizes of images that consist of whole patches."""
    sizes = positive_integers(text)
    if wrong := [str(size) for size in sizes if size % 14]:
        raise argparse.ArgumentTypeError(f"{', '.join(wrong)}: a size must be a multiple of 14")
    return sizes


def make_parser(module: str, docstring: str) -> argparse.ArgumentParser:
    """A parser with the options of :class:`bench.records.Recorder`, and --models."""
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.{module}", description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, choices=["cpu", "cuda"], help="default here: %(default)s")
    parser.add_argument("--write", action="store_true", help="save the rows in the device's folder of --results")
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="default: bench/results")
    parser.add_argument("--commit", help="the commit that is measured (default: git's HEAD)")
    parser.add_argument("--resume", action="store_true", help="skip what --results already hold of this commit")
    parser.add_argument("--models", type=list_of(MODELS), help="some of S,B,L,g, or names such as dinov2_vits14_reg")
    return parser


def parse_options(
    parser: argparse.ArgumentParser, arguments: list[str] | None, **device_defaults: dict[str, Any]
) -> argparse.Namespace:
    """The options, with defaults that depend on the device."""
    device = parser.parse_known_args(arguments)[0].device
    parser.set_defaults(**(DEFAULTS[device] | device_defaults.get(device, {})))
    return parser.parse_args(arguments)


def batch_sizes(task: str, device: str, resolution: int | str) -> list[int]:
    """The default batch sizes of a task: enough images to keep a device busy, or few for latency."""
    return BATCH_SIZES[task][device].get(resolution, [2 if task == "mixed" else 1])


def model_title(config: BackboneConfig) -> str:
    """The usual spelling of a model's name: `ViT-S/14`, `ViT-S/14 reg`."""
    size = config.name.removeprefix("dinov2_vit")[0]
    return f"ViT-{size if size == 'g' else size.upper()}/14{' reg' if config.num_register_tokens else ''}"
