"""The teacher's targets against dense formulas in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dinov2_fast.pretraining.targets import centered_targets, sinkhorn_targets, target_entropies, updated_center


def alone(x: Tensor) -> Tensor:
    return x


def joined_with(other: Tensor, combine: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What a second process with the tensor `other` makes of a reduction."""
    return lambda x: combine(torch.stack((x, other.to(x.dtype))))


def matrix(targets) -> Tensor:  # type: ignore[no-untyped-def]
    logits = targets.z.double() @ targets.prototypes.double().T / targets.temperature
    return (logits - targets.a.double() - targets.b.double()[..., None]).exp()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_sinkhorn_targets_are_those_of_the_matrix_form() -> None:
    z, w = tokens(2, 6, 8), tokens(5, 8, seed=1)
    q = (z.double().flatten(0, 1) @ w.double().T / 0.7).exp().T  # (prototypes, tokens)
    for _ in range(3):
        q = q / q.sum(dim=1, keepdim=True)
        q = q / q.sum(dim=0, keepdim=True)
    found = matrix(sinkhorn_targets(z, w, 0.7, alone)).flatten(0, 1)
    torch.testing.assert_close(found, q.T, rtol=1e-5, atol=1e-7)


def test_the_centre_shifts_the_logits_before_the_softmax() -> None:
    z, w, center = tokens(2, 6, 8), tokens(5, 8, seed=1), tokens(5, seed=2)
    expected = ((z.double() @ w.double().T - center) / 0.3).softmax(dim=-1)
    torch.testing.assert_close(matrix(centered_targets(z, w, 0.3, center)), expected, rtol=1e-5, atol=1e-7)


def test_the_centre_is_an_average_over_the_batches_before() -> None:
    center, expected = torch.zeros(5), torch.zeros(5, dtype=torch.float64)
    for step in range(3):
        z, w = tokens(2, 6, 8, seed=step), tokens(5, 8, seed=10 + step)
        center = updated_center(center, z, w, 0.9, alone)
        expected = 0.9 * expected + 0.1 * (z.double() @ w.double().T).flatten(0, 1).mean(dim=0)
    torch.testing.assert_close(center.double(), expected, rtol=1e-6, atol=1e-7)


def test_the_centre_weighs_processes_by_their_tokens() -> None:
    z, other, w = tokens(1, 2, 8), tokens(1, 6, 8, seed=3), tokens(5, 8, seed=1)
    sums = torch.cat((other[0].sum(dim=0), torch.tensor([6.0])))
    found = updated_center(torch.zeros(5), z, w, 0.0, joined_with(sums, lambda x: x.sum(dim=0)))
    torch.testing.assert_close(found, (torch.cat((z, other), dim=1)[0] @ w.T).mean(dim=0))


def test_the_centre_stays_if_there_are_no_tokens() -> None:
    center = tokens(5)
    assert torch.equal(updated_center(center, tokens(1, 0, 8), tokens(5, 8), 0.9, alone), center)


@pytest.mark.parametrize("chunk", [1, 15, 1 << 20])
def test_entropies_are_those_of_the_matrix(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov2_fast.pretraining.targets.CHUNK_ELEMENTS", chunk)
    targets = centered_targets(tokens(2, 6, 8), tokens(5, 8, seed=1), 0.5, tokens(5, seed=2))
    p = matrix(targets).flatten(0, 1)
    entropy, mean_entropy = target_entropies(targets, alone)
    assert float(entropy) == pytest.approx(float(-(p * p.log()).sum(dim=1).mean()), rel=1e-5)
    assert float(mean_entropy) == pytest.approx(float(-(p.mean(dim=0) * p.mean(dim=0).log()).sum()), rel=1e-5)


def test_equal_tokens_have_a_mean_entropy_of_their_own_entropy_and_uniform_ones_of_ln_k() -> None:
    w = tokens(5, 8)
    same = centered_targets(tokens(1, 1, 8).expand(1, 7, 8), w, 0.5, torch.zeros(5))
    entropy, mean_entropy = target_entropies(same, alone)
    assert float(entropy) == pytest.approx(float(mean_entropy), rel=1e-5)
    uniform = centered_targets(torch.zeros(1, 7, 8), w, 0.5, torch.zeros(5))
    assert [float(each) for each in target_entropies(uniform, alone)] == pytest.approx([math.log(5)] * 2)
