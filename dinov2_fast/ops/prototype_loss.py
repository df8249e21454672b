"""The cross-entropy between a teacher's targets and a student's softmax over prototypes, without their matrices.

    student:   p_cik = softmax over k of s_ci . v_k / temperature
    teacher:   t_jik = exp(z_ji . w_k / T - a_k - b_ji)             its sum over k is 1, see ops/sinkhorn.py
    loss_ci  = sum_j pairing_cj sum_k -t_jik log p_cik
             = P_c lse_ci - s_ci . M_ci / temperature

c are the student's crops, j those of the teacher, i the images (or masked patches), k the prototypes; and

    lse_ci = log sum_k exp(s_ci . v_k / temperature),    P_c = sum_j pairing_cj
    M_ci = sum_j pairing_cj m_ji,    m_ji = sum_k t_jik v_k           the expected prototype of a target

so that the kernels need each target once for all crops. With g the gradient of the loss:

    ds_ci = g_ci (P_c sum_k p_cik v_k - M_ci) / temperature
    dv_k  = sum_ci p_cik P_c g_ci s_ci / temperature - sum_ji t_jik sum_c pairing_cj g_ci s_ci / temperature

For the gradient the kernels compute p and t again, and store neither. Plain PyTorch computes them again too, unless all
prototypes are one chunk: then it stores the gradient of their logits.
Sources: Caron et al., arXiv:2104.14294 (DINO); Zhou et al., arXiv:2111.07832 (iBOT).
"""

from __future__ import annotations

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


# Plain PyTorch. The gradient of the logits y_cik = s_ci . v_k / temperature is g_ci d_cik, with
#     d_cik = P_c p_cik - sum_j pairing_cj t_jik


