"""`load_state_dict` of every face: all layouts, and what nn.Module promises about strict, assign and the report."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dinov2_fast
from dinov2_fast import DinoVisionTransformer, convert_state_dict, layouts, logs
from tests.helpers import checkpoints, golden


def _reference(case: str, **overrides: Any) -> nn.Module:
    arguments, _, _ = golden.load_case(case)
    return DinoVisionTransformer(**{**arguments, **overrides})


def _huggingface(head: str, case: str, **fields: Any) -> nn.Module:
    arguments, _, _ = golden.load_case(case)
    family, sizes = golden.huggingface_fields(arguments)
    config = getattr(dinov2_fast, f"{family}Config")(**sizes, num_labels=5, **fields)
    return getattr(dinov2_fast, family + head)(config)


FACES: dict[str, Callable[[str], nn.Module]] = {
    "reference": _reference,
    "reference_chunked": partial(_reference, block_chunks=3),
    "model": partial(_huggingface, "Model"),
    "backbone": partial(_huggingface, "Backbone"),
    "classifier": partial(_huggingface, "ForImageClassification"),
}
CASES = ("facebook_mlp", "facebook_reg4", "facebook_swiglu")


def plain(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A face's state dict by the names of the reference's flat layout, without the classifier."""
    result = {layouts.plain_key(key): tensor for key, tensor in state_dict.items()}
    return {key: tensor for key, tensor in result.items() if not key.startswith("classifier.")}


