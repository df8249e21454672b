"""`create_model` against timm's own, live, on the same random weights: outputs, features, what training asks for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dinov2_fast
from dinov2_fast import BACKBONES, WeightsError, convert_state_dict, create_model, load
from tests.helpers.checkpoints import assert_same, shapes
from tests.helpers.documents import example
from tests.helpers.timm_peers import NAMES, SMALL, Pair, assert_close, images, make_pair
from tests.helpers.weight_folders import (
    TINY,
    WeightFolders,
    isolate,
    refuse_network,
    tiny_backbone,
    tiny_weights,
    write,
)


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest) -> Pair:
    return make_pair(request.param, num_classes=5)


# Outputs


@pytest.mark.parametrize("size", [(518, 518), (98, 98), (70, 98)], ids=str)
@torch.no_grad()
def test_forward_equals_timm(pair: Pair, size: tuple[int, int]) -> None:
    x = images(*size, batch=1)
    tokens, theirs = pair.ours.forward_features(x), pair.theirs.forward_features(x)
    assert_close(tokens, theirs)
    assert_close(pair.ours(x), pair.theirs(x))
    for pre_logits in (False, True):
        assert_close(
            pair.ours.forward_head(theirs, pre_logits=pre_logits),
            pair.theirs.forward_head(theirs, pre_logits=pre_logits),
        )


@pytest.mark.parametrize("num_classes", [0, 5])
@pytest.mark.parametrize("fc_norm", [None, False, True])
@pytest.mark.parametrize("global_pool", ["", "token", "avg", "avgmax", "max"])
@torch.no_grad()
def test_pools_equal_those_of_timm(global_pool: str, fc_norm: bool | None, num_classes: int) -> None:
    pair = make_pair(NAMES[1], global_pool=global_pool, fc_norm=fc_norm, num_classes=num_classes)
    x = images(70, 98)
    assert_close(pair.ours(x), pair.theirs(x))
    tokens = pair.theirs.forward_features(x)
    assert_close(pair.ours.forward_head(tokens, pre_logits=True), pair.theirs.forward_head(tokens, pre_logits=True))
    for pool_type in ("", "token", "avg", "avgmax", "max"):
        assert_close(pair.ours.pool(tokens, pool_type), pair.theirs.pool(tokens, pool_type))


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"indices": 2},
        {"indices": [2, 0], "output_fmt": "NLC"},
        {"indices": (-1, 1), "return_prefix_tokens": True},
        {"indices": [1], "stop_early": True, "norm": True},
        {"indices": [1, 2], "stop_early": True, "return_prefix_tokens": True, "output_fmt": "NLC"},
        {"indices": 1, "intermediates_only": True},
        {"indices": 2, "intermediates_only": True, "return_prefix_tokens": True, "norm": True},
        {"indices": 2, "output_dict": True},
        {"indices": 2, "output_dict": True, "return_prefix_tokens": True, "norm": True},
        {"indices": 2, "output_dict": True, "intermediates_only": True, "output_fmt": "NLC"},
    ],
    ids=str,
)
@torch.no_grad()
def test_forward_intermediates_equals_timm(pair: Pair, kwargs: dict[str, Any]) -> None:
    x = images(70, 98)
    assert_close(pair.ours.forward_intermediates(x, **kwargs), pair.theirs.forward_intermediates(x, **kwargs))


def test_stop_early_runs_no_block_too_many(pair: Pair) -> None:
    ran: list[int] = []
    hooks = [block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(pair.ours.blocks)]
    pair.ours.forward_intermediates(images(28, 28), indices=[1], stop_early=True)
    for hook in hooks:
        hook.remove()
    assert ran == [0, 1]


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"n": 2, "reshape": True}, {"n": (0, 3), "return_prefix_tokens": True}, {"n": [3], "norm": True}],
    ids=str,
)
@torch.no_grad()
def test_get_intermediate_layers_equals_timm(pair: Pair, kwargs: dict[str, Any]) -> None:
    x = images(70, 98)
    assert_close(pair.ours.get_intermediate_layers(x, **kwargs), pair.theirs.get_intermediate_layers(x, **kwargs))


@pytest.mark.parametrize("size", [(71, 97), (1, 15), (70, 98)], ids=str)
@torch.no_grad()
def test_padded_images_equal_timm(size: tuple[int, int]) -> None:
    pair = make_pair(dynamic_img_pad=True)
    x = images(*size)
    assert_close(pair.ours.forward_intermediates(x), pair.theirs.forward_intermediates(x))


@torch.no_grad()
def test_a_timm_model_of_another_size(pair: Pair) -> None:
    """timm resamples its table once, for `img_size`; here that is done for each image."""
    name = pair.theirs.default_cfg["architecture"]
    timm = pytest.importorskip("timm")
    timms = {"mlp_ratio": 688 / 128} if "giant" in name else {}
    theirs = timm.create_model(name, img_size=(70, 98), num_classes=5, **SMALL, **timms).eval()
    theirs.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(pair.theirs.state_dict(), theirs))
    x = images(70, 98)
    assert_close(pair.ours(x), theirs(x))


# Sizes of the position table

TABLES = [98, (70, 98), (28, 112)]  # the last has as many patches as a square image of 56 pixels


@pytest.mark.parametrize("img_size", TABLES, ids=str)
@torch.no_grad()
def test_set_input_size_resamples_the_table_as_timm_does(img_size: Any) -> None:
    pair = make_pair(NAMES[1], num_classes=5)
    for model in pair:
        model.set_input_size(img_size, patch_size=14)
    assert_same_table(pair)
    for size in ((70, 98), (98, 98), (56, 56), (28, 112)):
        x = images(*size, batch=1)
        assert_close(pair.ours(x), pair.theirs(x))
    for model in pair:
        model.set_input_size((56, 84))
        model.set_input_size()
    assert_same_table(pair)
    x = images(56, 84)
    assert_close(pair.ours.forward_intermediates(x), pair.theirs.forward_intermediates(x))


def assert_same_table(pair: Pair) -> None:
    for name in ("img_size", "grid_size", "num_patches"):
        assert getattr(pair.ours.patch_embed, name) == getattr(pair.theirs.patch_embed, name), name
    weights = convert_state_dict(pair.ours.state_dict(), to="timm")
    assert_close(weights, dict(pair.theirs.state_dict()))
    assert isinstance(pair.ours.pos_embed, torch.nn.Parameter)
    assert pair.ours.pos_embed.requires_grad


@pytest.mark.parametrize("img_size", TABLES, ids=str)
def test_weights_trained_at_another_size(img_size: Any) -> None:
    """Both are made for that size: the weights load, and training finds the same gradients at other sizes, too."""
    pair = make_pair(NAMES[1], num_classes=5, img_size=img_size)
    x = images(42, 70)
    for model in pair:
        model(x).square().sum().backward()
    gradients = pair.ours.pos_embed.grad[:, 1:], pair.theirs.pos_embed.grad
    assert gradients[1].abs().max() > 0.05
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_a_table_that_is_not_resampled_stays_the_same_parameter() -> None:
    model = create_model(NAMES[0], **SMALL, img_size=(70, 98))
    model.pos_embed.requires_grad_(False)
    before = model.pos_embed
    for img_size in (None, (70, 98), (83, 99)):  # 83 and 99 pixels have as many whole patches
        model.set_input_size(img_size)
        assert model.pos_embed is before
    model.set_input_size(56)
    assert not model.pos_embed.requires_grad


def test_a_table_that_is_not_square_compiles_and_ignores_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = create_model(NAMES[1], **SMALL, img_size=(70, 98)).eval(), images(28, 42)
    compiled = torch.compile(model.forward_features, backend="eager", fullgraph=True)
    with torch.no_grad():
        for image in (x, images(70, 98)):
            assert_close(compiled(image), model.forward_features(image))
        exact = model.interpolate_pos_encoding(x, 28, 42)
        with torch.autocast("cpu"):
            assert torch.equal(model.interpolate_pos_encoding(x, 28, 42), exact)
        for name in ("antialias", "size", "offset"):
            model.position_interpolation = name
            assert torch.equal(model.interpolate_pos_encoding(x, 70, 98), model.pos_embed)
            with monkeypatch.context() as patch:
                patch.setattr("dinov2_fast.position_embeddings.is_traced", lambda: True)  # as in a graph
                assert torch.equal(model.interpolate_pos_encoding(x, 70, 98), model.pos_embed)
        assert not torch.equal(model.interpolate_pos_encoding(x, 28, 42), exact)


# Feature maps


@pytest.mark.parametrize("out_indices", [3, 1, (0, 2), (-1, 1), [-3]], ids=str)
@torch.no_grad()
def test_features_only_equals_timm(out_indices: Any) -> None:
    pair = make_pair(NAMES[1])
    timm = pytest.importorskip("timm")
    theirs = _features(timm, out_indices)
    ours = create_model(NAMES[1], **SMALL, features_only=True, out_indices=out_indices).eval()
    assert len(ours.model.blocks) == len(theirs.model.blocks)
    kept = {key: tensor for key, tensor in pair.ours.state_dict().items() if key in ours.model.state_dict()}
    ours.model.load_state_dict(kept)
    pruned = {key: tensor for key, tensor in pair.theirs.state_dict().items() if key in theirs.model.state_dict()}
    theirs.model.load_state_dict(pruned)
    x = images(70, 98)
    maps = ours(x)
    assert_close(maps, theirs(x))
    assert [tuple(m.shape) for m in maps] == [(2, 128, 5, 7)] * len(maps)
    assert_info(ours.feature_info, theirs.feature_info)
    assert_info(ours.feature_info.from_other((1, 0)), theirs.feature_info.from_other((1, 0)))
    assert not any(key.startswith(("model.norm", "model.head")) for key in ours.state_dict())


def _features(timm: Any, out_indices: Any) -> Any:
    return timm.create_model(
        NAMES[1], **SMALL, dynamic_img_size=True, features_only=True, out_indices=out_indices
    ).eval()


def assert_info(ours: Any, theirs: Any) -> None:
    for method in ("channels", "reduction", "module_name", "get_dicts"):
        assert getattr(ours, method)() == getattr(theirs, method)(), method
    for idx in (1, [0, 1]):
        assert ours.get("num_chs", idx) == theirs.get("num_chs", idx)
        assert ours.module_name(idx) == theirs.module_name(idx)
        assert ours.get_dicts(["reduction"], idx) == theirs.get_dicts(["reduction"], idx)
        assert ours.get_dicts(idx=idx) == theirs.get_dicts(idx=idx)
    assert (len(ours), ours[1], ours.info, ours.out_indices) == (
        len(theirs),
        theirs[1],
        theirs.info,
        theirs.out_indices,
    )


def test_features_are_of_the_last_three_blocks_by_default() -> None:
    model = create_model(NAMES[0], **SMALL, features_only=True)
    assert model.feature_info.module_name() == ["blocks.1", "blocks.2", "blocks.3"]


# What scripts ask for


def test_attributes_are_those_of_timm(pair: Pair) -> None:
    for name in (
        "num_classes",
        "num_features",
        "head_hidden_size",
        "embed_dim",
        "global_pool",
        "num_prefix_tokens",
        "num_reg_tokens",
        "has_class_token",
        "in_chans",
        "grad_checkpointing",
        "dynamic_img_size",
        "feature_info",
    ):
        assert getattr(pair.ours, name) == getattr(pair.theirs, name), name
    trained = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in pair]
    assert trained[0] == trained[1] + (pair.ours.embed_dim if pair.ours.num_reg_tokens else 0)  # CLS has a position


def test_the_data_config_is_that_of_timm() -> None:
    pair = make_pair(NAMES[1])
    data = pytest.importorskip("timm.data")
    assert data.resolve_model_data_config(pair.ours) == data.resolve_model_data_config(pair.theirs)
    features = create_model(NAMES[0], **SMALL, features_only=True)
    assert data.resolve_model_data_config(features)["input_size"] == (3, 518, 518)
    for key in ("architecture", "tag", "num_classes", "fixed_input_size", "first_conv", "classifier", "license"):
        assert pair.ours.default_cfg[key] == pair.theirs.default_cfg[key], key


def as_timms(names: Any) -> set[str]:
    renamed = {"register_tokens": "reg_token"}
    return {renamed.get(name, name).replace("w12", "fc1").replace("w3", "fc2") for name in names}


def test_layer_decay_groups_are_those_of_timm(pair: Pair) -> None:
    optim = pytest.importorskip("timm.optim")
    groups = []
    for model in pair:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        optimizer = optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
        groups.append(
            {
                name: (group["lr_scale"], group["weight_decay"])
                for group in optimizer.param_groups
                for parameter in group["params"]
                for name in as_timms([names[id(parameter)]])
            }
        )
    assert groups[0] == groups[1]
    assert len({scale for scale, _ in groups[0].values()}) == 6  # stem, 4 blocks, norm and head


def test_nothing_but_what_timm_decays_is_decayed(pair: Pair) -> None:
    assert {"pos_embed", "cls_token"} <= pair.ours.no_weight_decay()
    own = {name for name, _ in pair.ours.named_parameters()}
    assert as_timms(pair.ours.no_weight_decay() & own) == pair.theirs.no_weight_decay() & as_timms(own)


def test_reset_classifier_replaces_the_head() -> None:
    pair = make_pair(num_classes=5)
    for model in pair:
        model.train()
        model.reset_classifier(7, "avg")
    assert pair.ours.num_classes == 7
    assert pair.ours.get_classifier() is pair.ours.head
    assert pair.ours.head.training
    pair.theirs.head.load_state_dict(pair.ours.head.state_dict())
    x = images(28, 42)
    assert_close(pair.ours(x), pair.theirs(x))
    for model in pair:
        model.reset_classifier(0)
    assert_close(pair.ours(x), pair.theirs(x))
    assert pair.ours(x).shape == (2, 128)
    pair.ours.eval().reset_classifier(3)
    assert not pair.ours.head.training


def test_a_new_classifier_has_the_models_dtype() -> None:
    model = create_model(NAMES[0], **SMALL).to(torch.bfloat16)
    model.reset_classifier(1000)
    assert model.head.weight.dtype == torch.bfloat16
    assert model.head.weight.abs().max() < 0.2  # in bfloat16, trunc_normal_ gives some of 1 and more


def test_prune_intermediate_layers_removes_what_is_not_needed() -> None:
    pair = make_pair(num_classes=5)
    x = images(28, 42)
    assert pair.ours.prune_intermediate_layers([0, -2]) == pair.theirs.prune_intermediate_layers([0, -2]) == [0, 2]
    assert len(pair.ours.blocks) == len(pair.theirs.blocks) == 3
    assert_close(pair.ours(x), pair.theirs(x))
    assert pair.ours.prune_intermediate_layers(1, prune_norm=True, prune_head=False) == [2]
    pair.theirs.prune_intermediate_layers(1, prune_norm=True, prune_head=False)
    assert_close(pair.ours(x), pair.theirs(x))


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_training_equals_timm(rate: float) -> None:
    pair = make_pair(NAMES[1], num_classes=5, drop_path_rate=rate)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in pair.ours.blocks]
    theirs = [getattr(block.drop_path1, "drop_prob", 0.0) for block in pair.theirs.blocks]
    assert rates == pytest.approx(theirs)
    x = images(28, 42, batch=3)
    for model in pair:
        for block in model.blocks:  # nothing random, the rates are compared above
            for path in (block.drop_path1, block.drop_path2):
                path.drop_prob = 0.0
        model.train()(x).square().sum().backward()
    theirs = {name: p.grad for name, p in pair.theirs.named_parameters()}
    for name, parameter in pair.ours.named_parameters():
        if name not in ("register_tokens", "pos_embed"):
            torch.testing.assert_close(parameter.grad, theirs[name], atol=1e-3, rtol=1e-4, msg=name)
    torch.testing.assert_close(pair.ours.register_tokens.grad, theirs["reg_token"], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(pair.ours.pos_embed.grad[:, 1:], theirs["pos_embed"], atol=1e-3, rtol=1e-4)


def test_branches_are_dropped_for_single_images_at_every_rate() -> None:
    model = create_model(NAMES[0], **SMALL, drop_path_rate=0.5).train()
    assert {block.sample_drop_ratio > block.subset_threshold for block in model.blocks} == {False}


def test_grad_checkpointing_gives_equal_gradients() -> None:
    model = create_model(NAMES[0], **SMALL, num_classes=5).train()
    x, gradients, calls = images(28, 42), [], []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        calls.clear()
        model(x).sum().backward()
        assert len(calls) == 1 + enable, "with checkpointing a block runs again in the backward pass"
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert_close(*gradients)


def test_dropout_before_the_head() -> None:
    model = create_model(NAMES[0], **SMALL, num_classes=5, drop_rate=0.5).train()
    tokens = torch.ones(1, 3, 128)
    assert set(model.forward_head(tokens, pre_logits=True).unique().tolist()) == {0.0, 2.0}


def test_compiles_to_one_graph() -> None:
    model, x = create_model(NAMES[1], **SMALL).eval(), images(28, 42)
    compiled = torch.compile(model.forward_intermediates, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(x, indices=2), model.forward_intermediates(x, indices=2))


# Names and weights


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vitb14_reg", "dinov2_vitl14", "dinov2_vitg14_reg"])
def test_timms_models(name: str) -> None:
    timm = pytest.importorskip("timm", reason="compares with timm, which is not installed")
    config = BACKBONES[name]
    with torch.device("meta"):
        ours, theirs = create_model(config.timm_name), timm.create_model(config.timm_name)
    assert shapes(convert_state_dict(ours.state_dict(), to="timm")) == shapes(theirs.state_dict())
    assert ours.position_interpolation == "antialias"
    assert ours.blocks[0].ls1.init_values == 1e-5


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    attempts = refuse_network(monkeypatch)
    tiny_backbone(monkeypatch)
    yield isolate(monkeypatch, tmp_path)
    assert attempts == []


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch14_dinov2", "timm/vit_tiny_patch14_dinov2.lvd142m", "hf-hub:timm/vit_tiny_patch14_dinov2"]
)
def test_published_weights_are_loaded(name: str, folders: WeightFolders) -> None:
    weights = tiny_weights(2)
    path = write(weights, folders.cache / "dinov2_vitt14_pretrain.pth")
    model = create_model(name, pretrained=True, drop_path_rate=0.5)
    del weights["mask_token"]
    assert_same(model.state_dict(), weights)
    assert model.training
    assert model.loaded_from == str(path)
    assert model.blocks[1].drop_path1.drop_prob == 0.5
    assert all(parameter.requires_grad for parameter in model.parameters())
    x = images(42, 56)
    same = load(TINY, position_interpolation="antialias")
    assert_close(model.eval()(x), same(x))


@torch.no_grad()
def test_published_weights_for_images_of_another_size(folders: WeightFolders) -> None:
    write(tiny_weights(2), folders.cache / "dinov2_vitt14_pretrain.pth")
    model = create_model("vit_tiny_patch14_dinov2", pretrained=True, img_size=(28, 42)).eval()
    assert model.pos_embed.shape[1] == 1 + 2 * 3
    x = images(28, 42)
    assert_close(model(x), load(TINY, position_interpolation="antialias")(x))
    again = create_model("vit_tiny_patch14_dinov2", img_size=(28, 42)).eval()
    again.load_state_dict(model.state_dict())
    assert_close(again(x), model(x))


def test_published_weights_with_a_new_classifier(folders: WeightFolders) -> None:
    write(tiny_weights(2), folders.cache / "dinov2_vitt14_pretrain.pth")
    model = create_model("vit_tiny_patch14_dinov2", pretrained=True, num_classes=3, global_pool="avg", fc_norm=False)
    tokens = model.forward_features(images(42, 56))
    expected = tokens[:, 1:].mean(1) @ model.head.weight.T
    assert_close(model.forward_head(tokens), expected)
    assert 0.01 < model.head.weight.std() < 0.03
    with pytest.raises(ValueError, match=r"normalise before pooling: give fc_norm=False with global_pool='avg'"):
        create_model("vit_tiny_patch14_dinov2", pretrained=True, global_pool="avg")


def test_a_checkpoint_path_is_loaded(folders: WeightFolders, tmp_path: Path) -> None:
    trained = create_model("vit_tiny_patch14_dinov2", num_classes=3)
    path = write(dict(trained.state_dict()), tmp_path / "trained.safetensors")
    model = create_model("vit_tiny_patch14_dinov2", checkpoint_path=path, num_classes=3)
    assert_same(model.state_dict(), trained.state_dict())
    assert model.loaded_from == str(path)


@pytest.mark.parametrize("in_chans", [1, 4])
@pytest.mark.parametrize("features_only", [False, True])
def test_published_weights_for_other_channels(in_chans: int, features_only: bool, folders: WeightFolders) -> None:
    manipulate = pytest.importorskip("timm.models._manipulate", reason="compares with timm, which is not installed")
    weights = tiny_weights(2)
    write(weights, folders.cache / "dinov2_vitt14_pretrain.pth")
    options = {"in_chans": in_chans, "out_indices": 1, "features_only": features_only}
    made = create_model("vit_tiny_patch14_dinov2", pretrained=True, **options)
    model = made.model if features_only else made
    wanted = manipulate.adapt_input_conv(in_chans, weights["patch_embed.proj.weight"].clone())
    assert torch.equal(model.patch_embed.proj.weight, wanted)
    assert model.in_chans == in_chans
    made(torch.randn(1, in_chans, 28, 28))


def test_a_checkpoint_that_does_not_fit_is_refused(folders: WeightFolders, tmp_path: Path) -> None:
    path = write(tiny_weights(0), tmp_path / "square.safetensors")
    with pytest.raises(WeightsError, match=r"square\.safetensors: .*\n  Wrong shape \(1\): pos_embed \(1, 1370, 64\)"):
        create_model("vit_tiny_patch14_dinov2", checkpoint_path=path, img_size=(28, 42))
    stereo = {f"{side}.{key}": x.clone() for side in ("left", "right") for key, x in tiny_weights(0).items()}
    with pytest.raises(WeightsError, match=r"two\.safetensors: This state dict holds several backbones"):
        create_model("vit_tiny_patch14_dinov2", checkpoint_path=write(stereo, tmp_path / "two.safetensors"))
    assert create_model("vit_tiny_patch14_dinov2", checkpoint_path="").loaded_from is None  # as timm's scripts give it


@torch.no_grad()
def test_a_table_that_is_not_square_is_saved_and_loaded(folders: WeightFolders, tmp_path: Path) -> None:
    write(tiny_weights(2), folders.cache / "dinov2_vitt14_pretrain.pth")
    made = create_model("vit_tiny_patch14_dinov2", pretrained=True, img_size=(98, 140)).eval()
    path = write(dict(made.state_dict()), tmp_path / "wide.safetensors")
    again = load(path, img_size=(98, 140), position_interpolation="antialias")
    fed_back = create_model("vit_tiny_patch14_dinov2", checkpoint_path=path, img_size=(98, 140)).eval()
    for size in ((98, 140), (56, 28)):
        assert torch.equal(again(images(*size)), made(images(*size)))
        assert torch.equal(fed_back(images(*size)), made(images(*size)))


def test_wrong_arguments_are_refused_with_a_clear_error() -> None:
    with pytest.raises(
        ValueError, match=r"no DINOv2 called 'vit_smal_patch14_dinov2'; did you mean vit_small_patch14_dino"
    ):
        create_model("vit_smal_patch14_dinov2")
    with pytest.raises(ValueError, match=r"no DINOv2 called 'resnet50'; did you mean vit_small_patch14_dinov2 or"):
        create_model("resnet50")
    with pytest.raises(ValueError, match="no global_pool 'map'; choose one of '', 'token', 'avg'"):
        create_model(NAMES[0], **SMALL, global_pool="map")
    with pytest.raises(ValueError, match="no block chunks"):
        create_model(NAMES[0], **SMALL, block_chunks=2)
    with pytest.raises(
        TypeError, match=r"not take patch_drop_rate=0.1, class_token=False. Its models take num_classes, .*depth"
    ):
        create_model(NAMES[0], **SMALL, patch_drop_rate=0.1, class_token=False)
    with pytest.raises(WeightsError, match=r"a\.bin"):
        create_model(NAMES[0], pretrained=True, pretrained_cfg_overlay={"file": "a.bin"})
    with pytest.raises(ValueError, match=r"names other weights \(hf_hub_id\). Give a file .* checkpoint_path"):
        create_model(NAMES[0], pretrained=True, pretrained_cfg_overlay={"hf_hub_id": "me/mine"})
    with pytest.raises(ValueError, match="has no weights tagged 'in1k'"):
        create_model(NAMES[0], pretrained_cfg="in1k")
    with pytest.raises(ValueError, match=r"cache_dir is not used: set .* DINOV2_FAST_CACHE and, .* HF_HUB_CACHE"):
        create_model(NAMES[0], pretrained=True, cache_dir="there")
    with pytest.raises(TypeError, match="not take act_layer='relu'"):
        create_model(NAMES[0], **SMALL, act_layer="relu")
    with pytest.raises(TypeError, match=r"not take act_layer=<class '.*GELU'>"):
        create_model(NAMES[2], **SMALL, act_layer=torch.nn.GELU)
    model = create_model(NAMES[0], **SMALL, num_classes=None)
    with pytest.raises(ValueError, match=r"patch_size=16 cannot be set: the patch embedding has patches of 14"):
        model.set_input_size(224, patch_size=16)
    with pytest.raises(ValueError, match=r"img_size=\(28, 13\) is smaller than one patch of 14 pixels"):
        model.set_input_size((28, 13))
    x = images(28, 28)
    with pytest.raises(ValueError, match="The blocks are 0 to 3, or -4 to -1 counted from the last; got"):
        model.forward_intermediates(x, indices=[4])
    with pytest.raises(ValueError, match=r"counted from the last; got \[\]"):
        model.forward_intermediates(x, indices=[])
    with pytest.raises(ValueError, match="The last 5 blocks were asked for, but the model has 4"):
        model.get_intermediate_layers(x, 5)
    with pytest.raises(ValueError, match="no output_fmt 'NHWC'; choose one of NCHW, NLC"):
        model.forward_intermediates(x, output_fmt="NHWC")
    for kwargs in ({"is_causal": True}, {"attn_mask": torch.ones(5, 5)}):
        for method in (model, model.forward_features, model.forward_intermediates):
            with pytest.raises(ValueError, match="every token attends to all"):
                method(x, **kwargs)
    with pytest.raises(ValueError, match="Input image height 30 is not a multiple of patch height 14"):
        model(images(30, 28))
    with pytest.raises(TypeError, match="takes a tensor"):
        model.forward_intermediates([x])


def test_the_default_arguments_of_timms_scripts_are_accepted() -> None:
    """As timm's train.py calls it, with everything that its command line leaves as it is."""
    unset = dict.fromkeys(("drop_path_rate", "drop_block_rate", "global_pool", "bn_momentum", "bn_eps", "in_chans"))
    flags = {"scriptable": False, "exportable": True, "no_jit": True, "patch_drop_rate": 0.0}
    model = create_model(NAMES[0], pretrained=False, **SMALL, num_classes=5, drop_rate=0.0, **unset, **flags)
    assert model(images(28, 28)).shape == (2, 5)
    with pytest.raises(TypeError, match=r"scriptable=True: torch.jit.script cannot compile .* Use torch.jit.trace"):
        create_model(NAMES[0], **SMALL, scriptable=True)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_that_are_true_of_every_dinov2_are_accepted(name: str) -> None:
    registers = 4 if "reg4" in name else 0
    so_anyway = {
        "class_token": True,
        "pos_embed": "learn",
        "no_embed_class": registers > 0,
        "reg_tokens": registers,
        "qk_norm": False,
        "pre_norm": False,
        "final_norm": True,
        "attn_layer": "attn",
        "weight_init": "skip",
        "act_layer": "silu" if "giant" in name else "gelu",
        "patch_drop_rate": 0.0,
        "proj_drop_rate": 0.0,
        "cache_dir": "anywhere",
        "pretrained_cfg": "lvd142m",
        "pretrained_cfg_overlay": {"crop_pct": 0.9},
    }
    model = create_model(name, **SMALL, **so_anyway)
    assert model.default_cfg["crop_pct"] == 0.9
    assert model(images(28, 28)).shape == (2, 128)
    features = create_model(name, **SMALL, features_only=True, feature_cls="getter", **so_anyway)
    assert len(features(images(28, 28))) == 3
    assert create_model(NAMES[0], **SMALL, act_layer=torch.nn.GELU)(images(28, 28)).shape == (2, 128)
    for argument, value in so_anyway.items():
        other = {"no_embed_class": registers == 0, "reg_tokens": 2}.get(argument, not value)
        if not isinstance(value, str | dict):
            with pytest.raises(TypeError, match=f"create_model does not take {argument}={other}"):
                create_model(name, **SMALL, **{argument: other})


