"""The model against the reference's golden data, and what its users rely on."""

from __future__ import annotations

import copy
import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn

from dinov2_fast.block import Block
from dinov2_fast.configs import BACKBONES
from dinov2_fast.layers import GELU, Attention, LayerScale
from dinov2_fast.model import DinoVisionTransformer, vit_base, vit_giant2, vit_large, vit_small
from tests.helpers import golden
from tests.helpers.golden import INPUTS, close
from tests.helpers.small_models import SIZES, small


@pytest.fixture(scope="module", params=golden.cases("facebook"))
def reference(request):
    arguments, weights, tensors = golden.load_case(request.param)
    model = DinoVisionTransformer(**arguments).eval()
    model.load_state_dict(weights)
    return model, tensors


@pytest.mark.golden
@pytest.mark.parametrize("i", INPUTS)
@torch.no_grad()
def test_golden_features(reference, i: int) -> None:
    model, tensors = reference
    x = tensors[f"{i}.input"]
    features = model.forward_features(x)
    for key in ("x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens", "x_prenorm"):
        close(features[key], tensors[f"{i}.{key}"])
    assert features["masks"] is None
    close(model(x), tensors[f"{i}.forward"])
    as_training = model(x, is_training=True)
    assert all(torch.equal(as_training[key], features[key]) for key in features if key != "masks")
    mask = tensors[f"{i}.mask"]
    masked = model.forward_features(x, mask)
    close(masked["x_prenorm"], tensors[f"{i}.masked_prenorm"])
    assert masked["masks"] is mask


@pytest.mark.golden
@pytest.mark.parametrize("i", INPUTS)
@torch.no_grad()
def test_golden_intermediate_layers(reference, i: int) -> None:
    model, tensors = reference
    x = tensors[f"{i}.input"]
    pairs = model.get_intermediate_layers(x, n=2, reshape=True, return_class_token=True)
    assert len(pairs) == 2
    for j, (patches, cls_token) in enumerate(pairs):
        close(patches, tensors[f"{i}.intermediate.{j}.patch"])
        close(cls_token, tensors[f"{i}.intermediate.{j}.cls"])


@pytest.mark.golden
@torch.no_grad()
def test_golden_lists_run_as_one(reference) -> None:
    model, tensors = reference
    inputs = [tensors[f"{i}.input"] for i in INPUTS]
    masks = [tensors["0.mask"], None, tensors["2.mask"], None]
    for i, features in enumerate(model.forward_features(inputs, masks)):
        expected = "masked_prenorm" if masks[i] is not None else "x_prenorm"
        close(features["x_prenorm"], tensors[f"{i}.{expected}"])
        assert features["masks"] is masks[i]
    for i, features in enumerate(model(inputs, is_training=True)):
        close(features["x_norm_clstoken"], tensors[f"{i}.x_norm_clstoken"])


@pytest.mark.parametrize("chunks", [0, 3])
@torch.no_grad()
def test_every_flag_of_get_intermediate_layers(chunks: int) -> None:
    model = small(block_chunks=chunks, num_register_tokens=2)
    x = torch.randn(2, 3, 42, 56)
    tokens, every = model.prepare_tokens_with_masks(x), []
    for block in (block for block in model.modules() if isinstance(block, Block)):
        tokens = block(tokens)
        every.append(tokens)
    (last,) = model.get_intermediate_layers(x)
    assert torch.equal(last, model.norm(every[2])[:, 3:])
    first, third = model.get_intermediate_layers(x, n=[2, 0], norm=False)
    assert torch.equal(first, every[0][:, 3:])
    assert torch.equal(third, every[2][:, 3:])
    ((patches, cls_token),) = model.get_intermediate_layers(x, n=(1,), reshape=True, return_class_token=True)
    assert patches.shape == (2, 32, 3, 4)
    assert patches.is_contiguous()
    assert torch.equal(patches.flatten(2).transpose(1, 2), model.norm(every[1])[:, 3:])
    assert torch.equal(cls_token, model.norm(every[1])[:, 0])
    assert len(model.get_intermediate_layers(x, n=3)) == 3
    get = model._get_intermediate_layers_chunked if chunks else model._get_intermediate_layers_not_chunked
    assert [torch.equal(out, every[i]) for out, i in zip(get(x, [0, 2]), (0, 2), strict=True)] == [True, True]
    for n in (4, [3], [-1]):
        with pytest.raises(AssertionError, match="blocks found: there is no block"):
            model.get_intermediate_layers(x, n=n)


