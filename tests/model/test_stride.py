"""Overlapping patches in every face and its engine, against the reference's formula and peers with a patched stride."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import dinov2_fast
from dinov2_fast import Dinov2ImageProcessor, Extractor, ops, optimize_for_inference
from dinov2_fast.cli import main
from dinov2_fast.curation.neighbours import search
from dinov2_fast.export import export
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.ops.dispatch import BackendError, use_backend
from tests import reference
from tests.helpers.huggingface_peers import FAMILIES, make_pair
from tests.helpers.small_models import small, wild
from tests.helpers.timm_peers import NAMES
from tests.helpers.timm_peers import make_pair as make_timm_pair

KINDS = {"mlp": {}, "registers": {"num_register_tokens": 4, "interpolate_antialias": True, "interpolate_offset": 0.0}}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
# Images and strides, and the patches that there are: 42 to 112 pixels, of a table for 5 x 5 patches.
CASES = [((56, 84), 7, (7, 11)), ((56, 84), (14, 7), (4, 11)), ((49, 63), 7, (6, 8)), ((42, 42), 7, (5, 5))]
CASES += [((70, 112), 4, (15, 25))]  # 4 does not divide 14; the last pixels are unseen
each_case = pytest.mark.parametrize(("size", "stride", "grid"), CASES, ids=str)


def positions(model: DinoVisionTransformer, grid: tuple[int, int]) -> Tensor:
    """The reference's interpolate_pos_encoding for the grid of overlapping patches, in fp64 by torch's resampling."""
    table, side = model.pos_embed.double(), round((model.pos_embed.shape[1] - 1) ** 0.5)
    if grid == (side, side):
        return table
    maps = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    offset = model.interpolate_offset
    how: dict[str, Any] = {"size": grid}
    if offset:
        how = {"scale_factor": [(n + offset) / side for n in grid], "recompute_scale_factor": False}
    maps = F.interpolate(maps, mode="bicubic", antialias=model.interpolate_antialias, **how)
    assert maps.shape[-2:] == grid
    return torch.cat([table[:, :1], maps.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def by_hand(model: DinoVisionTransformer, x: Tensor, stride: Any, grid: tuple[int, int]) -> list[Tensor]:
    """The tokens after each block in fp64, every patch cut out of the images by itself."""
    down, across = (stride, stride) if isinstance(stride, int) else stride
    model, x = copy.deepcopy(model).double(), x.double()
    weight, bias = model.patch_embed.proj.weight.flatten(1), model.patch_embed.proj.bias
    cut = [
        x[:, :, i * down : i * down + 14, j * across : j * across + 14] for i in range(grid[0]) for j in range(grid[1])
    ]
    patches = torch.stack([reference.linear(patch.flatten(1), weight, bias) for patch in cut], 1)
    tokens = torch.cat([model.cls_token.expand(len(x), -1, -1), patches], 1) + positions(model, grid)
    if model.register_tokens is not None:
        tokens = torch.cat([tokens[:, :1], model.register_tokens.expand(len(x), -1, -1), tokens[:, 1:]], 1)
    outputs = [tokens]
    for block in model.blocks:
        outputs.append(block(outputs[-1]))
    return outputs


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours.double(), expected.double(), atol=tolerance, rtol=tolerance)


@each_case
@each_kind
@torch.no_grad()
def test_every_method_equals_the_reference_with_a_patched_stride(
    kind: dict[str, Any], size: tuple[int, int], stride: Any, grid: tuple[int, int]
) -> None:
    model, x = small(**kind), torch.randn(2, 3, *size)
    outputs = by_hand(model, x, stride, grid)
    norm, first = copy.deepcopy(model.norm).double(), 1 + model.num_register_tokens
    model.stride = stride
    assert model.patch_grid(*size) == grid
    for each in (model, optimize_for_inference(model, "fp32")):
        assert each.stride == ((stride, stride) if isinstance(stride, int) else stride)
        close(each.prepare_tokens_with_masks(x), outputs[0], 2e-5)
        features = each.forward_features(x)
        close(features["x_prenorm"], outputs[-1])
        assert features["x_norm_patchtokens"].shape == (2, grid[0] * grid[1], 32)
        close(each(x), norm(outputs[-1])[:, 0])
        maps, cls = each.get_intermediate_layers(x, [1], reshape=True, return_class_token=True)[0]
        expected = norm(outputs[2])
        close(cls, expected[:, 0])
        for row, column in ((0, 0), (1, 2), (grid[0] - 1, grid[1] - 1)):
            close(maps[:, :, row, column], expected[:, first + row * grid[1] + column])
        assert each.attention_maps(x).shape == (2, 1, 2, *grid)
        masks = torch.rand(2, grid[0] * grid[1]) < 0.5
        close(each.forward_features(x, masks)["x_prenorm"], model.forward_features(x, masks)["x_prenorm"])


@torch.no_grad()
def test_a_stride_set_by_hand_is_followed_and_taken_back() -> None:
    model, x = small(), torch.randn(1, 3, 56, 70)
    before = model.forward_features(x)["x_prenorm"]
    model.stride = 7
    expected = model.forward_features(x)["x_prenorm"]
    for by_hand in ((7, 7), 7):
        other = copy.deepcopy(model)
        other.stride = 14
        assert torch.equal(other.forward_features(x)["x_prenorm"], before)
        other.patch_embed.proj.stride = by_hand
        assert other.stride == (7, 7)
        assert torch.equal(other.forward_features(x)["x_prenorm"], expected)
        close(optimize_for_inference(other, "fp32").forward_features(x)["x_prenorm"], expected, 2e-5)


@pytest.mark.parametrize("stride", [0, 15, (7, 28), -7], ids=str)
def test_a_stride_out_of_range_is_refused(stride: Any) -> None:
    with pytest.raises(ValueError, match=r"is out of range: take 1 to the patch size, \(14, 14\)"):
        small().stride = stride


def test_sizes_that_neither_the_patches_nor_the_reference_fit_are_refused() -> None:
    model = small()
    model.stride = 7
    for each in (model, optimize_for_inference(model, "fp32")):
        assert each(torch.zeros(1, 3, 49, 14)).shape == (1, 32)
        with pytest.raises(ValueError, match="height 50 is not a multiple of patch height 14"):
            each(torch.zeros(1, 3, 50, 56))
        with pytest.raises(ValueError, match="width 7 is not a multiple"):
            each(torch.zeros(1, 3, 56, 7))
        with pytest.raises(AttributeError, match="stride belongs to the model: set it there"):
            optimize_for_inference(model, "fp32").stride = 14


# Engines


@each_kind
@torch.no_grad()
def test_an_engine_in_bf16_differs_as_little_as_the_model_in_bf16(kind: dict[str, Any]) -> None:
    model, x = wild(kind), torch.randn(2, 3, 56, 84)
    exact = by_hand(model, x, 7, (7, 11))[-1]
    model.stride = 7
    plain = copy.deepcopy(model).bfloat16().forward_features(x.bfloat16())["x_prenorm"]
    for setting in ({}, {"residual_dtype": "fp32"}):
        engine = optimize_for_inference(model, "bf16", allow_slow=True, **setting)
        found = engine.forward_features(x)["x_prenorm"]
        assert (found.double() - exact).norm() <= 2 * (plain.double() - exact).norm()


@torch.no_grad()
def test_an_engine_with_a_stride_takes_bytes_and_lists() -> None:
    model = small(num_register_tokens=2)
    model.stride = 7
    engine = optimize_for_inference(model, "fp32", max_tokens=100)
    bytes_, other = torch.randint(256, (2, 56, 84, 3), dtype=torch.uint8), torch.randn(1, 3, 49, 63)
    mean, std = (torch.tensor(values)[:, None, None] for values in (engine.plan.mean, engine.plan.std))
    x = (bytes_.permute(0, 3, 1, 2) / 255 - mean) / std
    close(engine.forward_features(bytes_)["x_prenorm"], model.forward_features(x)["x_prenorm"])
    for found, each in zip(engine.cls_tokens([bytes_, other]), (x, other), strict=True):
        close(found, model(each))
    masks = [torch.rand(2, 77) < 0.5, None]
    together = engine.forward_features_list([bytes_, other], masks)
    for found, expected in zip(together, model.forward_features_list([x, other], masks), strict=True):
        close(found["x_prenorm"], expected["x_prenorm"])


@torch.no_grad()
def test_an_engine_follows_a_new_stride() -> None:
    model, x = small(), torch.randn(1, 3, 56, 70)
    engine = optimize_for_inference(model, "fp32")
    close(engine.forward_features(x)["x_prenorm"], model.forward_features(x)["x_prenorm"])
    model.stride = 7
    close(engine.forward_features(x)["x_prenorm"], model.forward_features(x)["x_prenorm"])


def test_the_kernel_refuses_overlap_in_words() -> None:
    with FakeTensorMode(), torch.no_grad():
        images = torch.empty(1, 3, 28, 28, device="cuda")
        with pytest.raises(BackendError, match=r"cuts patches without overlap only, got a stride of \(7, 7\)"):
            ops.patches(images, 14, stride=(7, 7), backend="triton")
        with use_backend("patches=torch"):
            assert ops.patches(images, 14, stride=(7, 7)).shape == (1, 9, 588)


@pytest.mark.parametrize("stride", [(7, 7), (3, 5), (14, 14)], ids=str)
def test_rows_are_those_of_torch_s_unfold(stride: tuple[int, int]) -> None:
    images = torch.randn(2, 3, 56, 84, dtype=torch.float64)
    rows = ops.patches(images, 14, stride=stride, dtype=torch.float64)
    assert torch.equal(rows, F.unfold(images, 14, stride=stride).mT)
    assert torch.equal(
        rows, ops.patches(images.contiguous(memory_format=torch.channels_last), 14, stride=stride, dtype=torch.float64)
    )


# The other faces, against peers whose stride is patched


@pytest.mark.parametrize("size", [(56, 84), (52, 73)], ids=str)  # the convolution leaves out what no patch reaches
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_stride_equals_transformers_with_a_patched_stride(family: str, size: tuple[int, int]) -> None:
    pair, x = make_pair(family), torch.randn(2, 3, *size)
    grid = tuple((side - 14) // 7 + 1 for side in size)
    embeddings = pair.theirs.embeddings
    table = embeddings.position_embeddings
    antialias = bool(pair.registers)

    def interpolate(*args: Any) -> Tensor:
        maps = table[:, 1:].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
        maps = F.interpolate(maps, size=grid, mode="bicubic", antialias=antialias)
        return torch.cat([table[:, :1], maps.permute(0, 2, 3, 1).flatten(1, 2)], 1)

    embeddings.patch_embeddings.projection.stride = (7, 7)
    embeddings.interpolate_pos_encoding = interpolate
    expected = pair.theirs(x).last_hidden_state
    pair.ours.stride = 7
    for model in (pair.ours, optimize_for_inference(pair.ours, "fp32")):
        found = model(x)
        close(found.last_hidden_state, expected, 2e-4)
        assert model.grid(x) == grid
        assert model.attention_maps(x).shape[-2:] == grid


@torch.no_grad()
def test_feature_maps_of_the_hugging_face_backbone() -> None:
    backbone = make_pair("Dinov2WithRegisters", "Backbone", out_indices=[2], apply_layernorm=False).ours
    backbone.stride = 7
    x = torch.randn(2, 3, 52, 73)
    for model in (backbone, optimize_for_inference(backbone, "fp32")):
        output = model(x, output_hidden_states=True)
        assert output.feature_maps[0].shape == (2, 128, 6, 9)
        assert torch.equal(output.feature_maps[0].flatten(2).mT, output.hidden_states[2][:, 5:])


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_stride_equals_timm_with_a_patched_stride(name: str, pad: bool) -> None:
    pair = make_timm_pair(name, dynamic_img_pad=pad)
    x = torch.randn(2, 3, 45, 80) if pad else torch.randn(2, 3, 56, 84)
    pair.theirs.patch_embed.proj.stride = (7, 7)  # timm's positions follow what comes out of the convolution
    expected = pair.theirs.forward_features(x)
    pair.ours.stride = 7
    for model in (pair.ours, optimize_for_inference(pair.ours, "fp32")):
        close(model.forward_features(x), expected, 2e-4)
        final, maps = model.forward_intermediates(x, 1, norm=True)
        assert maps[0].shape == (2, 128, 7, 11)
        torch.testing.assert_close(maps[0].flatten(2).mT, final[:, model.num_prefix_tokens :])
        assert model.attention_maps(x).shape == (2, 1, 2, 7, 11)


@torch.no_grad()
def test_timm_s_position_table_is_resampled_for_patches_without_overlap() -> None:
    one, x = make_timm_pair().ours, torch.randn(1, 3, 56, 84)
    other = copy.deepcopy(one)
    one.stride = 7
    one.set_input_size((98, 112))
    other.set_input_size((98, 112))
    assert torch.equal(one.pos_embed, other.pos_embed)
    other.stride = 7
    assert torch.equal(one(x), other(x))


# What uses a model


def test_extracted_patches_and_the_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(2):
        noise = np.random.default_rng(i).integers(0, 256, (60, 90, 3), np.uint8)
        Image.fromarray(noise).save(images / f"{i}.png")
    model = small(embed_dim=64)
    torch.save(model.state_dict(), tmp_path / "small.pth")
    arguments = ["--model", str(tmp_path / "small.pth"), "--size", "56", "--device", "cpu"]
    extract = ["extract", str(images), *arguments, "--out", str(tmp_path / "features"), "--workers", "1"]
    assert main([*extract, "--features", "cls,patches", "--stride", "7", "--dtype", "fp32"]) == 0
    features = dinov2_fast.load_features(tmp_path / "features")
    assert features.manifest["model"]["stride"] == [7, 7]
    assert features["patches"].shape == (2, 49, 64)
    loaded = dinov2_fast.load(tmp_path / "small.pth")
    loaded.stride = 7
    processor = Dinov2ImageProcessor.for_size(56)
    with torch.no_grad():
        x = processor([Image.open(images / f"{i}.png") for i in range(2)], return_tensors="pt").pixel_values
        expected = loaded.forward_features(x)["x_norm_patchtokens"]
    close(torch.from_numpy(np.asarray(features["patches"])), expected)
    column = {"bytes": [(images / "0.png").read_bytes()]}
    found = Extractor(loaded, features=["patches"], processor=processor, dtype="fp32")(column)
    close(torch.from_numpy(found["patches"]), expected[:1])
    assert search(features, [images / "1.png"], k=1, device="cpu").cosines[0, 0] == pytest.approx(1, abs=1e-5)
    assert main([*extract, "--features", "cls,patches", "--dtype", "fp32"]) == 1
    assert "model.stride is [7, 7] there and [14, 14] here" in capsys.readouterr().err
    show = ["show", str(images), *arguments, "--out", str(tmp_path / "sheets"), "--stride", "7"]
    assert main([*show, "--pca", "--attention"]) == 0
    assert main(["show", str(tmp_path / "features"), "--pca", "--out", str(tmp_path / "sheets2")]) == 0


def test_an_exported_graph_has_the_stride(tmp_path: Path) -> None:
    model = small()
    model.stride = 7
    exported = export(model, tmp_path / "model.pt2", format="torch-export")
    assert {each.shape[1] for each in exported.differences if each.output == "patches"} == {31 * 31, 21 * 27}
