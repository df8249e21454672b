"""The log of a run: what a kill or a resume leaves of `metrics.jsonl`, and when a collapse is named."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dinov2_fast.ops.prototype_loss import Targets
from dinov2_fast.pretraining.config import PretrainingConfig
from dinov2_fast.pretraining.log import (
    LONG_STAY,
    METRICS,
    CollapseWatch,
    MetricsFile,
    StepReport,
    holds_metrics,
    read_metrics,
    uniform_losses,
)
from dinov2_fast.pretraining.losses import dino_losses, ibot_loss


def report(step: int, **metrics: float) -> StepReport:
    return StepReport(step, 1000, metrics, 0.0)


def write(folder: Path, *steps: int, resumed_from: int = 0) -> None:
    file = MetricsFile(folder, resumed_from)
    for step in steps:
        file.write(report(step, loss=step / 7))
    file.close()


def steps(folder: Path) -> list[float]:
    return [each["step"] for each in read_metrics(folder)]


def test_reports_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert not holds_metrics(tmp_path)
    file = MetricsFile(tmp_path, 0)
    file.write(StepReport(10, 1000, {"loss": 0.1 + 0.2, "gradient_norm/backbone": 1e-30}, 5.0))
    expected: list[dict[str, float]] = [{"step": 10, "loss": 0.1 + 0.2, "gradient_norm/backbone": 1e-30}]
    assert read_metrics(tmp_path) == expected  # before it is closed: another process can watch the run
    file.close()
    assert holds_metrics(tmp_path)


def test_a_resumed_run_makes_the_same_file(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for folder in (whole, resumed):
        folder.mkdir()
    write(whole, 10, 20, 30, 40)
    write(resumed, 10, 20, 30)
    write(resumed, 30, 40, resumed_from=25)  # the checkpoint is of step 25
    assert (resumed / METRICS).read_bytes() == (whole / METRICS).read_bytes()
    write(resumed, resumed_from=40)
    assert (resumed / METRICS).read_bytes() == (whole / METRICS).read_bytes()
    write(resumed, 10)
    assert steps(resumed) == [10]


def test_a_torn_last_line_is_dropped_wherever_it_ends(tmp_path: Path) -> None:
    write(tmp_path, 10, 20)
    data = (tmp_path / METRICS).read_bytes()
    whole = data.index(b"\n") + 1
    for length in range(whole, len(data)):
        (tmp_path / METRICS).write_bytes(data[:length])
        assert steps(tmp_path) == [10]
        write(tmp_path, 20, resumed_from=20)
        assert (tmp_path / METRICS).read_bytes() == data


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path, 0)
    file.write(report(10, loss=math.nan, ibot=-math.inf, koleo=1.0))
    file.close()

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    line = json.loads((tmp_path / METRICS).read_text(), parse_constant=refuse)
    assert line == {"step": 10, "loss": None, "ibot": None, "koleo": 1.0}
    (found,) = read_metrics(tmp_path)
    assert math.isnan(found["loss"])
    assert math.isnan(found["ibot"])


class Writer:
    """Stands in for TensorBoard's, which need not be installed."""

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step, self.is_closed = folder, purge_step, False
        self.scalars: list[tuple[str, float, int]] = []
        writers.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def close(self) -> None:
        self.is_closed = True


writers: list[Writer] = []


def test_tensorboard_gets_the_metrics_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writers.clear()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    write(tmp_path, 30, resumed_from=25)
    (writer,) = writers
    assert (writer.folder, writer.purge_step) == (str(tmp_path / "tensorboard"), 26)
    assert (writer.scalars, writer.is_closed) == ([("loss", 30 / 7, 30)], True)


def test_without_tensorboard_there_are_no_event_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it fails
    write(tmp_path, 10)
    assert [path.name for path in tmp_path.iterdir()] == [METRICS]