def test_chunked_and_flat_models_compute_the_same() -> None:
    flat, chunked = small(), small(block_chunks=2)
    chunked.load_state_dict(flat.state_dict())
    assert "blocks.2.2.norm1.weight" in chunked.state_dict()
    x = torch.randn(2, 3, 56, 70)
    assert torch.equal(flat(x), chunked(x))


def test_attributes_and_module_names_callers_use() -> None:
    model = small(num_register_tokens=4)
    assert (model.embed_dim, model.num_features, model.num_tokens, model.n_blocks) == (32, 32, 1, 3)
    assert (model.num_heads, model.patch_size, model.num_register_tokens) == (2, 14, 4)
    assert not model.chunked_blocks
    assert isinstance(model.head, nn.Identity)
    assert model.patch_embed.num_patches == 25
    assert model.patch_embed.patches_resolution == (5, 5)
    block = model.blocks[0]
    assert isinstance(block.attn, Attention)
    assert isinstance(block.norm1, nn.LayerNorm)
    assert isinstance(block.ls1, LayerScale)
    assert block.norm1.eps == 1e-6
    assert small().register_tokens is None
    assert isinstance(small(init_values=None).blocks[0].ls1, nn.Identity)
    assert isinstance(small(ffn_layer="identity").blocks[0].mlp, nn.Identity)
    assert isinstance(block.mlp.act, GELU)


def test_initialisation_is_the_reference_s() -> None:
    model = DinoVisionTransformer(**{**SIZES, "embed_dim": 128}, init_values=1e-5, num_register_tokens=4)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert 0 < model.cls_token.abs().max() < 1e-5
    assert 0 < model.register_tokens.abs().max() < 1e-5
    assert not model.mask_token.any()
    qkv = model.blocks[0].attn.qkv
    assert qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not qkv.bias.any()
    assert torch.equal(model.blocks[2].ls2.gamma, torch.full((128,), 1e-5))


