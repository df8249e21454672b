"""A run that is killed again and again ends with the bits of one that was left alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from random import Random

import pytest
import torch

from dinov2_fast.pretraining import checkpoint
from dinov2_fast.pretraining.run import pretrain
from tests.helpers.pretraining import computed_metrics, make_images, small_config, stored_tensors

KILLS = 20
STEPS = 80
CONFIG = small_config(run={"steps": STEPS, "save_every": 1})  # so that a save is always near


def train(images: Path, out: Path, steps: float | None) -> None:
    """Runs in a process of its own, which kills itself after two steps and as long as `steps` more take."""
    torch.set_num_threads(1)
    times: list[float] = []

    def progress(_: object) -> None:
        times.append(time.perf_counter())
        if steps is not None and len(times) == 2:
            threading.Timer(steps * (times[1] - times[0]), os.kill, (os.getpid(), signal.SIGKILL)).start()

    pretrain(images, out=out, config=CONFIG, device="cpu", progress=progress)


@pytest.mark.slow
def test_twenty_kills_change_no_bit(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images")
    context = multiprocessing.get_context("forkserver")  # so that each process need not import torch
    context.set_forkserver_preload([__name__, "dinov2_fast.pretraining.run"])
    rng, reached = Random(0), []

    def live(out: str, steps: float | None) -> int | None:
        process = context.Process(target=train, args=(images, tmp_path / out, steps))
        process.start()
        process.join()
        return process.exitcode

    assert live("whole", None) == 0
    for _ in range(KILLS):
        code = live("killed", rng.uniform(0, 2))
        assert code == -signal.SIGKILL  # 0: the run was complete before it could be killed so often
        reached.append(checkpoint.newest(tmp_path / "killed"))
    assert len(set(reached)) > KILLS / 2, "they are killed while they train"
    assert live("killed", None) == 0
    last = f"checkpoint-{STEPS:08}"
    expected, found = stored_tensors(tmp_path / "whole" / last), stored_tensors(tmp_path / "killed" / last)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert computed_metrics(tmp_path / "whole") == computed_metrics(tmp_path / "killed")
    assert sorted(path.name for path in (tmp_path / "killed").glob("*checkpoint*")) == [
        f"checkpoint-{STEPS - 1:08}",
        last,
    ]
