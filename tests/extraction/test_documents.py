"""The documented commands and code of extraction run as they stand there."""

from __future__ import annotations

import io
import shlex
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

import dinov2_fast
from dinov2_fast.cli import main
from tests.helpers import documents

ROOT = Path(__file__).parents[2]
IMAGES = sorted((ROOT / "examples" / "images").glob("*.jpg"))


@pytest.mark.slow
def test_the_examples_of_extraction_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights where the published ones would be, and small images."""
    monkeypatch.setenv("DINOV2_FAST_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    weights = dict(dinov2_fast.load("dinov2_vits14", weights="random:0").state_dict())
    save_file(weights, tmp_path / "dinov2_vits14_pretrain.safetensors")
    (tmp_path / "photos").mkdir()
    (tmp_path / "archives").mkdir()
    for path in IMAGES[:2]:
        shutil.copy(path, tmp_path / "photos")
    (tmp_path / "list.csv").write_text("path\nphotos/astronaut.jpg\n")
    with tarfile.open(tmp_path / "archives" / "a.tar", "w") as tar:
        info = tarfile.TarInfo("0.jpg")
        info.size = IMAGES[0].stat().st_size
        tar.addfile(info, io.BytesIO(IMAGES[0].read_bytes()))

    commands = documents.commands("extract")
    assert len(commands) == 7
    for command in commands:
        assert main(shlex.split(command, comments=True)) == 0, command
    names: dict[str, object] = {}
    exec(documents.example(".shards()"), names)

    features = dinov2_fast.load_features("features")
    assert [Path(path).name for path in features.path] == ["astronaut.jpg", "chelsea.jpg"]
    more = dinov2_fast.load_features("more")
    assert more.path == ["photos/astronaut.jpg", "archives/a.tar/0.jpg"]
    np.testing.assert_allclose(more["cls"][0], features["cls"][0], atol=1e-5)
    np.testing.assert_array_equal(dinov2_fast.load_features("shared")["cls"], features["cls"])
    shard = names["shard"]
    assert isinstance(shard, dinov2_fast.features.store.Features)
    assert (shard["patches@5"].shape, str(shard["patches@5"].dtype)) == ((2, 1024, 384), "float16")
