"""Resampling of positions: three interpolations against F.interpolate, at every size, eager and traced."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dinov2_fast import position_embeddings
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.position_embeddings import (
    POSITION_INTERPOLATIONS,
    position_interpolation,
    resample_position_embeddings,
)
from dinov2_fast.weights.load import load

GRID = 37
SIZES = [(n, n) for n in range(1, 75)] + [(16, 24), (37, 19), (4, 74), (1, 37), (24, 16)]


def _interpolated(table: torch.Tensor, height: int, width: int, name: str) -> torch.Tensor:
    """What each implementation does, by torch's own resampling."""
    grid = round(table.shape[0] ** 0.5)
    if (height, width) == (grid, grid):
        return table
    image = table.reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    if name == "offset":
        scale = ((height + 0.1) / grid, (width + 0.1) / grid)
        out = F.interpolate(image, scale_factor=scale, mode="bicubic")
    else:
        out = F.interpolate(image, size=(height, width), mode="bicubic", antialias=name == "antialias")
    assert out.shape[-2:] == (height, width)
    return out.permute(0, 2, 3, 1).flatten(0, 2)


@pytest.mark.parametrize("name", POSITION_INTERPOLATIONS)
def test_every_size_equals_interpolate(name: str) -> None:
    table = torch.randn(GRID * GRID, 8, dtype=torch.float64)
    for height, width in SIZES:
        exact = resample_position_embeddings(table, height, width, position_interpolation(name))
        assert (exact - _interpolated(table, height, width, name)).abs().max() <= 1e-12, (height, width)
        single = resample_position_embeddings(table.float(), height, width, position_interpolation(name))
        assert single.dtype == torch.float32
        assert (single - _interpolated(table.float(), height, width, name)).abs().max() <= 1e-4, (height, width)


@pytest.mark.parametrize("name", POSITION_INTERPOLATIONS)
def test_the_native_grid_is_the_table_itself(name: str) -> None:
    table = torch.randn(GRID * GRID, 8)
    assert torch.equal(resample_position_embeddings(table, GRID, GRID, position_interpolation(name)), table)
    interpolation = position_interpolation(name)
    matrices = position_embeddings._matrices(GRID, GRID, (GRID, GRID), interpolation, torch.device("cpu"))
    for matrix in matrices:  # what a traced graph uses at that size
        assert torch.equal(matrix, torch.eye(GRID, dtype=torch.float64))


@pytest.mark.parametrize("name", POSITION_INTERPOLATIONS)
def test_gradients_are_those_of_interpolate(name: str) -> None:
    table = torch.randn(25, 3, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(4 * 9, 3, dtype=torch.float64)
    (ours,) = torch.autograd.grad(resample_position_embeddings(table, 4, 9, position_interpolation(name)), table, seed)
    (theirs,) = torch.autograd.grad(_interpolated(table, 4, 9, name), table, seed)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_tables_are_resampled_in_fp32(dtype: torch.dtype) -> None:
    table = torch.randn(25, 8).to(dtype)
    out = resample_position_embeddings(table, 4, 9, position_interpolation("size"))
    assert torch.equal(out, resample_position_embeddings(table.float(), 4, 9, position_interpolation("size")))
    assert out.dtype == torch.float32


def test_autocast_does_not_lower_the_precision() -> None:
    table = torch.randn(25, 8)
    plain = resample_position_embeddings(table, 4, 9, position_interpolation("size"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resample_position_embeddings(table, 4, 9, position_interpolation("size")), plain)


def test_matrices_made_in_inference_mode_serve_training() -> None:
    position_embeddings._cached_matrices.cache_clear()
    table = torch.randn(25, 8, dtype=torch.float64, requires_grad=True)  # the matrices' own dtype: they are used as is
    with torch.inference_mode():
        resample_position_embeddings(table, 3, 7, position_interpolation("antialias"))
    assert position_embeddings._cached_matrices.cache_info().currsize == 1
    resample_position_embeddings(table, 3, 7, position_interpolation("antialias")).sum().backward()
    assert table.grad is not None


def test_the_cache_is_bounded_and_holds_no_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    position_embeddings._cached_matrices.cache_clear()
    with FakeTensorMode():
        resample_position_embeddings(torch.randn(25, 8), 3, 7, position_interpolation("size"))
    assert position_embeddings._cached_matrices.cache_info().currsize == 0
    for width in range(1, 300):
        resample_position_embeddings(torch.zeros(4, 1), 1, width, position_interpolation("size"))
    assert position_embeddings._cached_matrices.cache_info().currsize == 256


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", POSITION_INTERPOLATIONS)
def test_a_traced_graph_follows_the_size(name: str) -> None:
    table = torch.randn(25, 4, dtype=torch.float64)

    def resample(image: torch.Tensor) -> torch.Tensor:
        return resample_position_embeddings(table, image.shape[0], image.shape[1], position_interpolation(name))

    torch._dynamo.reset()
    compiled = torch.compile(resample, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for height, width in [(3, 7), (7, 3), (5, 5), (4, 9), (12, 12)]:
            expected = _interpolated(table, height, width, name)
            assert (compiled(torch.empty(height, width)) - expected).abs().max() <= 1e-12
    traced = torch.jit.trace(resample, (torch.empty(3, 7),), check_trace=False)
    for height, width in [(3, 7), (4, 9), (5, 5)]:
        difference = traced(torch.empty(height, width)) - _interpolated(table, height, width, name)
        assert difference.abs().max() <= 1e-12


def test_models_take_the_interpolation_of_the_reference_and_can_be_given_another() -> None:
    sizes = {"img_size": 70, "patch_size": 14, "embed_dim": 8, "depth": 1, "num_heads": 1}
    model = DinoVisionTransformer(**sizes)
    assert model.position_interpolation == "offset"
    model.position_interpolation = "antialias"
    assert (model.interpolate_offset, model.interpolate_antialias) == (0.0, True)
    model.interpolate_antialias = False
    assert model.position_interpolation == "size"
    model.interpolate_offset = 0.2
    assert model.position_interpolation == "custom"
    with pytest.raises(ValueError, match="no position interpolation 'facebook'; choose one of offset, size"):
        model.position_interpolation = "facebook"


def test_interpolate_pos_encoding_keeps_the_cls_position_and_the_dtype() -> None:
    model = DinoVisionTransformer(img_size=70, patch_size=14, embed_dim=8, depth=1, num_heads=1)
    encoding = model.interpolate_pos_encoding(torch.zeros(1, 1, 8, dtype=torch.float64), 42, 98)
    assert encoding.shape == (1, 1 + 3 * 7, 8)
    assert encoding.dtype == torch.float64
    assert torch.equal(encoding[0, 0].float(), model.pos_embed[0, 0])


def test_a_table_that_is_no_square_is_refused() -> None:
    with pytest.raises(ValueError, match="24 positions, which is not a square grid"):
        resample_position_embeddings(torch.zeros(24, 2), 3, 3, position_interpolation("size"))


@torch.inference_mode()
def test_the_interpolations_differ_at_224_px_as_readme_says() -> None:
    model, x, features = load("dinov2_vits14", weights="random:0"), torch.randn(2, 3, 224, 224), {}
    for name in POSITION_INTERPOLATIONS:
        model.position_interpolation = name
        features[name] = model.forward_features(x)["x_norm_patchtokens"]
    worst = {name: (f - features["offset"]).abs().max() / features["offset"].std() for name, f in features.items()}
    assert worst["size"] == pytest.approx(0.2, abs=0.05)
    assert worst["antialias"] == pytest.approx(0.4, abs=0.05)
