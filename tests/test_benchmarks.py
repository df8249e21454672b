"""The cases of tests/benchmarks: left out unless asked for, and timed until the device is done."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmarks import test_ops as cases

ROOT = Path(__file__).resolve().parents[1]
FAST = re.search(r"^FAST := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1]


def run_pytest(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/benchmarks", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["-n", "1"], ["-p", "no:benchmark"]], ids=["plain", "xdist", "no plugin"])
def test_they_are_left_out_without_a_warning(options: list[str]) -> None:
    said = run_pytest("-m", FAST, *options)
    assert re.search(r"(\d+ deselected|no tests ran) in ", said)
    assert not re.search("passed|failed|error|warning", said, re.IGNORECASE)


@pytest.mark.slow
def test_they_run_when_they_are_asked_for() -> None:
    said = run_pytest("--benchmark-only", "-k", "(layer_norm.plain- or activation.gelu-) and not e4m3")
    assert re.search(r"\b4 passed, \d+ deselected in ", said)
    assert "benchmark 'layer_norm.plain backward': 1 tests" in said


def test_each_op_has_a_case_for_each_mode() -> None:
    names = {case.id for case in cases.cases()}
    assert len(names) == len(list(cases.cases()))
    assert {"layer_norm.add-forward-torch", "layer_norm.add-backward-torch", "attention_pool-forward-torch"} <= names
    assert {case.values[0].label for case in cases.cases()} == {workload.label for workload in cases.WORKLOADS}


def test_a_time_ends_when_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(cases, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    cases.synchronised(lambda: calls.append("run"))()
    assert calls == ["run", "synchronize"]
