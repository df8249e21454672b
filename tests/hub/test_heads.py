"""The entry points of models with heads: the reference's signatures, keys and files."""

from __future__ import annotations

import functools
import inspect
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hubconf
from dinov2_fast import BACKBONES, WeightsError, hub, load
from dinov2_fast.configs import BackboneConfig
from dinov2_fast.hub import classifiers, depthers, segmenters
from tests.helpers.checkpoints import assert_same, head_of, shapes
from tests.helpers.local_server import Server, answer, isolate_without_servers, point_to
from tests.helpers.weight_folders import TINY, WeightFolders, refuse_network, write

SIZES = {"s": (384, 12), "b": (768, 12), "l": (1024, 24), "g": (1536, 40)}
FOUR_BLOCKS = {12: (2, 5, 8, 11), 24: (4, 11, 17, 23), 40: (9, 19, 29, 39)}
OFFICIAL = "https://dl.fbaipublicfiles.com/dinov2"

# Keys and shapes of the reference's heads, for a hidden size D.
Shapes = dict[str, tuple[int, ...]]


def classifier_shapes(D: int, layers: int) -> Shapes:
    return {"weight": (1000, (1 + layers) * D), "bias": (1000,)}


def linear_depth_shapes(D: int, layers: int) -> Shapes:
    return {"conv_depth.weight": (256, 2 * layers * D, 1, 1), "conv_depth.bias": (256,)}


def segmentation_shapes(D: int, layers: int, classes: int) -> Shapes:
    wide = layers * D
    return {
        "conv_seg.weight": (classes, wide, 1, 1),
        "conv_seg.bias": (classes,),
        "bn.weight": (wide,),
        "bn.bias": (wide,),
        "bn.running_mean": (wide,),
        "bn.running_var": (wide,),
        "bn.num_batches_tracked": (),
    }


