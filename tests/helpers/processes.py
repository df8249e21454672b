"""Functions that run in several processes, which exchange data by gloo."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dinov2_fast.pretraining.parallel import start_processes

LONGEST_WAIT = 120  # seconds of a process for another, which may still be importing


def run_processes(size: int, folder: Path, function: Callable[..., None], *args: Any) -> None:
    """Calls ``function(world, folder, *args)`` in `size` new processes, and raises the first error of one."""
    store = folder / f"store-{function.__name__}-{size}"
    mp.spawn(_run_one, (size, str(store), function, (folder, *args)), size)


def _run_one(rank: int, size: int, store: str, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    group: dict[str, Any] = {"rank": rank, "world_size": size, "timeout": timedelta(seconds=LONGEST_WAIT)}
    dist.init_process_group("gloo", store=dist.FileStore(store, size), **group)
    with start_processes("cpu") as world:
        function(world, *args)
        world.wait()
    dist.destroy_process_group()
