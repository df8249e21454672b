"""The op prototype_loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dinov2_fast import ops
from dinov2_fast.ops import _prototypes
from dinov2_fast.ops.prototype_loss import Targets
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
Arguments = tuple[Tensor, Tensor, Targets, Tensor]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _arguments(
    dtype: torch.dtype = torch.float64, crops: int = 4, n: int = 9, prototypes: int = 50, width: int = 24
) -> Arguments:
    """A student's tokens and prototypes, the targets of two crops that Sinkhorn-Knopp gives, and a pairing."""
    student, z = (normalize(random(size, n, width, dtype=torch.float64), dim=-1).to(dtype) for size in (crops, 2))
    v, w = (normalize(random(prototypes, width, dtype=torch.float64), dim=-1).to(dtype) for _ in range(2))
    return student, v, _targets(z, w), random(crops, 2, dtype=torch.float64).abs()


def _targets(z: Tensor, w: Tensor) -> Targets:
    a, b = ops.sinkhorn(z.flatten(0, 1), w, 0.07, backend="torch")
    return Targets(z, w, a, b.view(z.shape[:2]), 0.07)


def _dense(student: Tensor, v: Tensor, targets: Targets, pairing: Tensor, temperature: float = 0.1) -> Tensor:
    """The loss by plain PyTorch from the whole matrices.

    Logits are in fp32 (or fp64), and targets are rounded to the student's dtype, as operands of a product are.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    log_p = (student.to(wide) @ v.to(wide).T / temperature).log_softmax(-1)  # (crops, n, K)
    y = targets.z.to(wide) @ targets.prototypes.to(wide).T / targets.temperature
    t = (y - targets.a - targets.b[..., None]).exp().to(student.dtype).to(wide)  # (target_crops, n, K)
    return -torch.einsum("cj,jnk,cnk->cn", pairing.to(wide), t, log_p)


def _with_gradients(function: Any, student: Tensor, v: Tensor, *rest: Any, **options: Any) -> list[Tensor]:
    """The loss, and the gradients of student and prototypes for fixed weights of the losses."""
    leaves = [x.detach().clone().requires_grad_() for x in (student, v)]
    loss = function(*leaves, *rest, **options)
    weights = torch.randn(loss.shape, generator=torch.Generator().manual_seed(5)).to(loss)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, weights)]


def _doubled(arguments: Arguments) -> Arguments:
    student, v, targets, pairing = arguments
    z, w, a, b, temperature = targets
    return student.double(), v.double(), Targets(z.double(), w.double(), a.double(), b.double(), temperature), pairing


def _assert_obeys_rule(found: list[Tensor], arguments: Arguments) -> None:
    ref, plain = _with_gradients(_dense, *_doubled(arguments)), _with_gradients(_dense, *arguments)
    for each in zip(found, ref, plain, strict=True):
        reference.assert_obeys_rule(*each)


@pytest.fixture(params=[*BACKENDS, "torch in chunks"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """In chunks, logits of 4 crops of 9 tokens are computed for 13 prototypes at a time."""
    if request.param == "torch in chunks":
        monkeypatch.setattr(_prototypes, "CHUNK_BYTES", 4 * 36 * 13)
    return str(request.param).partition(" ")[0]


SIZES = {"small": (4, 9, 50, 24), "odd": (3, 23, 131, 40)}  # crops, n, prototypes, width


@pytest.mark.parametrize("size", SIZES)
@each_dtype
def test_loss_and_gradients_obey_the_rule(backend: str, dtype: torch.dtype, size: str) -> None:
    arguments = _arguments(dtype, *SIZES[size])
    with poisoned_memory():
        found = _with_gradients(ops.prototype_loss, *arguments, backend=backend)
    _assert_obeys_rule(found, arguments)


@pytest.mark.parametrize("size", [*SIZES.values(), (1, 1, 5, 16), (2, 3, 7, 1)], ids=str)
def test_equals_the_loss_from_whole_matrices(backend: str, size: tuple[int, int, int, int]) -> None:
    arguments = _arguments(torch.float64, *size)
    found = _with_gradients(ops.prototype_loss, *arguments, temperature=0.2, backend=backend)
    torch.testing.assert_close(found, _with_gradients(_dense, *arguments, temperature=0.2), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sharp_softmaxes_and_rows_of_other_sizes_obey_the_rule(backend: str, dtype: torch.dtype) -> None:
    student, v, targets, pairing = _arguments(dtype, n=40, width=64)
    student[0] /= 1000
    student[2] *= 8
    targets = _targets(targets.z * 8, targets.prototypes)
    arguments = student, v, targets, pairing
    found = _with_gradients(ops.prototype_loss, *arguments, backend=backend)
    ref, plain = _with_gradients(_dense, *_doubled(arguments)), _with_gradients(_dense, *arguments)
    for crop in range(4):
        for y, expected, usual in zip(found[:2], ref, plain, strict=False):
            reference.assert_obeys_rule(y[crop], expected[crop], usual[crop])
    reference.assert_obeys_rule(found[2], ref[2], plain[2])


def test_gradient_is_zero_where_the_student_equals_the_target(backend: str) -> None:
    """A softmax of the student's own logits as target: both sums of the gradient are alike and cancel."""
    student, v, _, _ = _arguments(torch.float32, crops=2)
    lse = (student @ v.T / 0.1).logsumexp(-1)
    targets = Targets(student, v, v.new_zeros(50), lse, 0.1)
    pairing = torch.eye(2, device=DEVICE)
    _, *gradients = _with_gradients(ops.prototype_loss, student, v, targets, pairing, backend=backend)
    for gradient in gradients:
        assert gradient.abs().max() < 1e-5


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_prototypes, "CHUNK_BYTES", 8 * 12 * 7)
    student, v, targets, pairing = _arguments(crops=3, n=4, prototypes=30, width=5)
    student, v = student.requires_grad_(), v.requires_grad_()
    assert torch.autograd.gradcheck(lambda s, v: ops.prototype_loss(s, v, targets, pairing), (student, v))


