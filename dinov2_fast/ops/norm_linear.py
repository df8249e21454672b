"""Linears with the layer norm before them folded in, so that no normalised activation is written. Inference only.

    layer_norm(x) @ W^T + b  =  rstd * (x @ weight^T) + bias        rstd = 1 / sqrt(variance of the row + eps)

with `weight` = W diag(gamma), each row less its mean, and `bias` = b + W beta. The rows of `weight` sum to zero, so the
mean of `x` drops out; `rstd` is one number for each row, so it can be multiplied with the product.

    row_statistics(x)                      of a stream that no linear wrote
    norm_linear(x, statistics)             z = rstd * (x @ weight^T) + bias
    norm_linear_gelu(x, statistics)        z * Phi(z), the exact (erf) GELU
    norm_linear_swiglu(x, statistics)      silu(z[0::2]) * z[1::2], as `linear_swiglu`
    linear_residual_statistics_(r, s, x)   r += gamma * (x @ weight^T + bias), and s becomes the statistics of r

Statistics of a stream (..., hidden) are (2, parts, ...): of each row and each PART of its columns the sum, and the sum
of squared deviations from the part's own mean. Whatever wrote the stream takes them on the way. Combined they give the
variance without the difference of large numbers that the mean of squares less the squared mean would be.
Sources: the folded norm: Graef et al., arXiv:2407.09577; combined variances: Chan, Golub & LeVeque, Updating Formulae
and a Pairwise Algorithm for Computing Sample Variances, Stanford STAN-CS-79-773.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_fast.backends import Op
from dinov2_fast.ops import _registry_old as _registry
from dinov2_fast.ops._linear_epilogue import HALF, swiglu, was_written
from dinov2_fast.ops.linear import _check, _refuses, _refuses_residual, linear_residual_torch_

PART = 64  # columns; the kernels' own is in kernels/linear.py


def row_statistics(x: Tensor, *, backend: str | None = None) -> Tensor:
    """The statistics of the rows of `x`.

    Args:
        x: (..., hidden), fp16, bf16, fp32 or fp64.
        backend: the implementation to use instead of the default.

    Returns:
        (2, parts, ...), contiguous, fp32 (of fp64: fp64), with a part for every 64 columns; the last may have fewer.

    Raises:
        ValueError: `x` has no columns.
        BackendError: gradients are recorded.
    """
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: there is nothing to take statistics of.")
    return _ROW_STATISTICS(x, backend=backend)


def norm_linear(
    x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, backend: str | None = None
) -> Tensor:
    """A linear of the layer norm of `x`, folded as the module's docstring says.

    Args:
        x: (..., in_features), the stream itself, fp16, bf16, fp32 or fp64.
        statistics: (2, parts, ...), of `x`.
        weight: (out_features, in_features), in the dtype of `x`; with rows that do not sum to zero the mean of `x`
            counts.
        bias: (out_features,) or None.
        eps: of the norm, added to the variance.
        backend: the implementation to use instead of the default.

    Returns:
        (..., out_features), contiguous, in the dtype of `x`.

    Raises:
        ValueError: sizes do not go together.
        BackendError: gradients are recorded.
    """
    _check(x, weight, bias=bias)
    _check_statistics(statistics, x)
    return _NORM_LINEAR(x, statistics, weight, bias, eps, backend=backend)


def norm_linear_gelu(
    x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, backend: str | None = None
) -> Tensor:
    """GELU of :func:`norm_linear`, with the same arguments, result and errors."""
    _check(x, weight, bias=bias)
    _check_statistics(statistics, x)
    return _NORM_LINEAR_GELU(x, statistics, weight, bias, eps, backend=backend)


def norm_linear_swiglu(
    x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, backend: str | None = None
) -> Tensor:
    """SwiGLU of :func:`norm_linear`: `weight` and `bias` have their rows in the order of `ops.linear.interleave`.

    Returns:
        (..., out_features / 2), contiguous, in the dtype of `x`.
    """
    _check(x, weight, swiglu=True, bias=bias)
    _check_statistics(statistics, x)
    return _NORM_LINEAR_SWIGLU(x, statistics, weight, bias, eps, backend=backend)


def linear_residual_statistics_(
    residual: Tensor,
    statistics: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    *,
    backend: str | None = None,
) -> None:
    """Adds a linear to the residual stream and takes the statistics of the sum, both in place.

    Args:
        residual: (..., out_features), the stream, as for `linear_residual_`.
        statistics: (2, parts, ...), contiguous, which is overwritten with that of the new stream, as it is stored.
        x, weight, bias, gamma: as for `linear_residual_`.
        backend: the implementation to use instead of the default.

    Raises:
        As :func:`norm_linear`.
    """
    _check(x, weight, residual, bias=bias, gamma=gamma)
    _check_statistics(statistics, residual)
    _LINEAR_RESIDUAL_STATISTICS(residual, statistics, x, weight, bias, gamma, backend=backend)


def _check_statistics(statistics: Tensor, stream: Tensor) -> None:
    shape = _shape(stream)
    if statistics.shape != shape:
        raise ValueError(f"statistics have shape {tuple(statistics.shape)}, those of the stream have {tuple(shape)}.")


def _shape(stream: Tensor) -> tuple[int, ...]:
    """Of the statistics of a stream."""
    return 2, -(-stream.shape[-1] // PART), *stream.shape[:-1]


# The torch references


def row_statistics_torch(x: Tensor) -> Tensor:
    parts = _shape(x)[1]
    column = torch.arange(parts * PART, device=x.device).view(parts, PART)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    values = F.pad(wide, (0, column.numel() - x.shape[-1])).unflatten(-1, (parts, PART))
    sums = values.sum(-1)  # (..., parts)
    deviations = values - (sums / _sizes(x.shape[-1], sums))[..., None]
    squares = torch.where(column < x.shape[-1], deviations, 0.0).square().sum(-1)
    return torch.stack((sums, squares)).movedim(-1, 1).contiguous()


def _sizes(hidden: int, like: Tensor) -> Tensor:
    """How many columns each part of `hidden` has, (parts,), in the dtype of `like`."""
    return torch.arange(hidden, 0, -PART, device=like.device).clamp(max=PART).to(like.dtype)


def row_rstd_torch(statistics: Tensor, hidden: int, eps: float) -> Tensor:
    """1 / sqrt(variance + eps) of each row, (...), from statistics (2, parts, ...)."""
    sums, squares = statistics.movedim(1, -1)  # (..., parts)
    sizes = _sizes(hidden, statistics)
    away = sums / sizes - sums.sum(-1, keepdim=True) / hidden  # of a part's mean from the row's
    return ((squares + sizes * away.square()).sum(-1) / hidden + eps).rsqrt()


def norm_linear_torch(x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return _normed(x, statistics, weight, bias, eps).to(x.dtype)


def norm_linear_gelu_torch(x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return torch.ops.aten.gelu_(_normed(x, statistics, weight, bias, eps)).to(x.dtype)


def norm_linear_swiglu_torch(x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return swiglu(_normed(x, statistics, weight, bias, eps)).to(x.dtype)


def linear_residual_statistics_torch_(
    residual: Tensor, statistics: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None
) -> None:
    linear_residual_torch_(residual, x, weight, bias, gamma)
    statistics.copy_(row_statistics_torch(residual))


def _normed(x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """What the activation takes, in the dtype of the statistics."""
    z = F.linear(x, weight).to(statistics.dtype)
    z *= row_rstd_torch(statistics, x.shape[-1], eps)[..., None]
    return z if bias is None else z.add_(bias)


# The kernels


def _launch_row_statistics(x: Tensor) -> Tensor:
    from dinov2_fast.kernels.norm_linear import row_statistics_forward

    return row_statistics_forward(x)


def _launch(
    epilogue: str, x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> Tensor:  # fmt: skip
    from dinov2_fast.kernels.norm_linear import norm_linear_forward

    return norm_linear_forward(x, statistics, weight, bias, eps, epilogue)


def _launch_residual_statistics_(
    residual: Tensor, statistics: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None
) -> None:
    from dinov2_fast.kernels.norm_linear import linear_residual_statistics_forward_

    linear_residual_statistics_forward_(residual, statistics, x, weight, bias, gamma)
    for written in (residual, statistics):
        was_written(written)


def _fake(x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_swiglu(x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2)


_OPERANDS = "Tensor x, Tensor statistics, Tensor weight, Tensor? bias, float eps"

_row_statistics = _registry.register(
    "row_statistics(Tensor x) -> Tensor",
    _launch_row_statistics,
    lambda x: x.new_empty(_shape(x), dtype=torch.float32),
)
_norm_linear = _registry.register(
    f"norm_linear({_OPERANDS}) -> Tensor", lambda *args: _launch("linear", *args), _fake
)  # fmt: skip
_norm_linear_gelu = _registry.register(
    f"norm_linear_gelu({_OPERANDS}) -> Tensor", lambda *args: _launch("gelu", *args), _fake
)
_norm_linear_swiglu = _registry.register(
    f"norm_linear_swiglu({_OPERANDS}) -> Tensor", lambda *args: _launch("swiglu", *args), _fake_swiglu
)
_linear_residual_statistics = _registry.register(
    "linear_residual_statistics_(Tensor(a!) residual, Tensor(b!) statistics, Tensor x, Tensor weight, Tensor? bias, "
    "Tensor? gamma) -> ()",
    _launch_residual_statistics_,
    lambda *args: None,
)


def _refuses_row_statistics(x: Tensor) -> str | None:
    return None if x.dtype in (*HALF, torch.float32) else f"takes fp16, bf16 and fp32, got {x.dtype}"


def _refuses_normed(x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> str | None:
    return _refuses(x, weight, bias) or _refuses_statistics(statistics)


def _refuses_residual_statistics(residual: Tensor, statistics: Tensor, *operands: Any) -> str | None:
    return _refuses_residual(residual, *operands) or _refuses_statistics(statistics)


def _refuses_statistics(statistics: Tensor) -> str | None:
    if statistics.dtype != torch.float32 or not statistics.is_contiguous():
        return f"needs contiguous fp32 statistics, got {statistics.dtype} with strides {statistics.stride()}"
    return None


def _sample_stream(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    return (torch.empty(1, 257, 384, device=device, dtype=dtype),)


def _sample(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    (x,) = _sample_stream(device, dtype)
    return x, x.new_empty(_shape(x), dtype=torch.float32), x.new_empty(1536, 384), x.new_empty(1536), 1e-6


def _sample_residual(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    residual, statistics, *_ = _sample(device, dtype)
    x, vector = residual.new_empty(1, 257, 1536), residual.new_empty(384)
    return residual, statistics, x, residual.new_empty(384, 1536), vector, vector


_ROW_STATISTICS = Op(
    "row_statistics",
    "norm_linear",
    _registry.torch_and_triton(row_statistics_torch, _row_statistics, _refuses_row_statistics, trains=False),
    _sample_stream,
)
_NORM_LINEAR = Op(
    "norm_linear",
    "norm_linear",
    _registry.torch_and_triton(norm_linear_torch, _norm_linear, _refuses_normed, trains=False),
    _sample,
)
_NORM_LINEAR_GELU = Op(
    "norm_linear_gelu",
    "norm_linear",
    _registry.torch_and_triton(norm_linear_gelu_torch, _norm_linear_gelu, _refuses_normed, trains=False),
    _sample,
)
_NORM_LINEAR_SWIGLU = Op(
    "norm_linear_swiglu",
    "norm_linear",
    _registry.torch_and_triton(norm_linear_swiglu_torch, _norm_linear_swiglu, _refuses_normed, trains=False),
    _sample,
)
_LINEAR_RESIDUAL_STATISTICS = Op(
    "linear_residual_statistics_",
    "norm_linear",
    _registry.torch_and_triton(
        linear_residual_statistics_torch_, _linear_residual_statistics, _refuses_residual_statistics, trains=False
    ),
    _sample_residual,
)
