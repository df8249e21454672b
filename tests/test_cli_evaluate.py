"""``dinov2-fast knn`` and ``linear``, on the digits that scikit-learn ships as pictures in class folders."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import dinov2_fast
from dinov2_fast.cli import _parser, labelled, main
from dinov2_fast.evaluate import Tokens, knn, linear_probes
from dinov2_fast.extraction import read_image
from dinov2_fast.image_processor import Dinov2ImageProcessor
from tests import readme

datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")

SPLITS = {"train": range(300), "val": range(300, 400), "test": range(400, 450)}
COMMON = ["--device", "cpu", "--workers", "0", "--size", "28"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/train/3/0007.png and so on."""
    images, labels = datasets.load_digits().images, datasets.load_digits().target
    root = tmp_path_factory.mktemp("digits") / "photos"
    for split, rows in SPLITS.items():
        for row in rows:
            path = root / split / str(labels[row]) / f"{row:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((images[row] * 15).astype(np.uint8)).resize((28, 28)).save(path)
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small DINOv2 of random weights, in a file."""
    torch.manual_seed(0)
    model = dinov2_fast.DinoVisionTransformer(
        img_size=28, patch_size=14, embed_dim=64, depth=5, num_heads=1, init_values=1.0, block_chunks=0
    )
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(model.state_dict(), path)
    return str(path)


def tokens_of(folder: Path, checkpoint: str, blocks: int) -> tuple[Tokens, np.ndarray]:
    """The model called directly; the classes are digits, so their names in order are 0 to 9."""
    paths = sorted(folder.glob("*/*.png"))
    pixels = Dinov2ImageProcessor.for_size(28)([read_image(path) for path in paths]).pixel_values
    with torch.no_grad():
        layers = dinov2_fast.load(checkpoint).get_intermediate_layers(pixels, n=blocks, return_class_token=True)
    tokens = Tokens(torch.stack([cls for _, cls in layers], dim=1), layers[-1][0].mean(dim=1))
    return tokens, np.array([int(path.parent.name) for path in paths])


def as_percent(accuracy: Any) -> dict[str, float]:
    return {"top1": pytest.approx(100 * accuracy.top1), "top5": pytest.approx(100 * accuracy.top5)}


def test_the_features_are_the_models(photos: Path, checkpoint: str) -> None:
    args = _parser().parse_args(["knn", "train", "--model", checkpoint, "--batch-size", "16", *COMMON])
    (read,), weights = labelled.read_all(args, [str(photos / "test")], blocks=4)
    expected, labels = tokens_of(photos / "test", checkpoint, 4)
    torch.testing.assert_close(read.tokens.cls, expected.cls, atol=1e-4, rtol=0)
    assert read.tokens.patch_mean is not None
    torch.testing.assert_close(read.tokens.patch_mean, expected.patch_mean, atol=1e-4, rtol=0)
    assert not torch.allclose(expected.cls[:, 0], expected.cls[:, -1], atol=1e-2)
    assert read.names == [str(label) for label in labels]
    assert weights == checkpoint
    assert labelled.read_all(args, [str(photos / "test")], blocks=9)[0][0].tokens.cls.shape[1] == 5


def test_knn(photos: Path, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, val = str(photos / "train"), str(photos / "val")
    out = tmp_path / "new" / "knn.json"
    assert main(["knn", train, val, "--model", checkpoint, "--json", str(out), "--batch-size", "64", *COMMON]) == 0
    (x, y), (x2, y2) = (tokens_of(photos / split, checkpoint, 1) for split in ("train", "val"))
    expected = knn(x.cls[:, 0], y, x2.cls[:, 0], y2)

    found = json.loads(out.read_text())
    assert found["results"] == [{"k": k, **as_percent(expected[k])} for k in (10, 20, 100, 200)]
    assert found["train"] == {"folder": train, "pictures": 300, "classes": 10, "failures": 0}
    assert (found["val"]["pictures"], found["temperature"], found["weights"]) == (100, 0.07, checkpoint)
    assert expected[10].top1 > 0.5  # chance is 0.1
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[:2] == [f"{train}: 300 pictures in 10 classes", f"{val}: 100 pictures in 10 classes"]
    assert lines[3].split() == ["k", "top", "1", "top", "5"]
    assert lines[4].split() == ["10", f"{found['results'][0]['top1']:.2f}", f"{found['results'][0]['top5']:.2f}"]
    assert captured.err.splitlines() == [f"{train}: 300/300 pictures", f"{val}: 100/100 pictures"]


def test_knn_of_one_folder_leaves_each_picture_out(photos: Path, checkpoint: str, tmp_path: Path) -> None:
    out = tmp_path / "knn.json"
    arguments = ["knn", str(photos / "val"), "--model", checkpoint, "--json", str(out), *COMMON]
    x, y = tokens_of(photos / "val", checkpoint, 1)
    for options, ks, temperature in (([], [10, 20], 0.07), (["--k", "3,99", "--temperature", "1"], [3, 99], 1.0)):
        assert main([*arguments, *options]) == 0
        expected = knn(x.cls[:, 0], y, neighbours=ks, temperature=temperature)
        assert json.loads(out.read_text())["results"] == [{"k": k, **as_percent(expected[k])} for k in ks]


def test_linear(photos: Path, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "linear.json"
    folders = [str(photos / split) for split in SPLITS]
    arguments = ["linear", *folders[:2], "--test", folders[2], "--model", checkpoint, "--json", str(out), *COMMON]
    assert main([*arguments, "--steps", "150", "--learning-rates", "0.001,0.05,0.5", "--seed", "2"]) == 0
    (x, y), val, test = (tokens_of(photos / split, checkpoint, 4) for split in SPLITS)
    probes = linear_probes(x, y, learning_rates=(0.001, 0.05, 0.5), steps=150, seed=2)
    accuracies = [probe.accuracy(*val) for probe in probes]

    found = json.loads(out.read_text())
    assert [(row["blocks"], row["avgpool"], row["learning_rate"]) for row in found["results"]] == [
        (n, mean, rate) for n in (1, 4) for mean in (False, True) for rate in (0.001, 0.05, 0.5)
    ]
    for row, accuracy in zip(found["results"], accuracies, strict=True):
        assert row["top1"] == pytest.approx(100 * accuracy.top1, abs=1.01)  # one picture, by rounding
    best = max(range(12), key=lambda row: found["results"][row]["top1"])
    assert found["best"] == found["results"][best]
    assert found["best"]["top1"] > 60
    assert found["best_on_test"]["top1"] == pytest.approx(100 * probes[best].accuracy(*test).top1, abs=2.01)

    lines = capsys.readouterr().out.splitlines()
    header = next(number for number, line in enumerate(lines) if line.startswith("learning rate"))
    columns = ["1 block", "1 block + patch mean", "4 blocks", "4 blocks + patch mean"]
    assert re.split(r" {2,}", lines[header]) == ["learning rate", *columns]
    shown = np.array([[float(cell) for cell in line.split()] for line in lines[header + 1 : header + 4]])
    np.testing.assert_allclose(shown[:, 1:].T.ravel(), [round(row["top1"], 2) for row in found["results"]])
    assert lines[-2].startswith(f"Best on {folders[1]}: ")
    assert lines[-1].startswith(f"The same on {folders[2]}: top 1 {found['best_on_test']['top1']:.2f}")


def test_stored_features_give_what_pictures_give(
    photos: Path, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos / "val", tmp_path / "val")
    (tmp_path / "val" / "3" / "broken.png").write_text("<html>")
    for split in ("val", "test"):
        folder = tmp_path / "val" if split == "val" else photos / split
        extracted = main(["extract", str(folder), "--model", checkpoint, "--out", split + "_features", *COMMON])
        assert extracted == (3 if split == "val" else 0)
    options = ["--json", "out.json"]
    results = []
    for folders, more in (
        (["val", str(photos / "test")], ["--model", checkpoint, *COMMON]),
        (["val_features", "test_features"], ["--device", "cpu"]),
    ):
        for command in (["knn", "--k", "5"], ["linear", "--steps", "60", "--blocks", "1"]):
            assert main([command[0], *folders, *command[1:], *options, *more]) == 3
            results.append(json.loads(Path("out.json").read_text()))
    assert results[0]["train"] | {"folder": ""} == {"folder": "", "pictures": 100, "classes": 10, "failures": 1}
    for pictures, features in zip(results[:2], results[2:], strict=True):
        assert pictures["train"] | {"folder": ""} == features["train"] | {"folder": ""}
        assert len(pictures["results"]) == len(features["results"])
        for one, other in zip(pictures["results"], features["results"], strict=True):
            assert one["top1"] == pytest.approx(other["top1"], abs=2.01)  # one picture, by rounding


def test_features_are_read_by_load_features(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = {"cls": np.eye(6, 4, dtype=np.float32), "patch_mean": np.ones((6, 4), np.float16)}
    rows["cls"][5] = np.nan
    names = ["x.tar/a/1", "x.tar/b/2", "y/a/3", "y/b/4", "y/a/5", "y/c/6"]

    class Stored(dict):
        path, error = names, [None] * 5 + ["broken"]

    monkeypatch.setattr(dinov2_fast, "load_features", lambda folder: Stored(rows), raising=False)
    (tmp_path / "manifest.json").touch()
    assert main(["knn", str(tmp_path), "--json", str(tmp_path / "out.json"), "--device", "cpu"]) == 3
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["train"] == {"folder": str(tmp_path), "pictures": 5, "classes": 2, "failures": 1}
    assert [row["k"] for row in found["results"]] == [4]


def test_what_is_not_possible_exits_with_1(
    photos: Path, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, val = str(photos / "train"), str(photos / "val")
    stored = tmp_path / "features"
    stored.mkdir()
    (stored / "manifest.json").touch()
    shutil.copytree(photos / "val" / "3", tmp_path / "one" / "3")
    shutil.copytree(photos / "val" / "4", tmp_path / "other" / "elephant")
    shutil.copytree(photos / "val" / "4", tmp_path / "other" / "3")
    shutil.copytree(photos / "val" / "4", tmp_path / "bad" / "3")
    for path in (tmp_path / "bad" / "3").iterdir():
        path.write_text("<html>")
    model = ["--model", checkpoint, *COMMON]
    for arguments, message in (
        (["knn", train, val], "--model is missing"),
        (["knn", str(stored), val, *model], "not both"),
        (["knn", str(stored), *model], "need no --model"),
        (["knn", str(photos / "val" / "3"), *model], "lies in no class folder"),
        (["knn", str(tmp_path / "one"), *model], "has one class, '3'"),
        (["knn", str(tmp_path / "bad"), *model], "can be read"),
        (["knn", str(stored.parent / "nowhere"), *model], "no file or folder"),
        (["linear", val, str(tmp_path / "other"), *model], "1 class(es) that"),
        (["linear", val, val, "--blocks", "1,9", *model], "class tokens of 5 last blocks, asked for 1, 9"),
    ):
        assert main(arguments) == 1, arguments
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["knn"], "required: TRAIN"),
        (["linear", "a"], "required: VAL"),
        (["knn", "a", "--k", "0"], "must be at least 1, got 0"),
        (["linear", "a", "b", "--learning-rates", "0"], "learning rates must be above 0"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_readmes_commands(photos: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(photos)
    commands = re.findall(
        r"^    dinov2-fast ((?:knn|linear) .*)$", readme.README.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert [command.split()[0] for command in commands] == ["knn", "linear"]
    for command in commands:
        words = shlex.split(command.replace("dinov2_vits14", checkpoint))
        assert main([*words, *COMMON, *(["--steps", "2"] if words[0] == "linear" else [])]) == 0
    assert json.loads(Path("linear.json").read_text())["steps"] == 2