class _InChunks(torch.autograd.Function):
    """All logits of a chunk of prototypes at once. If there is one chunk alone, d is kept for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, prototypes: Tensor, z: Tensor, w: Tensor, a: Tensor, b: Tensor,
        teacher_temperature: float, pairing: Tensor, temperature: float,
    ) -> Tensor:  # fmt: skip
        chunks = _chunks(student, prototypes, Targets(z, w, a, b, teacher_temperature))
        lse, cross = [], student.new_zeros(())
        for v, targets in chunks:
            y, paired = _logits_and_targets(student, v, targets, pairing, temperature)
            cross = cross + torch.einsum("cik,cik->ci", paired, y)
            lse.append(log_sum_exp_(y, 2))
        total, weight, kept = torch.stack(lse).logsumexp(0), pairing.sum(1, keepdim=True).to(y.dtype), None
        if len(chunks) == 1 and any(ctx.needs_input_grad):  # y is now a multiple of p
            kept = y.mul_((weight / y.sum(2))[..., None]).sub_(paired)
        ctx.save_for_backward(student, prototypes, z, w, a, b, pairing, total, kept)
        ctx.temperatures = teacher_temperature, temperature
        return weight * total - cross

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        student, prototypes, z, w, a, b, pairing, lse, kept = ctx.saved_tensors
        teacher_temperature, temperature = ctx.temperatures
        dloss = dloss[..., None] / temperature
        dtype = _backends.promoted(student, prototypes)
        s, weight = (dloss * student).flatten(0, 1).to(dtype), pairing.sum(1, keepdim=True).to(lse.dtype)
        sums, dprototypes = dloss.new_zeros(()), []
        with torch.autocast(student.device.type, enabled=False):
            for v, targets in _chunks(student, prototypes, Targets(z, w, a, b, teacher_temperature)):
                d = kept
                if d is None:
                    y, paired = _logits_and_targets(student, v, targets, pairing, temperature)
                    d = y.sub_(lse[..., None]).exp_().mul_(weight[..., None]).sub_(paired)
                d = d.flatten(0, 1).to(dtype)
                sums = sums + product(d, v.to(dtype))
                dprototypes.append(product(d.T, s))
        dstudent = dloss * sums.view(student.shape)
        return dstudent.to(student.dtype), torch.cat(dprototypes).to(prototypes.dtype), *[None] * 7


def _chunks(student: Tensor, prototypes: Tensor, targets: Targets) -> list[tuple[Tensor, Targets]]:
    """Prototypes of the student, and targets of the same prototypes, one chunk after the other."""
    size = chunk_size(max(student.shape[:2].numel(), targets.b.numel()), _backends.promoted(student, prototypes))
    parts = zip(*[x.split(size) for x in (prototypes, targets.prototypes, targets.a)], strict=True)
    return [(v, targets._replace(prototypes=w, a=a)) for v, w, a in parts]


def _logits_and_targets(
    student: Tensor, v: Tensor, targets: Targets, pairing: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """y and sum_j pairing_cj t_jik (crops, n, prototypes), in fp32 or fp64."""
    y, t = _logits(student, v, temperature), _logits(targets.z, targets.prototypes, targets.temperature)
    t = t.sub_(targets.a).sub_(targets.b[..., None]).exp_()
    return y, torch.einsum("cj,jik->cik", pairing.to(t.dtype), t).to(y.dtype)


def _logits(x: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    flat, prototypes = as_operands(x.flatten(0, 1), prototypes)
    return product(flat, prototypes.T).mul_(1 / temperature).view(*x.shape[:2], len(prototypes))


# The kernels. Samples are flat: s (crops * n, D), z (target_crops * n, D)


class _InKernels(torch.autograd.Function):
    """The sums over prototypes m_ji, sum_k p_cik v_k and dv run in one kernel, and lse in that of Sinkhorn-Knopp."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, prototypes: Tensor, z: Tensor, w: Tensor, a: Tensor, b: Tensor,
        teacher_temperature: float, pairing: Tensor, temperature: float,
    ) -> Tensor:  # fmt: skip
        s, v, flat_z, flat_w = _pairs(student, prototypes, z, w)
        lse = log_sum_exp(s, v, None, 1 / temperature)
        m = _weighted_sum(flat_z, flat_w, v.to(flat_z.dtype), b.flatten(), a, 1 / teacher_temperature)
        pairing = pairing.to(lse.dtype)
        paired = torch.einsum("cj,jnd->cnd", pairing, m.to(lse.dtype).unflatten(0, b.shape))
        ctx.save_for_backward(student, prototypes, z, w, a, b, pairing, lse, paired)
        ctx.temperatures = teacher_temperature, temperature
        lse = lse.view(student.shape[:2])
        return pairing.sum(1, keepdim=True) * lse - (student * paired).sum(2) / temperature

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        student, prototypes, z, w, a, b, pairing, lse, paired = ctx.saved_tensors
        teacher_temperature, temperature = ctx.temperatures
        dloss = dloss[..., None] / temperature
        weight = pairing.sum(1)[:, None, None]
        with torch.autocast(student.device.type, enabled=False):
            s, v, flat_z, flat_w = _pairs(student, prototypes, z, w)
            p_values = (weight * dloss * student).flatten(0, 1).to(v.dtype)
            t_values = torch.einsum("cj,cnd->jnd", pairing, dloss * student).flatten(0, 1).to(flat_w.dtype)
            expected = _weighted_sum(s, v, v, lse, None, 1 / temperature)
            dprototypes = _weighted_sum(v, s, p_values, None, lse, 1 / temperature)
            dprototypes -= _weighted_sum(flat_w, flat_z, t_values, a, b.flatten(), 1 / teacher_temperature)
        dstudent = dloss * (weight * expected.view(student.shape) - paired)
        return dstudent.to(student.dtype), dprototypes.to(prototypes.dtype), *[None] * 7


def _pairs(student: Tensor, v: Tensor, z: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s and v in one dtype, z and w in one that is no narrower."""
    own, teachers = _backends.promoted(student, v), _backends.promoted(z, w, v)
    return student.flatten(0, 1).to(own), v.to(own), z.flatten(0, 1).to(teachers), w.to(teachers)


# sum_j exp(x_i . y_j * scale - row_offset_i - column_offset_j) v_j: (rows, D), in fp32 or fp64
_weighted_sum = _registry.register(
    "prototype_sum(Tensor x, Tensor y, Tensor v, Tensor? row_offset, Tensor? column_offset, float scale) -> Tensor",
    _registry.launcher("prototype_loss", "prototype_sum"),
    lambda x, y, v, row_offset, column_offset, scale: x.new_empty(
        x.shape[0], v.shape[1], dtype=torch.promote_types(x.dtype, torch.float32)
    ),
)


def prototype_loss_torch(*args: Any) -> Tensor:
    loss: Tensor = _InChunks.apply(*args)
    return loss


def prototype_loss_triton(*args: Any) -> Tensor:
    loss: Tensor = _InKernels.apply(*args)
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