def config(n_local: int = 8, warmup_steps: int = 0) -> PretrainingConfig:
    changes: dict[str, Any] = {"optimizer": {"warmup_steps": warmup_steps}, "crops": {"n_local": n_local}}
    return PretrainingConfig().updated({**changes, "dino_head": {"prototypes": 4096}, "ibot_head": {"prototypes": 32}})


@pytest.mark.parametrize("n_local", [0, 1, 8])
def test_the_losses_at_uniform_outputs(n_local: int) -> None:
    """Against the losses of a student whose logits are 0, with any targets."""

    def targets(crops: int, images: int, k: int) -> Targets:
        z, prototypes = torch.randn(crops, images, 8), torch.randn(k, 8)
        b = (z @ prototypes.T / 0.05).logsumexp(dim=-1)
        return Targets(z, prototypes, torch.zeros(k), b, 0.05)

    prototypes = torch.randn(4096, 8)
    expected = uniform_losses(config(n_local))
    found = dino_losses(torch.zeros(2 + n_local, 3, 8), prototypes, targets(2, 3, 4096), 0.1)
    assert [float(loss) for loss in found] == pytest.approx([expected["dino_global"], expected["dino_local"]], rel=1e-5)
    # Four crops, of which two have masks, of one and two patches.
    weights = torch.tensor([1.0, 0.5, 0.5])
    ibot = ibot_loss(torch.zeros(3, 8), prototypes[:32], targets(1, 3, 32), weights, 4, 0.1)
    assert float(ibot) == pytest.approx(expected["ibot"], rel=1e-5)


UNIFORM = {**uniform_losses(config()), "dino_mean_entropy": 8.0}


def scaled(factor: float) -> dict[str, float]:
    return {name: value * factor for name, value in UNIFORM.items()}


def messages(values: Sequence[Mapping[str, float]], *, every: int = 10, warmup_steps: int = 0) -> dict[int, str]:
    """The messages by step, of reports every `every` steps."""
    watch = CollapseWatch(config(warmup_steps=warmup_steps))
    found = {every * i: watch.message(report(every * i, **each)) for i, each in enumerate(values, 1)}
    return {step: text for step, text in found.items() if text}


def test_uniform_outputs_are_named_once() -> None:
    found = messages([UNIFORM] * 100)
    assert list(found) == [110]  # 100 steps after the first report
    assert found[110].startswith("The loss is ln K: the outputs are uniform (DINO's loss is 8.3178)")
    noise = [scaled(1 + 0.004 * (-1) ** i) for i in range(100)]
    assert list(messages(noise)) == [110]


def test_a_loss_that_is_near_ln_k_for_a_while_is_not_named() -> None:
    falling = [scaled(1.02 - 0.0015 * i) for i in range(100)]  # 7 reports are within the tolerance
    assert messages(falling) == {}
    assert messages([scaled(0.99)] * 100) == {}
    assert messages([scaled(1.01)] * 100) == {}
    interrupted = [scaled(0.98) if i % 10 == 0 else UNIFORM for i in range(100)]
    assert messages(interrupted) == {}
    assert messages([{**UNIFORM, "dino_global": math.nan}] * 100) == {}
    other = {**UNIFORM, "dino_local": 0.9 * UNIFORM["dino_local"]}  # the global crops alone
    assert messages([other] * 100) == {}


def test_in_the_warm_up_only_a_long_stay_is_named() -> None:
    assert list(messages([UNIFORM] * 100, warmup_steps=300)) == [400]
    assert messages([*[UNIFORM] * 35, *[scaled(0.95)] * 100], warmup_steps=300) == {}
    assert list(messages([UNIFORM] * 1000, warmup_steps=100_000)) == [10 + LONG_STAY]


def test_targets_that_are_all_alike_are_named_once() -> None:
    same, sharp = {**scaled(0.5), "dino_mean_entropy": 0.01}, {**scaled(0.5), "dino_entropy": 0.0}
    found = messages([same] * 100)
    assert list(found) == [110]
    assert found[110].startswith("All targets are the same prototype")
    assert messages([sharp] * 100) == {}
