"""``dinov2-fast knn`` and ``linear``, on the digits that scikit-learn ships as images in class folders."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import dinov2_fast
from dinov2_fast.cli import evaluation, linear, main
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.evaluation.knn import knn
from dinov2_fast.evaluation.labelled import ModelOptions, read_labelled
from dinov2_fast.evaluation.linear import ProbeInputs, linear_probes
from tests.helpers import documents
from tests.helpers.images import read_image

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


def tokens_of(folder: Path, checkpoint: str, blocks: int) -> tuple[ProbeInputs, np.ndarray]:
    """The model called directly; the classes are digits, so their names in order are 0 to 9."""
    paths = sorted(folder.glob("*/*.png"))
    pixels = Dinov2ImageProcessor.for_size(28)([read_image(path) for path in paths]).pixel_values
    with torch.no_grad():
        layers = dinov2_fast.load(checkpoint).get_intermediate_layers(pixels, n=blocks, return_class_token=True)
    tokens = ProbeInputs(torch.stack([cls for _, cls in layers], dim=1), layers[-1][0].mean(dim=1))
    return tokens, np.array([int(path.parent.name) for path in paths])


def as_percent(accuracy: Any) -> dict[str, float]:
    return {"top1": pytest.approx(100 * accuracy.top1), "top5": pytest.approx(100 * accuracy.top5)}


def test_features_are_those_of_the_model(photos: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("dinov2_fast.inference.engine.WeightWatch")  # nobody else has the model
    options = ModelOptions(checkpoint, size=28, device="cpu", batch_size=16)
    (read,) = read_labelled([str(photos / "test")], 4, options)
    expected, labels = tokens_of(photos / "test", checkpoint, 4)
    torch.testing.assert_close(read.tokens.cls, expected.cls, atol=1e-4, rtol=0)
    assert read.tokens.patch_mean is not None
    torch.testing.assert_close(read.tokens.patch_mean, expected.patch_mean, atol=1e-4, rtol=0)
    assert not torch.allclose(expected.cls[:, 0], expected.cls[:, -1], atol=1e-2)
    assert read.classes == [str(label) for label in labels]
    assert (read.model, read.weights, read.n_blocks) == (checkpoint, checkpoint, 5)
    assert read_labelled([str(photos / "test")], 9, options)[0].tokens.cls.shape[1] == 5


def test_knn_prints_and_writes_the_accuracies(
    photos: Path, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, val = str(photos / "train"), str(photos / "val")
    out = tmp_path / "new" / "knn.json"
    assert main(["knn", train, val, "--model", checkpoint, "--json", str(out), "--batch-size", "64", *COMMON]) == 0
    (x, y), (x2, y2) = (tokens_of(photos / split, checkpoint, 1) for split in ("train", "val"))
    expected = knn(x.cls[:, 0], y, x2.cls[:, 0], y2)

    found = json.loads(out.read_text())
    assert found["results"] == [{"n_per_class": None, "k": k, **as_percent(expected[k])} for k in (10, 20, 100, 200)]
    assert found["train"] == {"folder": train, "images": 300, "classes": 10, "failures": 0}
    assert (found["val"]["images"], found["temperature"], found["weights"]) == (100, 0.07, checkpoint)
    assert expected[10].top1 > 0.5  # chance is 0.1
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[:2] == [f"{train}: 300 images in 10 classes", f"{val}: 100 images in 10 classes"]
    assert lines[3].split() == ["k", "top", "1", "top", "5"]
    assert lines[4].split() == ["10", f"{found['results'][0]['top1']:.2f}", f"{found['results'][0]['top5']:.2f}"]
    assert captured.err.splitlines() == [f"{train}: 300/300 images", f"{val}: 100/100 images"]


def test_knn_of_one_folder_leaves_each_image_out(photos: Path, checkpoint: str, tmp_path: Path) -> None:
    out = tmp_path / "knn.json"
    arguments = ["knn", str(photos / "val"), "--model", checkpoint, "--json", str(out), *COMMON]
    x, y = tokens_of(photos / "val", checkpoint, 1)
    for options, ks, temperature in (([], [10, 20], 0.07), (["--k", "3,99", "--temperature", "1"], [3, 99], 1.0)):
        assert main([*arguments, *options]) == 0
        expected = knn(x.cls[:, 0], y, neighbours=ks, temperature=temperature)
        rows = [{"n_per_class": None, "k": k, **as_percent(expected[k])} for k in ks]
        assert json.loads(out.read_text())["results"] == rows


def test_classes_are_folders_in_archives_and_globs_too(photos: Path, checkpoint: str, tmp_path: Path) -> None:
    archive, out = str(tmp_path / "val.tar"), tmp_path / "knn.json"
    with tarfile.open(archive, "w") as file:
        file.add(photos / "val", "val")
    results = []
    for source in (str(photos / "val"), archive, str(photos / "val" / "*" / "*.png")):
        assert main(["knn", source, "--model", checkpoint, "--json", str(out), *COMMON]) == 0
        results.append(json.loads(out.read_text()))
        assert results[-1]["train"] == {"folder": source, "images": 100, "classes": 10, "failures": 0}
    for found in results[1:]:
        for one, other in zip(results[0]["results"], found["results"], strict=True):
            assert one["top1"] == pytest.approx(other["top1"], abs=1.01)  # one image, by rounding


def test_images_at_the_top_of_an_archive_have_no_class(
    photos: Path, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = str(tmp_path / "val.tar")
    with tarfile.open(archive, "w") as file:
        file.add(photos / "val" / "3", "3")
        file.add(next((photos / "val" / "4").iterdir()), "loose.png")
    for source in (archive, str(tmp_path / "*.tar")):
        assert main(["knn", source, "--model", checkpoint, *COMMON]) == 1
        assert "loose.png' lies in no class folder" in capsys.readouterr().err


def test_knn_of_few_images_of_each_class(
    photos: Path, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "knn.json"
    arguments = ["knn", str(photos / "val"), str(photos / "test"), "--model", checkpoint, "--json", str(out), *COMMON]
    assert main([*arguments, "--n-per-class", "2,all", "--n-tries", "3", "--k", "1,20"]) == 0
    (x, y), (x2, y2) = (tokens_of(photos / split, checkpoint, 1) for split in ("val", "test"))
    few = knn(x.cls[:, 0], y, x2.cls[:, 0], y2, neighbours=(1,), n_per_class=2, n_tries=3)
    every = knn(x.cls[:, 0], y, x2.cls[:, 0], y2, neighbours=(1, 20))
    found = json.loads(out.read_text())
    assert found["n_tries"] == 3
    assert found["results"] == [
        {"n_per_class": n, "k": k, **as_percent(accuracy)}
        for n, accuracies in ((2, few), (None, every))
        for k, accuracy in accuracies.items()
    ]
    table = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    assert table[0] == ["per", "class", "k", "top", "1", "top", "5"]
    assert [row[:2] for row in table[1:]] == [["2", "1"], ["2", "2"], ["all", "1"], ["all", "20"]]
    assert [row[2] for row in table[1:]] == [f"{row['top1']:.2f}" for row in found["results"]]


def test_linear_prints_and_writes_the_accuracies(
    photos: Path, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
        assert row["top1"] == pytest.approx(100 * accuracy.top1, abs=1.01)  # one image, by rounding
    best = max(range(12), key=lambda row: found["results"][row]["top1"])
    assert found["best"] == found["results"][best]
    assert found["best"]["top1"] > 60
    assert found["best_on_test"]["top1"] == pytest.approx(100 * probes[best].accuracy(*test).top1, abs=2.01)

    lines = capsys.readouterr().out.splitlines()
    header = next(number for number, line in enumerate(lines) if line.startswith("learning rate"))
    columns = ["1 block", "1 block + mean", "4 blocks", "4 blocks + mean"]
    assert re.split(r" {2,}", lines[header]) == ["learning rate", *columns]
    shown = np.array([[float(cell) for cell in line.split()] for line in lines[header + 1 : header + 4]])
    np.testing.assert_allclose(shown[:, 1:].T.ravel(), [round(row["top1"], 2) for row in found["results"]])
    assert lines[-2].startswith(f"Best on {folders[1]}: ")
    assert lines[-1].startswith(f"The same on {folders[2]}: top 1 {found['best_on_test']['top1']:.2f}")


def test_stored_features_give_what_images_give(
    photos: Path,
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
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
            capsys.readouterr()
            assert main([command[0], *folders, *command[1:], *options, *more]) == 3
            assert re.search(rf"Left out of {folders[0]}:\n  '.*val/3/broken\.png': not a", capsys.readouterr().err)
            results.append(json.loads(Path("out.json").read_text()))
            assert (results[-1]["model"], results[-1]["weights"]) == (checkpoint, checkpoint)
    assert results[0]["train"] | {"folder": ""} == {"folder": "", "images": 100, "classes": 10, "failures": 1}
    for images, features in zip(results[:2], results[2:], strict=True):
        assert images["train"] | {"folder": ""} == features["train"] | {"folder": ""}
        assert len(images["results"]) == len(features["results"])
        for one, other in zip(images["results"], features["results"], strict=True):
            assert one["top1"] == pytest.approx(other["top1"], abs=2.01)  # one image, by rounding


def test_stored_images_with_an_error_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = {"cls": np.eye(6, 4, dtype=np.float32), "patch_mean": np.ones((6, 4), np.float16)}
    rows["cls"][5] = np.nan
    names = ["x.tar/a/1", "x.tar/b/2", "y/a/3", "y/b/4", "y/a/5", "y/c/6"]

    class Stored(dict):
        path, error = names, [None] * 5 + ["broken"]
        manifest: ClassVar = {"weights": "", "model": {"n_blocks": 1}, "about": {}}

    monkeypatch.setattr("dinov2_fast.evaluation.labelled.load_features", lambda folder: Stored(rows))
    (tmp_path / "_manifest.json").touch()
    assert main(["knn", str(tmp_path), "--json", str(tmp_path / "out.json"), "--device", "cpu"]) == 3
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["train"] == {"folder": str(tmp_path), "images": 5, "classes": 2, "failures": 1}
    assert [row["k"] for row in found["results"]] == [4]


@pytest.fixture(scope="module")
def stored(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folders of features of 50 images, and the model of 12 blocks that made them.

    all/ is what the command in the help text writes, last/ what extract writes by default, three/ has three blocks,
    bare/ has no mean of the patches, other/ is of another model, patches/ has no class tokens, and gap/ has those of
    the last and the fourth last block.
    """
    torch.manual_seed(1)
    root = tmp_path_factory.mktemp("stored")
    settings: dict[str, Any] = {"img_size": 28, "embed_dim": 64, "num_heads": 1, "init_values": 1.0, "block_chunks": 0}
    for name in ("deep", "other"):
        model = dinov2_fast.DinoVisionTransformer(patch_size=14, depth=12, **settings)
        save_file(model.state_dict(), root / f"{name}.safetensors")
    checkpoint = str(root / "deep.safetensors")
    (command,) = re.findall(r"^  dinov2-fast (extract .*\\\n.*)$", linear.DESCRIPTION, re.MULTILINE)
    words = shlex.split(command.replace("\\\n", ""))
    given = {"photos/train": str(photos / "test"), "dinov2_vits14": checkpoint, "features/train": str(root / "all")}
    assert set(given) < set(words)
    assert main([*(given.get(word, word) for word in words), *COMMON]) == 0
    for name, features in (
        ("last", "cls,patch_mean"),
        ("three", "cls@9,cls@10,cls@11,patch_mean"),
        ("bare", "cls@8,cls@9,cls@10,cls"),
        ("other", "cls,patch_mean"),
        ("patches", "patch_mean"),
        ("gap", "cls@8,cls,patch_mean"),
    ):
        model = str(root / "other.safetensors") if name == "other" else checkpoint
        arguments = ["--model", model, "--features", features, "--out", str(root / name), *COMMON]
        assert main(["extract", str(photos / "test"), *arguments]) == 0
    return root, checkpoint


