"""``make demo`` without network: it succeeds, warns that the weights are random, and marks every output."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dinov2_fast
from tests.helpers import documents

ROOT = Path(__file__).parents[2]


def run_demo(folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the demo without network and with empty caches."""
    environment = {
        **os.environ,
        "DINOV2_FAST_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder),
        "TORCH_HOME": str(folder),
        "PYTHONPATH": str(ROOT),
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
        "no_proxy": "",
        "NO_PROXY": "",
    }
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py"), str(folder / "out")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_the_demo_runs_offline_and_marks_its_outputs(tmp_path: Path) -> None:
    demo, out = run_demo(tmp_path), tmp_path / "out"
    assert demo.returncode == 0, demo.stderr
    assert "RANDOM WEIGHTS" in demo.stderr
    sheets = {kind: out / f"{kind}-random-weights.png" for kind in ("pca", "attention", "neighbours")}
    assert set(out.iterdir()) == {out / "features-random-weights", *sheets.values()}
    features = dinov2_fast.load_features(out / "features-random-weights")
    assert len(features) == len(list((ROOT / "examples" / "images").glob("*.jpg"))) == 5
    assert features.error == [None] * 5
    assert features.manifest["about"]["weights"] == "random:0"
    commands = [line for line in demo.stdout.splitlines() if line.startswith("$ dinov2-fast ")]
    assert [line.split()[2] for line in commands] == ["extract", "show", "show"]
    assert demo.stdout.endswith("All outputs come from RANDOM weights.\n")
    for kind, sheet in sheets.items():
        assert str(sheet) in demo.stdout
        check_documents_show(kind, sheet)


def check_documents_show(kind: str, sheet: Path) -> None:
    """The documents show this sheet: same size and, except for rounding on another machine, same colours."""
    assert f"examples/{kind}.png)" in documents.TEXT
    shown, drawn = (
        np.asarray(Image.open(path).convert("RGB")).astype(int) for path in (ROOT / "examples" / f"{kind}.png", sheet)
    )
    assert shown.shape == drawn.shape
    assert (np.abs(shown - drawn) > 8).mean() < 0.01
