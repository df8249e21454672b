"""The op patches, and the normalisation of uint8 images folded into the weight that multiplies them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dinov2_fast.inference.fold import fold_normalization
from dinov2_fast.ops.dispatch import BackendError
from dinov2_fast.ops.patches import patches, patches_torch
from tests import reference
from tests.helpers.devices import DEVICE, each_backend, on_gpu, opcheck, poisoned_memory, random, runs_triton

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def _images(dtype: torch.dtype, *shape: int) -> Tensor:
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=torch.uint8).to(DEVICE)
    return torch.rand(shape).to(DEVICE, dtype)


def _normalization(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return MEAN.to(DEVICE, dtype), STD.to(DEVICE, dtype)


def _channels_last(images: Tensor) -> Tensor:
    """The same images, stored as (batch, height, width, channels)."""
    return images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("of", [torch.uint8, *FLOATS], ids=str)
@each_backend
def test_obeys_the_rule(backend: str, of: torch.dtype, dtype: torch.dtype, channels_last: bool) -> None:
    images = _images(of, 2, 3, 28, 42)
    images = _channels_last(images) if channels_last else images
    with poisoned_memory():
        rows = patches(images, 14, padded_to=592, dtype=dtype, backend=backend)
    assert rows.shape == (2, 6, 592)
    assert rows.is_contiguous()
    plain = patches_torch(images, 14, (14, 14), 592, dtype)
    reference.assert_obeys_rule(rows, reference.patches(images, 14, 592), plain)


@pytest.mark.parametrize(
    ("shape", "patch_size", "padded_to"),
    [((1, 3, 14, 14), 14, 588), ((3, 3, 84, 14), 14, 640), ((2, 1, 15, 25), 5, 25), ((2, 5, 6, 4), 1, 9)],
    ids=str,
)
@each_backend
def test_other_sizes_obey_the_rule(backend: str, shape: tuple[int, ...], patch_size: int, padded_to: int) -> None:
    images = random(*shape)
    with poisoned_memory():
        rows = patches(images, patch_size, padded_to=padded_to, backend=backend)
    assert torch.equal(rows.double(), reference.patches(images, patch_size, padded_to))
    assert torch.equal(patches(images, patch_size, backend=backend), rows[..., : shape[1] * patch_size**2])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@each_backend
def test_every_shifted_byte_is_exact(backend: str, dtype: torch.dtype) -> None:
    images = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(1, 1, 16, 16)
    rows = patches(images, 16, dtype=dtype, backend=backend)
    assert rows.flatten().tolist() == list(range(-128, 128))


@each_backend
def test_rows_times_weight_is_the_convolution(backend: str) -> None:
    images = random(2, 3, 28, 56, dtype=torch.float64)
    weight = random(8, 3, 14, 14, dtype=torch.float64)
    rows = patches(images, 14, dtype=torch.float64, backend=backend)
    expected = F.conv2d(images, weight, stride=14).flatten(2).mT
    torch.testing.assert_close(rows @ weight.flatten(1).T, expected, rtol=0, atol=1e-12)


STRIDES = {
    "crop": lambda x: x[:, :, 3:31, 5:47],
    "every second image": lambda x: x[::2, :, :28, :42],
    "every second pixel": lambda x: x[:, :, :56:2, :84:2],
    "grey seen as three channels": lambda x: x[:, :1, :28, :42].expand(-1, 3, -1, -1),
    "one image seen as four": lambda x: x[:1, :, :28, :42].expand(4, -1, -1, -1),
    "channels outermost": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)[:, :, :28, :42],
    "transposed": lambda x: x.transpose(2, 3)[:, :, :42, :28],
    "bgr": lambda x: x[:, [2, 1, 0], :28, :42],
}


@pytest.mark.parametrize("make", STRIDES.values(), ids=STRIDES)
@pytest.mark.parametrize("of", [torch.uint8, torch.float32], ids=str)
@each_backend
def test_strided_images_give_what_a_copy_gives(backend: str, of: torch.dtype, make: Any) -> None:
    images = make(_images(of, 4, 3, 70, 84))
    rows = patches(images, 14, padded_to=592, backend=backend)
    assert torch.equal(rows, patches(images.contiguous(), 14, padded_to=592, backend=backend))
    assert torch.equal(rows.double(), reference.patches(images, 14, 592))


@pytest.mark.sanitize
@each_backend
def test_nan_and_inf_stay_in_their_place(backend: str) -> None:
    images = torch.rand(2, 3, 28, 28, device=DEVICE)
    images[1, 2, 15, 3], images[1, 2, 15, 4] = float("nan"), float("inf")
    rows = patches(images, 14, padded_to=592, backend=backend)
    place = 2 * 196 + 14 + 3
    assert rows[1, 2, place].isnan()
    assert rows[1, 2, place + 1] == float("inf")
    assert rows.isfinite().sum() == rows.numel() - 2


@each_backend
def test_an_empty_batch_gives_no_rows(backend: str) -> None:
    assert patches(torch.empty(0, 3, 28, 42, device=DEVICE), 14, backend=backend).shape == (0, 6, 588)


# The folded normalisation


def _noise_and_embedding() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """uint8 images, the convolution's weight and bias, and the convolution of the normalised images in fp64."""
    images = _images(torch.uint8, 2, 3, 140, 210)
    weight, bias = random(64, 3, 14, 14, scale=0.02), random(64, scale=0.02)
    mean, std = (v[:, None, None] for v in _normalization(torch.float64))
    exact = F.conv2d((images.double() / 255 - mean) / std, weight.double(), bias.double(), stride=14)
    return images, weight, bias, exact.flatten(2).mT


