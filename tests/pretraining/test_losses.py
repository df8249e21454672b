"""The losses of pretraining against their formulas in fp64, written independently."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dinov2_fast.ops.prototype_loss import Targets
from dinov2_fast.pretraining.losses import dino_losses, ibot_loss, koleo_loss

TEMPERATURE = 0.1


def make_targets(shape: tuple[int, ...], prototypes: int, generator: torch.Generator) -> tuple[Targets, Tensor]:
    """Targets with random vectors a, normalised by b, and the matrix that they stand for."""
    z = torch.randn(*shape, 8, generator=generator, dtype=torch.float64)
    w = torch.randn(prototypes, 8, generator=generator, dtype=torch.float64)
    a = torch.randn(prototypes, generator=generator, dtype=torch.float64)
    logits = z @ w.T / 0.5 - a
    b = logits.logsumexp(-1)
    return Targets(z, w, a, b, 0.5), (logits - b[..., None]).exp()


def cross_entropy(target: Tensor, student: Tensor, prototypes: Tensor) -> Tensor:
    return -(target * (student @ prototypes.T / TEMPERATURE).log_softmax(-1)).sum(-1)


@pytest.mark.parametrize("n_local", [0, 1, 3])
def test_dino_pairs_each_global_crop_with_the_other_and_each_local_crop_with_both(n_local: int) -> None:
    generator = torch.Generator().manual_seed(0)
    targets, (t_a, t_b) = make_targets((2, 5), 11, generator)
    student = torch.randn(2 + n_local, 5, 8, generator=generator, dtype=torch.float64)
    v = torch.randn(11, 8, generator=generator, dtype=torch.float64)
    terms = 2 + (2 * n_local or 1)
    expected_global = (cross_entropy(t_b, student[0], v).mean() + cross_entropy(t_a, student[1], v).mean()) / terms
    expected_local = sum(
        (cross_entropy(t, crop, v).mean() / terms for crop in student[2:] for t in (t_a, t_b)),
        torch.zeros((), dtype=torch.float64),
    )
    on_global, on_local = dino_losses(student, v, targets, TEMPERATURE)
    torch.testing.assert_close((on_global, on_local), (expected_global, expected_local))


def test_uniform_outputs_have_a_dino_loss_of_ln_k() -> None:
    targets, _ = make_targets((2, 4), 16, torch.Generator().manual_seed(1))
    losses = dino_losses(torch.zeros(6, 4, 8), torch.randn(16, 8), targets, TEMPERATURE)
    assert float(sum(losses)) == pytest.approx(math.log(16))


def test_ibot_is_the_mean_over_the_masked_patches_of_each_crop_and_then_over_all_crops() -> None:
    generator = torch.Generator().manual_seed(2)
    counts = [3, 0, 1, 2]  # masked patches of each crop
    targets, matrix = make_targets((1, sum(counts)), 7, generator)
    student = torch.randn(sum(counts), 8, generator=generator, dtype=torch.float64)
    v = torch.randn(7, 8, generator=generator, dtype=torch.float64)
    weights = torch.tensor([1 / count for count in counts for _ in range(count)], dtype=torch.float64)
    losses = cross_entropy(matrix[0], student, v).split(counts)
    expected = sum(each.mean() for each in losses if len(each)) / len(counts)
    torch.testing.assert_close(ibot_loss(student, v, targets, weights, len(counts), TEMPERATURE), expected)


def test_ibot_without_masked_patches_is_zero_and_has_gradients() -> None:
    targets, _ = make_targets((1, 0), 7, torch.Generator().manual_seed(3))
    student, v = torch.zeros(0, 8, requires_grad=True), torch.randn(7, 8, requires_grad=True)
    loss = ibot_loss(student, v, targets, torch.zeros(0), 4, TEMPERATURE)
    loss.backward()
    assert loss == 0
    assert v.grad is not None
    assert not v.grad.any()


def koleo_by_hand(x: Tensor) -> float:
    """Of one crop (images, hidden), image by image."""
    x = x.double() / x.double().norm(dim=-1, keepdim=True)
    total = 0.0
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        j = max(others, key=lambda j: float(x[i] @ x[j]))
        total -= math.log(float((x[i] - x[j] + 1e-8).norm()) + 1e-8)
    return total / len(x)


def test_koleo_is_the_mean_log_distance_to_the_nearest_within_each_crop() -> None:
    x = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(4))
    assert float(koleo_loss(x)) == pytest.approx(sum(koleo_by_hand(crop) for crop in x), rel=1e-6)


def test_koleo_of_one_image_is_zero() -> None:
    assert koleo_loss(torch.randn(2, 1, 10)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_koleo_of_duplicates_is_finite_and_so_are_its_gradients(dtype: torch.dtype) -> None:
    x = torch.ones(2, 4, 10, dtype=dtype).requires_grad_()
    loss = koleo_loss(x)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_koleo_of_bf16_tokens_is_computed_in_fp32() -> None:
    x = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(5)).bfloat16()
    assert float(koleo_loss(x)) == pytest.approx(koleo_by_hand(x[0].float()), rel=1e-5)
