"""The op sinkhorn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dinov2_fast import ops
from dinov2_fast.ops import _prototypes
from tests import reference
from tests.helpers.devices import (
    BACKENDS,
    DEVICE,
    STRIDES,
    LargestTensor,
    opcheck,
    poisoned_memory,
    random,
    runs_triton,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _inputs(n: int, prototypes: int, width: int = 24, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Samples and prototypes of length 1, of which some samples are alike."""
    z = normalize(random(n, width, dtype=torch.float64) + 0.5 * random(1, width, dtype=torch.float64), dim=-1)
    return z.to(dtype), normalize(random(prototypes, width, dtype=torch.float64), dim=-1).to(dtype)


def _targets(z: Tensor, w: Tensor, temperature: float, a: Tensor, b: Tensor) -> Tensor:
    return (z.double() @ w.double().T / temperature - a.double() - b.double()[:, None]).exp()


def _matrix_form(z: Tensor, w: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Targets (n, K) by Sinkhorn-Knopp on the matrix itself, in fp64: Caron et al., arXiv:2006.09882, appendix A."""
    q = torch.exp(z.double() @ w.double().T / temperature).T  # (K, n)
    q = q / q.sum()
    prototypes, n = q.shape
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / prototypes
        q = q / q.sum(0, keepdim=True) / n
    return (q * n).T


def _log_form(z: Tensor, w: Tensor, temperature: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """a and b by plain PyTorch in a dtype."""
    y = z.to(dtype) @ w.to(dtype).T / temperature
    b = y.new_zeros(len(z))
    for _ in range(3):
        a = (y - b[:, None]).logsumexp(0)
        b = (y - a).logsumexp(1)
    return a, b


@pytest.fixture(params=[*BACKENDS, "torch in chunks"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """In chunks, logits of 64 samples are computed for 15 prototypes at a time."""
    if request.param == "torch in chunks":
        monkeypatch.setattr(_prototypes, "CHUNK_BYTES", 4 * 1000)
    return str(request.param).partition(" ")[0]


@pytest.mark.parametrize("logits", [1, 8])
def test_gives_the_targets_of_the_matrix_form(backend: str, logits: int) -> None:
    z, w = _inputs(64, 50)
    temperature = 0.05 / logits
    a, b = ops.sinkhorn(z, w, temperature, backend=backend)
    targets = _targets(z, w, temperature, a, b)
    torch.testing.assert_close(targets, _matrix_form(z, w, temperature), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(targets.sum(1), torch.ones_like(b), rtol=0, atol=1e-12)


@pytest.mark.parametrize("iterations", [1, 2, 10])
def test_iterates_as_often_as_asked(backend: str, iterations: int) -> None:
    z, w = _inputs(20, 30)
    a, b = ops.sinkhorn(z, w, 0.1, iterations=iterations, backend=backend)
    torch.testing.assert_close(_targets(z, w, 0.1, a, b), _matrix_form(z, w, 0.1, iterations), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("n", "prototypes", "width"), [(64, 50, 24), (1, 7, 1), (33, 130, 40)])
@each_dtype
def test_obeys_the_rule(backend: str, dtype: torch.dtype, n: int, prototypes: int, width: int) -> None:
    z, w = _inputs(n, prototypes, width, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    with poisoned_memory():
        found = ops.sinkhorn(z, w, 0.05, backend=backend)
    for y, ref, plain in zip(found, _log_form(z, w, 0.05), _log_form(z, w, 0.05, wide), strict=True):
        reference.assert_obeys_rule(y, ref, plain)


def test_is_finite_in_fp32_where_the_matrix_form_overflows(backend: str) -> None:
    z, w = _inputs(64, 50, dtype=torch.float32)
    temperature = 0.05 / 8
    assert torch.isinf(torch.exp(z @ w.T / temperature)).any()
    a, b = ops.sinkhorn(z, w, temperature, backend=backend)
    expected, plain = _log_form(z, w, temperature), _log_form(z, w, temperature, torch.float32)
    for each in zip((a, b), expected, plain, strict=True):
        reference.assert_obeys_rule(*each)


def test_prototypes_without_samples_near_them_obey_the_rule(backend: str) -> None:
    """exp(y) of the far prototypes is 0 in fp32 for all samples, so that the matrix form divides 0 by 0."""
    z, w = _inputs(64, 50, dtype=torch.float32)
    z = normalize(z + 2 * normalize(z.mean(0), dim=0), dim=-1)
    w[40:] -= 4 * normalize(z.mean(0), dim=0)
    y = z @ w.T / 0.02
    assert ((y - y.max()).exp().sum(0) == 0).any()
    a, b = ops.sinkhorn(z, w, 0.02, backend=backend)
    expected, plain = _log_form(z, w, 0.02), _log_form(z, w, 0.02, torch.float32)
    for each in zip((a, b), expected, plain, strict=True):
        reference.assert_obeys_rule(*each)
    assert _targets(z, w, 0.02, a, b).sum(0)[40:].min() > 0.1  # a far prototype is used too


def test_one_sample_gives_the_uniform_target(backend: str) -> None:
    z, w = _inputs(1, 40)
    a, b = ops.sinkhorn(z, w, 0.05, backend=backend)
    torch.testing.assert_close(_targets(z, w, 0.05, a, b), torch.full((1, 40), 1 / 40, device=DEVICE).double())


def _in_two_processes(parts: list[Tensor], w: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """a, and b of all parts. Each gets from `reduce` what the other would send."""
    waiting: list[list[Tensor]] = [[] for _ in parts]  # each part's a before it is reduced, in the order of iterations
    offsets = [part.new_zeros(len(part)) for part in parts]
    for _ in range(3):
        for part, offset, sent in zip(parts, offsets, waiting, strict=True):
            sent.append((part @ w.T / 0.05 - offset[:, None]).logsumexp(0))
        a = torch.logaddexp(waiting[0][-1], waiting[1][-1])
        offsets = [(part @ w.T / 0.05 - a).logsumexp(1) for part in parts]
    results: list[tuple[Tensor, Tensor]] = []
    for own, other in (waiting, waiting[::-1]):
        steps = iter(zip(own, other, strict=True))

        def reduce(x: Tensor, steps: Any = steps) -> Tensor:
            mine, others = next(steps)
            torch.testing.assert_close(x, mine, rtol=1e-10, atol=1e-10)
            return torch.logaddexp(x, others)

        results.append(ops.sinkhorn(parts[len(results)], w, 0.05, reduce=reduce, backend=backend))
        assert next(steps, None) is None, "reduce was not called in each iteration"
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-10, atol=1e-10)
    return results[0][0], torch.cat([result[1] for result in results])


@pytest.mark.parametrize("split", [0, 1, 20, 64])
def test_two_processes_give_what_one_gives(backend: str, split: int) -> None:
    z, w = _inputs(64, 50)
    a, b = _in_two_processes([z[:split], z[split:]], w, backend)
    expected = ops.sinkhorn(z, w, 0.05, backend=backend)
    torch.testing.assert_close((a, b), expected, rtol=1e-10, atol=1e-10)


def test_no_sample_in_any_process(backend: str) -> None:
    z, w = _inputs(0, 50, dtype=torch.float32)
    a, b = ops.sinkhorn(z, w, 0.05, backend=backend)
    assert (a == -torch.inf).all()
    assert a.dtype == b.dtype == torch.float32
    assert (a.shape, b.shape) == ((50,), (0,))


def test_a_given_a_is_used_as_it_is(backend: str) -> None:
    z, w = _inputs(64, 50)
    a = random(50, dtype=torch.float64)
    found, b = ops.sinkhorn(z, w, 0.05, a=a, backend=backend)
    assert torch.equal(found, a)
    torch.testing.assert_close(_targets(z, w, 0.05, a, b), (z @ w.T / 0.05 - a).softmax(1))


def test_stores_no_more_logits_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_prototypes, "CHUNK_BYTES", 4 * 64 * 100)
    z, w = _inputs(64, 650, 8, torch.float32)
    with LargestTensor() as largest:
        ops.sinkhorn(z, w, 0.05, backend="torch")
    assert largest.elements == 64 * 100  # of 64 x 650


@pytest.mark.parametrize("layout", STRIDES)
def test_strided_inputs_give_what_copies_give(backend: str, layout: str) -> None:
    z, w = _inputs(33, 70, dtype=torch.float32)
    found = ops.sinkhorn(STRIDES[layout](z), STRIDES[layout](w), 0.05, backend=backend)
    torch.testing.assert_close(found, ops.sinkhorn(z, w, 0.05, backend=backend))


@runs_triton
@pytest.mark.parametrize("rows", [9, 0])
@pytest.mark.parametrize("strided", [False, True])
def test_the_registered_op_passes_opcheck(strided: bool, rows: int) -> None:
    """Several programs share the 130 columns."""
    x = random(24, rows).mT if strided else random(rows, 24)
    for offset in (random(130), None):
        opcheck(torch.ops.dinov2_fast.sinkhorn_lse.default, (x, random(130, 24), offset, 0.1))


def test_autocast_changes_nothing(backend: str) -> None:
    z, w = _inputs(20, 30, dtype=torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = ops.sinkhorn(z, w, 0.05, backend=backend)
    assert all(map(torch.equal, found, ops.sinkhorn(z, w, 0.05, backend=backend)))


def test_records_no_gradient() -> None:
    z, w = _inputs(20, 30)
    a, b = ops.sinkhorn(z.requires_grad_(), w.requires_grad_(), 0.05)
    assert not a.requires_grad
    assert not b.requires_grad


def test_arguments_that_do_not_fit_are_an_error() -> None:
    z, w = _inputs(20, 30)
    with pytest.raises(ValueError, match=r"takes z \(n, D\) and prototypes \(K, D\), got \(20, 23\) and \(30, 24\)"):
        ops.sinkhorn(z[:, 1:], w, 0.05)
    with pytest.raises(ValueError, match=r"takes a of shape \(30,\), got \(20,\)"):
        ops.sinkhorn(z, w, 0.05, a=z[:, 0])
    with pytest.raises(ValueError, match="at least one iteration, got 0"):
        ops.sinkhorn(z, w, 0.05, iterations=0)
