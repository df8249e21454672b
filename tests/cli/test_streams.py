"""The command line where nobody listens, and where it is interrupted: no traceback, and the right exit code."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import dinov2_fast
from dinov2_fast.cli import extract as command
from dinov2_fast.cli import main

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "examples" / "images"


def in_shell(redirections: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    shell = f'exec "$@" {redirections}'
    command = ["sh", "-c", shell, "sh", sys.executable, "-m", "dinov2_fast", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("redirections", "lines"), [("2>&-", 3), ("2>/dev/full", 3), (">&-", 0), (">/dev/full", 0), ("<&- >&- 2>&-", 0)]
)
def test_extraction_goes_on_where_nobody_listens(
    checkpoint: str, tmp_path: Path, redirections: str, lines: int
) -> None:
    (tmp_path / "bad.jpg").write_text("<html>")
    arguments = ["extract", str(IMAGES), str(tmp_path / "bad.jpg"), "--model", checkpoint, "--size", "28"]
    done = in_shell(redirections, *arguments, "--workers", "1", "--out", str(tmp_path / "out"))
    assert done.returncode == 3, done.stderr
    assert len(dinov2_fast.load_features(tmp_path / "out")) == 6
    assert done.stdout.count("\n") == lines
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_extraction_goes_on_when_the_reader_of_its_progress_has_left(checkpoint: str, tmp_path: Path) -> None:
    arguments = ["extract", str(IMAGES), "--model", checkpoint, "--size", "28", "--workers", "0"]
    whole = [sys.executable, "-m", "dinov2_fast", *arguments, "--out", str(tmp_path)]
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(whole, cwd=ROOT, stdout=subprocess.PIPE, stderr=writes, text=True)
    os.close(writes)
    assert (done.returncode, done.stdout.startswith("5 images, 0 failed")) == (0, True)


def test_what_is_printed_for_its_own_sake_is_an_error_where_it_is_lost() -> None:
    done = in_shell(">/dev/full", "info", "--device", "cpu")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("dinov2-fast: error: [Errno 28] No space left on device. Make room")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_many_signals_are_as_one(checkpoint: str, tmp_path: Path, name: str) -> None:
    whole = [sys.executable, "-m", "dinov2_fast", "extract", *[str(IMAGES / "coffee.jpg")] * 3000]
    whole += [
        "--model",
        checkpoint,
        "--size",
        "14",
        "--out",
        str(tmp_path / "out"),
        "--workers",
        "1",
        "--shard-size",
        "8",
    ]
    with subprocess.Popen(whole, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        process.stderr.readline()
        while process.poll() is None:
            os.killpg(process.pid, signal.Signals[name])
            time.sleep(0.01)
        assert (process.returncode, process.stderr.read()) == (130, "dinov2-fast: interrupted\n")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_while_libraries_are_imported(tmp_path: Path, name: str) -> None:
    (tmp_path / "numpy.py").write_text(
        "import time\nfrom pathlib import Path\n"
        "try:\n    Path(__file__).with_name('begun').touch(); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    raise ImportError('as numpy has it')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    whole = [sys.executable, "-m", "dinov2_fast", "info"]
    with subprocess.Popen(whole, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "begun").exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.Signals[name])
        assert process.stderr is not None
        assert (process.wait(30), process.stderr.read()) == (130, "dinov2-fast: interrupted\n")


ARGUMENTS = ["extract", "x", "--model", "m", "--out", "o"]


def test_an_interrupt_that_a_library_turns_into_another_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: Any) -> int:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except KeyboardInterrupt:
            raise ImportError("cannot import") from None
        return 0

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(command, "run", interrupted)
    assert main(ARGUMENTS) == 130
    assert capsys.readouterr().err == "dinov2-fast: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_the_exit_code_after_an_interrupt_inside_exec(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import os, signal, sys\nfrom dinov2_fast.cli import info, main\n"
        "info.run = lambda _: exec('os.kill(os.getpid(), signal.SIGINT)\\nwhile True: pass')\nsys.exit(main())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "program", "info"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "dinov2-fast: interrupted\n")


def test_a_full_disk_is_named_with_what_can_be_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "out/features-00000.parquet")

    monkeypatch.setattr(command, "run", full)
    assert main(ARGUMENTS) == 1
    assert capsys.readouterr().err == (
        "dinov2-fast: error: [Errno 28] No space left on device: 'out/features-00000.parquet'. Make room and run the "
        "same command again; complete files are kept\n"
    )