def test_linear_gives_the_same_on_stored_features_as_on_images(photos: Path, stored: tuple[Path, str]) -> None:
    root, checkpoint = stored
    options = ["--learning-rates", "0.1", "--steps", "20", "--json", str(root / "out.json"), "--device", "cpu"]
    results = []
    for folder, more in ((photos / "test", ["--model", checkpoint, *COMMON]), (root / "all", [])):
        assert main(["linear", str(folder), str(folder), *options, *more]) == 0
        results.append(json.loads((root / "out.json").read_text())["results"])
    assert [(row["blocks"], row["avgpool"]) for row in results[1]] == [(1, False), (1, True), (4, False), (4, True)]
    for one, other in zip(*results, strict=True):
        assert one["top1"] == pytest.approx(other["top1"], abs=2.01)  # one image, by rounding
    read = read_labelled([str(root / name) for name in ("all", "three", "bare", "gap")], 4, ModelOptions())
    expected, _ = tokens_of(photos / "test", checkpoint, 4)
    for each, blocks in zip(read, (4, 3, 4, 1), strict=True):
        torch.testing.assert_close(each.tokens.cls, expected.cls[:, -blocks:], atol=1e-4, rtol=0)
        assert each.tokens.cls.shape[1] == blocks
        if "bare" in each.source:
            assert each.tokens.patch_mean is None
        else:
            torch.testing.assert_close(each.tokens.patch_mean, expected.patch_mean, atol=1e-4, rtol=0)
    assert read_labelled([str(root / "all")], 1, ModelOptions())[0].tokens.cls.shape[1] == 1


