"""`dinov2-fast pretrain` as users run it: documented commands, signals, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import dinov2_fast
from dinov2_fast.cli import main
from dinov2_fast.features.lock import lock
from dinov2_fast.pretraining import presets
from dinov2_fast.pretraining.log import METRICS, read_metrics
from tests.helpers import documents
from tests.helpers.pretraining import SETTINGS, make_images, small_config


def write_toml(path: Path, **run: int) -> Path:
    """The small configuration, with other values for some settings of the run, as a file."""
    groups = {**SETTINGS, "run": {**SETTINGS["run"], **run}}
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
        for group, settings in groups.items()
    ]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    images = make_images(tmp_path / "photos")
    config = write_toml(tmp_path / "small.toml")
    arguments = ["pretrain", str(images), "--config", str(config), "--out", str(tmp_path / "run")]
    return [*arguments, "--device", "cpu", "--workers", "0"]


def test_a_run_its_summary_and_its_model(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    captured = capsys.readouterr()
    summary, where, how = captured.out.splitlines()
    assert re.fullmatch(r"6/6 steps of 4 images, 10 images, 0 skipped, \d:\d\d:\d\d, \d+\.\d images/s", summary)
    assert where == f"Checkpoint: {tmp_path / 'run' / 'checkpoint-00000006'}"
    assert captured.err.splitlines()[-1].startswith("6/6 steps, 0:00:00 left, ")
    names: dict[str, Any] = {}
    exec(how.partition(":")[2].strip(), names)
    assert names["model"](torch.zeros(1, 3, 42, 42)).shape == (1, 32)
    assert main([*command, "--set", "run.log_every=2"]) == 0
    assert "6 were there already, 10 images, 0 skipped, 0:00:00, nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "run.seed=1"], "run.seed"),
        (["--steps", "7"], "run.steps"),
        (["--set", "optimizer.learning_rat=1"], "Did you mean optimizer.learning_rate?"),
        (["--config", "smal"], "Did you mean small?"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_what_cannot_go_on_exits_with_1_and_says_why(
    options: list[str], message: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--set", "run.save_every=1", "--steps", "6"]) == 0
    before = (tmp_path / "run" / METRICS).read_bytes()
    capsys.readouterr()
    assert main([*command, *options]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("dinov2-fast: error: ")
    assert message in captured.err
    assert (tmp_path / "run" / METRICS).read_bytes() == before


def test_two_runs_cannot_share_a_folder(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    with lock(tmp_path / "run", (1, 1)):
        assert main(command) == 1
    assert capsys.readouterr().err.startswith("dinov2-fast: error: ")
    assert main(command) == 0


def test_a_broken_image_is_skipped_and_exits_with_3(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos" / "bad.jpg").write_text("<html>")
    assert main(command) == 3
    captured = capsys.readouterr()
    assert "Skipped:\n" in captured.err
    assert "bad.jpg': not an image" in captured.err
    assert re.search(r"11 images, [1-9]\d* skipped", captured.out)
    assert sum(line["skipped_images"] for line in read_metrics(tmp_path / "run")) >= 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGUSR1", 143), ("SIGINT", 130)])
def test_a_signal_ends_a_run_after_a_checkpoint(name: str, code: int, command: list[str], tmp_path: Path) -> None:
    """Also where the processes that decode get the signal, as Slurm and a terminal send it."""
    write_toml(tmp_path / "small.toml", steps=10_000, save_every=5)
    run, whole = tmp_path / "run", [sys.executable, "-m", "dinov2_fast", *command, "--workers", "1"]
    pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(whole, cwd=documents.ROOT, **pipes) as process:
        assert process.stderr is not None
        while not list(run.glob("checkpoint-*")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        os.killpg(process.pid, signal.Signals[name])
        rest = process.stderr.read()
    assert process.returncode == code, rest
    assert "Traceback" not in rest
    assert "Skipped" not in rest
    saved = max(int(path.name.removeprefix("checkpoint-")) for path in run.glob("checkpoint-*"))
    reported = int(read_metrics(run)[-1]["step"])
    assert saved == reported if code == 143 else reported - 5 <= saved <= reported + 1


def test_the_documented_commands_and_code_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the small configuration in the place of every preset."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(presets, "PRESETS", dict.fromkeys(presets.PRESETS, small_config()))
    make_images(tmp_path / "photos")
    for split in ("train", "val"):
        for name in ("a", "b"):
            make_images(tmp_path / "labelled" / split / name, 3)
    (tmp_path / "my.toml").write_text("[run]\nmicro_batch = 4\n")
    for line in documents.commands("pretrain"):
        arguments = shlex.split(line, comments=True)
        if "runs/d" in arguments:  # made by a documented command with torchrun
            shutil.copytree("runs/a", "runs/d")
        assert main([*arguments, "--steps", "2", "--device", "cpu", "--workers", "0"]) == 0, line
    assert "knn/6" in read_metrics(Path("runs/b"))[-1]  # of the 6 images to train on
    shutil.rmtree("runs/a")
    names: dict[str, Any] = {}
    exec(documents.example('pretrain("photos/"').replace("workers=8", 'device="cpu"'), names)
    assert isinstance(names["model"], dinov2_fast.DinoVisionTransformer)


@pytest.mark.slow
def test_torchrun_starts_the_command(command: list[str], tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "dinov2_fast", *command], cwd=documents.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("6/6 steps of 4 images, 10 images, 0 skipped") == 1
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
