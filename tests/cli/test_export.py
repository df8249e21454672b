"""``dinov2-fast export``: the documented command and example, what it prints, and what it refuses."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dinov2_fast
from dinov2_fast.cli import main
from dinov2_fast.cli.export import EPILOG
from dinov2_fast.data.image_processor import IMAGENET_MEAN, Dinov2ImageProcessor
from tests.helpers import documents
from tests.helpers.images import read_image

IMAGES = Path(__file__).parents[2] / "examples" / "images"


@pytest.mark.parametrize("command", ["export", "knn", "linear"])
def test_help_fits_a_terminal(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: dinov2-fast {command} ")
    assert f"  dinov2-fast {command} " in "\n".join(lines[1:])
    written = lines[: next(row for row, line in enumerate(lines) if line.endswith("arguments:") or line == "options:")]
    assert max(map(len, written)) <= 80


def test_the_documented_commands_and_the_example_run(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(IMAGES)
    to_onnx, to_torch_export = (
        shlex.split(command.replace("dinov2_vits14", checkpoint)) for command in documents.commands("export")
    )
    assert main(to_torch_export) == 0
    assert capsys.readouterr().out.startswith("vits14.pt2 ")
    assert main(to_onnx) == 0

    captured = capsys.readouterr()
    assert captured.err == ""
    file, _, title, header, *rows, _, stored = captured.out.splitlines()
    assert re.fullmatch(r"vits14\.onnx  \d\.\d MB", file)
    assert title == "Difference from the model, on images:"
    assert header.split() == ["output", "shape", "relative", "worst"]
    assert [row.split()[:-2] for row in rows] == [
        ["cls", "5", "x", "64"],
        ["patches", "5", "x", "256", "x", "64"],
        ["cls", "1", "x", "64"],
        ["patches", "1", "x", "220", "x", "64"],
    ]
    assert all(0 < float(row.split()[-2]) < 1e-5 for row in rows)
    assert "'dinov2_fast'" in stored

    pixels = Dinov2ImageProcessor()([read_image(path) for path in sorted(IMAGES.glob("*.jpg"))]).pixel_values
    names: dict[str, Any] = {"images": pixels}
    exec(documents.example('InferenceSession("vits14.onnx")'), names)
    with torch.no_grad():
        features = dinov2_fast.load(checkpoint).forward_features(pixels)
    for ours, name in ((names["cls_token"], "x_norm_clstoken"), (names["patches"], "x_norm_patchtokens")):
        torch.testing.assert_close(torch.from_numpy(ours), features[name], atol=1e-4, rtol=0)
    session = names["session"]
    assert f'"weights": "{checkpoint}"' in session.get_modelmeta().custom_metadata_map["dinov2_fast"]
    assert f'"mean": {list(IMAGENET_MEAN)}' in session.get_modelmeta().custom_metadata_map["dinov2_fast"]


def test_the_documented_extra_is_what_help_names() -> None:
    assert "`pip install '.[export]'`" in documents.TEXT
    project = (documents.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (names,) = re.findall(r"^export = \[(.*)\]$", project, re.MULTILINE)
    assert f"\npip install {names.replace(',', '').replace(chr(34), '')}\n" in EPILOG


def test_torch_export_of_one_size(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.pt2"
    arguments = ["export", "--model", checkpoint, "--out", str(path), "--format", "torch-export", "--dtype", "fp16"]
    arguments += ["--outputs", "patch_mean", "--size", "28x42", "--batch-size", "3", "--position-interpolation", "size"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "on noise" in captured.out
    pixels = torch.randn(3, 3, 28, 42)
    program = torch.export.load(path)
    (given,) = [node.meta["val"] for node in program.graph.nodes if node.name == "pixel_values"]
    assert given.shape == (3, 3, 28, 42)
    (ours,) = program.module()(pixels.half())
    model = dinov2_fast.load(checkpoint, position_interpolation="size")
    with torch.no_grad():
        expected = model.forward_features(pixels)["x_norm_patchtokens"].mean(dim=1)
    assert (ours.float() - expected).norm() < 1e-2 * expected.norm()
    assert main(arguments) == 1
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "bf16"], "bf16 cannot be exported to ONNX"),
        (["--opset", "16"], "opset 16 is too old"),
        (["--outputs", "cls,scores"], "outputs must be some of"),
        (["--outputs", "registers"], "has no registers"),
        (["--format", "torch-export"], "ends in .pt2"),
        (["--check", str(IMAGES / "README.md")], f"can be read:\n  {str(IMAGES / 'README.md')!r}: not a"),
        (["--check", "tests"], "There are no images in 'tests'"),
    ],
)
def test_what_is_not_possible_exits_with_1(
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    assert main(["export", "--model", checkpoint, "--out", "model.onnx", *options]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("dinov2-fast: error: ")
    assert message in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["tests"]


def test_images_that_cannot_be_read_are_left_out_of_the_check(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jpg").write_text("<html>")
    arguments = ["export", "--model", checkpoint, "--out", str(tmp_path / "model.pt2"), "--format", "torch-export"]
    arguments += ["--size", "28", "--outputs", "cls, patch_mean"]
    assert main([*arguments, "--check", str(tmp_path / "bad.jpg"), str(IMAGES)]) == 3
    captured = capsys.readouterr()
    assert captured.err.startswith(f"Left out:\n  {str(tmp_path / 'bad.jpg')!r}: not a")
    assert [line.split()[:2] for line in captured.out.splitlines()[4:6]] == [["cls", "5"], ["patch_mean", "5"]]


def perturb(model: torch.nn.Module) -> None:
    """Changes all parameters, so that none has its initial value."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("kind", ["transformers", "timm"])
def test_a_trained_classifier_is_exported(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels, path = torch.randn(3, 3, 28, 42), tmp_path / "model.pt2"
    if kind == "transformers":
        config = dinov2_fast.Dinov2Config(
            hidden_size=64, num_hidden_layers=1, num_attention_heads=1, image_size=28, num_labels=5
        )
        model: Any = dinov2_fast.Dinov2ForImageClassification(config).eval()
        perturb(model)
        model.save_pretrained(tmp_path)
        logits, position_interpolation = (lambda: model(pixels).logits), "size"
    else:
        model = dinov2_fast.create_model("vit_small_patch14_dinov2", depth=1, num_classes=5, img_size=28).eval()
        perturb(model)
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        logits, position_interpolation = (lambda: model(pixels)), "antialias"
    arguments = ["export", "--model", str(tmp_path), "--out", str(path), "--format", "torch-export"]
    assert main([*arguments, "--position-interpolation", position_interpolation]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[4:7]] == ["cls", "patches", "logits"]
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(path).module()(pixels)[2], logits(), atol=1e-5, rtol=1e-4)


def test_a_classifier_of_other_features_is_left_out_with_a_reason(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {**load_file(checkpoint), "linear_head.weight": torch.randn(5, 320), "linear_head.bias": torch.randn(5)}
    save_file(weights, tmp_path / "model.safetensors")
    arguments = ["export", "--model", str(tmp_path), "--out", str(tmp_path / "a.pt2"), "--format", "torch-export"]
    assert main([*arguments, "--outputs", "logits"]) == 1
    assert "it takes 320 features" in capsys.readouterr().err
    assert main(arguments) == 0
    assert "is left out: it takes 320 features" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "tflite"], "invalid choice: 'tflite'"),
        (["--size", "100"], "100 is not a multiple of the patch size 14"),
        (["--batch-size", "0"], "must be at least 1"),
    ],
)
def test_wrong_usage_exits_with_2(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["export", "--model", "dinov2_vits14", "--out", "model.onnx", *options])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
