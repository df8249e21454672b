"""tests/conftest.py: one test that breaks the CUDA context does not fail the tests after it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# As after an illegal memory access: every later CUDA call of the process fails.
BROKEN = """
faults = []

def use_gpu():
    if faults:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_before():
    use_gpu()

def test_fault():
    faults.append(1)
    use_gpu()

def test_after():
    use_gpu()

def test_last():
    use_gpu()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "failed"),
    [(["-n1"], {"fault"}), (["-p", "no:xdist"], {"fault", "after", "last"})],
    ids=["in a worker", "without xdist"],
)
def test_a_worker_ends_after_a_cuda_error_and_a_new_one_runs_the_rest(
    options: list[str], failed: set[str], tmp_path: Path
) -> None:
    if "-n1" in options:
        pytest.importorskip("xdist")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_gpu.py").write_text(BROKEN)
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", tmp_path / "pytest.ini", "-rfp", *options]
    run = subprocess.run([*command, tmp_path], cwd=ROOT, capture_output=True, text=True, check=False)
    print(run.stdout, run.stderr)
    outcomes = {*re.findall(r"^(PASSED|FAILED) .*::test_(\w+)", run.stdout, flags=re.MULTILINE)}
    passed = {"before", "fault", "after", "last"} - failed
    assert outcomes == {*(("PASSED", name) for name in passed), *(("FAILED", name) for name in failed)}
    assert re.search(r"^E +RuntimeError: CUDA error: an illegal memory access", run.stdout, flags=re.MULTILINE)
    assert ("crashed while running" in run.stdout) == ("-n1" in options)