def dpt_shapes(D: int) -> Shapes:
    widths = (D // 8, D // 4, D // 2, D)
    found: Shapes = {
        "reassemble_blocks.resize_layers.0.weight": (D // 8, D // 8, 4, 4),
        "reassemble_blocks.resize_layers.0.bias": (D // 8,),
        "reassemble_blocks.resize_layers.1.weight": (D // 4, D // 4, 2, 2),
        "reassemble_blocks.resize_layers.1.bias": (D // 4,),
        "reassemble_blocks.resize_layers.3.weight": (D, D, 3, 3),
        "reassemble_blocks.resize_layers.3.bias": (D,),
        "project.conv.weight": (256, 256, 3, 3),
        "project.conv.bias": (256,),
        "conv_depth.head.0.weight": (128, 256, 3, 3),
        "conv_depth.head.0.bias": (128,),
        "conv_depth.head.2.weight": (32, 128, 3, 3),
        "conv_depth.head.2.bias": (32,),
        "conv_depth.head.4.weight": (1, 32, 1, 1),
        "conv_depth.head.4.bias": (1,),
    }
    for i, width in enumerate(widths):
        found |= {
            f"reassemble_blocks.projects.{i}.conv.weight": (width, D, 1, 1),
            f"reassemble_blocks.projects.{i}.conv.bias": (width,),
            f"reassemble_blocks.readout_projects.{i}.0.weight": (D, 2 * D),
            f"reassemble_blocks.readout_projects.{i}.0.bias": (D,),
            f"convs.{i}.conv.weight": (256, width, 3, 3),
            f"fusion_blocks.{i}.project.conv.weight": (256, 256, 1, 1),
            f"fusion_blocks.{i}.project.conv.bias": (256,),
            f"fusion_blocks.{i}.res_conv_unit2.conv1.conv.weight": (256, 256, 3, 3),
            f"fusion_blocks.{i}.res_conv_unit2.conv2.conv.weight": (256, 256, 3, 3),
        }
        if i > 0:
            found[f"fusion_blocks.{i}.res_conv_unit1.conv1.conv.weight"] = (256, 256, 3, 3)
            found[f"fusion_blocks.{i}.res_conv_unit1.conv2.conv.weight"] = (256, 256, 3, 3)
    return found


def on_meta(name: str, **kwargs: Any) -> Any:
    with torch.device("meta"):
        return getattr(hubconf, name)(pretrained=False, **kwargs)


def prefixed(prefix: str, wanted: Shapes) -> Shapes:
    return {prefix + key: shape for key, shape in wanted.items()}


@functools.cache
def backbone_shapes(name: str) -> Shapes:
    return shapes(on_meta(name).state_dict())


def assert_backbone_and_head(model: nn.Module, name: str, head: Shapes) -> None:
    """The keys and shapes of `model` are those of the backbone called `name`, under "backbone.", and of `head`."""
    assert shapes(dict(model.state_dict())) == {**prefixed("backbone.", backbone_shapes(name)), **head}


# Signatures and keys


@pytest.mark.parametrize(
    ("ending", "defaults"),
    [
        ("_lc", {"layers": 4, "pretrained": True, "weights": classifiers.ClassifierWeights.IMAGENET1K}),
        ("_reg_lc", {"layers": 4, "pretrained": True, "weights": classifiers.ClassifierWeights.IMAGENET1K}),
        ("_ld", {"layers": 4, "pretrained": True, "weights": depthers.DepthWeights.NYU}),
        ("_dd", {"pretrained": True, "weights": depthers.DepthWeights.NYU}),
        ("_ls", {"layers": 1, "pretrained": True, "weights": segmenters.SegmenterWeights.ADE20K}),
    ],
)
@pytest.mark.parametrize("size", SIZES)
def test_a_signature_is_that_of_the_reference(size: str, ending: str, defaults: dict[str, Any]) -> None:
    entry_point = getattr(hubconf, f"dinov2_vit{size}14{ending}")
    parameters = list(inspect.signature(entry_point).parameters.values())
    assert {p.name: p.default for p in parameters[:-1]} == defaults
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters[:-1])
    assert parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    assert f"ViT-{size}/14" in entry_point.__doc__


@pytest.mark.parametrize("registers", ["", "_reg"])
@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("size", SIZES)
def test_classifier_has_the_references_keys(size: str, layers: int, registers: str) -> None:
    name = f"dinov2_vit{size}14{registers}"
    model = on_meta(f"{name}_lc", layers=layers)
    head = prefixed("linear_head.", classifier_shapes(SIZES[size][0], layers))
    assert_backbone_and_head(model, name, head)
    assert model.training
    assert model.backbone.position_interpolation == ("antialias" if registers else "offset")


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("size", SIZES)
def test_linear_depth_estimator_has_the_references_keys(size: str, layers: int) -> None:
    D, depth = SIZES[size]
    model = on_meta(f"dinov2_vit{size}14_ld", layers=layers)
    assert_backbone_and_head(model, f"dinov2_vit{size}14", prefixed("decode_head.", linear_depth_shapes(D, layers)))
    assert model.out_index == (FOUR_BLOCKS[depth] if layers == 4 else (depth - 1,))


@pytest.mark.parametrize("size", SIZES)
def test_dpt_depth_estimator_has_the_references_keys(size: str) -> None:
    D, depth = SIZES[size]
    model = on_meta(f"dinov2_vit{size}14_dd")
    assert_backbone_and_head(model, f"dinov2_vit{size}14", prefixed("decode_head.", dpt_shapes(D)))
    assert model.out_index == FOUR_BLOCKS[depth]


@pytest.mark.parametrize(("weights", "classes"), [("ADE20K", 150), ("VOC2012", 21)])
@pytest.mark.parametrize(("layers", "window"), [(1, (512, 341)), (4, (640, 320))])
@pytest.mark.parametrize("size", SIZES)
def test_segmenter_has_the_references_keys(
    size: str, layers: int, window: tuple[int, int], weights: str, classes: int
) -> None:
    D, depth = SIZES[size]
    model = on_meta(f"dinov2_vit{size}14_ls", layers=layers, weights=weights)
    head = prefixed("decode_head.", segmentation_shapes(D, layers, classes))
    assert_backbone_and_head(model, f"dinov2_vit{size}14", head)
    assert model.out_index == tuple(range(depth - layers, depth))
    assert (model.crop_size, model.stride) == ((window[0],) * 2, (window[1],) * 2)


@pytest.mark.parametrize("name", ["dinov2_vits14_lc", "dinov2_vits14_ld", "dinov2_vits14_ls"])
@pytest.mark.parametrize("layers", [0, 2, 12])
def test_other_numbers_of_layers_are_an_assertion_error(name: str, layers: int) -> None:
    with pytest.raises(AssertionError, match=f"Unsupported number of layers: {layers}; published heads have 1 or 4"):
        on_meta(name, layers=layers)


@pytest.mark.parametrize(
    ("name", "known"), [("lc", "IMAGENET1K"), ("ld", "NYU, KITTI"), ("dd", "NYU, KITTI"), ("ls", "ADE20K, VOC2012")]
)
@pytest.mark.parametrize("weights", ["nyu", "LVD142M", hub.BackboneWeights.LVD142M])
def test_unknown_weights_are_an_assertion_error(name: str, known: str, weights: Any) -> None:
    wrong = getattr(weights, "name", weights)
    with pytest.raises(AssertionError, match=f"Unsupported weights: {wrong}; the published ones are {known}"):
        on_meta(f"dinov2_vits14_{name}", weights=weights)


# Ranges of depth


@pytest.mark.parametrize("weights", ["NYU", "KITTI"])
def test_linear_heads_have_the_references_range_by_default(weights: str) -> None:
    head = on_meta("dinov2_vits14_ld", weights=weights).decode_head
    assert (head.min_depth, head.max_depth) == (0.001, 80.0)
    head = on_meta("dinov2_vits14_ld", weights=weights, depth_range=(0.5, 7.0)).decode_head
    assert (head.min_depth, head.max_depth) == (0.5, 7.0)


def test_dpt_heads_have_the_range_of_their_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert depth_range(on_meta("dinov2_vits14_dd", weights="KITTI")) == (0.001, 10.0)  # as the reference, at random
    assert depth_range(on_meta("dinov2_vits14_dd", depth_range=(0.5, 7.0))) == (0.5, 7.0)
    monkeypatch.setattr(depthers, "make_backbone", lambda config, pretrained: on_meta(config.name))
    monkeypatch.setattr(depthers, "fill_from_published", lambda *args: None)
    assert depth_range(hubconf.dinov2_vits14_dd(weights="KITTI")) == (0.001, 80.0)
    assert depth_range(hubconf.dinov2_vits14_dd(weights="NYU")) == (0.001, 10.0)


def depth_range(model: Any) -> tuple[float, float]:
    return model.decode_head.min_depth, model.decode_head.max_depth


# The published files


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> WeightFolders:
    return isolate_without_servers(monkeypatch, tmp_path / "folders")


@pytest.fixture
def tiny(folders: WeightFolders, monkeypatch: pytest.MonkeyPatch) -> BackboneConfig:
    """A backbone of 12 blocks, small, whose weights lie in the cache."""
    config = replace(BACKBONES[TINY], depth=12)
    monkeypatch.setitem(BACKBONES, TINY, config)
    write(dict(load(TINY, weights="random:3").state_dict()), folders.cache / "dinov2_vitt14_pretrain.pth")
    return config


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


Make = Callable[[BackboneConfig], Any]

# How each published file is asked for, with the keys that it has.
FILES: dict[str, tuple[Make, str, Shapes]] = {
    "linear_head": (lambda tiny: classifiers.classifier_entry_point(tiny)(layers=1), "", classifier_shapes(64, 1)),
    "linear4_head": (lambda tiny: classifiers.classifier_entry_point(tiny)(), "", classifier_shapes(64, 4)),
    "nyu_linear_head": (
        lambda tiny: depthers.linear_depther_entry_point(tiny)(layers=1),
        "decode_head.",
        linear_depth_shapes(64, 1),
    ),
    "nyu_linear4_head": (
        lambda tiny: depthers.linear_depther_entry_point(tiny)(),
        "decode_head.",
        linear_depth_shapes(64, 4),
    ),
    "kitti_linear4_head": (
        lambda tiny: depthers.linear_depther_entry_point(tiny)(weights="KITTI"),
        "decode_head.",
        linear_depth_shapes(64, 4),
    ),
    "nyu_dpt_head": (lambda tiny: depthers.dpt_depther_entry_point(tiny)(), "decode_head.", dpt_shapes(64)),
    "kitti_dpt_head": (
        lambda tiny: depthers.dpt_depther_entry_point(tiny)(weights=depthers.DepthWeights.KITTI),
        "decode_head.",
        dpt_shapes(64),
    ),
    "ade20k_linear_head": (
        lambda tiny: segmenters.segmenter_entry_point(tiny)(),
        "decode_head.",
        segmentation_shapes(64, 1, 150),
    ),
    "ade20k_ms_head": (
        lambda tiny: segmenters.segmenter_entry_point(tiny)(layers=4),
        "decode_head.",
        segmentation_shapes(64, 4, 150),
    ),
    "voc2012_linear_head": (
        lambda tiny: segmenters.segmenter_entry_point(tiny)(weights="VOC2012"),
        "decode_head.",
        segmentation_shapes(64, 1, 21),
    ),
}


def published_head(file: str, seed: int = 0) -> dict[str, Tensor]:
    _, prefix, wanted = FILES[file]
    generator = torch.Generator().manual_seed(seed)
    return {
        prefix + key: torch.tensor(7) if not shape else torch.rand(shape, generator=generator)
        for key, shape in wanted.items()
    }


@pytest.mark.parametrize("file", FILES)
def test_published_weights_are_loaded(file: str, tiny: BackboneConfig, folders: WeightFolders) -> None:
    weights = published_head(file)
    write(weights, folders.torch_hub / f"dinov2_vitt14_{file}.pth")
    model = FILES[file][0](tiny)
    assert_same(head_of(model), weights)
    assert_same(dict(model.backbone.state_dict()), dict(load(TINY, weights="random:3").state_dict()))
    assert model.training


@pytest.mark.parametrize("file", ["nyu_dpt_head", "ade20k_linear_head"])
def test_files_of_training_frameworks_are_loaded(file: str, tiny: BackboneConfig, folders: WeightFolders) -> None:
    weights = published_head(file)
    meta = {"CLASSES": ("wall", "sky"), "config": "model = dict()", "epoch": 3}
    state_dict = {**weights, "backbone.cls_token": torch.ones(1), "auxiliary_head.conv_seg.bias": torch.ones(2)}
    write({"meta": meta, "state_dict": state_dict}, folders.cache / f"dinov2_vitt14_{file}.pth")
    assert_same(head_of(FILES[file][0](tiny)), weights)


def test_a_file_without_the_count_of_batches_is_loaded(tiny: BackboneConfig, folders: WeightFolders) -> None:
    weights = published_head("ade20k_linear_head")
    del weights["decode_head.bn.num_batches_tracked"]
    write(weights, folders.cache / "dinov2_vitt14_ade20k_linear_head.pth")
    loaded = head_of(FILES["ade20k_linear_head"][0](tiny))
    assert loaded.pop("decode_head.bn.num_batches_tracked") == 0
    assert_same(loaded, weights)


def test_the_head_has_the_device_and_dtype_of_its_backbone(tiny: BackboneConfig, folders: WeightFolders) -> None:
    write(published_head("linear4_head"), folders.cache / "dinov2_vitt14_linear4_head.safetensors")
    model = classifiers.classifier_entry_point(tiny)(dtype="bfloat16", device="meta", drop_path_rate=0.5)
    for weight in (model.linear_head.weight, model.backbone.cls_token):
        assert (weight.dtype, weight.device.type) == (torch.bfloat16, "meta")
    assert model.backbone.blocks[11].drop_path1.drop_prob == 0.5


def test_heads_of_backbones_with_registers_have_their_own_files(tiny: BackboneConfig, folders: WeightFolders) -> None:
    config = replace(tiny, name="dinov2_vitt14_reg", num_register_tokens=4)
    BACKBONES["dinov2_vitt14_reg"] = config
    try:
        weights = dict(load(config.name, weights="random:4").state_dict())
        write(weights, folders.cache / "dinov2_vitt14_reg4_pretrain.pth")
        write(published_head("linear_head"), folders.cache / "dinov2_vitt14_reg4_linear_head.pth")
        model = classifiers.classifier_entry_point(config)(layers=1)
    finally:
        del BACKBONES["dinov2_vitt14_reg"]
    assert_same(head_of(model), published_head("linear_head"))


@pytest.mark.parametrize(
    ("name", "head", "address"),
    [
        ("dinov2_vits14", "linear4", "dinov2_vits14/dinov2_vits14_linear4_head.pth"),
        ("dinov2_vitg14_reg", "linear", "dinov2_vitg14/dinov2_vitg14_reg4_linear_head.pth"),
        ("dinov2_vitb14", "kitti_linear", "dinov2_vitb14/dinov2_vitb14_kitti_linear_head.pth"),
        ("dinov2_vitl14", "nyu_dpt", "dinov2_vitl14/dinov2_vitl14_nyu_dpt_head.pth"),
        ("dinov2_vitl14", "voc2012_ms", "dinov2_vitl14/dinov2_vitl14_voc2012_ms_head.pth"),
    ],
)
def test_addresses_of_heads_are_the_published_ones(name: str, head: str, address: str) -> None:
    assert BACKBONES[name].head_url(head) == f"{OFFICIAL}/{address}"


def pth(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def test_the_official_server_is_asked_once(
    tiny: BackboneConfig, server: Server, folders: WeightFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = published_head("nyu_linear4_head")
    server.answers["/dinov2_vitt14/dinov2_vitt14_nyu_linear4_head.pth"] = answer(pth({"state_dict": weights}))
    point_to(monkeypatch, official=server.address)
    for _ in range(2):
        assert_same(head_of(FILES["nyu_linear4_head"][0](tiny)), weights)
    assert server.requests == ["GET /dinov2_vitt14/dinov2_vitt14_nyu_linear4_head.pth"]
    assert (folders.cache / "dinov2_vitt14_nyu_linear4_head.pth").is_file()


def test_a_short_answer_leaves_nothing_and_says_where_the_file_goes(
    tiny: BackboneConfig, server: Server, folders: WeightFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply = answer(pth(published_head("linear4_head"))[:500], promised=100_000)
    server.answers["/dinov2_vitt14/dinov2_vitt14_linear4_head.pth"] = reply
    point_to(monkeypatch, official=server.address)
    path = folders.cache / "dinov2_vitt14_linear4_head.pth"
    with pytest.raises(WeightsError) as caught:
        FILES["linear4_head"][0](tiny)
    assert "ended after 500 of 100000" in str(caught.value)
    assert f"Download {tiny.head_url('linear4')} on a machine with a network and put it at {path}" in str(caught.value)
    assert sorted(folders.cache.iterdir()) == [folders.cache / "dinov2_vitt14_pretrain.pth"]


def test_local_files_only_sends_no_request(tiny: BackboneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = refuse_network(monkeypatch)
    with pytest.raises(WeightsError, match="local_files_only is set"):
        classifiers.classifier_entry_point(tiny)(local_files_only=True)
    assert attempts == []


def without(key: str, weights: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in weights.items() if name != key}


class Planted:
    """What no file of weights has to hold."""


MISFITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (lambda w: without("decode_head.bn.bias", w), r"Missing \(1\): decode_head.bn.bias"),
    "other head": (lambda w: published_head("linear4_head"), r"Missing \(6\): decode_head.conv_seg.weight"),
    "shape": (
        lambda w: {**w, "decode_head.conv_seg.bias": torch.ones(151)},
        r"decode_head.conv_seg.bias \(151,\) where the head has \(150,\)",
    ),
    "no tensor": (lambda w: {**w, "decode_head.bn.weight": "ones"}, r"decode_head.bn.weight \(\) where the head has"),
    "code": (lambda w: {**w, "decode_head.bn.weight": Planted()}, "is refused: it holds more than tensors"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_files_that_do_not_fit_are_refused(case: str, tiny: BackboneConfig, folders: WeightFolders) -> None:
    change, message = MISFITS[case]
    path = folders.cache / "dinov2_vitt14_ade20k_linear_head.pth"
    torch.save(change(published_head("ade20k_linear_head")), path)
    with pytest.raises(WeightsError, match=message) as caught:
        FILES["ade20k_linear_head"][0](tiny)
    assert str(path) in str(caught.value)
