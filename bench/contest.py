"""Implementations against each other: each is made ready, then all are timed in turn; what stops one stops no other."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch

from bench import records
from bench.timing import Run, in_turn, warm_up

Name = TypeVar("Name", bound=Hashable)


def contest(
    rows: Mapping[Name, dict[str, Any]],
    ready: Callable[[Name], Run],
    device: torch.device,
    seconds: float,
    sample: float = 0.0,
) -> dict[Name, list[float]]:
    """Seconds of each run, taken in turn for about `seconds` in all.

    Args:
        rows: of each entrant. One that has a reason already, such as that it is missing, takes no part; that of one
            which is stopped gets a reason.
        ready: gives what is timed of an entrant, or raises.
        sample: seconds of calls, one behind the other, that one time is taken of, at least.

    Raises:
        records.DeviceLost: an entrant took the device with it.
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
    return in_turn(runs, device, seconds, calls=calls, stop=stop) if runs else {}
