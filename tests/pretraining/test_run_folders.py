"""The folder of a run as a model: `load`, `convert`, and from there transformers and timm."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dinov2_fast
from dinov2_fast.cli import main
from dinov2_fast.errors import WeightsError
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.pretraining import checkpoint
from dinov2_fast.pretraining.backbone import make_backbone
from dinov2_fast.pretraining.config import PretrainingConfig
from dinov2_fast.pretraining.parallel import World, start_processes
from tests.helpers.pretraining import small_config
from tests.helpers.training_states import TrainingState, make_state

MODELS: dict[str, dict[str, Any]] = {
    "heads of 32 channels": {"hidden_size": 64},
    "registers": {"hidden_size": 64, "num_register_tokens": 3, "position_interpolation": "offset"},
    "swiglu": {"hidden_size": 96, "num_heads": 3, "ffn": "swiglufused", "position_interpolation": "antialias"},
}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with start_processes("cpu") as alone:
        yield alone


def save(run: Path, step: int, config: PretrainingConfig, world: World) -> tuple[Path, TrainingState]:
    state = make_state(config, world, seed=step, steps=0)
    return checkpoint.save(run, step, *state, config, world), state


def teacher_of(state: TrainingState, config: PretrainingConfig) -> DinoVisionTransformer:
    """The teacher's backbone, not sharded."""
    backbone = make_backbone(config)
    start = "teacher/backbone."
    weights = {name.removeprefix(start): tensor for name, tensor in state.whole().items() if name.startswith(start)}
    backbone.load_state_dict(weights)
    return backbone.eval()


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_folder_of_a_run_loads_as_its_newest_teacher(model: dict[str, Any], world: World, tmp_path: Path) -> None:
    config = small_config(model=model)
    save(tmp_path, 1, config, world)
    newest, state = save(tmp_path, 2, config, world)
    teacher = teacher_of(state, config)
    for place in (tmp_path, newest, newest / "teacher.safetensors"):
        loaded = dinov2_fast.load(place)
        assert loaded.position_interpolation == config.model.position_interpolation
        assert loaded.loaded_from == str(newest / "teacher.safetensors")
        for size in (42, 56):
            images = torch.randn(2, 3, size, 70)
            found, expected = loaded.forward_features(images), teacher.forward_features(images)
            assert torch.equal(found["x_prenorm"], expected["x_prenorm"])
            assert torch.equal(found["x_norm_clstoken"], expected["x_norm_clstoken"])


def test_the_way_of_resampling_positions_can_still_be_chosen(world: World, tmp_path: Path) -> None:
    save(tmp_path, 1, small_config(model={"position_interpolation": "antialias"}), world)
    assert dinov2_fast.load(tmp_path, position_interpolation="size").position_interpolation == "size"


def test_a_config_with_an_unknown_way_of_resampling_is_refused(world: World, tmp_path: Path) -> None:
    folder, _ = save(tmp_path, 1, small_config(), world)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"position_interpolation": "nearest"}))
    with pytest.raises(WeightsError, match=r"config.json cannot be used: There is no position interpolation 'nearest'"):
        dinov2_fast.load(folder)


def test_the_heads_are_there_for_others(world: World, tmp_path: Path) -> None:
    assert checkpoint.read_heads(tmp_path) == {}
    assert checkpoint.read_heads(Path("dinov2_vits14")) == {}
    folder, state = save(tmp_path, 1, small_config(), world)
    expected = {
        name.removeprefix("teacher/"): tensor
        for name, tensor in state.whole().items()
        if name.startswith(("teacher/dino_head.", "teacher/ibot_head."))
    }
    for place in (tmp_path, folder):
        heads = checkpoint.read_heads(place)
        assert heads.keys() == expected.keys()
        assert all(torch.equal(heads[name], expected[name]) for name in expected)


