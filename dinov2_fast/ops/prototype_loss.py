"""The cross-entropy between a teacher's targets and a student's softmax over prototypes, without their matrices.

    student:   p_cik = softmax over k of s_ci . v_k / temperature
    teacher:   t_jik = exp(z_ji . w_k / T - a_k - b_ji)             its sum over k is 1, see ops/sinkhorn.py
    loss_ci  = sum_j pairing_cj sum_k -t_jik log p_cik
             = P_c lse_ci - s_ci . M_ci / temperature

c are the student's crops, j those of the teacher, i the images (or masked patches), k the prototypes; and

    lse_ci = log sum_k exp(s_ci . v_k / temperature),    P_c = sum_j pairing_cj
    M_ci = sum_j pairing_cj m_ji,    m_ji = sum_k t_jik v_k           the expected prototype of a target

so that the targets are needed once for all crops. With g the gradient of the loss:

    ds_ci = g_ci (P_c sum_k p_cik v_k - M_ci) / temperature
    dv_k  = sum_ci p_cik P_c g_ci s_ci / temperature - sum_ji t_jik sum_c pairing_cj g_ci s_ci / temperature

p and t are computed again for the gradient. Nothing larger than a chunk of them is stored.
Sources: Caron et al., arXiv:2104.14294 (DINO); Zhou et al., arXiv:2111.07832 (iBOT).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.ops import _backends, _registry
from dinov2_fast.ops._fp8 import E4M3
from dinov2_fast.ops._prototypes import as_operands, chunk_size, log_sum_exp_, product
from dinov2_fast.ops.dispatch import Op
from dinov2_fast.ops.implementation import Implementation
from dinov2_fast.ops.sinkhorn import lse as log_sum_exp


class Targets(NamedTuple):
    """A teacher's distributions over prototypes, t_jik = exp(z_ji . w_k / temperature - a_k - b_ji)."""

    z: Tensor  # (target_crops, n, D)
    prototypes: Tensor  # w, (K, D)
    a: Tensor  # (K,)
    b: Tensor  # (target_crops, n)
    temperature: float


def prototype_loss(
    student: Tensor,
    prototypes: Tensor,
    targets: Targets,
    pairing: Tensor,
    *,
    temperature: float = 0.1,
    backend: str | None = None,
) -> Tensor:
    """The cross-entropy of each student's token with the targets that it is paired with.

    Differentiable with respect to `student` and `prototypes`, once.

    Args:
        student: (crops, n, D), floating point. n may be 0.
        prototypes: (K, D), the student's.
        targets: of the same n images or patches, and as many prototypes.
        pairing: (crops, target_crops), the weight of each target for each crop.
        temperature: of the student.
        backend: the backend to use instead of the default.

    Returns:
        (crops, n): sum_j pairing[c, j] * cross-entropy(targets[j, i], student[c, i]), in fp32, or in fp64 if
        `student` or `prototypes` are in fp64.

    Raises:
        ValueError: the shapes do not fit together.
        BackendError: `backend` cannot take these tensors.
    """
    _check_shapes(student, prototypes, targets, pairing)
    args = student, prototypes, *targets, pairing, temperature
    with torch.autocast(student.device.type, enabled=False):
        loss: Tensor = PROTOTYPE_LOSS.choose("prototype_loss", args, backend).function(*args)
    return loss


