"""The residual stream: adding a branch to it, for all pictures of a batch or (stochastic depth) for a subset.

    add_residual:          r' = r + drop_scale * gamma * branch
    gather_rows:           x[index]                                    the pictures whose branch is computed
    scatter_add_residual:  r'[index] = r[index] + scale * gamma * branch,  r' = r elsewhere

`gamma` is LayerScale. The `_packed` forms take a list of batches with different sequence lengths and hold all their
tokens in one tensor. Stochastic depth on a subset: Oquab et al., arXiv:2304.07193, section 5 ("Efficient stochastic
depth"): a branch is computed for a random subset of the pictures only, and scaled by batch / subset.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinov2_fast.backends import Op, records_gradient
from dinov2_fast.ops import _registry_old as _registry


def add_residual(
    residual: Tensor, branch: Tensor, gamma: Tensor | None, drop_scale: Tensor | None, *, backend: str | None = None
) -> Tensor:
    """Adds `branch` to the residual stream.

    Args:
        residual, branch: (batch, seq_len, hidden).
        gamma: LayerScale, (hidden,), or None for 1.
        drop_scale: (batch,) factor of each picture's branch, or None for 1.
        backend: the implementation to use instead of the default.

    Returns:
        A new tensor (batch, seq_len, hidden).
    """
    return _ADD_RESIDUAL(residual, branch, gamma, drop_scale, backend=backend)


def gather_rows(x: Tensor, index: Tensor, *, backend: str | None = None) -> Tensor:
    """The pictures `index` (subset,), distinct, of `x` (batch, seq_len, hidden), as (subset, seq_len, hidden)."""
    return _GATHER_ROWS(x, index, backend=backend)


def gather_rows_packed(xs: list[Tensor], indices: list[Tensor], *, backend: str | None = None) -> Tensor:
    """The pictures `indices[i]` of each `xs[i]` (batch_i, seq_len_i, hidden), all tokens as (total_tokens, hidden)."""
    return _GATHER_ROWS_PACKED(xs, indices, backend=backend)


def scatter_add_residual(
    residual: Tensor, index: Tensor, branch: Tensor, gamma: Tensor | None, scale: float, *, backend: str | None = None
) -> Tensor:
    """Adds the branch of a subset of the pictures to the residual stream.

    Args:
        residual: (batch, seq_len, hidden).
        index: (subset,) int64, distinct pictures.
        branch: (subset, seq_len, hidden).
        gamma: LayerScale, (hidden,), or None for 1.
        scale: batch / subset, which keeps the expectation.
        backend: the implementation to use instead of the default.

    Returns:
        A new tensor (batch, seq_len, hidden) of the dtype of `residual`.
    """
    return _SCATTER_ADD_RESIDUAL(residual, index, branch, gamma, scale, backend=backend)


def scatter_add_residual_packed(
    residuals: list[Tensor],
    indices: list[Tensor],
    branch: Tensor,
    gamma: Tensor | None,
    scales: list[float],
    *,
    backend: str | None = None,
) -> list[Tensor]:
    """`scatter_add_residual` for each `residuals[i]`, with the branches packed as `gather_rows_packed` packs them."""
    return _SCATTER_ADD_RESIDUAL_PACKED(residuals, indices, branch, gamma, scales, backend=backend)


# The torch references


def add_residual_torch(residual: Tensor, branch: Tensor, gamma: Tensor | None, drop_scale: Tensor | None) -> Tensor:
    if drop_scale is not None:
        branch = branch * drop_scale[:, None, None]
    return residual + branch if gamma is None else torch.addcmul(residual, branch, gamma)


def gather_rows_torch(x: Tensor, index: Tensor) -> Tensor:
    return x[index]


def gather_rows_packed_torch(xs: list[Tensor], indices: list[Tensor]) -> Tensor:
    return torch.cat([x[index].flatten(0, 1) for x, index in zip(xs, indices, strict=True)])


def scatter_add_residual_torch(
    residual: Tensor, index: Tensor, branch: Tensor, gamma: Tensor | None, scale: float
) -> Tensor:
    if gamma is not None:
        branch = branch * gamma
    return torch.index_add(residual, 0, index, branch.to(residual.dtype), alpha=scale)


def scatter_add_residual_packed_torch(
    residuals: list[Tensor], indices: list[Tensor], branch: Tensor, gamma: Tensor | None, scales: list[float]
) -> list[Tensor]:
    parts = _unpack(branch, residuals, indices)
    each = zip(residuals, indices, parts, scales, strict=True)
    return [scatter_add_residual_torch(x, index, part, gamma, scale) for x, index, part, scale in each]


def _unpack(packed: Tensor, like: list[Tensor], indices: list[Tensor]) -> list[Tensor]:
    """Views of `packed` (total_tokens, hidden), one for each batch: (subset, seq_len, hidden)."""
    shapes = [(index.shape[0], x.shape[1]) for x, index in zip(like, indices, strict=True)]
    parts = packed.split([subset * seq_len for subset, seq_len in shapes])
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


# The kernels


def _launch_add(residual: Tensor, branch: Tensor, gamma: Tensor | None, drop_scale: Tensor | None) -> Tensor:
    from dinov2_fast.kernels.residual import add_residual_forward

    return add_residual_forward(residual, branch, gamma, drop_scale)


def _launch_add_backward(
    dout: Tensor, branch: Tensor, gamma: Tensor | None, drop_scale: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    from dinov2_fast.kernels.residual_backward import add_residual_backward

    dbranch, dgamma = add_residual_backward(dout, branch, gamma, drop_scale, **options)
    return dbranch, dout.new_empty(0) if dgamma is None else dgamma


def _launch_gather(x: Tensor, index: Tensor) -> Tensor:
    from dinov2_fast.kernels.residual import gather_rows_forward

    return gather_rows_forward(x, index)


def _launch_gather_backward(dy: Tensor, index: Tensor, pictures: int) -> Tensor:
    from dinov2_fast.kernels.residual import gather_rows_forward, positions

    return gather_rows_forward(dy, positions(index, pictures))


def _launch_gather_packed(xs: list[Tensor], indices: list[Tensor]) -> Tensor:
    from dinov2_fast.kernels.residual import gather_rows_forward

    packed = _fake_gather_packed(xs, indices)
    for x, index, part in zip(xs, indices, _unpack(packed, xs, indices), strict=True):
        gather_rows_forward(x, index, part)
    return packed


def _launch_scatter(residual: Tensor, index: Tensor, branch: Tensor, gamma: Tensor | None, scale: float) -> Tensor:
    from dinov2_fast.kernels.residual import add_residual_forward

    return add_residual_forward(residual, branch, gamma, index=index, scale=scale, dtype=residual.dtype)


class _AddResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, branch: Tensor, gamma: Tensor | None, drop_scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(branch, gamma, drop_scale)
        ctx.dtype = residual.dtype
        return _add_residual(residual, branch, gamma, drop_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        branch, gamma, drop_scale = ctx.saved_tensors
        if gamma is None and drop_scale is None:
            return dout.to(ctx.dtype), dout.to(branch.dtype), None, None
        dbranch, dgamma = _add_residual_backward(dout, branch, gamma, drop_scale)
        return dout.to(ctx.dtype), dbranch, None if gamma is None else dgamma.to(gamma.dtype), None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.pictures = x.shape[0]
        return _gather_rows(x, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _gather_rows_backward(dy, *ctx.saved_tensors, ctx.pictures), None


class _GatherRowsPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, batches: int, *xs_and_indices: Tensor) -> Tensor:
        xs, indices = list(xs_and_indices[:batches]), list(xs_and_indices[batches:])
        ctx.save_for_backward(*indices)
        ctx.shapes = [x.shape for x in xs]
        return _gather_rows_packed(xs, indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        indices = ctx.saved_tensors
        rows = [index.shape[0] * shape[1] for index, shape in zip(indices, ctx.shapes, strict=True)]
        each = zip(dy.split(rows), indices, ctx.shapes, strict=True)
        gradients = [_gather_rows_backward(g.unflatten(0, (-1, shape[1])), i, shape[0]) for g, i, shape in each]
        return None, *gradients, *[None] * len(indices)


class _ScatterAddResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, index: Tensor, branch: Tensor, gamma: Tensor | None, scale: float
    ) -> Tensor:
        ctx.save_for_backward(index, branch, gamma)
        ctx.scale = scale
        return _scatter_add_residual(residual, index, branch, gamma, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        index, branch, gamma = ctx.saved_tensors
        dbranch, dgamma = _scatter_add_residual_backward(dout, index, branch, gamma, ctx.scale)
        return dout, None, dbranch, None if gamma is None else dgamma.to(gamma.dtype), None


def _fake_add_backward(dout: Tensor, branch: Tensor, gamma: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    if gamma is None:
        return branch.new_empty(branch.shape), dout.new_empty(0)
    wide = torch.promote_types(torch.float32, _registry.promoted(dout, branch, gamma))
    return branch.new_empty(branch.shape), gamma.new_empty(gamma.shape, dtype=wide)


def _fake_gather_packed(xs: list[Tensor], indices: list[Tensor]) -> Tensor:
    tokens = sum(index.shape[0] * x.shape[1] for x, index in zip(xs, indices, strict=True))
    return xs[0].new_empty((tokens, xs[0].shape[2]))


_add_residual = _registry.register(
    "add_residual(Tensor residual, Tensor branch, Tensor? gamma, Tensor? drop_scale) -> Tensor",
    _launch_add,
    lambda r, o, gamma, drop: r.new_empty(r.shape, dtype=_registry.promoted(r, o, gamma, drop)),
    _AddResidual.apply,
)
_add_residual_backward = _registry.register(
    "add_residual_backward(Tensor dout, Tensor branch, Tensor? gamma, Tensor? drop_scale) -> (Tensor, Tensor)",
    _launch_add_backward,
    _fake_add_backward,
)
_gather_rows = _registry.register(
    "gather_rows(Tensor x, Tensor index) -> Tensor",
    _launch_gather,
    lambda x, index: x.new_empty((index.shape[0], *x.shape[1:])),
    _GatherRows.apply,
)
_gather_rows_backward = _registry.register(
    "gather_rows_backward(Tensor dy, Tensor index, SymInt pictures) -> Tensor",
    _launch_gather_backward,
    lambda dy, index, pictures: dy.new_empty((pictures, *dy.shape[1:])),
)
_gather_rows_packed = _registry.register(
    "gather_rows_packed(Tensor[] xs, Tensor[] indices) -> Tensor",
    _launch_gather_packed,
    _fake_gather_packed,
    lambda xs, indices: _GatherRowsPacked.apply(len(xs), *xs, *indices),
)
_scatter_add_residual = _registry.register(
    "scatter_add_residual(Tensor residual, Tensor index, Tensor branch, Tensor? gamma, float scale) -> Tensor",
    _launch_scatter,
    lambda residual, *rest: residual.new_empty(residual.shape),
    _ScatterAddResidual.apply,
)
_scatter_add_residual_backward = _registry.register(
    "scatter_add_residual_backward(Tensor dout, Tensor index, Tensor branch, Tensor? gamma, float scale)"
    " -> (Tensor, Tensor)",
    lambda dout, index, branch, gamma, scale: _launch_add_backward(dout, branch, gamma, None, index=index, scale=scale),
    lambda dout, index, branch, gamma, scale: _fake_add_backward(dout, branch, gamma),
)


def _scatter_add_packed(
    residuals: list[Tensor], indices: list[Tensor], branch: Tensor, gamma: Tensor | None, scales: list[float]
) -> list[Tensor]:
    parts = _unpack(branch, residuals, indices)
    each = zip(residuals, indices, parts, scales, strict=True)
    return [_scatter_add_residual(x, index, part, gamma, scale) for x, index, part, scale in each]


def _refuses(x: Tensor | list[Tensor], *rest: Any) -> str | None:
    dtype = x[0].dtype if isinstance(x, list) else x.dtype
    return None if dtype in _registry.FLOATS else f"takes fp16, bf16, fp32 and fp64, got {dtype}"


def _refuses_add(residual: Tensor, branch: Tensor, gamma: Tensor | None, drop_scale: Tensor | None) -> str | None:
    if records_gradient([drop_scale]):
        return "gives no gradient for drop_scale"
    return _registry.refuses_to_broadcast(residual, branch, drop_scale, gamma=gamma) or _refuses(residual)


def _refuses_scatter(residual: Tensor, index: Tensor, branch: Tensor, gamma: Tensor | None, scale: float) -> str | None:
    subset = residual[: index.shape[0]]
    return _registry.refuses_to_broadcast(subset, branch, gamma=gamma) or _refuses(residual)


def _refuses_packed(xs: list[Tensor], *rest: Any) -> str | None:
    if len({x.dtype for x in xs}) > 1:
        return "takes batches of one dtype"
    return _refuses(xs)


def _refuses_scatter_packed(
    residuals: list[Tensor], indices: list[Tensor], branch: Tensor, gamma: Tensor | None, scales: list[float]
) -> str | None:
    hidden = residuals[0].shape[-1:]
    if branch.shape[-1:] != hidden or (gamma is not None and gamma.shape != hidden):
        return f"broadcasts nothing: takes branch and gamma of {hidden[0]} features"
    return _refuses_packed(residuals)


def _sample_add(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.empty(2, 257, 384, device=device, dtype=dtype)
    return x, x, x[0, 0], None


def _sample_gather(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    return torch.empty(2, 257, 384, device=device, dtype=dtype), torch.zeros(1, device=device, dtype=torch.int64)


def _sample_gather_packed(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    x, index = _sample_gather(device, dtype)
    return [x, x[:, :57]], [index, index]


def _sample_scatter(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    x, index = _sample_gather(device, dtype)
    return x, index, x[:1], x[0, 0], 2.0


def _sample_scatter_packed(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    xs, indices = _sample_gather_packed(device, dtype)
    return xs, indices, xs[0].new_empty((314, 384)), xs[0][0, 0], [2.0, 2.0]


_ADD_RESIDUAL = Op(
    "add_residual",
    "residual",
    _registry.torch_and_triton(add_residual_torch, _add_residual, _refuses_add),
    _sample_add,
)
_GATHER_ROWS = Op(
    "gather_rows", "residual", _registry.torch_and_triton(gather_rows_torch, _gather_rows, _refuses), _sample_gather
)
_GATHER_ROWS_PACKED = Op(
    "gather_rows_packed",
    "residual",
    _registry.torch_and_triton(gather_rows_packed_torch, _gather_rows_packed, _refuses_packed),
    _sample_gather_packed,
)
_SCATTER_ADD_RESIDUAL = Op(
    "scatter_add_residual",
    "residual",
    _registry.torch_and_triton(scatter_add_residual_torch, _scatter_add_residual, _refuses_scatter),
    _sample_scatter,
)
_SCATTER_ADD_RESIDUAL_PACKED = Op(
    "scatter_add_residual_packed",
    "residual",
    _registry.torch_and_triton(scatter_add_residual_packed_torch, _scatter_add_packed, _refuses_scatter_packed),
    _sample_scatter_packed,
)
