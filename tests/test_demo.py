"""``make demo``'s script, offline: it ends well, says loudly that the weights are random, and marks every output."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from dinov2_fast.extraction.features_file import read_metadata

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_demo_runs_offline_and_marks_its_outputs(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "DINOV2_FAST_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
    }
    environment |= {
        "no_proxy": "",
        "NO_PROXY": "",
        "TORCH_HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "http_proxy": "http://127.0.0.1:9",
    }
    environment |= {"https_proxy": "http://127.0.0.1:9"}
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py"), str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "RANDOM WEIGHTS" in run.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"features-random-weights", "pca-random-weights.png"}
    features = tmp_path / "out" / "features-random-weights" / "features.parquet"
    table = pq.read_table(features)
    assert table.num_rows == len(list((ROOT / "examples" / "pictures").glob("*.jpg"))) == 5
    assert table["error"].null_count == 5
    assert read_metadata(features)["weights"] == "random:0"
    with Image.open(tmp_path / "out" / "pca-random-weights.png") as sheet:
        assert sheet.width > 600
    assert str(features) in run.stdout
