"""Adds a branch to the residual stream, for all images of a batch or, with stochastic depth, for a subset of them.

    add_residual:             out = residual + drop_scale * gamma * branch
    add_residual with index:  out[index] = residual[index] + scale * gamma * branch;  the other images are copied
    gather_rows:              x[index], the images whose branch is computed

`gamma` is LayerScale. Stochastic depth computes a branch for a random subset of the images only, and scales it by
batch / subset: Oquab et al., arXiv:2304.07193, section 5 ("Efficient stochastic depth").
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.ops import _backends, _registry
from dinov2_fast.ops._fp8 import E4M3
from dinov2_fast.ops.dispatch import Op
from dinov2_fast.ops.implementation import Implementation, records_gradient


def add_residual(
    residual: Tensor,
    branch: Tensor,
    gamma: Tensor | None = None,
    drop_scale: Tensor | None = None,
    *,
    index: Tensor | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Adds `branch` to the residual stream: to all images, or with `index` to a subset of them.

    Args:
        residual: (batch, seq_len, hidden).
        branch: (batch, seq_len, hidden), or with `index` (subset, seq_len, hidden).
        gamma: LayerScale, (hidden,), or None for 1.
        drop_scale: (batch,), the factor of each image's branch, or None for 1. Not with `index`.
        index: (subset,) int64, distinct images of the batch, or None for all images.
        scale: batch / subset, which keeps the expected value. Only with `index`.
        backend: the backend to use instead of the default.

    Returns:
        A new tensor (batch, seq_len, hidden), in the promoted dtype of all arguments, or with `index` in the dtype of
        `residual`.

    Raises:
        ValueError: `drop_scale` is given with `index`, or `scale` without `index`.
        BackendError: `backend` cannot take these tensors.
    """
    if index is None:
        if scale != 1.0:
            raise InvalidValueError("add_residual takes scale with index only: without index, give drop_scale.")
    elif drop_scale is not None:
        raise InvalidValueError("add_residual takes drop_scale without index only: with index, give scale.")
    args = residual, branch, gamma, drop_scale, index, scale
    return RESIDUAL.choose("add", args, backend).function(*args)


def gather_rows(xs: list[Tensor], indices: list[Tensor], *, backend: str | None = None) -> Tensor:
    """The tokens of some images of several batches, in one tensor.

    Args:
        xs: batches (batch_i, seq_len_i, hidden) of one dtype.
        indices: (subset_i,) int64 for each batch, distinct images.
        backend: the backend to use instead of the default.

    Returns:
        (total_tokens, hidden): the tokens of `xs[0][indices[0]]`, followed by those of the next batch.
    """
    return RESIDUAL.choose("gather", (xs, indices), backend).function(xs, indices)