MORE = "For more: dinov2-fast extract ... --features cls@8,cls@9,cls@10,cls,patch_mean"


@pytest.mark.parametrize(
    ("train", "val", "said", "tried"),
    [
        ("last", "all", "'{}/last' has the class tokens of the last block only, so n = 4 is not tried. " + MORE, [1]),
        (
            "all",
            "three",
            "'{}/three' has the class tokens of the last 3 blocks only, so n = 4 is not tried. " + MORE,
            [1],
        ),
        ("all", "bare", "'{}/bare' has no patch_mean, so only classifiers without it are tried.", [1, 4]),
        ("all", "all", "", [1, 4]),
    ],
)
def test_what_stored_features_lack_is_logged(
    stored: tuple[Path, str], train: str, val: str, said: str, tried: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    root, out = stored[0], stored[0] / "out.json"
    caplog.clear()
    folders = [str(root / train), str(root / val)]
    assert main(["linear", *folders, "--steps", "2", "--device", "cpu", "--json", str(out)]) == 0
    assert caplog.messages == ([said.format(root)] if said else [])
    rows = json.loads(out.read_text())["results"]
    assert sorted({row["blocks"] for row in rows}) == tried
    assert {row["avgpool"] for row in rows} == ({False} if val == "bare" else {False, True})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["linear", "all", "three", "--blocks", "3,4"],
            "/three' has the class tokens of the last 3 blocks only; asked",
        ),
        (["linear", "last", "all", "--blocks", "4"], MORE),
        (["linear", "all", "all", "--blocks", "13"], "The model has 12 blocks; asked for 13"),
        (["linear", "all", "other"], "/other' are of another model than those in"),
        (["knn", "patches"], "/patches' has no class tokens of the last block"),
    ],
)
def test_unsuitable_stored_features_are_refused(
    stored: tuple[Path, str], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(stored[0] / word) if (stored[0] / word).is_dir() else word for word in arguments]
    assert main([*words, "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_progress_is_printed_every_30_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = iter((0.0, 29.0, 30.0, 59.0, 61.0, 62.0))
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: next(seconds))
    progress = evaluation.ProgressLines()
    for done in range(1, 6):
        progress("training", done, 5, "updates")
    assert capsys.readouterr().err == "".join(f"training: {done}/5 updates\n" for done in (2, 4, 5))


def test_wrong_input_is_refused_before_the_model_runs(
    photos: Path, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dinov2_fast.evaluation.labelled.load_model", None)
    monkeypatch.setattr("torch.cpu.get_capabilities", dict)
    (tmp_path / "file").write_text("")
    shutil.copytree(photos / "val" / "3", tmp_path / "one" / "3")
    train, model = str(photos / "test"), ["--model", checkpoint, *COMMON]
    for arguments, message in (
        (["knn", str(tmp_path / "file")], "has one class, "),
        (["knn", train, str(tmp_path / "nowhere")], "There is no file or folder "),
        (["knn", str(tmp_path / "one")], "has one class, '3'"),
        (["linear", str(tmp_path / "one"), train], "has one class, '3'"),
        (["knn", train, "--n-per-class", "2"], "n_per_class needs val"),
        (["knn", str(tmp_path / "one"), "--precision", "bf16"], "Precision bf16 would be slower than fp32 here: "),
        (["knn", str(tmp_path / "one"), "--weights", "nowhere.safetensors"], "has one class, '3'"),
        (["knn", train, "--json", str(tmp_path / "file" / "out.json")], "cannot be made: "),
        (["knn", train, "--json", str(tmp_path)], "is a folder, or may not be written"),
    ):
        assert main([*arguments, *model]) == 1, arguments
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.out == ""


def test_what_is_not_possible_exits_with_1(
    photos: Path, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, val = str(photos / "train"), str(photos / "val")
    stored = tmp_path / "features"
    stored.mkdir()
    (stored / "_manifest.json").touch()
    shutil.copytree(photos / "val" / "4", tmp_path / "other" / "elephant")
    shutil.copytree(photos / "val" / "4", tmp_path / "other" / "3")
    for folder in ("bad/3", "bad/4", "half/3", "half/4"):
        shutil.copytree(photos / "val" / "4", tmp_path / folder)
    for path in [*(tmp_path / "bad").glob("*/*"), *(tmp_path / "half" / "4").iterdir()]:
        path.write_text("<html>")
    model = ["--model", checkpoint, *COMMON]
    for arguments, message in (
        (["knn", train, val], "--model is missing"),
        (["knn", str(stored), val, *model], "not both"),
        (["knn", str(stored), *model], "need no model"),
        (["knn", str(photos / "val" / "3"), *model], "lies in no class folder"),
        (["knn", str(tmp_path / "half"), *model], "has one class, '3'"),
        (["knn", str(tmp_path / "bad"), *model], f"has features:\n  {str(tmp_path / 'bad' / '3')!r}"[:-1]),
        (["linear", val, str(tmp_path / "other"), *model], "1 class(es) that"),
        (["linear", val, val, "--blocks", "1,9", *model], "The model has 5 blocks; asked for 1, 9"),
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
        (["knn", "a", "--k", "1,x"], "'1,x' is not a number, or several such as 1,4"),
        (["knn", "a", "--temperature", "0"], "'0' is not a number above 0"),
        (["knn", "a", "--temperature", "warm"], "'warm' is not a number above 0"),
        (["knn", "a", "b", "--n-per-class", "5,some"], "'some' is not a number"),
        (["knn", "a", "b", "--n-tries", "0"], "must be at least 1, got 0"),
        (["linear", "a", "b", "--blocks", "last"], "'last' is not a number"),
        (["linear", "a", "b", "--learning-rates", "0"], "'0' is not a number above 0"),
        (["linear", "a", "b", "--learning-rates", "0.1,x"], "'x' is not a number above 0"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_the_documented_commands_run(
    photos: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(photos)
    commands = documents.commands("knn|linear")
    assert [command.split()[0] for command in commands] == ["knn", "linear"]
    for command in commands:
        words = shlex.split(command.replace("dinov2_vits14", checkpoint))
        assert main([*words, *COMMON, *(["--steps", "2"] if words[0] == "linear" else [])]) == 0
    assert json.loads(Path("linear.json").read_text())["steps"] == 2
