"""`dinov2_fast.load` from what is on this disk, seeded random weights, and reading a model's sizes from its weights."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dinov2_fast
from dinov2_fast import WeightsError, convert_state_dict, load, logs
from tests.helpers import checkpoints, golden
from tests.helpers.weight_folders import (
    TINY,
    WeightFolders,
    isolate,
    refuse_network,
    tiny_backbone,
    tiny_weights,
    write,
)

SMALL = "dinov2_vits14"


@pytest.fixture(autouse=True)
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Empty caches and the tiny backbone; nothing here may ask the network."""
    tiny_backbone(monkeypatch)
    attempts = refuse_network(monkeypatch)
    yield isolate(monkeypatch, tmp_path)
    assert attempts == []


def assert_gives(model: torch.nn.Module, tensors: dict[str, Tensor], key: str = "x_norm_clstoken") -> None:
    for i in range(4):
        with torch.no_grad():
            features = model.forward_features(tensors[f"{i}.input"])
        wanted = tensors[f"{i}.{key}"]
        actual = model.norm(features["x_prenorm"]) if key == "forward_features" else features[key]
        torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("ending", [".safetensors", ".pth", ".pt", ".bin"])
@pytest.mark.parametrize("where", ["cache", "torch_hub"])
def test_a_name_is_found_in_the_caches(folders: WeightFolders, where: str, ending: str) -> None:
    weights = tiny_weights(1)
    write(weights, getattr(folders, where) / f"dinov2_vitt14_pretrain{ending}")
    model = load(TINY)
    checkpoints.assert_same(model.state_dict(), weights)
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_own_cache_goes_before_torchs_and_safetensors_before_pth(folders: WeightFolders) -> None:
    found = []
    candidates = [
        folders.torch_hub / "dinov2_vitt14_pretrain.pth",
        folders.cache / "dinov2_vitt14_pretrain.pth",
        folders.cache / "dinov2_vitt14_pretrain.safetensors",
    ]
    for seed, path in enumerate(candidates):
        write(tiny_weights(seed), path)
        found.append(torch.equal(load(TINY).norm.weight, tiny_weights(seed)["norm.weight"]))
    assert found == [True, True, True]


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
@pytest.mark.parametrize("source", checkpoints.SOURCES)
@pytest.mark.parametrize("case", ["facebook_mlp", "facebook_reg4", "facebook_swiglu"])
def test_a_file_in_any_layout_is_loaded(case: str, source: str, ending: str, tmp_path: Path) -> None:
    _, weights, tensors = golden.load_case(case)
    content = checkpoints.SOURCES[source](weights)
    if ending == ".safetensors":  # holds no nested dictionaries
        content = content.get("teacher") or content.get("model") or content
    model = load(write(content, tmp_path / f"any{ending}"))
    checkpoints.assert_same(model.state_dict(), checkpoints.expected(source, weights))
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
    assert_gives(model, tensors)


@pytest.mark.parametrize("case", golden.cases("timm"))
def test_a_file_of_timm_is_loaded(case: str, tmp_path: Path) -> None:
    _, weights, tensors = golden.load_case(case)
    model = load(write(weights, tmp_path / "timm.safetensors"), position_interpolation="antialias")
    assert_gives(model, tensors, "forward_features")


