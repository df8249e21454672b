"""The configurations: transformers' fields, defaults, stages and config.json, both ways."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov2_fast.errors import WeightsError
from dinov2_fast.huggingface import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel
from tests.helpers.huggingface_peers import FAMILIES, our_class, their_class

# Of transformers' base class, with no meaning for a vision model or no place in a file.
NOT_OURS = {"_name_or_path", "chunk_size_feed_forward", "is_encoder_decoder", "transformers_version"}
UNUSUAL = {
    "hidden_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "mlp_ratio": 2,
    "hidden_act": "relu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.2,
    "initializer_range": 0.01,
    "layer_norm_eps": 1e-5,
    "image_size": 98,
    "patch_size": 7,
    "num_channels": 1,
    "qkv_bias": False,
    "layerscale_value": 0.5,
    "drop_path_rate": 0.3,
    "use_swiglu_ffn": True,
    "apply_layernorm": False,
    "reshape_hidden_states": False,
    "out_indices": [0, 2, -1],
    "id2label": {0: "cat", 1: "dog", 2: "fish"},
    "label2id": {"cat": 0, "dog": 1, "fish": 2},
    "problem_type": "multi_label_classification",
    "output_hidden_states": True,
    "output_attentions": True,
    "return_dict": False,
    "dtype": "bfloat16",
    "my_own_field": {"kept": [1, 2]},
}


def values(config: Any, names: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


# Fields and defaults


def test_every_field_and_default_is_transformers(family: str) -> None:
    ours, theirs = our_class(family, "Config")(), their_class(family, "Config")()
    names = theirs.to_dict().keys() - NOT_OURS
    assert values(ours, names) == values(theirs, names)
    assert ours.num_labels == theirs.num_labels == 2
    assert ours.to_dict().keys() <= theirs.to_dict().keys()


def test_values_are_kept_as_transformers_keeps_them(family: str) -> None:
    ours, theirs = our_class(family, "Config")(**UNUSUAL), their_class(family, "Config")(**UNUSUAL)
    names = (theirs.to_dict().keys() - NOT_OURS) | {"num_labels", "my_own_field"}
    assert values(ours, names) == values(theirs, names)


def test_the_config_with_registers_has_its_own_defaults() -> None:
    config = Dinov2WithRegistersConfig(num_register_tokens=2, use_mask_token=False)
    assert config.num_register_tokens == 2
    assert config.use_mask_token, "transformers has no such field on this config: these models have a mask token"
    assert "use_mask_token" not in config.to_dict()


@pytest.mark.parametrize("image_size", [98, [98, 98], (98, 98)])
def test_an_image_size_may_be_an_int_a_list_or_a_tuple(family: str, image_size: Any) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14}
    ours, theirs = (make(family, "Config")(**sizes, image_size=image_size) for make in (our_class, their_class))
    assert ours.image_size == theirs.image_size
    assert our_class(family, "Model")(ours).pos_embed.shape == (1, 50, 16)


def test_use_mask_token_decides_whether_there_is_a_mask_token() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    assert "mask_token" in Dinov2Model(Dinov2Config(**sizes)).state_dict()
    without = Dinov2Model(Dinov2Config(**sizes, use_mask_token=False))
    assert "mask_token" not in without.state_dict()
    assert without.mask_token is None
    assert Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes)).mask_token is not None


def test_attributes_that_transformers_tools_read_are_there() -> None:
    config = Dinov2Config(return_dict=False)
    assert config.use_return_dict is False
    assert config.name_or_path == ""
    assert config._commit_hash is None
    assert config == Dinov2Config(return_dict=False, name_or_path="somewhere")


# config.json


def test_our_file_is_read_by_transformers(family: str, tmp_path: Path) -> None:
    ours = our_class(family, "Config")(**UNUSUAL)
    ours.save_pretrained(tmp_path)
    theirs = their_class(family, "Config").from_pretrained(tmp_path)
    expected = their_class(family, "Config")(**UNUSUAL)
    names = (expected.to_dict().keys() - NOT_OURS) | {"my_own_field"}
    assert values(theirs, names) == values(expected, names)


def test_their_file_is_read_by_ours_and_written_back(family: str, tmp_path: Path) -> None:
    theirs = their_class(family, "Config")(**UNUSUAL)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = our_class(family, "Config").from_pretrained(tmp_path / "theirs")
    assert ours == our_class(family, "Config")(**UNUSUAL)
    ours.save_pretrained(tmp_path / "ours")
    assert their_class(family, "Config").from_pretrained(tmp_path / "ours").to_dict() == theirs.to_dict()


def test_a_saved_config_loads_back_equal(family: str, tmp_path: Path) -> None:
    config = our_class(family, "Config")(**UNUSUAL, position_interpolation="offset")
    config.save_pretrained(tmp_path)
    back = our_class(family, "Config").from_pretrained(tmp_path)
    assert back == config
    assert back.position_interpolation == "offset"
    assert back.out_indices == [0, 2, -1]
    assert back.dtype is torch.bfloat16
    assert our_class(family, "Config").from_pretrained(tmp_path / "config.json") == config


def test_default_file_names_no_position_interpolation_and_no_dtype(family: str) -> None:
    written = json.loads(our_class(family, "Config")().to_json_string())
    assert not {"position_interpolation", "dtype", "architectures", "problem_type", "return_dict"} & written.keys()
    assert written["model_type"] == {"Dinov2": "dinov2"}.get(family, "dinov2_with_registers")
    assert our_class(family, "Config")(dtype=torch.float16).to_dict()["dtype"] == "float16"


def test_the_published_config_file_is_read() -> None:
    """What older versions of transformers wrote: another name of the dtype, stages by name and index."""
    stages = ["stem", *(f"stage{i}" for i in range(1, 13))]
    config = Dinov2Config.from_dict(
        {"model_type": "dinov2", "architectures": ["Dinov2Model"], "torch_dtype": "float32", "image_size": 518}
        | {"transformers_version": "4.32.0.dev0", "stage_names": stages}
        | {"out_features": ["stage12"], "out_indices": [12]}
    )
    assert config.dtype is torch.float32
    assert (config.out_features, config.out_indices) == (["stage12"], [12])
    assert not hasattr(config, "transformers_version")


@pytest.mark.parametrize(("value", "written"), [(4.0, "4"), (4, "4"), (2.5, "2.5")])
def test_whole_mlp_ratio_is_written_as_transformers_wants_it(value: float, written: str) -> None:
    assert f'"mlp_ratio": {written},' in Dinov2Config(mlp_ratio=value).to_json_string()


def test_whole_floats_are_written_as_transformers_wants_them(tmp_path: Path) -> None:
    Dinov2Config(layerscale_value=1, initializer_range=1, layer_norm_eps=1, mlp_ratio=4.0).save_pretrained(tmp_path)
    assert their_class("Dinov2", "Config").from_pretrained(tmp_path).layerscale_value == 1.0


NONSENSE: dict[str, list[Any]] = {
    "hidden_size": ["768", 0, -1, 1.5, True, None, 10**30, [768]],
    "num_hidden_layers": ["12", -1, 10**9, 2.0, None],
    "num_attention_heads": ["1", 0, -1, None, 1.0],
    "num_channels": [0, "3", 10**9],
    "num_labels": [10**9, -1, "2"],
    "image_size": [0, -14, "224", [224], [224, "a"], [1, 2, 3], {}, None, 10**12],
    "patch_size": [0, "14", None, [14, 0], 10**6],
    "mlp_ratio": [math.nan, math.inf, 0, -1, "4", None],
    "layer_norm_eps": [-1, math.nan, "1e-6", None, math.inf],
    "initializer_range": [-1, "a", math.nan],
    "layerscale_value": ["1", math.nan, math.inf],
    "hidden_dropout_prob": [2, -0.1, "0", math.nan],
    "attention_probs_dropout_prob": [2, None],
    "drop_path_rate": [1.5, "0"],
    "qkv_bias": [1, "true", None],
    "use_swiglu_ffn": ["no", 0],
    "apply_layernorm": [[]],
    "reshape_hidden_states": [{}],
    "use_mask_token": ["false"],
    "hidden_act": [1, ["gelu"]],
    "problem_type": [3],
    "position_interpolation": [["size"]],
    "out_features": ["stage1", [1], 5],
    "out_indices": ["1", ["1"], 1, [1.0]],
    "id2label": [{"a": "b"}, ["a"], 3],
    "num_register_tokens": [-1, "4", 10**9],
    "to_dict": [1],
    "__class__": [1],
    "save_pretrained": ["x"],
    "self": [1],
    "dtype": ["float61", 5, {}],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in NONSENSE.items() for value in values])
def test_the_error_for_a_bad_field_names_it(name: str, value: Any, tmp_path: Path) -> None:
    kind = Dinov2WithRegistersConfig if name == "num_register_tokens" else Dinov2Config
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind.model_type, name: value}))
    with pytest.raises(ValueError, match=rf"config\.json: .*{name}"):
        kind.from_pretrained(tmp_path)


def test_a_config_that_is_nested_too_deep_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(WeightsError, match="is not JSON"):
        Dinov2Config.from_pretrained(tmp_path)


# Overrides


def test_overrides_replace_fields_on_loading(tmp_path: Path) -> None:
    Dinov2Config(**UNUSUAL).save_pretrained(tmp_path)
    load = Dinov2Config.from_pretrained
    assert load(tmp_path, hidden_size=48).hidden_size == 48
    assert load(tmp_path, num_labels=10).id2label == {i: f"LABEL_{i}" for i in range(10)}
    assert load(tmp_path, num_labels=3).id2label == UNUSUAL["id2label"]
    assert load(tmp_path, id2label={0: "a", 1: "b"}).label2id == {"a": 0, "b": 1}
    assert load(tmp_path, out_features=["stage2"]).out_indices == [2]
    assert load(tmp_path, out_indices=[1, 3]).out_features == ["stage1", "stage3"]
    assert load(tmp_path, num_hidden_layers=2).out_features == ["stage2"]
    assert load(tmp_path, dtype="float16").dtype is torch.float16


def test_labels_follow_num_labels_and_id2label() -> None:
    assert Dinov2Config(num_labels=0).num_labels == 0
    assert Dinov2Config(id2label={"0": "a"}).id2label == {0: "a"}
    config = Dinov2Config()
    config.num_labels = 3
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}


# Stages


@pytest.mark.parametrize(
    "stages",
    [
        {},
        {"out_indices": [1, 3]},
        {"out_indices": [0, -1]},
        {"out_indices": [-3, 3]},
        {"out_features": ["stem", "stage2"]},
        {"out_features": ["stage2"], "out_indices": [2]},
        {"out_features": ["stage2"], "out_indices": [-2]},
        {"out_indices": []},
    ],
)
def test_stages_are_transformers(family: str, stages: dict[str, Any]) -> None:
    ours = our_class(family, "Config")(num_hidden_layers=3, **stages)
    theirs = their_class(family, "Config")(num_hidden_layers=3, **stages)
    names = ("stage_names", "out_features", "out_indices")
    assert values(ours, names) == values(theirs, names)


@pytest.mark.parametrize(
    "stages",
    [
        {"out_indices": [4]},
        {"out_indices": [-5]},
        {"out_indices": [2, 1]},
        {"out_indices": [-1, 0]},
        {"out_indices": [3, -1]},
        {"out_features": ["stage4"]},
        {"out_features": ["stage2", "stage1"]},
        {"out_features": ["stage1", "stage1"]},
        {"out_features": ["stage1"], "out_indices": [2]},
        {"out_features": ["stage1", "stage2"], "out_indices": [1]},
    ],
)
def test_impossible_stages_are_refused_as_by_transformers(family: str, stages: dict[str, Any]) -> None:
    with pytest.raises((ValueError, IndexError)):
        their_class(family, "Config")(num_hidden_layers=3, **stages)
    with pytest.raises(ValueError, match=r"out_features|out_indices|Stages"):
        our_class(family, "Config")(num_hidden_layers=3, **stages)


def test_setting_one_kind_of_stages_sets_the_other(family: str) -> None:
    for config in (our_class(family, "Config")(), their_class(family, "Config")()):
        config.out_indices = (1, -1)
        assert config.out_features == ["stage1", "stage12"]
        assert config.out_indices == [1, -1]
        config.out_features = ["stem"]
        assert config.out_indices == [0]


# Errors and copies


def test_the_file_of_another_model_is_refused(tmp_path: Path) -> None:
    Dinov2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'dinov2' model; Dinov2WithRegistersConfig is for 'dinov2_with_registers'"):
        Dinov2WithRegistersConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}", b"[1, 2]", b"null", b""])
def test_a_damaged_file_is_an_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(WeightsError, match=r"config\.json"):
        Dinov2Config.from_pretrained(tmp_path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"config\.json"):
        Dinov2Config.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position_interpolation": "bilinear"}, "no position interpolation 'bilinear'; choose one of offset, size"),
        ({"dtype": "float8"}, "no dtype 'float8'"),
        ({"problem_type": "single_label_classification", "num_labels": 1}, "needs at least two labels"),
    ],
)
def test_values_that_do_not_fit_together_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Dinov2Config(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 100, "num_attention_heads": 3}, "100 is not a multiple of the number of attention heads 3"),
        ({"patch_size": (14, 16)}, "Patches must be square"),
        ({"hidden_act": "gelouille"}, "no hidden_act 'gelouille'; choose one of gelu"),
    ],
)
def test_values_that_no_model_can_have_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Dinov2Model(Dinov2Config(**fields))


def test_a_model_refuses_the_config_of_another() -> None:
    with pytest.raises(TypeError, match=r"Give a Dinov2WithRegistersConfig, .* got a dinov2_fast.huggingface"):
        Dinov2WithRegistersModel(Dinov2Config())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_copies_are_equal_and_independent(family: str, clone: Any) -> None:
    config = our_class(family, "Config")(**UNUSUAL)
    twin = clone(config)
    assert twin == config
    twin.out_indices = [1]
    twin.id2label[0] = "lion"
    assert config.out_indices == [0, 2, -1]
    assert config.id2label[0] == "cat"
    assert twin != config
