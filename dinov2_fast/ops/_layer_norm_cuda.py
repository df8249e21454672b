"""Launches csrc/layer_norm.cu and csrc/layer_norm_backward.cu; allocates what they write."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_fast.ops import _cuda

MAX_HIDDEN = 2048
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BLOCKS_PER_MULTIPROCESSOR = 2  # of the backward: each leaves partial sums to be added


def refuses(x: Tensor, branch: Tensor | None, *vectors: Tensor | None, drop_scale: Tensor | None = None) -> str | None:
    """Why the kernels take none of these, or None. Shapes have been checked."""
    if x.dtype not in DTYPES:
        return f"takes fp16, bf16 and fp32, got {x.dtype}"
    if x.shape[-1] % _cuda.CHUNK or not 0 < x.shape[-1] <= MAX_HIDDEN:
        return f"takes a hidden size that is a multiple of {_cuda.CHUNK}, up to {MAX_HIDDEN}, got {x.shape[-1]}"
    mixed = next((v.dtype for v in vectors if v is not None and v.dtype != x.dtype), None)
    if mixed is not None:
        return f"takes vectors in the dtype of what is normalised, {x.dtype}, got {mixed}"
    if branch is not None and branch.dtype != x.dtype and x.dtype != torch.float32:
        return f"takes a branch in the dtype of the stream, {x.dtype}, or any under one in fp32, got {branch.dtype}"
    if branch is not None and branch.dtype not in DTYPES:
        return f"takes a branch in fp16, bf16 or fp32, got {branch.dtype}"
    if drop_scale is not None and torch.promote_types(x.dtype, drop_scale.dtype) != x.dtype:
        return f"takes a drop_scale no wider than the stream, {x.dtype}, got {drop_scale.dtype}"
    return None


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    branch: Tensor | None = None,
    gamma: Tensor | None = None,
    drop_scale: Tensor | None = None,
    deferred_bias: Tensor | None = None,
    statistics: bool = False,
    e4m3: bool = False,
    scale: float | None = None,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The sum, its norm, mean, rstd and row scales, as `layer_norm_forward` of the Triton kernels gives them."""
    lead = x.shape[:-1]
    total = None if branch is None else x.new_empty(x.shape)
    y = x.new_empty(x.shape, dtype=torch.float8_e4m3fn if e4m3 else x.dtype)
    mean = x.new_empty(lead, dtype=torch.float32) if statistics else None
    rstd = x.new_empty(lead, dtype=torch.float32) if statistics else None
    row_scale = x.new_empty((*lead, 1), dtype=torch.float32) if e4m3 and scale is None else None
    if x.numel():
        _cuda.launches().layer_norm_forward(
            _cuda.rows(x),
            None if branch is None else _cuda.rows(branch),
            _cuda.vector(gamma),
            _drop_scale(drop_scale, x),
            _cuda.vector(deferred_bias),
            _cuda.vector(weight),
            _cuda.vector(bias),
            eps,
            _rows_per_picture(x),
            1.0 if scale is None else 1.0 / scale,
            _cuda.flat_rows(total),
            _cuda.flat_rows(y),
            _cuda.flat(mean),
            _cuda.flat(rstd),
            _cuda.flat(row_scale),
        )
    return total, y, mean, rstd, row_scale


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *,
    dtotal: Tensor | None = None,
    dx_dtype: torch.dtype | None = None,
    branch: Tensor | None = None,
    gamma: Tensor | None = None,
    drop_scale: Tensor | None = None,
    deferred: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of what was added or normalised, of the branch, and (sums, hidden) of the vectors, in fp32.

    The sums are those of weight and bias, with a branch of gamma and of a deferred bias as well, wanted or not. The
    first gradient has the dtype of `x`, which is the only `dx_dtype` that :func:`refuses` lets through.
    """
    hidden, sums = x.shape[-1], 2 if branch is None else 4
    dx = x.new_empty(x.shape)
    dbranch = None if branch is None else x.new_empty(x.shape, dtype=branch.dtype)
    if not x.numel():
        return dx, dbranch, x.new_zeros((sums, hidden), dtype=torch.float32)
    flat = _cuda.rows(x)
    blocks = min(flat.shape[0], BLOCKS_PER_MULTIPROCESSOR * _cuda.multiprocessors(x.device))
    partial = x.new_empty((blocks, sums * hidden), dtype=torch.float32)
    _cuda.launches().layer_norm_backward(
        _cuda.rows(dy),
        None if dtotal is None else _cuda.rows(dtotal),
        flat,
        None if branch is None else _cuda.rows(branch),
        _cuda.vector(gamma),
        _drop_scale(drop_scale, x),
        _cuda.vector(weight),
        mean.reshape(-1),
        rstd.reshape(-1),
        _rows_per_picture(x),
        _cuda.flat_rows(dx),
        _cuda.flat_rows(dbranch),
        partial,
    )
    return dx, dbranch, partial.sum(0).view(sums, hidden)


def _drop_scale(drop_scale: Tensor | None, x: Tensor) -> Tensor | None:
    return None if drop_scale is None else drop_scale.to(x.dtype).contiguous()


def _rows_per_picture(x: Tensor) -> int:
    return x.numel() // x.shape[-1] // x.shape[0]