@pytest.mark.parametrize("case", ["facebook_mlp", "facebook_reg4"])
def test_a_folder_that_save_pretrained_wrote_is_loaded(case: str, tmp_path: Path) -> None:
    _, weights, _ = golden.load_case(case)
    family = "Dinov2WithRegisters" if case == "facebook_reg4" else "Dinov2"
    sizes = {"hidden_size": 128, "num_hidden_layers": 3, "image_size": 70, "patch_size": 14}
    saved = getattr(dinov2_fast, f"{family}Model")(
        getattr(dinov2_fast, f"{family}Config")(**sizes, num_attention_heads=4)  # not the 64 channels to be guessed
    )
    saved.load_state_dict(weights)
    saved.save_pretrained(tmp_path)
    model = load(tmp_path)
    checkpoints.assert_same(model.state_dict(), weights)
    assert model.num_heads == 4


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_a_sharded_checkpoint_is_loaded(ending: str, tmp_path: Path) -> None:
    _, weights, _ = golden.load_case("facebook_swiglu")
    content = checkpoints.huggingface(weights)
    keys = list(content)
    names = [f"model-0000{i}-of-00003{ending}" for i in (1, 2, 3)]
    for i, name in enumerate(names):
        write({key: content[key] for key in keys[i::3]}, tmp_path / name)
    weight_map = {key: names[i % 3] for i, key in enumerate(keys)}
    stem = "model.safetensors" if ending == ".safetensors" else "pytorch_model.bin"
    index = tmp_path / f"{stem}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    checkpoints.assert_same(load(tmp_path).state_dict(), weights)
    checkpoints.assert_same(load(index).state_dict(), weights)


def test_folders_without_or_with_several_checkpoints_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(WeightsError, match=r"holds no checkpoint; expected one of model\.safetensors"):
        load(folder)
    only = write(tiny_weights(0), folder / "mine.pth")
    checkpoints.assert_same(load(folder).state_dict(), load(only).state_dict())
    write(tiny_weights(0), folder / "other.safetensors")
    with pytest.raises(WeightsError, match=r"holds 2 checkpoints \(mine.pth, other.safetensors\)"):
        load(folder)


def test_a_file_given_for_a_name_is_loaded(tmp_path: Path) -> None:
    weights = tiny_weights(3)
    path = write({"teacher": {f"backbone.{key}": tensor for key, tensor in weights.items()}}, tmp_path / "mine.pth")
    checkpoints.assert_same(load(TINY, weights=path).state_dict(), weights)
    checkpoints.assert_same(load(TINY, weights=str(path), dtype=torch.float32).state_dict(), weights)
    with pytest.raises(WeightsError, match=r"Wrong shape \(35\): cls_token \(1, 1, 64\) .* \(1, 1, 384\)") as caught:
        load(SMALL, weights=path)
    assert "Missing (140): blocks.2." in str(caught.value)
    assert "recognised layout: facebook" in str(caught.value)
    with pytest.raises(WeightsError, match=r"There is no file .*absent\.pth"):
        load(TINY, weights=tmp_path / "absent.pth")
    with pytest.raises(WeightsError, match=r"There is no file .*absent\.safetensors"):
        load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("name", ["dinov2_vits14reg", "dinov2_vitS14", "dino_vits14", "dinov2-vits14"])
@pytest.mark.parametrize("weights", [None, "random:0", "some.pth"])
def test_the_error_for_an_unknown_name_lists_the_nearest(name: str, weights: str | None) -> None:
    with pytest.raises(ValueError, match=rf"no DINOv2 backbone called '{name}'. Did you mean .*dinov2_vits14"):
        load(name, weights=weights)


def test_the_error_for_a_name_unlike_any_other_lists_all() -> None:
    with pytest.raises(ValueError, match="The backbones are dinov2_vits14, dinov2_vitb14"):
        load("resnet")


def test_dtype_device_position_interpolation_and_arguments_reach_the_model(tmp_path: Path) -> None:
    path = write(tiny_weights(0), tmp_path / "tiny.pth")
    half = load(path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.norm.weight, load(path).norm.weight.bfloat16())
    write(half.state_dict(), tmp_path / "half.safetensors")
    assert load(tmp_path / "half.safetensors").norm.weight.dtype == torch.bfloat16
    assert load(path, device="meta").norm.weight.device.type == "meta"
    assert load(path).position_interpolation == "offset"
    assert load(path, position_interpolation="size").position_interpolation == "size"
    with pytest.raises(ValueError, match="'bilinear'"):
        load(path, position_interpolation="bilinear")
    model = load(path, drop_path_rate=0.3, drop_path_uniform=True, block_chunks=2)
    assert model.chunked_blocks
    checkpoints.assert_same(convert_state_dict(model.state_dict(), to="facebook"), load(path).state_dict())
    with pytest.raises(WeightsError, match=r"Wrong shape \(1\): pos_embed \(1, 1370, 64\) .* \(1, 257, 64\)"):
        load(path, img_size=224)


