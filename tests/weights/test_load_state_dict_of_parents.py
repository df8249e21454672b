"""A backbone as a part of another module: weights in any layout load through its parent, by torch's own rules."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import dinov2_fast
from dinov2_fast import DinoVisionTransformer, logs
from tests.helpers import checkpoints, golden

CASES = ("facebook_mlp", "facebook_reg4", "facebook_swiglu")


class Net(nn.Module):
    """What people write: a backbone, deeper than one name, and a head."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"vision": backbone})
        self.head = nn.Linear(4, 2)


def _reference(case: str, **overrides: Any) -> nn.Module:
    arguments, _, _ = golden.load_case(case)
    return DinoVisionTransformer(**{**arguments, **overrides})


def _huggingface(case: str, head: str = "Model") -> nn.Module:
    arguments, _, _ = golden.load_case(case)
    family, fields = golden.huggingface_fields(arguments)
    return getattr(dinov2_fast, family + head)(getattr(dinov2_fast, f"{family}Config")(**fields))


def _chunked(case: str) -> nn.Module:
    return _reference(case, block_chunks=3)


def _within(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    head = {"head.weight": torch.ones(2, 4), "head.bias": torch.ones(2)}
    return {f"model.vision.{key}": tensor for key, tensor in weights.items()} | head


def _flat(backbone: nn.Module) -> dict[str, Tensor]:
    return dinov2_fast.convert_state_dict(backbone.state_dict(), to="facebook")


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("layout", ["facebook", "chunked", "compiled", "huggingface", "huggingface_memory", "timm"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("make", [_reference, _chunked, _huggingface])
def test_a_parent_loads_every_layout(make: Callable[[str], nn.Module], case: str, layout: str, assign: bool) -> None:
    _, weights, _ = golden.load_case(case)
    parent = Net(make(case))
    report = parent.load_state_dict(_within(checkpoints.SOURCES[layout](weights)), assign=assign)
    assert report == ([], [])
    checkpoints.assert_same(_flat(parent.model["vision"]), checkpoints.expected(layout, weights))
    assert torch.all(parent.head.weight == 1)


def test_a_parent_of_a_classifier_loads_transformers_own() -> None:
    transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    arguments, _, _ = golden.load_case("facebook_mlp")
    _, fields = golden.huggingface_fields(arguments)
    theirs = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**fields, num_labels=3)).eval()
    ours = dinov2_fast.Dinov2ForImageClassification(dinov2_fast.Dinov2Config(**fields, num_labels=3)).eval()
    Net(ours).load_state_dict(Net(theirs).state_dict(), strict=False)
    x = torch.randn(1, 3, 70, 70)
    with torch.no_grad():
        torch.testing.assert_close(ours(x).logits, theirs(x).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_feature_getters_load_timms_own(name: str) -> None:
    timm = pytest.importorskip("timm", reason="compares with timm, which is not installed")
    arguments = {"features_only": True, "out_indices": (0, 2), "depth": 4, "embed_dim": 64, "num_heads": 1}
    theirs = timm.create_model(name, img_size=56, **arguments).eval()
    ours = dinov2_fast.create_model(name, img_size=56, **arguments).eval()
    assert ours.load_state_dict(theirs.state_dict()) == ([], [])
    x = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        for mine, wanted in zip(ours(x), theirs(x), strict=True):
            torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=0)


def test_a_parent_of_transformers_loads_what_it_loaded_before_the_swap() -> None:
    transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    parent, x = _depth_model(transformers), torch.randn(1, 3, 70, 70)
    before = {key: tensor.clone() for key, tensor in parent.state_dict().items()}
    with torch.no_grad():
        wanted = parent(x).predicted_depth
    parent.backbone = dinov2_fast.Dinov2Backbone(parent.backbone.config).eval()
    assert parent.load_state_dict(before) == ([], [])
    with torch.no_grad():
        torch.testing.assert_close(parent(x).predicted_depth, wanted, atol=1e-5, rtol=0)


def test_a_parent_of_transformers_warns_once_on_saving_and_loads_its_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    logs.log_once.cache_clear()
    parent, again = (_depth_model(transformers) for _ in range(2))
    for model in (parent, again):
        model.backbone = dinov2_fast.Dinov2Backbone(model.backbone.config).eval()
    with caplog.at_level(logging.WARNING, logger="dinov2_fast"):
        for _ in range(2):
            parent.save_pretrained(tmp_path)
    assert [record.message for record in caplog.records if "(backbone.blocks.0.…)" in record.message] != []
    assert len(caplog.records) == 1
    assert "dinov2_fast.accelerate(model)" in caplog.text
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    checkpoints.assert_same(dict(again.state_dict()), dict(parent.state_dict()))


def test_an_accelerated_parent_of_transformers_is_saved_for_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    parent, x = _depth_model(transformers), torch.randn(1, 3, 70, 70)
    dinov2_fast.accelerate(parent)
    parent.save_pretrained(tmp_path)
    again, report = type(parent).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        wanted = parent(x).predicted_depth
        torch.testing.assert_close(again.eval()(x).predicted_depth, wanted, atol=1e-5, rtol=0)


def test_a_classifier_of_our_own_does_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("transformers", reason="the warning is for where transformers is loaded")
    logs.log_once.cache_clear()
    _huggingface("facebook_mlp", "ForImageClassification").state_dict()
    assert caplog.records == []


def _depth_model(transformers: Any) -> Any:
    arguments, _, _ = golden.load_case("facebook_mlp")
    _, fields = golden.huggingface_fields(arguments)
    backbone = transformers.Dinov2Config(**fields, out_indices=[1, 2], reshape_hidden_states=False)
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=fields["hidden_size"],
        reassemble_factors=[2, 1],
        neck_hidden_sizes=[8, 8],
        fusion_hidden_size=8,
        head_hidden_size=4,
    )
    return transformers.DepthAnythingForDepthEstimation(config).eval()


