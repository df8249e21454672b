"""`from_pretrained` and `save_pretrained`: to and from transformers, heads, dtypes, devices, arguments, damage."""

from __future__ import annotations

import json
import logging
import weakref
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file

from dinov2_fast.convert import convert_checkpoint
from dinov2_fast.errors import WeightsError
from dinov2_fast.huggingface import Dinov2Backbone, Dinov2Config, Dinov2ForImageClassification, Dinov2Model
from tests.helpers.huggingface_peers import (
    FAMILIES,
    KIND_NAMES,
    KINDS,
    Pair,
    assert_close,
    images,
    make_pair,
    our_class,
    small_config,
    their_class,
    worst,
)

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56}
TASKS = ("Model", "ForImageClassification", "Backbone")
# AutoBackbone takes no folder in transformers 5.17 (it asks the hub for a repository of that name).
AUTO = {"Model": transformers.AutoModel, "ForImageClassification": transformers.AutoModelForImageClassification}


@pytest.fixture(params=KINDS, ids=KIND_NAMES)
def kind(request: pytest.FixtureRequest) -> tuple[str, bool]:
    return request.param


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base model of one family, as transformers saves it."""
    make_pair("Dinov2", **SMALL).theirs.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def classifier_folder(tmp_path: Path) -> Path:
    make_pair("Dinov2", "ForImageClassification", **SMALL, num_labels=5).theirs.save_pretrained(tmp_path)
    return tmp_path


def features(pair: Pair, **kwargs: Any) -> tuple[Any, Any]:
    x = images(70)
    with torch.no_grad():
        return pair.ours(x, **kwargs).to_tuple(), pair.theirs(x, **kwargs).to_tuple()


# To transformers and from it


@pytest.mark.parametrize("task", TASKS)
def test_transformers_loads_what_is_saved(kind: tuple[str, bool], task: str, tmp_path: Path) -> None:
    family, swiglu = kind
    ours, before = make_pair(family, task, **SMALL, use_swiglu_ffn=swiglu, num_labels=5)
    ours.save_pretrained(tmp_path)
    cls = AUTO.get(task, their_class(family, task))
    theirs, report = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs) is their_class(family, task)
    assert not any(report.values()), report
    for key, tensor in before.state_dict().items():
        assert torch.equal(theirs.state_dict()[key], tensor), key
    assert_close(*features(Pair(ours, theirs)))
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == [family + task]
    assert written["dtype"] == "float32"


@pytest.mark.parametrize("task", TASKS)
def test_loads_what_transformers_saves(kind: tuple[str, bool], task: str, tmp_path: Path) -> None:
    family, swiglu = kind
    expected, theirs = make_pair(family, task, **SMALL, use_swiglu_ffn=swiglu, num_labels=5)
    theirs.save_pretrained(tmp_path)
    ours = our_class(family, task).from_pretrained(tmp_path)
    assert not ours.training
    assert all(p.requires_grad for p in ours.parameters())
    assert ours.state_dict().keys() == expected.state_dict().keys()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(ours.state_dict()[key], tensor), key
    assert_close(*features(Pair(ours, theirs)))


@pytest.mark.parametrize("task", TASKS)
def test_a_saved_model_loads_back_with_the_same_bits(kind: tuple[str, bool], task: str, tmp_path: Path) -> None:
    family, swiglu = kind
    before = make_pair(family, task, **SMALL, use_swiglu_ffn=swiglu, position_interpolation="offset").ours
    before.save_pretrained(tmp_path / "new" / "folder")
    after = our_class(family, task).from_pretrained(str(tmp_path / "new" / "folder"))
    assert after.config == before.config
    assert after.base_model.position_interpolation == "offset"
    for key, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[key], tensor), key


@pytest.mark.parametrize("extension", ["safetensors", "bin"])
def test_a_sharded_checkpoint_is_loaded(extension: str, tmp_path: Path) -> None:
    expected, theirs = make_pair("Dinov2", **SMALL)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    if extension == "bin":
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        index["weight_map"] = {key: name.replace(".safetensors", ".bin") for key, name in index["weight_map"].items()}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        (tmp_path / "model.safetensors.index.json").unlink()
        for shard in shards:
            torch.save(load_file(shard), shard.with_suffix(".bin"))
            shard.unlink()
    ours = Dinov2Model.from_pretrained(tmp_path)
    for key, tensor in expected.state_dict().items():
        assert torch.equal(ours.state_dict()[key], tensor), key


# Heads that come and go


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_loads_a_base_model_and_initialises_its_head(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = make_pair(family, **SMALL)
    base.theirs.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "dinov2_fast"):
        model = our_class(family, "ForImageClassification").from_pretrained(tmp_path, num_labels=10, dtype="bfloat16")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "classifier.weight, classifier.bias that fits: the classification head is initialised" in caplog.text
    assert model.classifier.weight.shape == (10, 64)
    assert model.classifier.weight.dtype is torch.bfloat16
    assert 0.015 < model.classifier.weight.std() < 0.025
    assert model.classifier.weight.abs().max() < 0.1
    assert not model.classifier.bias.any()
    assert model.config.id2label[9] == "LABEL_9"
    for key, tensor in base.ours.state_dict().items():
        assert torch.equal(model.base_model.state_dict()[key], tensor.bfloat16()), key


def test_a_base_model_loads_a_classifier_without_its_head(classifier_folder: Path) -> None:
    pair = make_pair("Dinov2", "ForImageClassification", **SMALL, num_labels=5)
    for cls in (Dinov2Model, Dinov2Backbone):
        model = cls.from_pretrained(classifier_folder)
        for key, tensor in pair.ours.base_model.state_dict().items():
            assert torch.equal(model.state_dict()[key], tensor), key


def test_another_number_of_labels_needs_ignore_mismatched_sizes(
    classifier_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load = Dinov2ForImageClassification.from_pretrained
    with pytest.raises(WeightsError, match=r"classifier.weight \(5, 64\) where the model has \(10, 64\)"):
        load(classifier_folder, num_labels=10)
    expected = load(classifier_folder)
    model = load(classifier_folder, num_labels=10, ignore_mismatched_sizes=True)
    assert "the classification head is initialised at random" in caplog.text
    assert model(images(56)).logits.shape == (2, 10)
    assert torch.equal(model.base_model(images(56))[0], expected.base_model(images(56))[0])
    same = load(classifier_folder, ignore_mismatched_sizes=True)
    assert torch.equal(same.classifier.weight, expected.classifier.weight)
    with pytest.raises(WeightsError, match="pos_embed"):  # only a head may be another
        load(classifier_folder, image_size=28, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("num_channels", [1, 4])
def test_another_number_of_channels_adapts_the_filters(num_channels: int, folder: Path) -> None:
    manipulate = pytest.importorskip("timm.models._manipulate", reason="compares with timm, which is not installed")
    with pytest.raises(WeightsError, match=r"Wrong shape \(1\): patch_embed\.proj\.weight"):
        Dinov2Model.from_pretrained(folder, num_channels=num_channels)
    model = Dinov2Model.from_pretrained(folder, num_channels=num_channels, ignore_mismatched_sizes=True)
    published = Dinov2Model.from_pretrained(folder).patch_embed.proj.weight.detach()
    assert torch.equal(model.patch_embed.proj.weight, manipulate.adapt_input_conv(num_channels, published))
    assert model(torch.randn(1, num_channels, 56, 56)).last_hidden_state.isfinite().all()


def test_keyword_arguments_override_the_config(folder: Path) -> None:
    assert Dinov2Backbone.from_pretrained(folder, out_indices=[0, 1]).out_features == ["stem", "stage1"]
    assert Dinov2Model.from_pretrained(folder, position_interpolation="offset").position_interpolation == "offset"
    assert Dinov2Model.from_pretrained(folder, output_hidden_states=True)(images(56)).hidden_states is not None
    assert Dinov2Model.from_pretrained(folder, drop_path_rate=0.2).blocks[0].drop_path1.drop_prob == 0.2
    without_mask = Dinov2Model.from_pretrained(folder, use_mask_token=False)
    assert without_mask.mask_token is None
    assert torch.equal(without_mask(images(56))[0], Dinov2Model.from_pretrained(folder)(images(56))[0])


def test_a_given_config_replaces_that_of_the_folder(folder: Path, tmp_path: Path) -> None:
    config = Dinov2Config(**SMALL, position_interpolation="antialias")
    model = Dinov2Model.from_pretrained(folder, config=config, dtype="float16")
    assert model.position_interpolation == "antialias"
    assert config.dtype is None, "the caller's config is not changed"
    config.save_pretrained(tmp_path / "elsewhere")
    for where in (tmp_path / "elsewhere", str(tmp_path / "elsewhere" / "config.json")):
        assert Dinov2Model.from_pretrained(folder, config=where).position_interpolation == "antialias"
    (folder / "config.json").unlink()
    assert Dinov2Model.from_pretrained(folder, config=config).position_interpolation == "antialias"
    with pytest.raises(TypeError, match="num_labels cannot be given together with config"):
        Dinov2Model.from_pretrained(folder, config=config, num_labels=3)


# dtype and device


def test_a_conversion_keeps_the_dtype_of_the_weights_whatever_the_config_says(folder: Path, tmp_path: Path) -> None:
    fields = json.loads((folder / "config.json").read_text()) | {"dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(fields))
    written = convert_checkpoint(str(folder), tmp_path / "copy", layout="huggingface").written
    assert load_file(written)["layernorm.weight"].dtype is torch.float32
    assert json.loads((written.parent / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [
        ({}, torch.float32),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "torch.float16"}, torch.float16),
        ({"dtype": torch.float64}, torch.float64),
        ({"torch_dtype": torch.float16}, torch.float16),
        ({"dtype": "auto"}, torch.float32),
        ({"torch_dtype": "auto"}, torch.float32),
    ],
    ids=str,
)
def test_the_model_has_the_dtype_asked_for(folder: Path, arguments: dict[str, Any], dtype: torch.dtype) -> None:
    model = Dinov2Model.from_pretrained(folder, **arguments)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.dtype is dtype
    assert model.config.dtype is dtype
    assert Dinov2Model.from_pretrained(folder, **arguments)(images(56))[0].dtype is dtype


@pytest.mark.parametrize("named", ["float16", "float32", None])
def test_automatic_dtype_is_the_configs_then_the_weights(named: str | None, tmp_path: Path) -> None:
    theirs = make_pair("Dinov2", **SMALL).theirs.to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text()) | {"dtype": named}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    expected = transformers.Dinov2Model.from_pretrained(tmp_path).dtype
    assert expected is (getattr(torch, named) if named else torch.bfloat16)
    for arguments in ({}, {"dtype": "auto"}, {"dtype": None}):
        assert Dinov2Model.from_pretrained(tmp_path, **arguments).dtype is expected


def test_an_unknown_dtype_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="no dtype 'float17'; give one such as"):
        Dinov2Model.from_pretrained(folder, dtype="float17")


@pytest.mark.parametrize(
    "arguments",
    [
        {"device": "meta"},
        {"device": torch.device("meta")},
        {"device_map": "meta"},
        {"device_map": {"": "meta"}},
        {"device_map": {"embeddings": "meta", "encoder": torch.device("meta")}},
    ],
    ids=str,
)
def test_the_model_is_on_the_device_asked_for(folder: Path, arguments: dict[str, Any]) -> None:
    assert Dinov2Model.from_pretrained(folder, **arguments).device.type == "meta"
    assert Dinov2Model.from_pretrained(folder, device_map=None).device.type == "cpu"


@pytest.mark.parametrize("placement", ["auto", "balanced", "sequential"])
@pytest.mark.parametrize("there", [True, False])
def test_device_map_auto_takes_the_gpu_if_there_is_one(
    there: bool, placement: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    placed: list[Any] = []
    monkeypatch.setattr(
        "dinov2_fast.huggingface.pretrained.fill", lambda model, weights, *, device, **_: placed.append(device) or []
    )
    Dinov2Model.from_pretrained(folder, device_map=placement)
    assert placed == ["cuda" if there else "cpu"]


def test_several_devices_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"runs on one device, but device_map .*cuda:1"):
        Dinov2Model.from_pretrained(folder, device_map={"embeddings": "cuda:0", "encoder": "cuda:1"})
    with pytest.raises(ValueError, match="runs on one device"):
        Dinov2Model.from_pretrained(folder, device_map={})


# Arguments


REPOSITORY = "somebody/dinov2-tiny"


@pytest.fixture
def hub_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with revision "main" of a repository, and "other" with 7 classes and weights of zero."""
    cache = tmp_path / "hub"
    for revision in ("main", "other"):
        snapshot = cache / "models--somebody--dinov2-tiny" / "snapshots" / (revision[0] * 40)
        model = Dinov2Model.from_pretrained(folder, num_labels=2 if revision == "main" else 7)
        if revision == "other":
            model.requires_grad_(False).cls_token.zero_()
        model.save_pretrained(snapshot)
        ref = cache / "models--somebody--dinov2-tiny" / "refs" / revision
        ref.parent.mkdir(exist_ok=True)
        ref.write_text(snapshot.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture
def tree(folder: Path, tmp_path: Path) -> Path:
    """A hub cache with one repository whose model is in the subfolder "inner", and with it a variant of its weights."""
    repository = tmp_path / "elsewhere" / "models--somebody--dinov2-tiny"
    inner = repository / "snapshots" / "v2" / "inner"
    model = Dinov2Model.from_pretrained(folder)
    model.save_pretrained(inner)
    model.half().save_pretrained(inner, variant="fp16")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("v2")
    return repository


def test_cache_subfolder_and_variant_are_where_the_weights_are_read(tree: Path) -> None:
    assert sorted(path.name for path in (tree / "snapshots/v2/inner").iterdir()) == [
        "config.json", "model.fp16.safetensors", "model.safetensors",
    ]  # fmt: skip
    for name, options in ((REPOSITORY, {"cache_dir": tree.parent}), (tree / "snapshots" / "v2", {"cache_dir": None})):
        options |= {"subfolder": "inner", "local_files_only": True, "token": None}
        model = Dinov2Model.from_pretrained(name, **options, dtype="float32")
        half = Dinov2Model.from_pretrained(name, **options, dtype="float32", variant="fp16")
        assert 0 < worst(half.cls_token, model.cls_token) < 1e-3
        assert Dinov2Config.from_pretrained(name, **options).hidden_size == SMALL["hidden_size"]
        assert not {"token", "cache_dir", "subfolder", "variant"} & vars(model.config).keys()
        with pytest.raises(WeightsError, match=r"model.bf16.safetensors|local_files_only"):
            Dinov2Model.from_pretrained(name, **options, variant="bf16")
    with pytest.raises(WeightsError, match=r"no folder .*outer; check subfolder"):
        Dinov2Model.from_pretrained(tree, subfolder="outer")


@pytest.mark.parametrize("local_files_only", [True, False])
def test_a_revision_in_the_hubs_cache_is_loaded(local_files_only: bool, hub_cache: Path) -> None:
    for revision, labels in ((None, 2), ("main", 2), ("other", 7), ("o" * 40, 7)):
        arguments = {"revision": revision, "local_files_only": local_files_only}
        model = Dinov2Model.from_pretrained(REPOSITORY, **arguments)
        assert model.config.num_labels == labels
        assert bool(model.cls_token.any()) is (labels == 2)
        assert Dinov2Config.from_pretrained(REPOSITORY, **arguments).num_labels == labels


@pytest.mark.parametrize("cls", [Dinov2Model, Dinov2Config])
def test_what_is_in_no_cache_is_asked_of_the_hub_unless_forbidden(
    cls: Any, folder: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def download(repository: str, name: str, *, revision: str | None, cache_dir: str | None, token: str | None) -> str:
        asked.append((repository, revision, cache_dir, token))
        return str(folder / Path(name).name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr("dinov2_fast.weights.sources._hub_answers", lambda: True)
    with pytest.raises(WeightsError, match="local_files_only"):
        cls.from_pretrained(REPOSITORY, revision="newest", local_files_only=True)
    assert asked == []
    cls.from_pretrained(REPOSITORY, revision="newest")
    assert set(asked) == {(REPOSITORY, "newest", None, None)}
    asked.clear()
    loaded = cls.from_pretrained(REPOSITORY, cache_dir="/nowhere", token="hf_secret", subfolder="inner")
    assert set(asked) == {(REPOSITORY, None, "/nowhere", "hf_secret")}
    assert "secret" not in getattr(loaded, "config", loaded).to_json_string()


def test_arguments_without_effect_are_accepted(folder: Path) -> None:
    model = Dinov2Model.from_pretrained(
        folder, attn_implementation="sdpa", low_cpu_mem_usage=True, use_safetensors=True, trust_remote_code=False,
        weights_only=True, token=None, cache_dir=None, output_loading_info=False, state_dict=None, variant=None,
        subfolder=None,
        force_download=False, proxies=None, offload_folder="offload", max_memory={0: "1GB"},
    )  # fmt: skip
    written = model.config.to_dict()
    assert not {"attn_implementation", "low_cpu_mem_usage", "token", "cache_dir", "weights_only"} & written.keys()


@pytest.mark.parametrize(
    "arguments", [{"tokens": "hf_secret"}, {"num_label": 3}, {"quantization_config": {"bits": 4}}], ids=str
)
def test_unknown_arguments_are_refused_and_not_kept_in_the_config(folder: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(
        TypeError, match=rf"{next(iter(arguments))} is no argument .* no field of Dinov2Config"
    ) as error:
        Dinov2Model.from_pretrained(folder, **arguments)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("mismatched", [False, True])
@pytest.mark.parametrize(
    ("saved", "loaded"),
    [("Model", "ForImageClassification"), ("ForImageClassification",) * 2, ("ForImageClassification", "Backbone")],
)
def test_loading_info_is_transformers(saved: str, loaded: str, mismatched: bool, tmp_path: Path) -> None:
    make_pair("Dinov2", saved, **SMALL, num_labels=5).theirs.save_pretrained(tmp_path)
    arguments = {"output_loading_info": True, "ignore_mismatched_sizes": True, "num_labels": 7 if mismatched else 5}
    ours, info = our_class("Dinov2", loaded).from_pretrained(tmp_path, **arguments)
    _, expected = their_class("Dinov2", loaded).from_pretrained(tmp_path, **arguments)
    assert isinstance(ours, our_class("Dinov2", loaded))
    as_lists = {name: sorted(keys) for name, keys in info.items()}
    assert as_lists == {name: sorted(keys) for name, keys in expected.items()}


def test_given_weights_take_the_place_of_a_file(folder: Path) -> None:
    model = Dinov2Model.from_pretrained(folder)
    weights = {key: tensor + 1 for key, tensor in model.state_dict().items()}
    for name, config in ((None, model.config), (folder, None)):
        loaded = Dinov2Model.from_pretrained(name, config=config, state_dict=weights)
        assert loaded.state_dict().keys() == weights.keys(), "the dictionary is not emptied"
        for key, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, weights[key]), key
            assert tensor.data_ptr() != weights[key].data_ptr(), "the tensors are copied"
    with pytest.raises(TypeError, match="There is nothing to load"):
        Dinov2Model.from_pretrained(None, config=model.config)
    with pytest.raises(TypeError, match="A state_dict alone is not enough: give a config"):
        Dinov2Model.from_pretrained(None, state_dict=weights)


def test_a_model_knows_where_it_is_from(folder: Path, tmp_path: Path) -> None:
    model = Dinov2Model.from_pretrained(folder)
    assert model.name_or_path == model.config.name_or_path == str(folder)
    assert Dinov2Model(Dinov2Config(**SMALL)).name_or_path == ""
    model.save_pretrained(tmp_path / "again")
    assert "name_or_path" not in (tmp_path / "again" / "config.json").read_text()


# Errors


def test_a_missing_config_is_an_error(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"No config.json was found for .* Give config, or save with save_"):
        Dinov2Model.from_pretrained(folder)


def test_a_damaged_config_is_an_error(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[: len(text) // 2])
    with pytest.raises(WeightsError, match=r"config.json is not JSON"):
        Dinov2Model.from_pretrained(folder)


def test_the_config_of_another_model_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="configuration of a 'dinov2' model"):
        our_class("Dinov2WithRegisters", "Model").from_pretrained(folder)


def test_a_folder_without_weights_and_a_missing_folder_are_errors(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="holds no checkpoint"):
        Dinov2Model.from_pretrained(folder)
    with pytest.raises(WeightsError, match="no file or folder here, and no hub id"):
        Dinov2Model.from_pretrained(folder / "nowhere")


def test_weights_that_do_not_fit_are_refused(folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"huggingface[\s\S]*Missing[\s\S]*blocks\.2\.norm1\.weight"):
        Dinov2Model.from_pretrained(folder, num_hidden_layers=3)
    with pytest.raises(WeightsError, match=r"Unexpected[\s\S]*blocks\.1\."):
        Dinov2Model.from_pretrained(folder, num_hidden_layers=1)
    with pytest.raises(
        WeightsError, match=r"Wrong shape[\s\S]*mlp\.fc1\.weight \(128, 32\) where the model has \(64, 32\)"
    ):
        Dinov2Model.from_pretrained(folder, mlp_ratio=2)


def test_a_table_of_the_published_size_is_loaded_and_resampled(tmp_path: Path) -> None:
    """The position table of 37 x 37, resampled after loading as before saving."""
    before = make_pair("Dinov2", **small_config()).ours
    before.save_pretrained(tmp_path)
    after = Dinov2Model.from_pretrained(tmp_path)
    assert worst(after(images(98))[0], before(images(98))[0]) == 0


def test_a_model_without_mask_token_is_saved_without_one(tmp_path: Path) -> None:
    model = make_pair("Dinov2", **SMALL, use_mask_token=False).ours
    model.save_pretrained(tmp_path)
    assert "embeddings.mask_token" not in load_file(tmp_path / "model.safetensors")
    reloaded = transformers.AutoModel.from_pretrained(tmp_path)
    assert_close(reloaded(images(70)).last_hidden_state, model(images(70)).last_hidden_state)


def test_given_weights_are_saved_and_other_formats_refused(tmp_path: Path) -> None:
    pair = make_pair("Dinov2", **SMALL)
    gathered = {f"module.{key}": value + 1 for key, value in pair.ours.state_dict().items()}
    pair.ours.save_pretrained(tmp_path, state_dict=gathered, safe_serialization=True)
    loaded = Dinov2Model.from_pretrained(tmp_path)
    assert all(torch.equal(value, pair.ours.state_dict()[key] + 1) for key, value in loaded.state_dict().items())
    with pytest.raises(ValueError, match="Only safetensors files are written"):
        pair.ours.save_pretrained(tmp_path, safe_serialization=False)


def test_the_position_interpolation_is_kept_and_harmless_arguments_of_transformers_are_taken(tmp_path: Path) -> None:
    model = make_pair("Dinov2", **SMALL).ours
    model.position_interpolation = "antialias"
    model.save_pretrained(
        tmp_path, is_main_process=True, push_to_hub=False, max_shard_size="5GB", save_function=torch.save, token=None,
        save_peft_format=True, variant=None,
    )  # fmt: skip
    assert Dinov2Model.from_pretrained(tmp_path).position_interpolation == "antialias"
    assert transformers.AutoModel.from_pretrained(tmp_path).config.hidden_size == SMALL["hidden_size"]
    model.position_interpolation = "size"
    model.save_pretrained(tmp_path)
    assert "position_interpolation" not in json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match="push_to_hub is not supported"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


def test_transformers_configurations_are_taken_and_another_model_s_refused(folder: Path) -> None:
    theirs = transformers.AutoConfig.from_pretrained(folder)
    ours = Dinov2Config.from_pretrained(folder)
    assert Dinov2Model(theirs).config.constructor_arguments() == ours.constructor_arguments()
    assert Dinov2Model.from_pretrained(folder, config=theirs).config.hidden_size == SMALL["hidden_size"]
    for other in (transformers.ViTConfig(), transformers.Dinov2WithRegistersConfig(), {"hidden_size": 3}):
        with pytest.raises(TypeError, match=r"Give a Dinov2Config, or transformers' own; got a "):
            Dinov2Model(other)


def test_hidden_states_are_kept_only_when_asked_for() -> None:
    pair, alive, most = make_pair("Dinov2", **{**SMALL, "num_hidden_layers": 6}), weakref.WeakSet(), []
    for block in pair.ours.blocks:

        def note(module: Any, args: Any, output: torch.Tensor) -> None:
            alive.add(output)
            most.append(len(alive))

        block.register_forward_hook(note)
    with torch.no_grad():
        pair.ours(images(70))
        assert max(most) <= 2
        most.clear()
        pair.ours(images(70), output_hidden_states=True)
        assert max(most) == 6