@pytest.mark.parametrize("source", checkpoints.SOURCES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("face", FACES)
def test_every_face_loads_every_source(face: str, case: str, source: str) -> None:
    _, weights, _ = golden.load_case(case)
    model = FACES[face](case)
    without_head = ["classifier.weight", "classifier.bias"] if face == "classifier" else []
    report = model.load_state_dict(checkpoints.SOURCES[source](weights), strict=not without_head)
    assert report.missing_keys == without_head
    assert report.unexpected_keys == []
    checkpoints.assert_same(plain(model.state_dict()), checkpoints.expected(source, weights))


@pytest.mark.parametrize("layout", [checkpoints.huggingface, checkpoints.huggingface_memory])
@pytest.mark.parametrize("case", CASES)
def test_the_classifier_loads_transformers_own(case: str, layout: Callable[..., dict[str, Tensor]]) -> None:
    _, weights, _ = golden.load_case(case)
    prefix = "dinov2_with_registers." if case == "facebook_reg4" else "dinov2."
    head = {"classifier.weight": torch.randn(5, 256), "classifier.bias": torch.randn(5)}
    model = FACES["classifier"](case)
    model.load_state_dict({prefix + key: tensor for key, tensor in layout(weights).items()} | head)
    loaded = model.state_dict()
    checkpoints.assert_same({key: loaded[key] for key in head}, head)
    checkpoints.assert_same(plain(loaded), weights)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("face", FACES)
def test_state_dict_has_the_references_keys(face: str, case: str) -> None:
    _, weights, _ = golden.load_case(case)
    keys = set(FACES[face](case).state_dict())
    if face == "reference_chunked":
        assert keys == set(checkpoints.chunked(weights))
    elif face == "classifier":
        prefix = "dinov2_with_registers." if case == "facebook_reg4" else "dinov2."
        assert keys == {prefix + key for key in weights} | {"classifier.weight", "classifier.bias"}
    else:
        assert keys == set(weights)


@pytest.mark.golden
def test_golden_chunked_weights_load_into_flat_and_other_chunks() -> None:
    _, chunked, _ = golden.load_case("facebook_chunked")
    flat = convert_state_dict(chunked, to="facebook")
    for chunks in (0, 1, 2, 3):
        model = _reference("facebook_chunked", block_chunks=chunks)
        model.load_state_dict(chunked)
        checkpoints.assert_same(plain(model.state_dict()), flat)


@pytest.mark.parametrize("source", ["facebook", "huggingface", "huggingface_memory", "timm"])
@pytest.mark.parametrize("assign", [False, True])
def test_assign_makes_the_tensors_the_parameters(source: str, assign: bool) -> None:
    _, weights, _ = golden.load_case("facebook_mlp")
    half = {key: tensor.bfloat16() for key, tensor in weights.items()}
    source_dict = checkpoints.SOURCES[source](half)
    model = FACES["model"]("facebook_mlp")
    before = dict(model.named_parameters())
    model.load_state_dict(source_dict, assign=assign)
    norm = next(source_dict[key] for key in ("norm.weight", "layernorm.weight") if key in source_dict)
    for key, parameter in model.named_parameters():
        assert isinstance(parameter, nn.Parameter)
        assert parameter.requires_grad
        assert parameter.is_leaf
        assert (parameter is before[key]) == (not assign)
        assert parameter.dtype == (torch.bfloat16 if assign else torch.float32)
    assert (model.norm.weight.data_ptr() == norm.data_ptr()) == assign


def test_assign_fills_a_model_without_storage() -> None:
    arguments, weights, tensors = golden.load_case("facebook_reg4")
    with torch.device("meta"):
        model = DinoVisionTransformer(**arguments)
    model.load_state_dict(checkpoints.huggingface(weights), assign=True)
    with torch.no_grad():
        output = model.eval()(tensors["0.input"])
    torch.testing.assert_close(output, tensors["0.forward"], atol=1e-4, rtol=0)


def test_parameters_that_require_grad_are_loaded() -> None:
    _, weights, _ = golden.load_case("facebook_mlp")
    source = {key: nn.Parameter(tensor) for key, tensor in checkpoints.huggingface(weights).items()}
    model = _reference("facebook_mlp")
    model.load_state_dict(source, assign=True)
    assert all(parameter.is_leaf for parameter in model.parameters())
    checkpoints.assert_same(model.state_dict(), weights)


@pytest.mark.parametrize("layout", ["facebook", "huggingface", "huggingface_memory"])
def test_not_strict_reports_as_nn_module_does(layout: str) -> None:
    _, weights, _ = golden.load_case("facebook_mlp")
    model = _reference("facebook_mlp")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    partial_weights = {key: tensor for key, tensor in weights.items() if key not in ("mask_token", "norm.bias")}
    source = {**checkpoints.SOURCES[layout](partial_weights), "extra.weight": torch.ones(2), "epoch": 3}
    if layout == "facebook":  # without its mask token this layout is timm's: leave out more than timm does
        del source["pos_embed"]
    report = model.load_state_dict(source, strict=False)
    missing = {"mask_token", "norm.bias"} | ({"pos_embed"} if layout == "facebook" else set())
    assert set(report.missing_keys) == missing
    assert set(report.unexpected_keys) == {"extra.weight", "epoch"}
    wanted = {key: before[key] if key in missing else weights[key] for key in before}
    checkpoints.assert_same(model.state_dict(), wanted)


def test_not_strict_with_one_token_touches_no_other() -> None:
    model = _reference("facebook_mlp")
    model.mask_token.data.fill_(7.0)
    report = model.load_state_dict({"cls_token": torch.ones(1, 1, 128)}, strict=False)
    assert "mask_token" in report.missing_keys
    assert torch.all(model.mask_token == 7.0)
    assert torch.all(model.cls_token == 1.0)


def test_timms_missing_mask_token_is_zeros_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    logs.log_once.cache_clear()
    _, weights, _ = golden.load_case("timm_mlp")
    model = _reference("facebook_mlp")
    with caplog.at_level(logging.WARNING, logger="dinov2_fast"):
        for _ in range(3):
            model.mask_token.data.fill_(7.0)
            report = model.load_state_dict(weights)
    assert report.missing_keys == []
    assert not model.mask_token.any()
    assert [record.message for record in caplog.records if "no mask token" in record.message] == [
        "These weights come from timm and have no mask token: it is set to zeros."
    ]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("source", checkpoints.SOURCES)
def test_a_wrong_shape_is_named_and_changes_nothing(source: str, strict: bool) -> None:
    _, weights, _ = golden.load_case("facebook_mlp")
    model = _reference("facebook_mlp")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    spoilt = {**weights, "blocks.1.attn.qkv.bias": torch.ones(3 * 64), "norm.weight": torch.ones(7)}
    with pytest.raises(RuntimeError, match=r"The weights do not fit this model \(recognised layout: \w+\)") as caught:
        model.load_state_dict(checkpoints.SOURCES[source](spoilt), strict=strict)
    message = str(caught.value)
    assert "Wrong shape (2): " in message
    assert "blocks.1.attn.qkv.bias (192,) where the model has (384,)" in message
    assert "norm.weight (7,) where the model has (128,)" in message
    checkpoints.assert_same(model.state_dict(), before)


def test_strict_names_missing_and_unexpected_keys_and_changes_nothing() -> None:
    _, weights, _ = golden.load_case("facebook_reg4")
    model = _reference("facebook_reg4")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    source = checkpoints.huggingface(weights)
    del source["encoder.layer.1.attention.attention.key.weight"], source["layernorm.bias"]
    source["pooler.dense.weight"] = torch.ones(2)
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(source)
    message = str(caught.value)
    assert "(recognised layout: huggingface)" in message
    assert "Missing (2): blocks.1.attn.qkv.weight, norm.bias." in message
    assert "Unexpected (3): " in message
    for name in ("attention.attention.query.weight", "attention.attention.value.weight", "pooler.dense.weight"):
        assert name in message
    checkpoints.assert_same(model.state_dict(), before)


@pytest.mark.parametrize(
    ("key", "message"),
    [("norm.bias", r"Missing \(1\): norm\.bias\."), ("extra.weight", r"Unexpected \(1\): extra\.weight\.")],
)
def test_strict_refuses_one_key_too_few_or_too_many(key: str, message: str) -> None:
    _, weights, _ = golden.load_case("facebook_mlp")
    model = _reference("facebook_mlp")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if weights.pop(key, None) is None:
        weights[key] = torch.ones(2)
    with pytest.raises(RuntimeError, match=rf"\(recognised layout: facebook\)\.\n  {message}$"):
        model.load_state_dict(weights)
    checkpoints.assert_same(model.state_dict(), before)


def test_another_size_of_model_gives_a_short_message() -> None:
    _, weights, _ = golden.load_case("facebook_mlp")
    with pytest.raises(RuntimeError, match=r"Wrong shape \(49\): .* and 41 more") as caught:
        _reference("facebook_mlp", embed_dim=192, num_heads=3).load_state_dict(weights)
    assert len(str(caught.value)) < 1000


def test_a_model_without_mask_token_loads_its_own_state_dict() -> None:
    model = _huggingface("Model", "facebook_mlp", use_mask_token=False)
    assert "mask_token" not in model.state_dict()
    model.load_state_dict(model.state_dict())


def test_a_subclass_with_wrapper_like_names_loads_its_own_state_dict() -> None:
    class Subclass(DinoVisionTransformer):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.module, self.backbone = nn.Linear(2, 2), nn.Linear(2, 2)

    arguments, _, _ = golden.load_case("facebook_mlp")
    model = Subclass(**arguments)
    model.load_state_dict(model.state_dict())


def test_lightning_checkpoints_are_looked_into() -> None:
    _, weights, _ = golden.load_case("facebook_mlp")
    model = _reference("facebook_mlp")
    model.load_state_dict({"epoch": 3, "state_dict": {f"model.{key}": value for key, value in weights.items()}})
    assert torch.equal(model.state_dict()["cls_token"], weights["cls_token"])