def add_residual_torch(
    residual: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    index: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    if index is not None:
        branch = branch if gamma is None else branch * gamma
        return torch.index_add(residual, 0, index, branch.to(residual.dtype), alpha=scale)
    if drop_scale is not None:
        branch = branch * drop_scale[:, None, None]
    return residual + branch if gamma is None else torch.addcmul(residual, branch, gamma)


def gather_rows_torch(xs: list[Tensor], indices: list[Tensor]) -> Tensor:
    rows = [x[index].flatten(0, 1) for x, index in zip(xs, indices, strict=True)]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


# The kernels

_launch_add_backward = _registry.launcher("residual_backward", "add_residual_backward")


def _add_backward(dout: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    dbranch, dgamma = _launch_add_backward(dout, *args)
    return dbranch, dout.new_empty(0) if dgamma is None else dgamma


class _AddResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, *rest: Any) -> Tensor:
        *factors, ctx.scale = rest
        ctx.save_for_backward(*factors)  # branch, gamma, drop_scale, index
        ctx.dtype = residual.dtype
        return _add_residual(residual, *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        branch, gamma, drop_scale, index = ctx.saved_tensors
        dresidual = dout.to(ctx.dtype)
        if gamma is None and drop_scale is None and index is None:
            return dresidual, dout.to(branch.dtype), None, None, None, None
        dbranch, dgamma = _add_residual_backward(dout, branch, gamma, drop_scale, index, ctx.scale)
        return dresidual, dbranch, None if gamma is None else dgamma.to(gamma.dtype), None, None, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, batches: int, *xs_and_indices: Tensor) -> Tensor:
        xs, indices = list(xs_and_indices[:batches]), list(xs_and_indices[batches:])
        ctx.save_for_backward(*indices)
        ctx.shapes = [x.shape[:2] for x in xs]
        return _gather_rows(xs, indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        indices = ctx.saved_tensors
        parts = dout.split([index.shape[0] * seq_len for index, (_, seq_len) in zip(indices, ctx.shapes, strict=True)])
        gradients = [
            _gather_rows_backward(part.unflatten(0, (index.shape[0], seq_len)), index, batch)
            for part, index, (batch, seq_len) in zip(parts, indices, ctx.shapes, strict=True)
        ]
        return None, *gradients, *[None] * len(indices)


def _add_fake(residual: Tensor, *rest: Any) -> Tensor:
    *factors, index, _ = rest  # branch, gamma, drop_scale
    dtype = _backends.promoted(residual, *factors) if index is None else residual.dtype
    return residual.new_empty(residual.shape, dtype=dtype)


def _add_backward_fake(dout: Tensor, branch: Tensor, gamma: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    if gamma is None:
        return branch.new_empty(branch.shape), dout.new_empty(0)
    wide = torch.promote_types(torch.float32, _backends.promoted(dout, branch, gamma))
    return branch.new_empty(branch.shape), gamma.new_empty(gamma.shape, dtype=wide)


def _gather_fake(xs: list[Tensor], indices: list[Tensor]) -> Tensor:
    tokens = sum(index.shape[0] * x.shape[1] for x, index in zip(xs, indices, strict=True))
    return xs[0].new_empty((tokens, xs[0].shape[2]))


_add_residual = _registry.register(
    "add_residual(Tensor residual, Tensor branch, Tensor? gamma, Tensor? drop_scale, Tensor? index, float scale)"
    " -> Tensor",
    _registry.launcher("residual", "add_residual_forward"),
    _add_fake,
    _AddResidual.apply,
)
_add_residual_backward = _registry.register(
    "add_residual_backward(Tensor dout, Tensor branch, Tensor? gamma, Tensor? drop_scale, Tensor? index, float scale)"
    " -> (Tensor, Tensor)",
    _add_backward,
    _add_backward_fake,
)
_gather_rows = _registry.register(
    "gather_rows(Tensor[] xs, Tensor[] indices) -> Tensor",
    _registry.launcher("residual", "gather_rows_forward"),
    _gather_fake,
    lambda xs, indices: _GatherRows.apply(len(xs), *xs, *indices),
)
_gather_rows_backward = _registry.register(
    "gather_rows_backward(Tensor dout, Tensor index, SymInt batch) -> Tensor",
    _registry.launcher("residual_backward", "gather_rows_backward"),
    lambda dout, index, batch: dout.new_empty((batch, *dout.shape[1:])),
)


def _refuses_add(
    residual: Tensor, branch: Tensor, gamma: Tensor | None, drop_scale: Tensor | None, index: Tensor | None, *rest: Any
) -> str | None:
    if records_gradient([drop_scale]):
        return "has no gradient for drop_scale"
    stream = residual if index is None else residual[: index.shape[0]]
    return _backends.refuses_to_broadcast(stream, branch, drop_scale, gamma=gamma)


def _refuses_gather(xs: list[Tensor], indices: list[Tensor]) -> str | None:
    alike = all(x.dtype == xs[0].dtype and x.shape[2] == xs[0].shape[2] for x in xs)
    return None if alike else "takes batches of one dtype and one hidden size"


def _sample(form: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...] | None:
    if dtype == E4M3:
        return None
    x, index = torch.empty(2, 257, 384, device=device, dtype=dtype), torch.zeros(1, device=device, dtype=torch.int64)
    return ([x, x[:, :57]], [index, index]) if form == "gather" else (x, x, x[0, 0], None, None, 1.0)


RESIDUAL = Op(
    "residual",
    (
        Implementation("torch", add_residual_torch, forms=("add",), why=_backends.UNMEASURED),
        Implementation("torch", gather_rows_torch, forms=("gather",), why=_backends.UNMEASURED),
        _backends.triton(_add_residual, _refuses_add, dtypes=_backends.FLOATS, forms=("add",)),
        _backends.triton(_gather_rows, _refuses_gather, dtypes=_backends.FLOATS, forms=("gather",)),
    ),
    {"add": partial(_sample, "add"), "gather": partial(_sample, "gather")},
)