@pytest.mark.parametrize(("uniform", "rates"), [(False, [0.0, 0.2, 0.4]), (True, [0.4, 0.4, 0.4])])
def test_stochastic_depth_grows_with_depth_unless_uniform(uniform: bool, rates: list[float]) -> None:
    model = DinoVisionTransformer(**SIZES, drop_path_rate=0.4, drop_path_uniform=uniform)
    assert [block.sample_drop_ratio for block in model.blocks] == rates


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(1, 4, 56, 56), ValueError, "takes 3 channels, got 4"),
        (torch.zeros(3, 56, 56), ValueError, r"shape \(3, 56, 56\). Add a batch dimension"),
        (torch.zeros(1, 3, 60, 56), ValueError, "height 60 is not a multiple of patch height 14. .* it to 56 or 70"),
        (torch.zeros(1, 3, 56, 57), ValueError, "width 57 is not a multiple"),
        (torch.zeros(1, 3, 7, 14), ValueError, "height 7 is not a multiple of patch height 14. .* it to 14."),
        (torch.zeros(1, 3, 0, 14), ValueError, "height 0 is not a multiple"),
        (torch.zeros(1, 3, 56, 56, dtype=torch.uint8), TypeError, "floating-point images, got torch.uint8"),
        ([], ValueError, "list of batches is empty"),
        ((torch.zeros(1, 3, 56, 56),), TypeError, "takes a tensor .* got tuple"),
        (np.zeros((1, 3, 56, 56), np.float32), TypeError, "takes a tensor .* got ndarray. Dinov2ImageProcessor"),
    ],
    ids=["channels", "rank", "height", "width", "small", "empty", "integers", "empty list", "tuple", "array"],
)
def test_bad_images_are_refused_with_a_clear_error(x, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small().forward_features(x)


def test_bad_masks_lists_and_constructor_arguments_are_refused_with_a_clear_error() -> None:
    model, x = small(), torch.zeros(2, 3, 56, 56)
    with pytest.raises(ValueError, match=r"must be \(batch, patches\) = \(2, 16\) .* got \(2, 17\)"):
        model.forward_features(x, torch.zeros(2, 17, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"masks must be bool .* got torch.float32"):
        model.forward_features(x, torch.zeros(2, 16))
    with pytest.raises(ValueError, match="2 batches but 1 masks"):
        model.forward_features([x, x], [None])
    with pytest.raises(TypeError, match="is_training=True"):
        model([x])
    with pytest.raises(ValueError, match="no ffn_layer 'mpl'; choose one of mlp"):
        DinoVisionTransformer(ffn_layer="mpl")
    with pytest.raises(ValueError, match=r"hidden size 32 is not a multiple of the number of attention heads 5"):
        small(num_heads=5)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        small(num_register_tokens=-1)


def test_an_empty_batch_gives_empty_features() -> None:
    assert small()(torch.zeros(0, 3, 56, 56)).shape == (0, 32)


def test_device_and_dtype_are_those_of_the_parameters() -> None:
    model = small()
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    model.to("meta", torch.bfloat16)
    assert (model.device, model.dtype) == (torch.device("meta"), torch.bfloat16)


def test_forward_takes_masks_and_is_training_as_the_reference_does() -> None:
    model, x, masks = small(), torch.randn(2, 3, 28, 42), torch.rand(2, 6) < 0.5
    expected = model.forward_features(x, masks)
    for features in (
        model(x, masks, is_training=True),
        model(x=x, masks=masks, is_training=True),
        model([x], [masks], is_training=True)[0],
    ):
        assert torch.equal(features["x_prenorm"], expected["x_prenorm"])
    assert torch.equal(model(x, masks), expected["x_norm_clstoken"])


def test_deepcopy_pickle_and_state_dict_round_trips() -> None:
    model, x = small(num_register_tokens=2), torch.randn(1, 3, 56, 70)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    other = small(num_register_tokens=2)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), expected)
    with pytest.raises(RuntimeError, match=r"cls_token \(\) where the model has \(1, 1, 32\)"):
        other.load_state_dict({**model.state_dict(), "cls_token": 3})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_lower_precisions_stay_near_fp32(dtype: torch.dtype) -> None:
    model, x = small(num_register_tokens=2), torch.randn(1, 3, 56, 70)
    expected = model(x)
    out = copy.deepcopy(model).to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, atol=0.1, rtol=0)
    assert (out.double() - expected).norm() / expected.norm() < 0.03


@torch.no_grad()
def test_autocast_runs_the_linears_in_bf16_and_keeps_stream_and_positions_in_fp32() -> None:
    model, x, seen = small(num_register_tokens=2), torch.randn(1, 3, 56, 70), []
    model.blocks[1].attn.qkv.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = model.prepare_tokens_with_masks(x)
        assert model.forward_features(x)["x_prenorm"].dtype == torch.float32
        patches = model.patch_embed(x)
    assert seen == [torch.bfloat16]
    assert patches.dtype == torch.bfloat16
    positions = model.interpolate_pos_encoding(tokens, 56, 70)
    assert torch.equal(tokens[:, 3:], patches.float() + positions[:, 1:])


