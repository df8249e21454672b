"""How everything is timed: after warming up, in turn, A B C A B C, so that a change of the device's speed meets all."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar

import torch

Run = Callable[[], Any]
Name = TypeVar("Name")

ROUNDS = 5  # of each run at least
# Bytes written between timings: more than any L2, and on a GPU enough for Python to prepare the next launch meanwhile.
FLUSH = {"cpu": 64 << 20, "cuda": 1 << 30}
STEADY = 0.1  # two times in a row that differ by less than this share are those of a warm run
PATIENCE = 10.0  # seconds after which a run that does not become steady is taken as it is
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
    """Seconds of each run, taken in turn, for about `seconds` in all.

    Args:
        flush: fill the L2 cache with other data before each.
        calls: how often each is called for one time, one call behind the other without waiting; once by default.
        stop: told of a run that raises, which is then left out, and has no times; without it the exception is raised.
    """
    keep_freed_memory()
    cold = torch.empty(FLUSH[device.type], dtype=torch.uint8, device=device) if flush else None
    times: dict[Name, list[float]] = {name: [] for name in runs}
    order, start = list(runs), time.perf_counter()
    while order and (len(times[order[0]]) < ROUNDS or time.perf_counter() - start < seconds):
        for name in order:
            if cold is not None:
                cold.zero_()
            count = calls[name] if calls else 1
            try:
                times[name].append(elapsed(runs[name], device, count) / count)
            except Exception as exception:
                if stop is None:
                    raise
                del times[name]
                stop(name, exception)
        order = [name for name in order[1:] + order[:1] if name in times]
    return times


@cache
def keep_freed_memory() -> None:
    """Has glibc's malloc keep what is freed, for the next allocation, where it would give large blocks back.

    How much it gives back depends on what the process did before, and fetching it anew is a part of the time of a
    forward pass on a CPU that is not the same in the next run. With this every implementation has its best case.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def warm_up(run: Run, device: torch.device) -> float:
    """Runs until the time is steady, since libraries plan and compile at first; gives the last time, in seconds."""
    before, last = elapsed(run, device), elapsed(run, device)
    start = time.perf_counter()
    while abs(last - before) > STEADY * last and time.perf_counter() - start < PATIENCE:
        before, last = last, elapsed(run, device)
    return last


def elapsed(run: Run, device: torch.device, calls: int = 1) -> float:
    """Seconds until the device is done with some calls: by its own events on a GPU, by the clock on a CPU."""
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
