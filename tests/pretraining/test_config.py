"""Settings of pretraining: their checks, presets, files and overrides."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.pretraining import reference_config
from dinov2_fast.pretraining.config import HeadConfig, PretrainingConfig, difference, find_problems
from dinov2_fast.pretraining.presets import PRESETS, read_config
from dinov2_fast.pretraining.reference_config import from_reference
from dinov2_fast.pretraining.schedules import rates_at

SEPARATE_HEADS = PretrainingConfig(ibot_head=HeadConfig())
SETTINGS = [
    f"{group.name}.{field.name}"
    for group in fields(SEPARATE_HEADS)
    for field in fields(getattr(SEPARATE_HEADS, group.name))
]


def nested(setting: str, value: Any) -> dict[str, Any]:
    group, name = setting.split(".")
    return {group: {name: value}}


def value_of(config: PretrainingConfig, setting: str) -> Any:
    group, name = setting.split(".")
    return getattr(getattr(config, group), name)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("wrong", ["wrong", None, -1, float("nan"), [], [0.5, 0.5, 0.5, 0.5], {}])
def test_a_wrong_value_is_named(setting: str, wrong: Any) -> None:
    with pytest.raises(InvalidValueError, match=rf"^{setting} must be .*, got "):
        SEPARATE_HEADS.updated(nested(setting, wrong))


@pytest.mark.parametrize(
    ("setting", "edge", "beyond"),
    [
        ("model.depth", 1, 0),
        ("model.depth", 1, 1.0),
        ("model.depth", 1, True),
        ("model.gradient_checkpointing", True, 1),
        ("model.drop_path", 0.99, 1.0),
        ("model.layer_scale", 1e-30, 0),
        ("model.ffn", "swiglufused", "swiglu"),
        ("crops.n_local", 0, -1),
        ("crops.global_scale", [1, 1], [0, 1]),
        ("crops.global_scale", [0.5, 0.5], [0.5, 0.4]),
        ("crops.local_scale", [0.1, 1.0], [0.1, 1.1]),
        ("crops.blur", [0, 1, 0], [0, 1.1, 0]),
        ("crops.blur", [0, 1, 0], [0, 1]),
        ("masks.probability", 1, 1.01),
        ("masks.ratio", [0, 0], [-0.1, 0]),
        ("losses.koleo", 0, -0.1),
        ("teacher.momentum", 1, 1.1),
        ("optimizer.beta2", 0, 1),
        ("optimizer.clip_norm", 0, float("inf")),
        ("run.precision", "fp32", "fp16"),
    ],
)
def test_ranges(setting: str, edge: Any, beyond: Any) -> None:
    changed = PretrainingConfig().updated(nested(setting, edge))
    assert value_of(changed, setting) == (tuple(edge) if isinstance(edge, list) else edge)
    with pytest.raises(InvalidValueError, match=setting):
        PretrainingConfig().updated(nested(setting, beyond))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"hidden_size": 200}}, "model.hidden_size must be a multiple of model.num_heads, 6, got 200"),
        ({"crops": {"global_size": 225}}, "crops.global_size must be a multiple of model.patch_size, 14, got 225"),
        ({"crops": {"local_size": 96}}, "crops.local_size must be a multiple of model.patch_size, 14, got 96"),
        ({"run": {"batch_size": 96}}, "run.batch_size must be a multiple of run.micro_batch, 64, got 96"),
        ({"losses": {"koleo_group": 48}}, "run.micro_batch must be a multiple of losses.koleo_group, 48, got 64"),
    ],
)
def test_settings_that_do_not_fit_each_other(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        PretrainingConfig().updated(changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optimizer": {"learning_rat": 1}},
            r"no setting 'optimizer.learning_rat'. Did you mean optimizer.learning_rate\?",
        ),
        ({"model": {"learning_rate": 1}}, r"no setting 'model.learning_rate'. Did you mean optimizer.learning_rate\?"),
        ({"optimizer": {"lr": 1}}, r"no setting 'optimizer.lr'. There are optimizer.learning_rate, optimizer.min_"),
        ({"optimiser": {}}, r"no group of settings 'optimiser'. Did you mean optimizer\?"),
        ({"steps": 5}, r"no group of settings 'steps'. Did you mean run.steps\?"),
        ({"run": 5}, r"run is a group of settings, run.steps, .* got 5"),
    ],
)
def test_unknown_names(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        PretrainingConfig().updated(changes)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name: str) -> None:
    config = PRESETS[name]
    assert PretrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert find_problems(config, n_images=config.run.batch_size) == []


def test_presets() -> None:
    assert PRESETS["small"] == PretrainingConfig()
    assert rates_at(PRESETS["tiny"], PRESETS["tiny"].optimizer.warmup_steps).learning_rate == pytest.approx(1e-3)
    base, large = PRESETS["base"].model, PRESETS["vitl14"].model
    assert (base.hidden_size, base.depth, base.num_heads) == (768, 12, 12)
    assert (large.hidden_size, large.depth, large.num_heads) == (1024, 24, 16)


@pytest.mark.parametrize(
    ("setting", "other", "sentence"),
    [
        ("model.hidden_size", 192, "model.hidden_size is 384 there and 192 here"),
        ("ibot_head.layers", 2, "ibot_head.layers is 3 there and 2 here"),
        ("crops.blur", [0, 0, 0], "crops.blur is (0.0, 0.9, 0.5) there and (0, 0, 0) here"),
        ("losses.centering", "sinkhorn_knopp", "losses.centering is centering there and sinkhorn_knopp here"),
        ("run.reshard_after_forward", True, "run.reshard_after_forward is False there and True here"),
        ("teacher.final_momentum", 1, None),  # was 1.0
    ],
)
def test_a_difference_is_named(setting: str, other: Any, sentence: str | None) -> None:
    assert difference(SEPARATE_HEADS, SEPARATE_HEADS.updated(nested(setting, other))) == sentence


def test_a_difference_of_heads_is_named() -> None:
    assert difference(PretrainingConfig(), SEPARATE_HEADS) == "ibot_head.prototypes is None there and 65536 here"


@pytest.mark.parametrize(
    ("changes", "n_images", "sentence"),
    [
        ({"losses": {"koleo_group": 1}}, 5000, "KoLeo compares the images of a group .* has one image here"),
        ({"losses": {"koleo_group": 1, "koleo": 0}}, 5000, None),
        ({}, 1024, None),
        ({}, 1023, r"fewer images \(1023\) than a batch has \(1024\)"),
        (
            {"optimizer": {"warmup_steps": 125_000}},
            5000,
            r"optimizer.warmup_steps \(125000\) is not shorter than the run",
        ),
        ({"optimizer": {"warmup_steps": 124_999}}, 5000, None),
        ({"optimizer": {"freeze_last_layer_steps": 125_000}}, 5000, "optimizer.freeze_last_layer_steps .* never learn"),
        ({"optimizer": {"freeze_backbone_steps": 125_000}}, 5000, "optimizer.freeze_backbone_steps .* never learns"),
        ({"teacher": {"temperature_warmup_steps": 125_000}}, 5000, "temperature does not reach 0.07"),
        ({"teacher": {"temperature_warmup_steps": 125_000, "temperature": 0.04}}, 5000, None),
        ({"masks": {"probability": 0.0}}, 5000, "No patch is ever masked"),
        ({"masks": {"ratio": [0.0, 0.003]}}, 5000, "No patch is ever masked .* of at most 0 of 256 patches"),
        ({"crops": {"global_size": 14}, "masks": {"ratio": [1, 1]}}, 5000, "No patch is ever masked"),
        ({"masks": {"probability": 0.0}, "losses": {"ibot": 0.0}}, 5000, None),
    ],
)
def test_problems(changes: dict[str, Any], n_images: int, sentence: str | None) -> None:
    found = find_problems(PretrainingConfig().updated(changes), n_images)
    if sentence is None:
        assert found == []
    else:
        assert [re.search(sentence, each) is not None for each in found] == [True], found


def test_overrides_are_toml() -> None:
    overrides = ["run.batch_size=32", "run.micro_batch = 32", "losses.centering=centering", "run.precision='bf16'"]
    overrides += ["crops.global_scale=[0.5, 1]", "optimizer.learning_rate=1e-3", "model.gradient_checkpointing=true"]
    config = read_config("tiny", overrides)
    assert (config.run.batch_size, config.run.micro_batch, config.run.precision) == (32, 32, "bf16")
    assert config.losses.centering == "centering"
    assert config.crops.global_scale == (0.5, 1)
    assert config.optimizer.learning_rate == 1e-3
    assert config.model.gradient_checkpointing is True
    assert config.model.depth == PRESETS["tiny"].model.depth


def test_heads_become_shared_and_separate_by_overrides() -> None:
    assert read_config("tiny", ["ibot_head=shared"]).ibot_head is None
    assert read_config("small", ["ibot_head.prototypes=9"]).ibot_head == HeadConfig(prototypes=9)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.steps", "An override is a setting and its value, such as run.steps=1000, got 'run.steps'"),
        ("run.steps=many", "run.steps must be an integer from 1, got 'many'"),
        ("run.step=5", r"Did you mean run.steps\?"),
        ("crops.blur=[1, 2", r"crops.blur must be three numbers from 0 to 1, got '\[1, 2'"),
    ],
)
def test_wrong_overrides(override: str, message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        read_config("tiny", [override])


def test_toml_files_change_a_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('base = "tiny"\n[run]\nsteps = 7\n[crops]\nglobal_scale = [0.4, 1]\n', encoding="utf-8")
    config = read_config(file, ["run.seed=3"])
    expected = PRESETS["tiny"].updated({"run": {"steps": 7, "seed": 3}, "crops": {"global_scale": (0.4, 1)}})
    assert config == expected
    file.write_text("[run]\nsteps = 7\n", encoding="utf-8")
    assert read_config(file) == PretrainingConfig().updated({"run": {"steps": 7}})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.toml", "base = 'huge'", "base must be one of tiny, .* got 'huge'"),
        ("a.toml", "base = ", "is no TOML file: Invalid value"),
        ("a.toml", "[run]\nsteps = 0", "run.steps must be an integer from 1"),
        ("a.yaml", "train: [", "is no YAML file"),
        ("a.yml", "- 1", "holds no settings"),
        ("a.yml", "optim: {epoch: 5}", r"The reference has no setting 'optim.epoch'. Did you mean optim.epochs\?"),
    ],
)
def test_wrong_files(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(InvalidValueError, match=message):
        read_config(tmp_path / name)


def test_wrong_names() -> None:
    with pytest.raises(InvalidValueError, match=r"no preset 'smal', .* Did you mean small\?"):
        read_config("smal")
    with pytest.raises(FileNotFoundError):
        read_config("missing.toml")


SHORT = {"train": {"dataset_path": "ImageNet:split=TRAIN", "batch_size_per_gpu": 64}, "student": {"block_chunks": 4}}
LONG = {
    "dino": {"head_n_prototypes": 131072, "head_bottleneck_dim": 384},
    "ibot": {"separate_head": True, "head_n_prototypes": 131072},
    "train": {"batch_size_per_gpu": 32, "dataset_path": "ImageNet22k", "centering": "sinkhorn_knopp"},
    "student": {"arch": "vit_large", "patch_size": 14, "drop_path_rate": 0.4, "ffn_layer": "swiglufused"},
    "teacher": {"momentum_teacher": 0.994},
    "optim": {"epochs": 500, "weight_decay_end": 0.2, "base_lr": "2e-4", "warmup_epochs": 80, "layerwise_decay": 1.0},
    "crops": {"local_crops_size": 98},
}  # "2e-4" is what YAML 1.1 makes of 2e-4


def test_the_short_recipe_of_the_reference() -> None:
    config = from_reference(SHORT, n_processes=16)
    changes = {
        "model": {"hidden_size": 1024, "depth": 24, "num_heads": 16, "patch_size": 16},
        "crops": {"local_size": 96},
        "losses": {"koleo_group": 64},
    }
    assert config == PretrainingConfig().updated(changes)  # 16 * 64 = 1024 images


def test_the_long_recipe_of_the_reference() -> None:
    config = from_reference(LONG, n_processes=96)
    changes = {"model": {"ffn": "swiglufused"}, "losses": {"koleo_group": 32}}
    assert config == PRESETS["vitl14"].updated(changes)


def test_yaml_files_take_the_number_of_processes(tmp_path: Path) -> None:
    file = tmp_path / "short.yaml"
    file.write_text(yaml.safe_dump(SHORT), encoding="utf-8")
    config = read_config(file, ["run.micro_batch=32", "losses.koleo_group=32"], n_processes=4)
    assert (config.run.batch_size, config.run.micro_batch) == (256, 32)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"student": {"arch": "vit_huge"}}, "student.arch must be 'vit_small' or .* got 'vit_huge'"),
        ({"student": {"drop_path_uniform": False}}, "student.drop_path_uniform must be True here, got False"),
        (
            {"student": {"interpolate_offset": 0.2}},
            "student.interpolate_offset and interpolate_antialias must be one of",
        ),
        ({"optim": {"base_lr": "fast"}}, "optim.base_lr must be a number, got 'fast'"),
        ({"optim": {"epochs": float("nan")}}, "optim.epochs must be a number, got nan"),
        ({"student": {"patch_size": 14}}, "crops.local_size must be a multiple of model.patch_size, 14, got 96"),
        ({"train": {"centering": "none"}}, 'losses.centering must be "centering" or "sinkhorn_knopp", got \'none\''),
        ({"gram": {"weight": 1}}, "The reference has no setting 'gram.weight'"),
    ],
)
def test_wrong_settings_of_the_reference(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        from_reference(values, n_processes=1)


def test_the_defaults_of_the_reference(request: pytest.FixtureRequest) -> None:
    path = request.config.getoption("--reference-path", None)
    if path is None:
        pytest.skip("no --reference-path was given")
    folder = path / "dinov2" / "configs"
    defaults = yaml.safe_load((folder / "ssl_default_config.yaml").read_text(encoding="utf-8"))
    assert dict(reference_config._flattened(defaults)) == reference_config._DEFAULTS
    for file in (folder / "train").iterdir():
        read_config(file, n_processes=2)