def _check_shapes(student: Tensor, prototypes: Tensor, targets: Targets, pairing: Tensor) -> None:
    if student.ndim != 3:
        raise InvalidValueError(f"prototype_loss takes student (crops, n, D), got {tuple(student.shape)}.")
    crops, n, _ = student.shape
    target_crops, rows = len(targets.b), len(targets.a)
    expected = {
        "student": (student, (crops, n, prototypes.shape[-1])),
        "prototypes": (prototypes, (rows, student.shape[-1])),
        "targets.z": (targets.z, (target_crops, n, targets.prototypes.shape[-1])),
        "targets.prototypes": (targets.prototypes, (rows, targets.z.shape[-1])),
        "targets.a": (targets.a, (rows,)),
        "targets.b": (targets.b, (target_crops, n)),
        "pairing": (pairing, (crops, target_crops)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise InvalidValueError(f"prototype_loss takes {name} of shape {shape} here, got {tuple(tensor.shape)}.")


# Plain PyTorch. Samples are flat: s (crops * n, D), and in targets z (target_crops * n, D) and b (target_crops * n,)


def _forward_torch(s: Tensor, v: Tensor, targets: Targets, temperature: float) -> tuple[Tensor, Tensor]:
    """lse (crops * n,) and m (target_crops * n, D)."""
    s, v = as_operands(s, v)
    lse, m = [], s.new_zeros(())
    for v_chunk, target_chunk in _chunks(s, v, targets):
        lse.append(log_sum_exp_(product(s, v_chunk.T).mul_(1 / temperature), 1))
        m = m + product(_probabilities(*target_chunk), v_chunk)
    return torch.stack(lse).logsumexp(0), m


def _backward_torch(
    s: Tensor, v: Tensor, targets: Targets, temperature: float, lse: Tensor, p_values: Tensor, t_values: Tensor
) -> tuple[Tensor, Tensor]:
    """sum_k p_ck v_k (crops * n, D), and sum_c p_ck p_values_c - sum_j t_jk t_values_j (K, D)."""
    s, v = as_operands(s, v)
    p_values, t_values = p_values.to(v.dtype), t_values.to(v.dtype)
    expected, dv, first = s.new_zeros(()), torch.empty_like(v, dtype=lse.dtype), 0
    for v_chunk, target_chunk in _chunks(s, v, targets):
        p = _probabilities(s, v_chunk, None, lse, temperature)
        expected = expected + product(p, v_chunk)
        t = _probabilities(*target_chunk)
        part = slice(first, first := first + len(v_chunk))
        torch.sub(product(p.T, p_values), product(t.T, t_values), out=dv[part])
    return expected, dv


def _chunks(s: Tensor, v: Tensor, targets: Targets) -> Iterator[tuple[Tensor, Targets]]:
    """Prototypes of the student, and targets of the same prototypes, one chunk after the other."""
    z, w = as_operands(targets.z, targets.prototypes)
    size = chunk_size(max(len(s), len(z)), s.dtype)
    for v_chunk, w_chunk, a_chunk in zip(v.split(size), w.split(size), targets.a.split(size), strict=True):
        yield v_chunk, Targets(z, w_chunk, a_chunk, targets.b, targets.temperature)


def _probabilities(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor, temperature: float) -> Tensor:
    """exp(x_i . y_k / temperature - a_k - b_i), in the dtype of the operands. Without `a` it is 0."""
    logits = product(x, y.T)
    logits = torch.add(-b[:, None], logits, alpha=1 / temperature, out=logits)
    return (logits if a is None else logits.sub_(a)).exp_().to(y.dtype)


# The kernels


def _forward_triton(s: Tensor, v: Tensor, targets: Targets, temperature: float) -> tuple[Tensor, Tensor]:
    s, v, z, w = _pairs(s, v, targets)
    m = _weighted_sum(z, w, v.to(z.dtype), targets.b, targets.a, 1 / targets.temperature)
    return log_sum_exp(s, v, None, 1 / temperature), m


def _backward_triton(
    s: Tensor, v: Tensor, targets: Targets, temperature: float, lse: Tensor, p_values: Tensor, t_values: Tensor
) -> tuple[Tensor, Tensor]:
    s, v, z, w = _pairs(s, v, targets)
    p_values, t_values = p_values.to(v.dtype), t_values.to(w.dtype)
    expected = _weighted_sum(s, v, v, lse, None, 1 / temperature)
    dv = _weighted_sum(v, s, p_values, None, lse, 1 / temperature)
    dv -= _weighted_sum(w, z, t_values, targets.a, targets.b, 1 / targets.temperature)
    return expected, dv


def _pairs(s: Tensor, v: Tensor, targets: Targets) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s and v in one dtype, z and w in one that is no narrower."""
    student, teacher = _backends.promoted(s, v), _backends.promoted(targets.z, targets.prototypes, v)
    return s.to(student), v.to(student), targets.z.to(teacher), targets.prototypes.to(teacher)


# sum_j exp(x_i . y_j * scale - row_offset_i - column_offset_j) v_j: (rows, D), in fp32 or fp64
_weighted_sum = _registry.register(
    "prototype_sum(Tensor x, Tensor y, Tensor v, Tensor? row_offset, Tensor? column_offset, float scale) -> Tensor",
    _registry.launcher("prototype_loss", "prototype_sum"),
    lambda x, y, v, row_offset, column_offset, scale: x.new_empty(
        x.shape[0], v.shape[1], dtype=torch.promote_types(x.dtype, torch.float32)
    ),
)


# The gradient


class _Compute(NamedTuple):
    """What of the op runs over all prototypes."""

    forward: Callable[[Tensor, Tensor, Targets, float], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Targets, float, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class _PrototypeLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, compute: _Compute, student: Tensor, prototypes: Tensor, z: Tensor, w: Tensor, a: Tensor, b: Tensor,
        teacher_temperature: float, pairing: Tensor, temperature: float,
    ) -> Tensor:  # fmt: skip
        targets = Targets(z.flatten(0, 1), w, a, b.flatten(), teacher_temperature)
        lse, m = compute.forward(student.flatten(0, 1), prototypes, targets, temperature)
        pairing = pairing.to(lse.dtype)
        paired = torch.einsum("cj,jnd->cnd", pairing, m.to(lse.dtype).unflatten(0, b.shape))
        ctx.save_for_backward(student, prototypes, *targets[:4], pairing, lse, paired)
        ctx.compute, ctx.temperatures = compute, (teacher_temperature, temperature)
        lse = lse.view(student.shape[:2])
        return pairing.sum(1, keepdim=True) * lse - (student * paired).sum(2) / temperature

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        student, prototypes, z, w, a, b, pairing, lse, paired = ctx.saved_tensors
        teacher_temperature, temperature = ctx.temperatures
        targets = Targets(z, w, a, b, teacher_temperature)
        dloss = dloss[..., None] / temperature
        weight = pairing.sum(1)[:, None, None]
        with torch.autocast(student.device.type, enabled=False):
            p_values = (weight * dloss * student).flatten(0, 1)
            t_values = torch.einsum("cj,cnd->jnd", pairing, dloss * student).flatten(0, 1)
            expected, dprototypes = ctx.compute.backward(
                student.flatten(0, 1), prototypes, targets, temperature, lse, p_values, t_values
            )
        dstudent = dloss * (weight * expected.view(student.shape) - paired)
        return None, dstudent.to(student.dtype), dprototypes.to(prototypes.dtype), *[None] * 7


def prototype_loss_torch(*args: Any) -> Tensor:
    loss: Tensor = _PrototypeLoss.apply(_Compute(_forward_torch, _backward_torch), *args)
    return loss


def prototype_loss_triton(*args: Any) -> Tensor:
    loss: Tensor = _PrototypeLoss.apply(_Compute(_forward_triton, _backward_triton), *args)
    return loss


def _sample(device: torch.device, dtype: torch.dtype) -> tuple[object, ...] | None:
    if dtype == E4M3:
        return None
    student, z = (torch.empty(crops, 64, 256, device=device, dtype=dtype) for crops in (10, 2))
    prototypes = torch.empty(65536, 256, device=device, dtype=dtype)
    pairing = torch.empty(10, 2, device=device)
    a, b = torch.empty(65536, device=device), torch.empty(2, 64, device=device)
    return student, prototypes, z, prototypes, a, b, 0.07, pairing, 0.1


# torch is first because the kernels have not been measured on a GPU yet.
PROTOTYPE_LOSS = Op(
    "prototype_loss",
    (
        Implementation("torch", prototype_loss_torch, why=_backends.UNMEASURED),
        _backends.triton(prototype_loss_triton, dtypes=_backends.FLOATS),
    ),
    {"prototype_loss": _sample},
    in_model=False,
)
