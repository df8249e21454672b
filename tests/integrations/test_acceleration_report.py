"""What `accelerate` finds in a model, what it refuses, and how the report says it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
from torch import nn

import dinov2_fast
from dinov2_fast import accelerate, acceleration_report
from tests.helpers.library_models import (
    filled,
    hub_model,
    timm_model,
    transformers_model,
)


def test_vision_towers_inside_larger_models_are_found_and_the_rest_is_left_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    transformers = pytest.importorskip("transformers")
    text = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50
    )
    tower = transformers_model("Dinov2", "Model")
    config = transformers.LlavaConfig(vision_config=tower.config, text_config=text)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    before = {name: type(module) for name, module in model.named_modules()}
    with caplog.at_level(logging.INFO, logger="dinov2_fast"):
        accelerate(model)
    changed = {name for name, module in model.named_modules() if type(module) is not before[name]}
    assert changed == {f"model.vision_tower.encoder.layer.{i}" for i in range(2)}
    line = "model.vision_tower.encoder.layer: 2 of 2 Dinov2Layer accelerated"
    assert str(acceleration_report(model)) == line
    assert caplog.messages == [line]


def test_two_backbones_are_two_groups_and_a_block_that_is_not_accelerated_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.ModuleDict({"left": filled(hub_model()), "right": filled(hub_model())}).eval()
    model["right"].blocks[1].attn = nn.MultiheadAttention(128, 2)
    assert all(group.accelerated == 0 for group in acceleration_report(model).groups)
    untouched = copy.deepcopy(model)
    accelerate(model)
    left, right = acceleration_report(model).groups
    assert (left.name, left.accelerated, left.count, left.reasons) == ("left.blocks", 2, 2, ())
    assert (right.name, right.accelerated, right.count) == ("right.blocks", 1, 2)
    its_class = "torch.nn.modules.activation.MultiheadAttention"
    reason = f"right.blocks.1: its attention is a {its_class}, which our ops cannot compute"
    assert right.reasons == (reason,)
    assert reason in caplog.text
    assert type(model["right"].blocks[1]) is type(untouched["right"].blocks[1])
    assert str(acceleration_report(nn.Linear(2, 2))) == "no DINOv2 blocks"


def _with_forward() -> nn.Module:
    model = hub_model()
    for block in model.blocks:
        block.forward = lambda x: x
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no blocks": (lambda: nn.Linear(2, 2), "Its repeated modules are: none"),
    "another architecture": (
        lambda: __import__("transformers").ViTModel(
            __import__("transformers").ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
        ),
        r"are: transformers.models.vit.modeling_vit.ViTLayer",
    ),
    "attention dropout": (
        lambda: transformers_model("Dinov2", "Model", attention_dropout=0.1).train(),
        r"encoder.layer.0, encoder.layer.1: it is in training mode and drops attention weights \(p = 0.1\)",
    ),
    "hub attention dropout": (lambda: hub_model(attention_dropout=0.2).train(), r"drops attention weights \(p = 0.2\)"),
    "timm attention dropout": (
        lambda: timm_model("vit_small_patch14_dinov2", attention_dropout=0.2).train(),
        r"drops attention weights \(p = 0.2\)",
    ),
    "norms in attention": (
        lambda: timm_model("vit_small_patch14_dinov2", qk_norm=True),
        "its attention has q_norm and k_norm",
    ),
    "own forward": (_with_forward, "forward was set on the instance"),
    "our own": (lambda: dinov2_fast.DinoVisionTransformer(embed_dim=64, depth=2, num_heads=1), "of this package"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_accelerated_is_refused_with_the_reason_and_left_as_it_was(case: str) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("timm")
    make, reason = REFUSED[case]
    model = make()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(TypeError, match=reason):
        accelerate(model)
    assert [type(module) for module in model.modules()] == kinds


def test_options_of_the_engine_need_the_engine() -> None:
    with pytest.raises(TypeError, match="precision: the engine's options need inference=True"):
        accelerate(hub_model(), precision="bf16")