@pytest.mark.parametrize("padded_to", [588, 592])
@each_backend
def test_folded_normalization_equals_normalizing_first(backend: str, padded_to: int) -> None:
    images, weight, bias, exact = _noise_and_embedding()
    mean, std = _normalization(torch.float64)
    folded, constant = fold_normalization(weight, bias, mean, std, torch.float64, padded_to)
    rows = patches(images, 14, padded_to=padded_to, dtype=torch.float64, backend=backend)
    torch.testing.assert_close(F.linear(rows, folded, constant), exact, rtol=0, atol=1e-12)
    without_bias = fold_normalization(weight, None, mean, std, torch.float64, padded_to)[1]
    torch.testing.assert_close(without_bias, constant - bias.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_backend
def test_folded_normalization_avoids_the_cancellation_trap(backend: str, dtype: torch.dtype) -> None:
    images, weight, bias, exact = _noise_and_embedding()
    mean, std = _normalization()

    def error(rows: Tensor, weight: Tensor, bias: Tensor) -> float:
        return (F.linear(rows.double(), weight.flatten(1).double(), bias.double()) - exact).norm().item()

    rows = patches(images, 14, dtype=dtype, backend=backend)
    ours = error(rows, *fold_normalization(weight, bias, mean, std, dtype, weight[0].numel()))
    normalized = (images.float() / 255 - mean[:, None, None]) / std[:, None, None]
    normalized_first = error(patches(normalized, 14, dtype=dtype, backend=backend), weight.to(dtype), bias)
    # Rows in 0..255 with the constant of the exact weight.
    exact_weight = weight.double() / (255 * std.double()[:, None, None])
    constant = bias - (exact_weight * 255 * mean.double()[:, None, None]).sum((1, 2, 3))
    trap = error(rows.double() + 128, exact_weight.to(dtype), constant)
    assert ours < normalized_first < trap


def test_folding_rounds_once() -> None:
    _, weight, bias, _ = _noise_and_embedding()
    mean, std = _normalization()
    folded, constant = fold_normalization(weight, bias, mean, std, torch.bfloat16, weight[0].numel())
    exact = weight.double() / (255 * std.double()[:, None, None])
    assert torch.equal(folded, exact.flatten(1).to(torch.bfloat16))
    assert constant.dtype == torch.float32
    # An image in the colour of the mean gives the bias alone.
    colour = (255 * mean.double() - 128)[:, None].expand(3, 196).flatten()
    torch.testing.assert_close(folded.double() @ colour + constant.double(), bias.double(), rtol=0, atol=1e-6)


# Errors


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"\(batch, channels, height, width\), got shape \(3, 28, 28\)", {"images": torch.rand(3, 28, 28)}),
        ("height 27 is not a multiple of the patch size 14", {"images": torch.rand(1, 3, 27, 28)}),
        (r"width 3 .* images.permute\(0, 3, 1, 2\)", {"images": torch.rand(1, 28, 28, 3)}),
        ("width 0 is not a multiple", {"images": torch.rand(1, 3, 28, 0)}),
        ("padded_to is 587, but a patch has 588", {"padded_to": 587}),
    ],
)
def test_sizes_that_do_not_fit_are_an_error(message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        patches(**{"images": torch.rand(1, 3, 28, 28), "patch_size": 14, **arguments})


def test_unsupported_dtypes_are_an_error() -> None:
    with pytest.raises(TypeError, match=r"uint8 or floating-point images, got torch\.int32"):
        patches(torch.zeros(1, 3, 28, 28, dtype=torch.int32), 14)
    with pytest.raises(TypeError, match=r"floating-point rows, not torch\.uint8"):
        patches(torch.rand(1, 3, 28, 28), 14, dtype=torch.uint8)


@pytest.mark.parametrize("backend", [None, "torch", "triton"])
def test_is_for_inference_only(backend: str | None) -> None:
    with FakeTensorMode():
        images = torch.empty(1, 3, 28, 28, device="cuda", requires_grad=True)
        with pytest.raises(BackendError, match="is for inference only, and gradients are recorded"):
            patches(images, 14, backend=backend)
        with torch.no_grad():
            assert patches(images, 14, backend="torch").shape == (1, 4, 588)


# Registration with torch


@runs_triton
@pytest.mark.parametrize("of", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_registered_ops_pass_opcheck(channels_last: bool, of: torch.dtype) -> None:
    images = _images(of, 2, 3, 28, 42)
    images = _channels_last(images) if channels_last else images
    op = torch.ops.dinov2_fast.patches.default
    opcheck(op, (images, 14, 592, torch.float32))


@each_backend
def test_compiled_as_one_graph_and_in_inference_mode(backend: str) -> None:
    def embed(images: Tensor, weight: Tensor) -> Tensor:
        return patches(images, 14, dtype=torch.float32, backend=backend) @ weight

    images, weight = _images(torch.uint8, 2, 3, 28, 42), random(588, 8)
    compiled = torch.compile(embed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, weight), embed(images, weight))
    with torch.inference_mode():
        torch.testing.assert_close(compiled(images, weight), embed(images, weight))


@pytest.mark.gpu_large
@on_gpu
def test_more_than_2_to_the_31_elements() -> None:
    images = _images(torch.uint8, 1, 3, 224, 224).expand(14300, -1, -1, -1).contiguous()
    rows = patches(images, 14, padded_to=592, dtype=torch.bfloat16, backend="triton")
    assert rows.numel() > 2**31
    assert torch.equal(rows[-1], patches(images[:1], 14, padded_to=592, dtype=torch.bfloat16, backend="torch")[0])