def test_a_pretrained_cfg_of_timms(folders: WeightFolders, tmp_path: Path) -> None:
    """Builds what timm builds of it: a classifier, another size; its file is what `pretrained` loads."""
    timm = pytest.importorskip("timm", reason="takes timm's object, which is not installed")
    path = write(tiny_weights(2), tmp_path / "mine.safetensors")
    given = timm.models.PretrainedCfg(file=str(path), num_classes=7, input_size=(3, 28, 42), mean=(0.0, 0.0, 0.0))
    model = create_model("vit_tiny_patch14_dinov2", pretrained=True, pretrained_cfg=given)
    assert model.loaded_from == str(path)
    assert model.patch_embed.grid_size == (2, 3)
    assert (model.num_classes, model.default_cfg["mean"]) == (7, (0.0, 0.0, 0.0))
    again = create_model("vit_tiny_patch14_dinov2", pretrained_cfg=given, num_classes=2)
    assert again.num_classes == 2
    assert again.default_cfg["architecture"] == "vit_tiny_patch14_dinov2"


def test_device_and_dtype() -> None:
    model = create_model(NAMES[0], **SMALL, num_classes=5, device="meta", dtype=torch.bfloat16)
    assert {(str(p.device), p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


def test_timm_is_not_needed() -> None:
    script = (
        "import sys; sys.modules['timm'] = None\n"
        "import dinov2_fast\n"
        "print(dinov2_fast.create_model('vit_small_patch14_dinov2', features_only=True).feature_info.channels())"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (run.stdout, run.returncode) == ("[384, 384, 384]\n", 0), run.stderr


def test_the_examples_of_the_readme_run(folders: WeightFolders, monkeypatch: pytest.MonkeyPatch) -> None:
    random = load("dinov2_vits14", weights="random:0")
    write(dict(random.state_dict()), folders.cache / "dinov2_vits14_pretrain.pth")
    names: dict[str, Any] = {"images": images(42, 70, batch=1)}
    exec(example("forward_head(tokens)"), names)
    exec(example("features_only=True"), names)
    assert names["logits"].shape == (1, 10)
    assert [tuple(m.shape) for m in names["maps"]] == [(1, 384, 3, 5)] * 2
    assert names["backbone"].feature_info.reduction() == [14, 14]

    timm = pytest.importorskip("timm", reason="compares with timm, which is not installed")
    names["timm_model"] = timm.create_model("vit_small_patch14_dinov2.lvd142m")
    monkeypatch.setattr(
        dinov2_fast,
        "load",
        lambda name, position_interpolation: load("dinov2_vits14", position_interpolation=position_interpolation),
    )
    exec(example('position_interpolation="antialias")'), names)
    assert_same(names["weights"], names["timm_model"].state_dict())
