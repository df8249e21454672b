"""`attention_maps` and `qkv_features` on every face and its engine, against the formula in fp64 and against peers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_fast import optimize_for_inference
from dinov2_fast.model import DinoVisionTransformer
from tests import reference
from tests.helpers.documents import example
from tests.helpers.huggingface_peers import FAMILIES, both, make_pair
from tests.helpers.small_models import KINDS_OF_MODEL, small, wild
from tests.helpers.timm_peers import NAMES
from tests.helpers.timm_peers import make_pair as make_timm_pair

ROWS, COLUMNS = 3, 5  # of patches; not square, so that a transposed grid shows
IMAGES = (2, 3, 14 * ROWS, 14 * COLUMNS)

each_kind = pytest.mark.parametrize("kind", KINDS_OF_MODEL.values(), ids=KINDS_OF_MODEL)


def packed(model: DinoVisionTransformer, images: Tensor) -> list[Tensor]:
    """The queries, keys and values of each block in fp64, (batch, tokens, 3, heads, head_dim), from the formula."""
    model = copy.deepcopy(model).double()
    x, found = model.prepare_tokens_with_masks(images.double()), []
    for block in (module for module in model.blocks.modules() if hasattr(module, "norm1")):
        y = reference.layer_norm(x, block.norm1.weight, block.norm1.bias, block.norm1.eps)
        qkv = reference.linear(y, block.attn.qkv.weight, block.attn.qkv.bias)
        found.append(qkv.reshape(*qkv.shape[:2], 3, model.num_heads, -1))
        x = block(x)
    return found


def cls_maps(qkv: Tensor, grid: tuple[int, int] = (ROWS, COLUMNS)) -> Tensor:
    """(batch, heads, rows, columns): what the CLS token takes of each patch; the patches are the last tokens."""
    weights = reference.attention_probabilities(qkv)[:, :, 0]
    maps = torch.zeros(*weights.shape[:2], *grid, dtype=torch.float64)
    for row in range(grid[0]):
        for column in range(grid[1]):
            maps[:, :, row, column] = weights[:, :, -grid[0] * grid[1] + row * grid[1] + column]
    return maps


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours.double(), expected.double(), atol=2e-6, rtol=2e-4)


@each_kind
@torch.no_grad()
def test_maps_are_the_cls_row_of_the_softmax(kind: dict[str, Any]) -> None:
    model, images = wild(kind), torch.randn(IMAGES)
    expected = [cls_maps(qkv) for qkv in packed(model, images)]
    maps = model.attention_maps(images)
    assert maps.shape == (2, 1, 2, ROWS, COLUMNS)
    close(maps[:, 0], expected[-1])
    assert (maps.sum((-2, -1)) < 1).all()
    chosen = model.attention_maps(images, layers=[-1, 0, 2], heads=[1])
    for i, layer in enumerate((-1, 0, 2)):
        close(chosen[:, i], expected[layer][:, 1:])
    assert torch.equal(model.attention_maps(images, 1, (-1, 0)), model.attention_maps(images, [1])[:, :, [1, 0]])


@each_kind
@torch.no_grad()
def test_queries_give_whole_rows(kind: dict[str, Any]) -> None:
    model, images = wild(kind), torch.randn(IMAGES)
    expected = torch.stack([reference.attention_probabilities(qkv) for qkv in packed(model, images)], 1)
    whole = model.attention_maps(images, range(4), queries=slice(None))
    assert whole.shape == (2, 4, 2, expected.shape[-1], expected.shape[-1])
    close(whole, expected)
    patches = slice(1 + model.num_register_tokens, None)
    close(model.attention_maps(images, range(4), queries=patches), expected[..., patches, :])
    assert patches.start == expected.shape[-1] - ROWS * COLUMNS


@each_kind
@torch.no_grad()
def test_queries_keys_and_values_are_the_formula_s(kind: dict[str, Any]) -> None:
    model, images = wild(kind), torch.randn(IMAGES)
    expected = packed(model, images)
    tokens = 1 + model.num_register_tokens + ROWS * COLUMNS
    found, maps = model.qkv_features(images, [2, 0]), model.qkv_features(images, [2, 0], reshape=True)
    for part, name in enumerate(("query", "key", "value")):
        feature, of_patches = getattr(found, name), getattr(maps, name)
        assert feature.shape == (2, 2, 2, tokens, 64)
        assert of_patches.shape == (2, 2, 128, ROWS, COLUMNS)
        for i, layer in enumerate((2, 0)):
            of_layer = expected[layer][:, :, part]  # (batch, tokens, heads, head_dim)
            torch.testing.assert_close(feature[:, i].double(), of_layer.transpose(1, 2), atol=1e-4, rtol=1e-4)
            for row, column in ((0, 0), (0, 4), (2, 1)):
                patch = of_layer[:, tokens - ROWS * COLUMNS + row * COLUMNS + column].flatten(1)
                torch.testing.assert_close(of_patches[:, i, :, row, column].double(), patch, atol=1e-4, rtol=1e-4)
    weights = (found.query @ found.key.mT / 64**0.5).softmax(-1)
    close(weights, model.attention_maps(images, [2, 0], queries=slice(None)))


@pytest.mark.parametrize("size", [(42, 70), (45, 80)], ids=str)  # transformers leaves out what is beyond whole patches
@pytest.mark.parametrize("task", ["Model", "Backbone", "ForImageClassification"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_maps_equal_the_attentions_of_transformers(family: str, task: str, size: tuple[int, int]) -> None:
    pair, images = make_pair(family, task), torch.randn(2, 3, *size)
    keys = ("layer.2.attention.attention.key", "layer.2.attention.k_proj")  # in transformers 5.17, and in 5.23
    name = next(name for name, _ in pair.theirs.named_modules() if name.endswith(keys))
    seen: list[Tensor] = []
    pair.theirs.get_submodule(name).register_forward_hook(lambda *args: seen.append(args[2]))
    _, theirs = both(pair, images, output_attentions=True)
    first_patch = 1 + pair.registers
    for model in (pair.ours, optimize_for_inference(pair.ours, "fp32")):
        whole = model.attention_maps(images, [0, 1, 2], queries=slice(None))
        torch.testing.assert_close(whole, torch.stack(theirs.attentions, 1), atol=1e-5, rtol=1e-3)
        maps = model.attention_maps(images, [0, 1, 2])
        assert maps.shape == (2, 3, 2, 3, 5)
        torch.testing.assert_close(maps.flatten(-2), whole[..., 0, first_patch:])
        keys = model.qkv_features(images, 2).key[:, 0]
        torch.testing.assert_close(keys.transpose(1, 2).flatten(2), seen[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_maps_equal_the_attention_weights_of_timm(name: str, pad: bool) -> None:
    pair = make_timm_pair(name, dynamic_img_pad=pad)
    images = torch.randn(2, 3, 41, 60) if pad else torch.randn(IMAGES)
    seen: list[Tensor] = []
    pair.theirs.blocks[2].attn.qkv.register_forward_hook(lambda *args: seen.append(args[2]))
    pair.theirs(images)
    qkv = seen[0].unflatten(-1, (3, 2, 64))
    for model in (pair.ours, optimize_for_inference(pair.ours, "fp32")):
        torch.testing.assert_close(model.attention_maps(images, 2)[:, 0].double(), cls_maps(qkv), atol=1e-6, rtol=1e-3)
        found = torch.stack(model.qkv_features(images, [2])).squeeze(2).permute(1, 3, 0, 2, 4)
        torch.testing.assert_close(found, qkv, atol=1e-4, rtol=1e-4)


# Errors as a share of the reference's norm. In bf16 an engine may be twice as wrong as the model itself. In e4m3 the
# first block's operands, of 4 bits, put its features off by some 3 %; tests/inference/test_fp8.py is about later ones.
ENGINES = {"fp32": {}, "bf16": {}, "bf16, residual fp32": {"residual_dtype": "fp32"}, "fp8": {}}


def error(ours: Any, expected: Tensor) -> float:
    return ((torch.as_tensor(ours).double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("setting", ENGINES)
@each_kind
@torch.no_grad()
def test_an_engine_differs_as_little_as_its_precision_allows(kind: dict[str, Any], setting: str) -> None:
    model, images = wild(kind), torch.randn(IMAGES)
    precision = setting.partition(",")[0]
    engine = optimize_for_inference(model, precision, allow_slow=True, **ENGINES[setting])
    if precision == "fp8":
        engine.calibrate(images)
    layers = range(1 if precision == "fp8" else 4)
    qkv = [packed(model, images)[i] for i in layers]
    maps, features = torch.stack([cls_maps(each) for each in qkv], 1), torch.stack(qkv, 1)
    in_bf16 = copy.deepcopy(model).bfloat16()
    for get, expected in (
        (lambda m, x: m.attention_maps(x, layers), maps),
        (lambda m, x: torch.stack(m.qkv_features(x, layers)).permute(1, 2, 4, 3, 0, 5), features.transpose(3, 4)),
    ):
        found = get(engine, images)
        assert found.dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)
        limit = {"fp32": 1e-4, "bf16": 2 * error(get(in_bf16, images.bfloat16()), expected), "fp8": 0.06}[precision]
        assert error(found, expected) < limit
        assert error(found.flip(-3), expected) > 3 * limit  # heads in another order


@torch.no_grad()
def test_an_engine_takes_images_of_bytes() -> None:
    model = wild({})
    engine, images = optimize_for_inference(model, "fp32"), torch.randint(256, (2, 42, 70, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in (engine.plan.mean, engine.plan.std))
    normalised = (images.permute(0, 3, 1, 2) / 255 - mean) / std
    torch.testing.assert_close(engine.attention_maps(images), model.attention_maps(normalised), atol=1e-5, rtol=1e-3)
    close(engine.qkv_features(images).key, engine.qkv_features(normalised).key)


@torch.no_grad()
def test_the_documented_example_runs() -> None:
    names: dict[str, Any] = {"model": small(depth=12), "images": torch.randn(IMAGES)}
    exec(example("attention_maps("), names)
    tokens = 1 + ROWS * COLUMNS
    assert names["maps"].shape == (2, 1, 2, ROWS, COLUMNS)
    assert names["weights"].shape == (2, 1, 2, tokens, tokens)
    assert names["query"].shape == names["key"].shape == names["value"].shape == (2, 2, 2, tokens, 16)
    assert names["keys"].shape == (2, 1, 32, ROWS, COLUMNS)
    assert names["dense"].shape == (2, 32, 2 * ROWS - 1, 2 * COLUMNS - 1)


def test_gradients_flow_and_no_later_block_runs() -> None:
    model, ran = wild({"num_register_tokens": 4}), []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *args, i=i: ran.append(i))
    model.attention_maps(torch.randn(IMAGES), layers=[2, 0])[..., 1, 1].sum().backward()
    assert ran == [0, 1]
    assert model.blocks[2].attn.qkv.weight.grad.abs().sum() > 0
    assert model.blocks[2].attn.proj.weight.grad is None


@torch.no_grad()
def test_blocks_and_heads_that_do_not_exist_are_refused() -> None:
    model, images = wild({}), torch.randn(IMAGES)
    for each in (model, optimize_for_inference(model, "fp32")):
        with pytest.raises(ValueError, match="There is no block 4; the blocks of this model are 0 to 3, or -4 to -1"):
            each.attention_maps(images, layers=[0, 4])
        with pytest.raises(ValueError, match="There is no block -5"):
            each.qkv_features(images, -5)
        with pytest.raises(ValueError, match="There is no head 2; the heads of this model are 0 to 1"):
            each.attention_maps(images, heads=[2])
        with pytest.raises(ValueError, match="No block was asked for"):
            each.attention_maps(images, layers=[])
        with pytest.raises(TypeError, match=r"takes a tensor .* got list"):
            each.attention_maps([images])