@pytest.mark.parametrize("head", ["classifier", "head", "linear_head"])
def test_a_classifier_is_skipped(head: str, tmp_path: Path) -> None:
    weights = tiny_weights(0)
    path = write({**weights, f"{head}.weight": torch.ones(5, 128)}, tmp_path / "classifier.safetensors")
    checkpoints.assert_same(load(path).state_dict(), weights)
    write({**weights, "headless.weight": torch.ones(1)}, path)
    with pytest.raises(WeightsError, match=r"Unexpected \(1\): headless.weight"):
        load(path)


def test_parts_of_one_storage_get_their_own(tmp_path: Path) -> None:
    weights = tiny_weights(0)
    flat = torch.cat([tensor.flatten() for tensor in weights.values()])
    sizes = [tensor.numel() for tensor in weights.values()]
    parts = zip(weights.items(), flat.split(sizes), strict=True)
    path = write({key: part.view(tensor.shape) for (key, tensor), part in parts}, tmp_path / "flat.pth")
    model = load(path)
    checkpoints.assert_same(model.state_dict(), weights)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())


WRAPPED: dict[str, Any] = {
    "Depth Anything's originals": lambda w: (
        {f"pretrained.{k}": x for k, x in w.items()} | {"depth_head.x": w["norm.bias"]}
    ),
    "an encoder": lambda w: {f"encoder.{k}": x for k, x in w.items()} | {"decoder.weight": w["norm.bias"]},
    "a student": lambda w: {f"student.backbone.{k}": x for k, x in w.items()} | {"student.dino_head.x": w["norm.bias"]},
    "a decoder": lambda w: {f"backbone.{k}": x for k, x in w.items()} | {"decode_head.conv.weight": w["norm.bias"]},
    "chunks deep inside": lambda w: {f"module.net.0.vit.{k}": x for k, x in checkpoints.chunked(w).items()},
    "transformers' tower": lambda w: {f"vision_tower.{k}": x for k, x in checkpoints.huggingface(w).items()},
    "timm's saver": lambda w: {"epoch": 3, "arch": "vit", "state_dict": w, "optimizer": {"state": {}}},
    "averages": lambda w: {"model": {k: x + 1 for k, x in w.items()}, "ema": w},
    "averages without weights": lambda w: {"ema": {"decay": 0.9}, "model_state_dict": w},
    "Lightning": lambda w: {"epoch": 1, "state_dict": {f"model.encoder.{k}": x for k, x in w.items()}},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_backbone_is_found_in_what_training_scripts_save(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, weights, _ = golden.load_case("facebook_mlp")
    path = write(WRAPPED[name](weights), tmp_path / "checkpoint.pth.tar")
    with caplog.at_level(logging.INFO, logger="dinov2_fast"):
        checkpoints.assert_same(load(path).state_dict(), weights)
        checkpoints.assert_same(load(tmp_path).state_dict(), weights)
    beside = [
        key for key in ("depth_head.x", "decoder.weight", "decode_head.conv.weight") if key in WRAPPED[name](weights)
    ]
    assert all(f"Skipped 1 keys that the model does not have, such as {key}." in caplog.text for key in beside)


def test_two_backbones_in_one_file_are_named(tmp_path: Path) -> None:
    weights = tiny_weights(0)
    both = {f"{name}.{key}": tensor.clone() for name in ("left", "right") for key, tensor in weights.items()}
    with pytest.raises(WeightsError, match=r"holds several backbones, under left\., right\.: give the tensors of one"):
        load(write(both, tmp_path / "stereo.safetensors"))


def test_the_keys_of_another_model_are_named(tmp_path: Path) -> None:
    path = write({f"layer{i}.0.conv1.weight": torch.ones(1) for i in range(9)}, tmp_path / "resnet.pth")
    with pytest.raises(WeightsError, match=r"cls_token, .* not found among layer0\.0\.conv1\.weight, layer1.*, …\."):
        load(path)


def test_a_position_table_that_is_not_square_needs_an_image_size(tmp_path: Path) -> None:
    sizes = {"embed_dim": 64, "depth": 1, "num_heads": 1, "patch_size": 14}
    made = dinov2_fast.DinoVisionTransformer(img_size=(98, 140), block_chunks=0, init_values=1.0, **sizes).eval()
    path = write(dict(made.state_dict()), tmp_path / "wide.safetensors")
    with pytest.raises(WeightsError, match=r"70 positions, which is not a square grid\. Give the image size"):
        load(path)
    with pytest.raises(WeightsError, match="not a square grid"):
        load(path, img_size=(98, 98))
    given_size = load(path, img_size=(98, 140))
    (tmp_path / "config.json").write_text(json.dumps({"image_size": [98, 140], "num_attention_heads": 1}))
    for size in ((98, 140), (70, 56), (140, 98)):
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            assert torch.equal(given_size(x), made(x))
            assert torch.equal(load(tmp_path)(x), made(x))


@pytest.mark.parametrize("img_size", [(98, 140), (28, 112)])  # the second has as many patches as a square
def test_a_position_table_that_is_not_square_is_resampled_by_its_own_grid(img_size: tuple[int, int]) -> None:
    rows, columns = img_size[0] // 14, img_size[1] // 14
    model = dinov2_fast.DinoVisionTransformer(img_size=img_size, patch_size=14, embed_dim=64, depth=1, num_heads=1)
    model.position_interpolation = "antialias"
    table = model.pos_embed[:, 1:].unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
    wanted = F.interpolate(table, (12, 5), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    resampled = model.interpolate_pos_encoding(torch.empty(0), 12 * 14, 5 * 14)[:, 1:]
    torch.testing.assert_close(resampled, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("in_chans", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_filters_are_adapted_as_timm_does(in_chans: int, dtype: torch.dtype, tmp_path: Path) -> None:
    manipulate = pytest.importorskip("timm.models._manipulate", reason="compares with timm, which is not installed")
    weights = {key: tensor.to(dtype) for key, tensor in tiny_weights(0).items()}
    model = load(write(weights, tmp_path / "rgb.safetensors"), in_chans=in_chans)
    wanted = manipulate.adapt_input_conv(in_chans, weights["patch_embed.proj.weight"].clone())
    assert torch.equal(model.patch_embed.proj.weight, wanted)
    assert model.patch_embed.in_chans == in_chans
    with torch.no_grad():
        assert model.float()(torch.randn(1, in_chans, 28, 28)).isfinite().all()


def test_adapting_filters_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logs.log_once.cache_clear()
    path = write(tiny_weights(0), tmp_path / "rgb.safetensors")
    for _ in range(2):
        load(path, in_chans=1)
        load(path, in_chans=4)
        load(path, in_chans=3)
    assert [record.message for record in caplog.records] == [
        "The filters for 3 channels are summed for images of 1.",
        "The filters for 3 channels are repeated in turn and scaled by 3/4 for images of 4.",
    ]


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(ValueError, match="no DINOv2 backbone called ''"):
        load("")
    for model in (dinov2_fast.Dinov2Model, dinov2_fast.Dinov2Config):
        with pytest.raises(WeightsError, match=r"name of the model is empty\. Give a file"):
            model.from_pretrained("")


@pytest.mark.parametrize("image_size", ["518", 1.5, {}, [], [518], ["a", "b"], 0, None, -518])
def test_a_bad_image_size_in_the_config_is_ignored(image_size: Any, tmp_path: Path) -> None:
    write(tiny_weights(0), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"image_size": image_size}))
    assert load(tmp_path).patch_embed.img_size == (518, 518)


@pytest.mark.parametrize("heads", ["1", -1, 0, True, 1.5, 7, [1]])
def test_a_config_with_a_bad_number_of_heads_is_refused(heads: Any, tmp_path: Path) -> None:
    write(tiny_weights(0), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": heads}))
    with pytest.raises(WeightsError, match=r"config\.json has num_attention_heads .* must divide the hidden size 64"):
        load(tmp_path)


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_a_file_that_lacks_a_tensor_is_refused(ending: str, tmp_path: Path) -> None:
    weights = tiny_weights(0)
    del weights["blocks.1.ls2.gamma"]
    with pytest.raises(WeightsError, match=r"Missing \(1\): blocks\.1\.ls2\.gamma\.$"):
        load(write(weights, tmp_path / f"part{ending}"))


def test_parameters_do_not_share_memory_with_the_file(tmp_path: Path) -> None:
    path = write(tiny_weights(0), tmp_path / "tiny.safetensors")
    model = load(path)
    with path.open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(size // 10)
        file.write(bytes(size - size // 10))
    checkpoints.assert_same(model.state_dict(), tiny_weights(0))


def test_random_weights_depend_on_the_seed_and_nothing_else() -> None:
    first = load(TINY, weights="random:7").state_dict()
    torch.manual_seed(99)
    checkpoints.assert_same(load(TINY, weights="random:7").state_dict(), first)
    half = load(TINY, weights="random:7", dtype=torch.bfloat16).state_dict()
    checkpoints.assert_same(half, {key: tensor.bfloat16() for key, tensor in first.items()})
    chunked = load(TINY, weights="random:7", block_chunks=2).state_dict()
    checkpoints.assert_same(convert_state_dict(chunked, to="facebook"), first)
    other = load(TINY, weights="random:8").state_dict()
    assert not any(torch.equal(tensor, other[key]) for key, tensor in first.items())
    pinned = torch.tensor([-0.02018170, -0.00883115, -0.00410060])
    torch.testing.assert_close(first["cls_token"][0, 0, :3], pinned, atol=1e-6, rtol=0)


def test_no_random_weight_is_constant() -> None:
    weights = load(TINY, weights="random:0").state_dict()
    constant = [key for key, tensor in weights.items() if tensor.std() < 1e-3]
    assert constant == []
    with torch.no_grad():
        tokens = load(TINY, weights="random:0").forward_features(torch.randn(1, 3, 28, 28))["x_prenorm"]
    assert 0.1 < tokens.std() < 10


@pytest.mark.parametrize("weights", ["random:", "random:x", "random:-1", "random:²", "random:2147483648"])
def test_a_seed_out_of_range_is_refused(weights: str) -> None:
    with pytest.raises(ValueError, match="random:SEED with a seed from 0 to 2147483647"):
        load(TINY, weights=weights)


def test_a_model_that_is_not_pretrained_has_the_random_weights_of_its_seed() -> None:
    for seed in (0, 7):
        model = load(TINY, pretrained=False, seed=seed)
        assert model.loaded_from == f"random:{seed}"
        checkpoints.assert_same(model.state_dict(), load(TINY, weights=f"random:{seed}").state_dict())
    checkpoints.assert_same(load(TINY, pretrained=False).state_dict(), load(TINY, weights="random:0").state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained": False, "weights": "random:1"}, "exclude each other"),
        ({"pretrained": False, "weights": "file.pth"}, "exclude each other"),
        ({"seed": 1}, "give pretrained=False"),
        ({"seed": 1, "weights": "random:2"}, "give pretrained=False"),
        ({"pretrained": False, "seed": -1}, "seed from 0 to 2147483647"),
    ],
    ids=str,
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(TINY, **options)


def test_load_records_its_source_and_takes_names_of_dtypes() -> None:
    model = load(TINY, weights="random:3", dtype="bfloat16")
    assert model.loaded_from == "random:3"
    assert model.norm.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="no dtype 'float61'"):
        load(TINY, weights="random:3", dtype="float61")


@pytest.mark.parametrize("name", ["./nowhere", "../nowhere", "~/nowhere", "/nowhere/model"])
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(WeightsError, match="is no file or folder here, and no hub id"):
        load(name)
