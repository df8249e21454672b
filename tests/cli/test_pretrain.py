"""`dinov2-fast pretrain` up to the library's `pretrain`, which a stand-in replaces: options, output, signals."""

from __future__ import annotations

import io
import os
import re
import shlex
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from dinov2_fast.cli import main
from dinov2_fast.cli.pretrain import EPILOG
from dinov2_fast.cli.process import noted_stop
from dinov2_fast.data.batches import Failures
from dinov2_fast.pretraining.config import find_problems
from dinov2_fast.pretraining.log import StepReport
from dinov2_fast.pretraining.presets import read_config
from dinov2_fast.pretraining.run import End
from tests.helpers import documents

METRICS = {"loss": 9.25, "dino_global": 1.0, "dino_local": 7.5, "ibot": 1.5, "koleo": -2.0, "data_wait": 0.03}
METRICS |= {"images_per_second": 123.44, "dino_entropy": 5.5, "ibot_entropy": 4.5}


def report(step: int, **more: float) -> StepReport:
    return StepReport(step, 500, {**METRICS, **more}, seconds_left=3723.0)


class Pretrain:
    """Stands in for `pretrain`: keeps its arguments, gives reports, may do something, and returns."""

    def __init__(self) -> None:
        self.arguments: dict[str, Any] = {}
        self.reports: list[StepReport] = []
        self.during: Callable[[], object] = lambda: None
        self.end: dict[str, Any] = {}

    def __call__(self, images: list[str], *, progress: Any, stop: Any, **arguments: Any) -> End:
        self.arguments = {"images": images, **arguments}
        for each in self.reports:
            progress(each)
        self.during()
        done = 100 if stop() else 500
        end = {"first_step": 0, "step": done, "steps": 500, "images": 40, "batch_size": 8, "failures": Failures()}
        end["skipped"] = 0
        end |= {"folder": Path("runs/a"), "checkpoint": Path("runs/a/checkpoint-00000500"), "seconds": 20.0}
        return End(**{**end, "processes": 1, "is_main": True, **self.end})


@pytest.fixture
def pretrain(monkeypatch: pytest.MonkeyPatch) -> Pretrain:
    replacement = Pretrain()
    monkeypatch.setattr("dinov2_fast.pretraining.run.pretrain", replacement)
    return replacement


COMMAND = ["pretrain", "photos/", "--out", "runs/a"]


def test_options_that_are_not_given_have_the_defaults_of_the_library(pretrain: Pretrain) -> None:
    assert main([*COMMAND, "--workers", "0"]) == 0
    assert pretrain.arguments == {
        "images": ["photos/"],
        "out": "runs/a",
        "config": "small",
        "overrides": [],
        "workers": 0,
    }


def test_every_option_reaches_the_library(pretrain: Pretrain) -> None:
    options = ["--config", "vitl14", "--set", "model.depth=8", "--steps", "50", "--set", "crops.blur=[0, 1, 0]"]
    options += ["--start-from", "runs/0", "--evaluate", "train/", "val/", "--device", "cuda:1", "--workers", "3"]
    assert (
        main(["pretrain", "photos/", "b.tar", *COMMAND[2:], *options, "--max-pixels", "1000", "--max-seconds", "5"])
        == 0
    )
    assert pretrain.arguments == {
        "images": ["photos/", "b.tar"],
        "out": "runs/a",
        "config": "vitl14",
        "overrides": ["model.depth=8", "crops.blur=[0, 1, 0]", "run.steps=50"],
        "start_from": "runs/0",
        "evaluate": ["train/", "val/"],
        "device": "cuda:1",
        "workers": 3,
        "max_pixels": 1000,
        "max_seconds": 5,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "model.depth"], "'model.depth' is not FIELD=VALUE, such as model.depth=8"),
        (["--steps", "0"], "must be at least 1, got 0"),
        (["--evaluate", "train/"], "expected 2 arguments"),
        (["--workers", "-1"], "must be at least 0, got -1"),
    ],
)
def test_wrong_usage_exits_with_2(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*COMMAND, *options])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_the_help_fits_80_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80] == []