@pytest.mark.parametrize("layout", ["chunked", "huggingface", "timm"])
def test_a_parents_error_names_what_does_not_fit(layout: str) -> None:
    _, weights, _ = golden.load_case("facebook_mlp")
    spoilt = {**weights, "norm.weight": torch.ones(7)}
    del spoilt["blocks.1.attn.qkv.bias"]
    source = _within(checkpoints.SOURCES[layout](spoilt) | {"extra.weight": torch.ones(1)})
    parent = Net(_reference("facebook_mlp"))
    report = parent.load_state_dict(
        {key: x for key, x in source.items() if ".norm.w" not in key and "layernorm.w" not in key}, strict=False
    )
    assert set(report.missing_keys) == {"model.vision.norm.weight", "model.vision.blocks.1.attn.qkv.bias"}
    assert report.unexpected_keys == ["model.vision.extra.weight"]
    with pytest.raises(RuntimeError) as caught:
        parent.load_state_dict(source)
    message = str(caught.value)
    assert 'Missing key(s) in state_dict: "model.vision.blocks.1.attn.qkv.bias"' in message
    assert 'Unexpected key(s) in state_dict: "model.vision.extra.weight"' in message
    assert "size mismatch for model.vision.norm.weight" in message


def test_a_parents_error_names_two_keys_for_one_tensor() -> None:
    _, weights, _ = golden.load_case("facebook_mlp")
    with pytest.raises(RuntimeError, match=r"model\.vision: The keys .* both name the tensor 'cls_token'"):
        Net(_reference("facebook_mlp")).load_state_dict(_within({**weights, "module.cls_token": weights["cls_token"]}))


def test_weights_of_the_parent_alone_leave_the_backbone_unchanged() -> None:
    parent = Net(_reference("facebook_mlp"))
    before = copy.deepcopy(parent.model["vision"].state_dict())
    report = parent.load_state_dict(_within({}), strict=False)
    assert set(report.missing_keys) == {f"model.vision.{key}" for key in before}
    checkpoints.assert_same(dict(parent.model["vision"].state_dict()), dict(before))


def test_a_parent_loads_its_own_weights_back() -> None:
    parent, other = Net(_huggingface("facebook_mlp")), Net(_huggingface("facebook_mlp"))
    other.load_state_dict(parent.state_dict())
    checkpoints.assert_same(dict(other.state_dict()), dict(parent.state_dict()))
    assert parent.state_dict().keys() == {name for name, _ in parent.named_parameters()}