def test_transformers_loads_what_convert_makes_of_a_run(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    config = small_config(model={**MODELS["heads of 32 channels"], "position_interpolation": "antialias"})
    _, state = save(tmp_path / "run", 1, config, world)
    out = tmp_path / "huggingface"
    assert main(["convert", str(tmp_path / "run"), str(out), "--to", "huggingface"]) == 0
    assert "resample positions as 'antialias', those of the new as 'size'" in capsys.readouterr().out
    model = transformers.AutoModel.from_pretrained(out, attn_implementation="eager").eval()
    assert model.config.num_attention_heads == 2
    images = torch.randn(2, 3, 42, 42)
    with torch.no_grad():
        found = model(images).last_hidden_state[:, 0]
        torch.testing.assert_close(found, teacher_of(state, config)(images), rtol=1e-5, atol=1e-5)


def test_timm_loads_what_convert_makes_of_a_run(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    timm = pytest.importorskip("timm")
    config = small_config(model=MODELS["heads of 32 channels"])
    _, state = save(tmp_path / "run", 1, config, world)
    out = tmp_path / "timm.safetensors"
    assert main(["convert", str(tmp_path / "run"), str(out), "--to", "timm"]) == 0
    assert "resample positions as 'offset', those of the new as 'antialias'" in capsys.readouterr().out
    sizes = {"img_size": 42, "embed_dim": 64, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, **sizes).eval()
    model.load_state_dict(load_file(out))
    images = torch.randn(2, 3, 42, 42)
    with torch.no_grad():
        found = model.forward_features(images)[:, 0]
        torch.testing.assert_close(found, teacher_of(state, config)(images), rtol=1e-5, atol=1e-5)


def test_convert_says_nothing_of_positions_that_are_resampled_alike(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "run", 1, small_config(model={"position_interpolation": "antialias"}), world)
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "timm.safetensors"), "--to", "timm"]) == 0
    assert "resample" not in capsys.readouterr().out


# What is not whole


@pytest.mark.parametrize("file", ["teacher.safetensors", "config.json"])
def test_a_damaged_teacher_is_passed_over(
    file: str, world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = save(tmp_path, 1, small_config(), world)
    second, _ = save(tmp_path, 2, small_config(), world)
    os.truncate(second / file, 20)
    assert dinov2_fast.load(tmp_path).loaded_from == str(first / "teacher.safetensors")
    assert f"{second} is damaged: {file} has 20 bytes" in caplog.text


def test_damage_of_what_is_not_loaded_does_not_matter(world: World, tmp_path: Path) -> None:
    folder, _ = save(tmp_path, 1, small_config(), world)
    (folder / "student-00001-of-00001.safetensors").unlink()
    assert dinov2_fast.load(tmp_path).loaded_from == str(folder / "teacher.safetensors")


def test_a_run_whose_checkpoints_are_all_damaged_says_so(world: World, tmp_path: Path) -> None:
    folder, _ = save(tmp_path, 1, small_config(), world)
    os.truncate(folder / "teacher.safetensors", 20)
    with pytest.raises(WeightsError, match=r"No checkpoint of .* can be used:\n.*teacher.safetensors has 20 bytes"):
        dinov2_fast.load(tmp_path)


def test_a_run_whose_first_checkpoint_is_half_written_says_so(world: World, tmp_path: Path) -> None:
    folder, _ = save(tmp_path, 1, small_config(), world)
    folder.rename(tmp_path / ".checkpoint-00000001.part")
    with pytest.raises(WeightsError, match="a pretraining run whose first checkpoint is not complete"):
        dinov2_fast.load(tmp_path)


def test_folders_of_other_trainers_load_as_before(world: World, tmp_path: Path) -> None:
    """The Trainer of transformers keeps folders of other checkpoints beside the model."""
    folder, _ = save(tmp_path / "run", 1, small_config(), world)
    other = tmp_path / "other"
    (other / "checkpoint-500").mkdir(parents=True)
    (folder / "teacher.safetensors").rename(other / "model.safetensors")
    assert dinov2_fast.load(other, num_heads=2).loaded_from == str(other / "model.safetensors")
