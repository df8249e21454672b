"""The residual stream: adding a branch to it, for all pictures of a batch or (stochastic depth) for a subset.

    add_residual:          r' = r + drop_scale * gamma * branch
    gather_rows:           x[index]                                    the pictures whose branch is computed
    scatter_add_residual:  r'[index] = r[index] + scale * gamma * branch,  r' = r elsewhere

`gamma` is LayerScale. Stochastic depth on a subset: Oquab et al., arXiv:2304.07193, section 5 ("Efficient stochastic
depth"): a branch is computed for a random subset of the pictures only, and scaled by batch / subset.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_fast.backends import Implementation, Op


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
    """The pictures `index` (subset,) of `x` (batch, seq_len, hidden), as (subset, seq_len, hidden)."""
    return _GATHER_ROWS(x, index, backend=backend)


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


def add_residual_torch(residual: Tensor, branch: Tensor, gamma: Tensor | None, drop_scale: Tensor | None) -> Tensor:
    if drop_scale is not None:
        branch = branch * drop_scale[:, None, None]
    return residual + branch if gamma is None else torch.addcmul(residual, branch, gamma)


def gather_rows_torch(x: Tensor, index: Tensor) -> Tensor:
    return x[index]


def scatter_add_residual_torch(
    residual: Tensor, index: Tensor, branch: Tensor, gamma: Tensor | None, scale: float
) -> Tensor:
    if gamma is not None:
        branch = branch * gamma
    return torch.index_add(residual, 0, index, branch.to(residual.dtype), alpha=scale)


def _sample_add(device: torch.device, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    x = torch.empty(2, 257, 384, device=device, dtype=dtype)
    return x, x, x[0, 0], None


def _sample_gather(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty(2, 257, 384, device=device, dtype=dtype), torch.zeros(1, device=device, dtype=torch.int64)


def _sample_scatter(device: torch.device, dtype: torch.dtype) -> tuple[object, ...]:
    x, index = _sample_gather(device, dtype)
    return x, index, x[:1], x[0, 0], 2.0


_ADD_RESIDUAL = Op("add_residual", "residual", (Implementation("torch", add_residual_torch),), _sample_add)
_GATHER_ROWS = Op("gather_rows", "residual", (Implementation("torch", gather_rows_torch),), _sample_gather)
_SCATTER_ADD_RESIDUAL = Op(
    "scatter_add_residual", "residual", (Implementation("torch", scatter_add_residual_torch),), _sample_scatter
)
