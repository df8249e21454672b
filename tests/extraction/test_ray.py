"""Ray Data and Spark: the example script on a real Ray, run again with its checkpoint, and the documented code."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import dinov2_fast
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from tests.helpers import golden
from tests.helpers.documents import example

ROOT = Path(__file__).parents[2]
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install ray[data]"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(golden.load_case("facebook_mlp")[1], path)
    return str(path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of four images and a file that is none."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(4):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (90, 120, 3), np.uint8)).save(folder / f"{i}.png")
    (folder / "bad.jpg").write_text("<html>")
    return folder


def cls_tokens(checkpoint: str, files: Iterable[Path], size: int | None = None) -> dict[str, np.ndarray]:
    """The CLS token of each file, by the model as it is, with the checkpoints' preprocessing unless a size is given."""
    model = dinov2_fast.load(checkpoint)
    processor = Dinov2ImageProcessor.for_size(size) if size else Dinov2ImageProcessor()
    with torch.inference_mode():
        return {str(file): model(processor(Image.open(file)).pixel_values)[0].numpy() for file in files}


def run_example(images: Path, out: Path, checkpoint: str) -> None:
    """Runs the script as a user does, on a Ray that it starts itself."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # On two busy cores Ray 2.60's newer reader took 100 s to read a checkpoint of six rows, the older one 14 s.
        "RAY_DATA_USE_DATASOURCE_V2": "0",
    }
    command = [sys.executable, str(ROOT / "examples" / "ray_extract.py"), str(images), str(out)]
    command += ["--model", checkpoint, "--size", "28"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=out.parent)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
@needs_ray
def test_the_example_extracts_and_does_what_is_missing_when_it_is_run_again(
    checkpoint: str, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "features"
    run_example(images, out, checkpoint)
    check_rows(out, images, checkpoint)
    before = {path: path.read_bytes() for path in out.iterdir()}
    shutil.copy(images / "2.png", images / "new.png")
    run_example(images, out, checkpoint)
    check_rows(out, images, checkpoint)
    assert before.items() <= {path: path.read_bytes() for path in out.iterdir()}.items()


def check_rows(out: Path, images: Path, checkpoint: str) -> None:
    """One row for each file, with the features of its image or its error."""
    rows = {row["path"]: row for row in pq.read_table(out).to_pylist()}
    assert pq.read_table(out).num_rows == len(rows)
    assert rows.keys() == {str(path) for path in images.iterdir()}
    for path, expected in cls_tokens(checkpoint, images.glob("*.png"), 28).items():
        assert rows[path]["error"] is None
        np.testing.assert_allclose(np.array(rows[path]["cls"]).ravel(), expected, atol=1e-4)
    assert rows[str(images / "bad.jpg")]["error"].startswith("not an image")


class Dataset:
    """What Ray Data does with the documented calls, in one process."""

    def __init__(self, batch: dict[str, Any]) -> None:
        self.batch = batch

    def map_batches(self, function: Callable[..., Any], **options: Any) -> Dataset:
        return Dataset(function(*options["fn_constructor_args"])(self.batch))

    def write_parquet(self, path: str) -> None:
        assert path == "features/"


def test_the_documented_code_for_ray(checkpoint: str, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted(images.iterdir())

    def read_binary_files(path: str, include_paths: bool) -> Dataset:
        assert (path, include_paths) == ("photos/", True)
        content = np.array([file.read_bytes() for file in files], object)
        return Dataset({"bytes": content, "path": np.array([str(file) for file in files])})

    data = SimpleNamespace(read_binary_files=read_binary_files, ActorPoolStrategy=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(data=data))
    names: dict[str, Any] = {}
    exec(example("import ray").replace("dinov2_vits14", checkpoint), names)
    found = names["features"].batch
    assert list(found) == ["path", "cls", "patch_mean", "error"]  # as the comment says
    expected = cls_tokens(checkpoint, files[:4])
    np.testing.assert_allclose(found["cls"][:4], list(expected.values()), atol=1e-4)
    assert found["error"][:4].tolist() == [None] * 4
    assert found["error"][4].startswith("not an image")


@pytest.mark.slow
@needs_ray
def test_ray_has_what_the_documents_call() -> None:
    """Its names and arguments; Ray is imported in a process of its own, which it changes."""
    code = (
        "import inspect, ray.data\n"
        "inspect.signature(ray.data.read_binary_files).bind('photos/', include_paths=True)\n"
        "inspect.signature(ray.data.Dataset.map_batches).bind(None, print, fn_constructor_args=(1,), batch_size=256,\n"
        "    compute=ray.data.ActorPoolStrategy(size=8), num_gpus=1)\n"
        "inspect.signature(ray.data.Dataset.write_parquet).bind(None, 'features/')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_documented_code_for_spark(checkpoint: str, images: Path) -> None:
    pandas = pytest.importorskip("pandas")
    files = sorted(images.iterdir())

    class Frame:
        """What Spark does with the documented calls: pandas frames to the function, and its frames to the schema."""

        def mapInPandas(self, function: Callable[[Iterator[Any]], Iterator[Any]], schema: str) -> Any:
            columns = [column.split()[0] for column in schema.split(", ")]
            parts = [files[:3], files[3:]]
            frames = (
                pandas.DataFrame(
                    {"path": [f"file:{file}" for file in part], "content": [file.read_bytes() for file in part]}
                )
                for part in parts
            )
            self.result = pandas.concat(list(function(frames)))
            assert list(self.result.columns) == columns
            self.write = SimpleNamespace(parquet=lambda path: None)
            return self

    frame = Frame()
    spark = SimpleNamespace(read=SimpleNamespace(format=lambda kind: SimpleNamespace(load=lambda path: frame)))
    exec(example("mapInPandas").replace("dinov2_vits14", checkpoint), {"spark": spark})
    expected = cls_tokens(checkpoint, files[:4])
    np.testing.assert_allclose(np.stack(frame.result["cls"][:4]), list(expected.values()), atol=1e-4)
    assert frame.result["error"].iloc[4].startswith("not an image")