def test_parts_can_be_replaced_as_users_do_with_the_reference() -> None:
    model, x = small(), torch.randn(1, 3, 56, 56)
    model.patch_embed.proj = nn.Conv2d(6, 32, 14, 14)
    assert model(torch.randn(1, 6, 56, 56)).shape == (1, 32)
    with pytest.raises(ValueError, match="takes 6 channels, got 3"):
        model(x)
    model.norm = nn.Identity()
    assert re.search(r"  layer_norm +torch +the others need a GPU\n", str(model))
    overlapping, seen = small(), []

    def positions(x: torch.Tensor, w: int, h: int) -> torch.Tensor:
        seen.append(x.shape)
        return torch.zeros(1, 1, 32)

    overlapping.patch_embed.proj.stride = (7, 7)
    overlapping.interpolate_pos_encoding = positions
    assert overlapping(x).shape == (1, 32)
    assert seen == [(1, 1 + 7 * 7, 32)]  # CLS and the patches, as the reference's method is called


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@torch.no_grad()
def test_a_forward_pass_on_the_meta_device_and_an_ensemble() -> None:
    with torch.device("meta"):
        assert small()(torch.empty(2, 3, 42, 98)).shape == (2, 32)
    models, x = [small(), small()], torch.randn(2, 3, 42, 98)
    parameters, buffers = torch.func.stack_module_state(models)
    together = torch.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), x))(parameters, buffers)
    for out, model in zip(together, models, strict=True):
        torch.testing.assert_close(out, model(x), atol=1e-5, rtol=0)


def test_meta_device_construction_takes_no_memory() -> None:
    with torch.device("meta"):
        model = DinoVisionTransformer(**BACKBONES["dinov2_vitg14"].constructor_arguments())
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not list(model.buffers())


def test_print_shows_backends_and_position_interpolation() -> None:
    model = small()
    text = str(model)
    assert "position_interpolation=offset" in text
    assert re.search(r"layer_norm +torch ", text)
    assert {row.op for row in model.backends()} >= {"layer_norm", "activation"}


@pytest.mark.golden
@pytest.mark.parametrize("name", golden.cases("timm"))
@torch.no_grad()
def test_golden_features_of_timm(name: str) -> None:
    arguments, weights, tensors = golden.load_case(name)
    model = DinoVisionTransformer(**arguments).eval()
    model.load_state_dict(weights)
    assert model.position_interpolation == "antialias"
    for i in INPUTS:
        features = model.forward_features(tensors[f"{i}.input"])
        keys = ("x_norm_regtokens", "x_norm_patchtokens")
        tokens = torch.cat([features["x_norm_clstoken"][:, None], *(features[key] for key in keys)], dim=1)
        close(tokens, tensors[f"{i}.forward_features"])
        close(model(tensors[f"{i}.input"]), tensors[f"{i}.forward"])


@pytest.mark.parametrize(("letter", "make"), [("s", vit_small), ("b", vit_base), ("l", vit_large), ("g", vit_giant2)])
def test_the_references_factories_make_models_of_the_configurations_sizes(letter: str, make) -> None:
    config = BACKBONES[f"dinov2_vit{letter}14_reg"]
    with torch.device("meta"):
        model = make(14, 4, img_size=28, block_chunks=0)
        default = make()
    assert (model.embed_dim, model.n_blocks, model.num_heads) == (config.embed_dim, config.depth, config.num_heads)
    assert model.blocks[0].mlp.fc1.out_features == 4 * config.embed_dim
    assert (model.patch_size, model.num_register_tokens, model.pos_embed.shape[1]) == (14, 4, 5)
    assert (default.patch_size, default.num_register_tokens, default.chunked_blocks) == (16, 0, True)


def test_a_replica_of_data_parallel_knows_its_device_and_dtype() -> None:
    """A replica has the tensors as attributes, and no parameters."""
    replica = small()._replicate_for_data_parallel()
    for name, parameter in replica._parameters.items():
        setattr(replica, name, parameter.detach())
    replica._parameters = {}
    for module in replica.children():
        module._parameters = {}
    assert (replica.device, replica.dtype) == (torch.device("cpu"), torch.float32)