def test_the_summary_says_where_the_model_is(pretrain: Pretrain, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(COMMAND) == 0
    assert capsys.readouterr() == (
        "500/500 steps of 8 images, 40 images, 0 skipped, 0:00:20, 200.0 images/s\n"
        "Checkpoint: runs/a/checkpoint-00000500\n"
        "Load it:    import dinov2_fast; model = dinov2_fast.load('runs/a')\n",
        "",
    )
    pretrain.end = {"first_step": 300}
    main(COMMAND)
    first = "500/500 steps of 8 images, 300 were there already, 40 images, 0 skipped, 0:00:20, 80.0 images/s\n"
    assert capsys.readouterr().out.startswith(first)
    pretrain.end = {"first_step": 500}
    main(COMMAND)
    assert ", 0:00:20, nothing to do\n" in capsys.readouterr().out


def test_skipped_images_exit_with_3_but_not_under_torchrun(
    pretrain: Pretrain, capsys: pytest.CaptureFixture[str]
) -> None:
    failures = Failures()
    failures.add("bad.jpg", "not an image")
    pretrain.end = {"failures": failures, "skipped": 1}
    assert main(COMMAND) == 3
    captured = capsys.readouterr()
    assert ", 1 skipped, " in captured.out
    assert captured.err == "Skipped:\n  'bad.jpg': not an image\n"
    pretrain.end |= {"processes": 2}
    assert main(COMMAND) == 0


def test_only_the_main_process_prints_the_summary(pretrain: Pretrain, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain.end = {"processes": 2, "is_main": False}
    assert main(COMMAND) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_asks_for_a_stop_and_exits_with_143(
    pretrain: Pretrain, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    number = signal.Signals[name]
    before = signal.getsignal(number)
    pretrain.during = lambda: [os.kill(os.getpid(), number) for _ in range(2)]
    assert main(COMMAND) == 143
    assert capsys.readouterr().out.startswith("100/500 steps of 8 images")
    assert signal.getsignal(number) is before
    pretrain.end = {"step": 500}  # the signal came in the last step
    assert main(COMMAND) == 0


def test_control_c_ends_at_once_with_130(pretrain: Pretrain, capsys: pytest.CaptureFixture[str]) -> None:
    """Also after a SIGTERM, if the step takes too long. Further signals do not disturb the end."""
    received: list[int] = []

    def outer(number: int, _: FrameType | None) -> None:
        received.append(number)

    def during() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, outer)
    try:
        pretrain.during = during
        assert main(COMMAND) == 130
        assert signal.getsignal(signal.SIGTERM) is outer
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == []
    assert capsys.readouterr() == ("", "dinov2-fast: interrupted\n")


def test_signals_that_a_control_c_has_made_ignored_stay_ignored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with noted_stop():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


LINE = "10/500 steps, 1:02:03 left, 123.4 images/s, data wait 3%, loss 9.2500"
REST = ", DINO 1.0000 + 7.5000, iBOT 1.5000, KoLeo -2.0000, entropies 5.50 and 4.50"


def test_the_progress_is_a_line_now_and_then(
    pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = count(100.0, 4.0)  # of a report every four seconds
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    pretrain.reports = [report(step) for step in range(10, 501, 10)]
    pretrain.reports.insert(6, StepReport(60, 500, {"knn/10": 0.5, "knn/20": 0.625}, 3723.0))
    assert main(COMMAND) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("/")[0] for line in lines] == ["70", "150", "230", "310", "390", "470", "500"]
    assert lines[0] == LINE.replace("10/", "70/", 1) + ", k-NN 62.5% (k = 20, step 60)" + REST


def test_the_progress_fits_a_line_of_the_terminal(pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr("os.get_terminal_size", lambda _: os.terminal_size((100, 24)))
    monkeypatch.setattr(stream, "fileno", lambda: 2)
    pretrain.reports = [report(10), report(500)]
    assert main(COMMAND) == 0
    first, second, end = stream.getvalue().split("\r")
    assert first == (LINE + REST)[:99]
    assert second.startswith("500/500 steps, ")
    assert (len(second), end) == (99, "\n")


def test_an_evaluation_that_an_earlier_call_left_out_is_shown(
    pretrain: Pretrain, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain.reports = [StepReport(500, 500, {"knn/10": 0.5}, 0.0)]
    assert main(COMMAND) == 0
    assert capsys.readouterr().err == "500/500 steps, 0:00:00 left, k-NN 50.0% (k = 10, step 500)\n"


def documented() -> list[str]:
    """The commands in the documents and in the help, with and without torchrun."""
    text = re.sub(r"\\\n +", "", f"{documents.TEXT}\n{EPILOG}")
    lines = re.findall(r"^ +(?:\w+=\S+ )*(?:torchrun .* -m dinov2_fast|dinov2-fast) (pretrain .*)$", text, re.M)
    return sorted({*lines})


@pytest.mark.parametrize("line", documented())
def test_a_documented_command_is_correct_usage(line: str, pretrain: Pretrain) -> None:
    assert main(shlex.split(line, comments=True)) == 0
    assert pretrain.arguments["out"]


def test_commands_are_documented_with_and_without_torchrun() -> None:
    assert len(documented()) >= 10
    assert "-m dinov2_fast pretrain" in documents.TEXT
    assert documents.commands("pretrain")


def test_the_documented_file_is_a_configuration(tmp_path: Path) -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", documents.TEXT, flags=re.DOTALL)
    (tmp_path / "my.toml").write_text(text)
    config = read_config(tmp_path / "my.toml")
    assert (config.run.steps, config.model.num_register_tokens) == (20000, 4)
    assert find_problems(config, 10**6) == []
