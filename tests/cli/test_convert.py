"""`dinov2-fast convert`: every layout gets its tensors, losses are listed, and a file is whole or absent."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dinov2_fast
from dinov2_fast import layouts
from dinov2_fast.cli import convert, main
from dinov2_fast.convert import READERS
from dinov2_fast.huggingface import Dinov2ForImageClassification
from dinov2_fast.weights import save
from tests.helpers import checkpoints, golden

CASES = ("facebook_mlp", "facebook_reg4", "facebook_swiglu")


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., str]:
    """Writes the weights of a golden case to a file, in one of the forms in which they are published."""

    def write(case: str = "facebook_mlp", source: str = "facebook", **changed: torch.Tensor) -> str:
        weights = checkpoints.SOURCES[source]({**golden.load_case(case)[1], **changed})
        path = tmp_path / f"{source}.pth"
        torch.save(weights, path)
        return str(path)

    return write


def test_the_command_knows_every_layout() -> None:
    assert convert.LAYOUTS == layouts.LAYOUTS
    assert READERS.keys() == set(layouts.LAYOUTS)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_a_file_has_the_tensors_of_the_layout(
    case: str, layout: str, written: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = golden.load_case(case)[1]
    expected = checkpoints.SOURCES[layout](weights)
    for out in (tmp_path / "new" / "out.safetensors", tmp_path / "out.pth"):
        assert main(["convert", written(case), str(out), "--to", layout]) == 0
        found = load_file(out) if out.suffix == ".safetensors" else torch.load(out, weights_only=True)
        checkpoints.assert_same(found, expected)
        said = capsys.readouterr().out
        assert "layout facebook: 128 wide, 3 blocks" in said
        assert ("Lost:     mask_token" in said) == (layout == "timm")
        assert ("Lost:     the CLS token's position" in said) == (layout == "timm" and case == "facebook_reg4")
        lost = layout == "timm"
        merged = "register_tokens" in weights and layout == "timm"
        assert f"Checked:  {len(weights) - lost} tensors read back from the file have the same values" in said, merged
        resampled = layout != "facebook" and case != "facebook_reg4"
        assert ("Note:     readers of the old layout resample positions as" in said) == resampled


@pytest.mark.parametrize("source", checkpoints.SOURCES)
def test_every_source_is_recognised(source: str, written: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    assert main(["convert", written(source=source), str(out), "--to", "facebook"]) == 0
    checkpoints.assert_same(load_file(out), checkpoints.expected(source, golden.load_case("facebook_mlp")[1]))


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_the_folder(case: str, written: Callable[..., str], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "model"
    assert main(["convert", written(case), str(folder), "--to", "huggingface"]) == 0
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert not list(tmp_path.glob(".*"))
    pixels = torch.randn(1, 3, 70, 70)
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    ours = dinov2_fast.load(written(case), num_heads=2)
    with torch.inference_mode():
        tokens = theirs(pixels).last_hidden_state[:, 0]
        torch.testing.assert_close(tokens, ours(pixels), atol=1e-4, rtol=0)


def test_a_classifier_is_kept(tmp_path: Path) -> None:
    head = {"classifier.weight": torch.randn(3, 256), "classifier.bias": torch.randn(3)}
    path, folder = tmp_path / "in.safetensors", tmp_path / "out"
    save_file({**golden.load_case("facebook_mlp")[1], **head}, path)
    assert main(["convert", str(path), str(folder), "--to", "huggingface"]) == 0
    model = Dinov2ForImageClassification.from_pretrained(folder)
    assert torch.equal(model.classifier.weight, head["classifier.weight"])
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Dinov2ForImageClassification"]


def test_the_config_beside_the_weights_is_kept(tmp_path: Path, written: Callable[..., str]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["convert", written(), str(first), "--to", "huggingface"]) == 0
    config = json.loads((first / "config.json").read_text())
    (first / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-3, "num_attention_heads": 4}))
    assert main(["convert", str(first), str(second), "--to", "huggingface"]) == 0
    again = json.loads((second / "config.json").read_text())
    assert (again["layer_norm_eps"], again["num_attention_heads"]) == (1e-3, 4)
    (first / "config.json").write_text(json.dumps({"architecture": "vit_small_patch14_dinov2"}))  # as timm's are
    assert main(["convert", str(first), str(second), "--to", "huggingface", "--overwrite"]) == 0
    assert json.loads((second / "config.json").read_text()) == config


def test_half_precision_stays_half(
    written: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = tmp_path / "in.safetensors", tmp_path / "out"
    save_file({key: tensor.bfloat16() for key, tensor in golden.load_case("facebook_mlp")[1].items()}, path)
    assert main(["convert", str(path), str(folder), "--to", "huggingface"]) == 0
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert re.search(r"parameters in bfloat16$", capsys.readouterr().out, re.M)


def test_a_part_of_a_larger_storage_is_written_alone(tmp_path: Path) -> None:
    table = torch.randn(1000, 8)
    for name in ("a.safetensors", "a.pth"):
        save.save_weights({"x": table[3], "y": table[:, 1]}, tmp_path / name)
        assert (tmp_path / name).stat().st_size < 8000
    assert torch.equal(load_file(tmp_path / "a.safetensors")["y"], table[:, 1])


def test_what_is_there_is_kept_unless_overwriting_is_asked_for(
    written: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, folder = tmp_path / "out.safetensors", tmp_path / "folder"
    out.write_text("mine")
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    for target, message in ((out, "exists already"), (folder, "is not empty")):
        arguments = ["convert", written(), str(target), "--to", "huggingface"]
        assert main(arguments) == 1
        assert message in capsys.readouterr().err
        assert target == folder or out.read_text() == "mine"
        assert main([*arguments, "--overwrite"]) == 0
    assert len(load_file(out)) > 10
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize("target", ["out.safetensors", "out.pth", "folder"])
def test_a_file_is_whole_or_absent(
    target: str, written: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, arguments = written(), ["--to", "huggingface", "--overwrite"]
    assert main(["convert", source, str(tmp_path / f"old-{target}"), *arguments]) == 0

    def contents() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = contents()

    def breaks_off(tensors: Any, path: Path, **kwargs: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("dinov2_fast.weights.save.save_file", breaks_off)
    monkeypatch.setattr("torch.save", breaks_off)
    for name in (target, f"old-{target}"):
        assert main(["convert", source, str(tmp_path / name), *arguments]) == 1
        assert contents() == before
    assert not (tmp_path / target).exists()


def test_a_file_with_other_tensors_is_noticed(
    written: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoilt(tensors: dict[str, torch.Tensor], path: Path, **kwargs: Any) -> None:
        save_file({name: t + (name == "blocks.1.ls1.gamma") * 1e-6 for name, t in tensors.items()}, path)

    monkeypatch.setattr("dinov2_fast.weights.save.save_file", spoilt)
    assert main(["convert", written(), str(tmp_path / "out.safetensors"), "--to", "facebook"]) == 1
    captured = capsys.readouterr()
    assert "does not hold what was read; delete it. These tensors differ: blocks.1.ls1.gamma" in captured.err
    assert "Checked" not in captured.out


@pytest.mark.parametrize(
    ("target", "layout", "message"),
    [
        ("folder", "timm", "must end in .safetensors"),
        ("x.npz", "facebook", "must end in .safetensors"),
        ("facebook.pth/x", "huggingface", "Not a directory"),
        ("README", "huggingface", "is a file, and a folder would be written"),
    ],
)
def test_impossible_targets_are_refused(
    target: str,
    layout: str,
    message: str,
    written: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "README").write_text("")
    assert main(["convert", written(), str(tmp_path / target), "--to", layout]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("to_folder", [False, True])
def test_weights_of_other_models_are_refused(
    to_folder: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "in.safetensors"
    save_file({"fc.weight": torch.randn(3, 2)}, path)
    out = tmp_path / ("out" if to_folder else "out.safetensors")
    assert main(["convert", str(path), str(out), "--to", "huggingface"]) == 1
    assert "not the weights of a DINOv2" in capsys.readouterr().err
    assert not out.exists()


def test_a_model_transformers_cannot_hold_is_refused_as_a_folder_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "in.safetensors"
    weights = golden.load_case("facebook_mlp")[1]
    for changed in (
        {key: tensor for key, tensor in weights.items() if ".ls" not in key},
        {
            key: tensor[..., :500] if "fc2.w" in key else tensor[:500] if "fc1" in key else tensor
            for key, tensor in weights.items()
        },
    ):
        save_file({key: tensor.contiguous() for key, tensor in changed.items()}, path)
        assert main(["convert", str(path), str(tmp_path / "out"), "--to", "huggingface"]) == 1
        assert "transformers has no such DINOv2: its models have LayerScale" in capsys.readouterr().err
        assert (
            main(["convert", str(path), str(tmp_path / "out.safetensors"), "--to", "huggingface", "--overwrite"]) == 0
        )