def test_a_pairing_of_zero_leaves_a_target_out(backend: str) -> None:
    student, v, targets, pairing = _arguments()
    pairing[:, 1] = 0
    found = _with_gradients(ops.prototype_loss, student, v, targets, pairing, backend=backend)
    first = Targets(targets.z[:1], targets.prototypes, targets.a, targets.b[:1], targets.temperature)
    expected = _with_gradients(ops.prototype_loss, student, v, first, pairing[:, :1], backend=backend)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("dtype", "teachers"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_teachers_may_have_another_width_and_dtype(backend: str, dtype: torch.dtype, teachers: torch.dtype) -> None:
    student, v, _, pairing = _arguments(dtype)
    z, w = random(2, 9, 40, dtype=torch.bfloat16), random(50, 40, dtype=teachers)
    arguments = student, v, _targets(z * 0.1, w), pairing
    found = _with_gradients(ops.prototype_loss, *arguments, backend=backend)
    assert [x.dtype for x in found] == [torch.promote_types(dtype, torch.float32), dtype, dtype]
    expected = _with_gradients(_dense, *_doubled(arguments))
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close([x.double() for x in found], expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("layout", STRIDES)
def test_strided_inputs_give_what_copies_give(backend: str, layout: str) -> None:
    contiguous, make = _arguments(torch.float32), STRIDES[layout]
    student, v, (z, w, a, b, temperature), pairing = contiguous
    targets = Targets(make(z), make(w), a.repeat_interleave(2)[::2], b.T.contiguous().T, temperature)
    found = []
    for s, own, *rest in ((make(student), make(v), targets, pairing.T.contiguous().T), contiguous):
        leaves = [x.detach().requires_grad_() for x in (s, own)]  # a clone could be contiguous
        loss = ops.prototype_loss(*leaves, *rest, backend=backend)
        found.append([loss.detach(), *torch.autograd.grad(loss.sum(), leaves)])
    torch.testing.assert_close(*found)


@runs_triton
@pytest.mark.parametrize("rows", [9, 0])
@pytest.mark.parametrize("strided", [False, True])
def test_the_registered_op_passes_opcheck(strided: bool, rows: int) -> None:
    x = random(24, rows).mT if strided else random(rows, 24)
    y, v = random(130, 24), random(130, 40)
    for row, column in ((random(rows), random(130)), (random(rows), None), (None, random(130))):
        opcheck(torch.ops.dinov2_fast.prototype_sum.default, (x, y, v, row, column, 0.1))


def test_no_token_gives_no_loss_and_no_gradient(backend: str) -> None:
    student, v, targets, pairing = _arguments(n=0)
    loss, dstudent, dv = _with_gradients(ops.prototype_loss, student, v, targets, pairing, backend=backend)
    assert (loss.shape, dstudent.shape) == ((4, 0), (4, 0, 24))
    assert torch.equal(dv, torch.zeros_like(v))


def test_teachers_get_no_gradient(backend: str) -> None:
    student, v, targets, pairing = _arguments()
    for tensor in targets[:4]:
        tensor.requires_grad_()
    ops.prototype_loss(student.requires_grad_(), v, targets, pairing, backend=backend).sum().backward()
    assert student.grad is not None
    assert all(tensor.grad is None for tensor in targets[:4])


def test_stores_no_more_logits_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = _arguments(torch.float32, crops=4, n=16, prototypes=650, width=8)
    monkeypatch.setattr(_prototypes, "CHUNK_BYTES", 4 * 64 * 100)
    with LargestTensor() as largest:
        _with_gradients(ops.prototype_loss, *arguments, backend="torch")
    assert largest.elements == 64 * 100  # of 64 x 650


def test_autocast_changes_nothing(backend: str) -> None:
    arguments = _arguments(torch.float32)
    expected = _with_gradients(ops.prototype_loss, *arguments, backend=backend)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = _with_gradients(ops.prototype_loss, *arguments, backend=backend)
    torch.testing.assert_close(found, expected)


def test_arguments_that_do_not_fit_are_an_error() -> None:
    student, v, targets, pairing = _arguments()
    with pytest.raises(ValueError, match=r"takes student \(crops, n, D\), got \(9, 24\)"):
        ops.prototype_loss(student[0], v, targets, pairing)
    with pytest.raises(ValueError, match=r"takes student of shape \(4, 9, 24\) here, got \(4, 9, 23\)"):
        ops.prototype_loss(student[..., 1:], v, targets, pairing)
    with pytest.raises(ValueError, match=r"takes prototypes of shape \(50, 24\) here, got \(49, 24\)"):
        ops.prototype_loss(student, v[1:], targets, pairing)
    with pytest.raises(ValueError, match=r"takes targets.z of shape \(2, 8, 24\) here, got \(2, 9, 24\)"):
        ops.prototype_loss(student[:, 1:], v, targets, pairing)
    with pytest.raises(ValueError, match=r"takes pairing of shape \(4, 2\) here, got \(2, 4\)"):
        ops.prototype_loss(student, v, targets, pairing.T)
