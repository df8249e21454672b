"""`dinov2_fast.layouts`: conversion between the layouts, bit for bit, and what is recognised and refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dinov2_fast import DinoVisionTransformer, convert_state_dict
from dinov2_fast.layouts import LAYOUTS, plain_key, plan_conversion, recognise
from tests.helpers import checkpoints, golden
from tests.helpers.checkpoints import shapes

FACEBOOK = [name for name in golden.cases("facebook") if name != "facebook_chunked"]


@pytest.mark.parametrize("source", checkpoints.SOURCES)
@pytest.mark.parametrize("case", FACEBOOK)
def test_every_source_becomes_the_own_layout(case: str, source: str) -> None:
    _, weights, _ = golden.load_case(case)
    converted = convert_state_dict(checkpoints.SOURCES[source](weights), to="facebook")
    checkpoints.assert_same(converted, checkpoints.expected(source, weights))


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "facebook"])
@pytest.mark.parametrize("case", FACEBOOK)
def test_the_own_layout_becomes_every_other(case: str, layout: str) -> None:
    _, weights, _ = golden.load_case(case)
    checkpoints.assert_same(convert_state_dict(weights, to=layout), checkpoints.SOURCES[layout](weights))


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(LAYOUTS, 2)))
@pytest.mark.parametrize("case", FACEBOOK)
def test_converting_there_and_back_gives_the_same_bits(case: str, first: str, second: str) -> None:
    _, weights, _ = golden.load_case(case)
    start = convert_state_dict(weights, to=first)
    back = convert_state_dict(convert_state_dict(start, to=second), to=first)
    lossy = second == "timm"
    wanted = convert_state_dict(checkpoints.expected("timm", weights), to=first) if lossy else start
    checkpoints.assert_same(back, wanted)


def test_converting_through_chunks_gives_the_same_bits() -> None:
    _, chunked, _ = golden.load_case("facebook_chunked")
    flat = convert_state_dict(chunked, to="facebook")
    assert "blocks.2.norm1.weight" in flat
    checkpoints.assert_same(convert_state_dict(flat, to="facebook", block_chunks=3), chunked)
    for depth, chunks in ((12, 4), (12, 5), (3, 2), (2, 4)):
        with torch.device("meta"):
            arguments = {"img_size": 28, "patch_size": 14, "embed_dim": 64, "num_heads": 1, "depth": depth}
            model = DinoVisionTransformer(**arguments, block_chunks=chunks)
        converted = convert_state_dict(model.state_dict(), to="facebook", block_chunks=chunks)
        assert shapes(converted) == shapes(model.state_dict())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_models_without_qkv_bias_or_layerscale_are_converted(layout: str) -> None:
    arguments, _, _ = golden.load_case("facebook_swiglu")
    model = DinoVisionTransformer(**{**arguments, "qkv_bias": False, "init_values": None})
    weights = model.state_dict()
    converted = convert_state_dict(weights, to=layout)
    wanted = checkpoints.expected(layout, {**weights})
    checkpoints.assert_same(convert_state_dict(converted, to="facebook"), wanted)


@pytest.mark.parametrize(("case", "prefix"), [("facebook_mlp", "dinov2."), ("facebook_reg4", "dinov2_with_registers.")])
def test_a_classifier_is_converted_with_its_backbone(case: str, prefix: str) -> None:
    _, weights, _ = golden.load_case(case)
    head = {"classifier.weight": torch.randn(5, 256), "classifier.bias": torch.randn(5)}
    converted = convert_state_dict({**weights, **head}, to="huggingface")
    wanted = {prefix + key: tensor for key, tensor in checkpoints.huggingface(weights).items()} | head
    checkpoints.assert_same(converted, wanted)
    checkpoints.assert_same(convert_state_dict(converted, to="facebook"), {**weights, **head})


def test_conversion_shares_equal_tensors_and_leaves_the_source_unchanged() -> None:
    _, weights, _ = golden.load_case("facebook_mlp")
    before = {key: tensor.clone() for key, tensor in weights.items()}
    converted = convert_state_dict(weights, to="huggingface")
    assert converted["layernorm.weight"].data_ptr() == weights["norm.weight"].data_ptr()
    query = converted["encoder.layer.0.attention.attention.query.weight"]
    assert query.untyped_storage().nbytes() == query.nbytes
    query.zero_()
    checkpoints.assert_same(weights, before)


def test_converting_parameters_keeps_no_graph() -> None:
    _, weights, _ = golden.load_case("facebook_mlp")
    parameters = {key: torch.nn.Parameter(tensor) for key, tensor in weights.items()}
    there = convert_state_dict(parameters, to="huggingface")
    assert all(tensor.grad_fn is None for tensor in there.values())
    leaves = {key: torch.nn.Parameter(tensor) for key, tensor in there.items()}
    plan = plan_conversion(leaves)
    assert all(plan.read(key).grad_fn is None for key in plan.recipes)


@pytest.mark.parametrize(
    ("key", "plain"),
    [
        ("blocks.7.attn.qkv.weight", "blocks.7.attn.qkv.weight"),
        ("blocks.1.7.attn.qkv.weight", "blocks.7.attn.qkv.weight"),
        ("module.backbone.blocks.1.7.ls1.gamma", "blocks.7.ls1.gamma"),
        ("teacher.backbone._fsdp_wrapped_module.norm.bias", "norm.bias"),
        ("_orig_mod.module.cls_token", "cls_token"),
        ("dinov2_with_registers.embeddings.cls_token", "embeddings.cls_token"),
        ("decode_head.backbone.weight", "decode_head.backbone.weight"),
        ("blocks.0.mlp.0.weight", "blocks.0.mlp.0.weight"),
        ("backbone", "backbone"),
        ("module", ""),
    ],
)
def test_plain_key_removes_wrappers_and_prefixes(key: str, plain: str) -> None:
    assert plain_key(key) == plain


def test_parts_of_a_model_are_not_recognised_as_timm() -> None:
    plan = plan_conversion({"cls_token": torch.ones(1, 1, 8), "norm.weight": torch.ones(8)})
    assert plan.layout == "facebook"
    assert set(plan.recipes) == {"cls_token", "norm.weight"}
    assert recognise(["encoder.layer.0.mlp.gate_proj.weight"]) == "huggingface_memory"
    assert recognise(["layernorm.weight"]) == "huggingface"
    registers = plan_conversion({"reg_token": torch.ones(1, 4, 8)})  # without the CLS token, no mask token is made
    assert (registers.layout, set(registers.recipes)) == ("timm", {"register_tokens"})


def _double_wrapper(weights: dict[str, Any]) -> dict[str, Any]:
    return {**weights, "module.cls_token": weights["cls_token"]}


def _two_layouts_on_top(weights: dict[str, Any]) -> dict[str, Any]:
    return {**checkpoints.huggingface(weights), "cls_token": weights["cls_token"]}


def _two_layouts_in_a_block(weights: dict[str, Any]) -> dict[str, Any]:
    return {**checkpoints.huggingface(weights), "blocks.1.attn.qkv.bias": weights["blocks.1.attn.qkv.bias"]}


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (_double_wrapper, "cls_token"),
        (_two_layouts_on_top, "cls_token"),
        (_two_layouts_in_a_block, "blocks.1.attn.qkv.bias"),
    ],
)
def test_two_keys_for_one_tensor_are_refused(spoil: Any, name: str) -> None:
    _, weights, _ = golden.load_case("facebook_mlp")
    with pytest.raises(ValueError, match=rf"The keys .* both name the tensor '{name}'"):
        convert_state_dict(spoil(weights), to="facebook")


def test_a_part_of_a_joined_tensor_keeps_its_name() -> None:
    _, weights, _ = golden.load_case("facebook_mlp")
    source = checkpoints.huggingface(weights)
    del source["encoder.layer.1.attention.attention.query.bias"]
    left = {key for key in plan_conversion(source).recipes if key.startswith("encoder.")}
    parts = "encoder.layer.1.attention.attention.{}.bias"
    assert left == {parts.format("key"), parts.format("value")}


def test_unknown_layouts_and_foreign_weights_are_refused() -> None:
    _, weights, _ = golden.load_case("facebook_mlp")
    with pytest.raises(ValueError, match="There is no layout 'jax'; choose one of facebook, huggingface"):
        convert_state_dict(weights, to="jax")
    with pytest.raises(ValueError, match="Only the layout 'facebook' has block chunks"):
        convert_state_dict(weights, to="timm", block_chunks=3)
    with pytest.raises(KeyError, match=r"no cls_token among conv1\.weight"):
        convert_state_dict({"conv1.weight": torch.ones(1)}, to="facebook")
    with pytest.raises(TypeError, match="a dictionary of tensors, got a list"):
        convert_state_dict([1], to="facebook")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="keys of a state dict must be strings"):
        convert_state_dict({3: torch.ones(1)}, to="facebook")  # type: ignore[dict-item]


@pytest.mark.parametrize("case", FACEBOOK)
def test_transformers_loads_what_is_converted(case: str, tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    arguments, weights, tensors = golden.load_case(case)
    family, fields = golden.huggingface_fields(arguments)
    config = getattr(transformers, f"{family}Config")(**fields)
    config.save_pretrained(tmp_path)
    converted = convert_state_dict(weights, to="huggingface")
    save_file(converted, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, report = getattr(transformers, f"{family}Model").from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        output = model.eval()(tensors["0.input"])
    torch.testing.assert_close(output.pooler_output, tensors["0.x_norm_clstoken"], atol=1e-4, rtol=0)
    checkpoints.assert_same(convert_state_dict(model.state_dict(), to="facebook"), weights)


@pytest.mark.parametrize("case", golden.cases("timm"))
def test_timm_loads_what_is_converted(case: str) -> None:
    pytest.importorskip("timm", reason="compares with timm, which is not installed")
    _, weights, tensors = golden.load_case(case)
    own = convert_state_dict(weights, to="facebook")
    model = golden.timm_model(case)
    model.load_state_dict(convert_state_dict(own, to="timm"), strict=True)
    checkpoints.assert_same(model.state_dict(), weights)
    with torch.no_grad():
        output = model.forward_features(tensors["0.input"])
    torch.testing.assert_close(output, tensors["0.forward_features"], atol=1e-4, rtol=0)
