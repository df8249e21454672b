"""Classification and backbone against transformers' own, live, on the same random weights: logits, losses, maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import dinov2_fast
from dinov2_fast import optimize_for_inference
from dinov2_fast.huggingface import BackboneOutput, ImageClassifierOutput
from tests.helpers.documents import example
from tests.helpers.huggingface_peers import (
    FAMILIES,
    TOLERANCE,
    Pair,
    assert_close,
    both,
    images,
    make_pair,
    small_config,
)
from tests.helpers.small_models import filled


@pytest.fixture(scope="module", params=FAMILIES)
def classifier(request: pytest.FixtureRequest) -> Pair:
    return make_pair(request.param, "ForImageClassification", num_labels=5)


@pytest.fixture(scope="module", params=FAMILIES)
def backbones(request: pytest.FixtureRequest) -> Pair:
    return make_pair(request.param, "Backbone")


@pytest.fixture
def backbone(backbones: Pair) -> Pair:
    """The pair with its settings as they are by default, whatever another test left."""
    for side in backbones:
        side.config.apply_layernorm, side.config.reshape_hidden_states = True, True
        side.out_indices = [3]
    return backbones


# Classification


@pytest.mark.parametrize("size", [(98, 98), (60, 75)], ids=str)
def test_logits_equal_those_of_transformers(classifier: Pair, size: tuple[int, int]) -> None:
    ours, theirs = both(classifier, images(*size), output_hidden_states=True, output_attentions=True)
    assert isinstance(ours, ImageClassifierOutput)
    assert list(ours) == list(theirs) == ["logits", "hidden_states", "attentions"]
    assert_close(ours.to_tuple(), theirs.to_tuple())


def test_registers_are_not_in_the_classifiers_mean(classifier: Pair) -> None:
    x = images(98)
    tokens = classifier.ours.base_model(x).last_hidden_state
    inputs = torch.cat([tokens[:, 0], tokens[:, 1 + classifier.ours.base_model.num_register_tokens :].mean(1)], dim=1)
    assert inputs.shape == (2, 256)
    assert torch.equal(classifier.ours(x).logits, classifier.ours.classifier(inputs))


LABELS: dict[str, tuple[int, Tensor]] = {
    "regression": (1, torch.tensor([0.3, -1.2])),
    "single_label_classification": (5, torch.tensor([4, 1])),
    "multi_label_classification": (5, torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 1, 0, 0]])),
}


@pytest.mark.parametrize("given", [False, True], ids=["from labels", "from config"])
@pytest.mark.parametrize("problem", LABELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_equal_those_of_transformers(family: str, problem: str, given: bool) -> None:
    num_labels, labels = LABELS[problem]
    fields = {"problem_type": problem} if given else {}
    pair = make_pair(family, "ForImageClassification", num_labels=num_labels, num_hidden_layers=1, **fields)
    ours, theirs = both(pair, images(56), labels=labels)
    assert_close(ours.to_tuple(), theirs.to_tuple())
    assert ours[0] is ours.loss
    assert ours.loss.ndim == 0
    assert pair.ours.config.problem_type == pair.theirs.config.problem_type == problem


def test_regression_takes_several_targets() -> None:
    pair = make_pair("Dinov2", "ForImageClassification", num_labels=3, num_hidden_layers=1, problem_type="regression")
    ours, theirs = both(pair, images(56), labels=torch.randn(2, 3))
    assert_close(ours.loss, theirs.loss)


def test_one_label_may_be_a_class_where_a_configuration_is_changed_to_it() -> None:
    config = transformers.Dinov2Config(**small_config(num_labels=1, num_hidden_layers=1))
    config.problem_type = "single_label_classification"
    labels = torch.tensor([0, 0])
    losses = [
        library.Dinov2ForImageClassification(config)(images(56), labels=labels).loss
        for library in (dinov2_fast, transformers)
    ]
    assert losses[0] == losses[1] == 0


@pytest.mark.parametrize("count", [7, torch.tensor(7)])
def test_loss_over_the_items_of_all_accumulated_batches(classifier: Pair, count: Any) -> None:
    x, labels = images(56), torch.tensor([4, -100])  # -100 is left out
    ours, theirs = both(classifier, x, labels=labels, num_items_in_batch=count)
    assert_close(ours.loss, theirs.loss)
    assert ours.loss == pytest.approx(classifier.ours(x, labels=labels).loss.item() / 7)


def test_an_unknown_problem_type_is_refused(classifier: Pair) -> None:
    before = classifier.ours.config.problem_type
    classifier.ours.config.problem_type = "guessing"
    try:
        with pytest.raises(ValueError, match="no problem_type 'guessing'; choose regression"):
            classifier.ours(images(28), labels=torch.tensor([0, 1]))
    finally:
        classifier.ours.config.problem_type = before


def test_a_model_with_no_labels_returns_features() -> None:
    pair = make_pair("Dinov2", "ForImageClassification", num_labels=0, num_hidden_layers=1)
    ours, theirs = both(pair, images(56))
    assert ours.logits.shape == (2, 256)
    assert_close(ours.logits, theirs.logits)


def test_models_for_one_channel_equal_transformers() -> None:
    pair = make_pair("Dinov2", "ForImageClassification", num_channels=1, num_hidden_layers=1)
    ours, theirs = both(pair, images(56, channels=1))
    assert_close(ours.logits, theirs.logits)


# Backbone


@pytest.mark.parametrize("reshape", [True, False], ids=["maps", "tokens"])
@pytest.mark.parametrize("norm", [True, False], ids=["normed", "raw"])
@pytest.mark.parametrize("indices", [[3], [0, 2], [-3, -1], [0, 1, 2, 3]], ids=str)
def test_feature_maps_equal_those_of_transformers(
    backbone: Pair, indices: list[int], norm: bool, reshape: bool
) -> None:
    for side in backbone:
        side.config.apply_layernorm, side.config.reshape_hidden_states = norm, reshape
        side.out_indices = indices
    x = images(70, 98)
    ours, theirs = both(backbone, x)
    assert isinstance(ours, BackboneOutput)
    assert list(ours) == list(theirs) == ["feature_maps"]
    assert_close(ours.feature_maps, theirs.feature_maps)
    tokens = 1 + backbone.registers + 35
    assert ours.feature_maps[0].shape == ((2, 128, 5, 7) if reshape else (2, tokens, 128))
    assert all(maps.is_contiguous() for maps in ours.feature_maps)


@pytest.mark.parametrize("size", [(60, 75), (14, 27), (98, 42)], ids=str)
@pytest.mark.parametrize("features", [["stem", "stage2"], ["stage3"]], ids=str)
def test_feature_maps_of_any_size_equal_those_of_transformers(
    backbone: Pair, features: list[str], size: tuple[int, int]
) -> None:
    for side in backbone:
        side.out_features = features
    ours, theirs = both(backbone, images(*size))
    assert_close(ours.feature_maps, theirs.feature_maps)
    assert [tuple(maps.shape[2:]) for maps in ours.feature_maps] == [(size[0] // 14, size[1] // 14)] * len(features)


def test_backbone_gives_states_attentions_and_tuples_as_transformers(backbone: Pair) -> None:
    for side in backbone:
        side.out_features = ["stage1"]
    for kwargs in (
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"output_hidden_states": True, "output_attentions": True},
    ):
        ours, theirs = both(backbone, images(56), **kwargs)
        assert list(ours) == list(theirs)
        assert_close(ours.to_tuple(), theirs.to_tuple())
        assert_close(backbone.ours(images(56), **kwargs, return_dict=False), ours.to_tuple(), 0.0)


def test_the_backbones_attributes_are_those_of_transformers(backbone: Pair) -> None:
    for side in backbone:
        side.out_features = ["stem", "stage2"]
    for name in ("stage_names", "out_features", "out_indices", "channels", "num_features", "out_feature_channels"):
        assert getattr(backbone.ours, name) == getattr(backbone.theirs, name), name
    ours, x = backbone.ours, images(56)
    assert_close(ours.forward_with_filtered_kwargs(x).feature_maps, ours(x).feature_maps, 0.0)
    ours.out_features = []
    assert ours(x).feature_maps == ()


# Inside transformers' own models for depth and segmentation


def depth_anything(config: Any, **kwargs: Any) -> nn.Module:
    kwargs |= {"reassemble_hidden_size": 128, "neck_hidden_sizes": [8, 16, 24, 32], "fusion_hidden_size": 16}
    return transformers.DepthAnythingForDepthEstimation(
        transformers.DepthAnythingConfig(backbone_config=config, head_hidden_size=8, patch_size=14, **kwargs)
    )


def dpt(config: Any, **kwargs: Any) -> nn.Module:
    kwargs |= {"hidden_size": 128, "neck_hidden_sizes": [8, 16, 24, 32], "fusion_hidden_size": 16, "image_size": 98}
    return transformers.DPTForDepthEstimation(transformers.DPTConfig(backbone_config=config, **kwargs))


def upernet(config: Any, **kwargs: Any) -> nn.Module:
    kwargs |= {"hidden_size": 16, "auxiliary_channels": 8, "auxiliary_in_channels": 128, "num_labels": 5}
    return transformers.UperNetForSemanticSegmentation(transformers.UperNetConfig(backbone_config=config, **kwargs))


@pytest.mark.parametrize(
    ("family", "make", "reshaped"),
    [
        ("Dinov2", depth_anything, False),  # these two take a CLS token and patches, no registers
        ("Dinov2", dpt, False),
        ("Dinov2", upernet, True),
        ("Dinov2WithRegisters", upernet, True),
    ],
)
def test_a_model_of_transformers_on_this_backbone(family: str, make: Any, reshaped: bool) -> None:
    stages = {"num_hidden_layers": 4, "out_indices": [1, 2, -2, -1], "reshape_hidden_states": reshaped}
    pair = make_pair(family, "Backbone", **stages)
    model = make(pair.theirs.config, attn_implementation="eager").eval()
    filled(model)
    [part for part in model.modules() if isinstance(part, nn.Conv2d)][-1].bias.data.fill_(1.0)  # a ReLU follows
    pair.ours.load_state_dict(model.backbone.state_dict())
    x, asked = images(70, 98), {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected = model(x, **asked)
        for backbone in (pair.ours, optimize_for_inference(pair.ours, "fp32")):
            model.backbone = backbone
            found = model(x, **asked)
            assert list(found) == list(expected)
            tolerance = TOLERANCE * max(1.0, expected[0].abs().max().item())
            assert_close(found.to_tuple(), expected.to_tuple(), tolerance)
            assert expected[0].std() > 100 * tolerance


@torch.no_grad()
def test_the_documented_example_runs() -> None:
    config = make_pair("Dinov2", "Backbone", num_hidden_layers=4, out_indices=[1, 2, 3, 4]).theirs.config
    config.reshape_hidden_states = False
    names: dict[str, Any] = {"dinov2_fast": dinov2_fast, "depth_model": depth_anything(config).eval()}
    filled(names["depth_model"])
    x = images(70, 98)
    expected = names["depth_model"](x).predicted_depth
    exec(example("depth_model.backbone = "), names)
    assert isinstance(names["depth_model"].backbone, dinov2_fast.Dinov2Backbone)
    assert_close(names["depth_model"](x).predicted_depth, expected)


def test_backbone_stops_after_the_last_stage_asked_for(backbone: Pair) -> None:
    calls: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, block in enumerate(backbone.ours.blocks)
    ]
    backbone.ours.out_indices = [2]
    backbone.ours(images(28))
    for handle in handles:
        handle.remove()
    assert calls == [0, 1]
