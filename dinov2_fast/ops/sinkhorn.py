"""Sinkhorn-Knopp: targets that use all prototypes alike, as two vectors in the log domain.

    y_ik = z_i . w_k / temperature
    b = 0, then in each iteration:    a_k = log sum_i exp(y_ik - b_i),    b_i = log sum_k exp(y_ik - a_k)

The target of sample i is t_ik = exp(y_ik - a_k - b_i). Its sum over k is 1, and its sum over i is nearly the same for
all k. Shapes: z (n, D), w (K, D), a (K,), b (n,). The matrix of all y or t is never stored.

It equals the iteration on the matrix Q = exp(y) that alternately divides rows and columns by their sums, but it
neither overflows at large logits nor divides by zero where a prototype has no sample near it.
Sources: Cuturi, arXiv:1306.0895; Caron et al., arXiv:2006.09882 (SwAV).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.ops import _backends, _registry
from dinov2_fast.ops._fp8 import E4M3
from dinov2_fast.ops._prototypes import as_operands, chunk_size, log_sum_exp_, product
from dinov2_fast.ops.dispatch import Op
from dinov2_fast.ops.implementation import Implementation

Reduce = Callable[[Tensor], Tensor]


@torch.no_grad()
def sinkhorn(
    z: Tensor,
    prototypes: Tensor,
    temperature: float,
    *,
    iterations: int = 3,
    reduce: Reduce | None = None,
    a: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The vectors a and b of the targets t_ik = exp(z_i . w_k / temperature - a_k - b_i). No gradient is recorded.

    Args:
        z: (n, D), the samples of this process, floating point. There may be none.
        prototypes: (K, D), floating point.
        temperature: positive.
        iterations: how often samples and prototypes are balanced, at least once.
        reduce: log(sum over processes of exp(x)), elementwise, for samples that lie in several processes. It is called
            with (K,) once in each iteration, also if there are no samples.
        a: (K,) to be used as it is. Then b alone is computed: the targets are the softmax of y - a over prototypes.
        backend: the backend to use instead of the default.

    Returns:
        a (K,) and b (n,), in fp32, or in fp64 if an input is fp64. Without samples in any process a is -inf.

    Raises:
        ValueError: the shapes of `z`, `prototypes` and `a` do not fit together, or `iterations` is less than 1.
        BackendError: `backend` cannot take these tensors.
    """
    if z.ndim != 2 or prototypes.ndim != 2 or z.shape[1] != prototypes.shape[1]:
        raise InvalidValueError(
            f"sinkhorn takes z (n, D) and prototypes (K, D), got {tuple(z.shape)} and {tuple(prototypes.shape)}."
        )
    if a is not None and a.shape != prototypes.shape[:1]:
        raise InvalidValueError(f"sinkhorn takes a of shape {tuple(prototypes.shape[:1])}, got {tuple(a.shape)}.")
    if iterations < 1:
        raise InvalidValueError(f"sinkhorn needs at least one iteration, got {iterations}.")
    args = z, prototypes, temperature, iterations, reduce, a
    with torch.autocast(z.device.type, enabled=False):
        result: tuple[Tensor, Tensor] = SINKHORN.choose("sinkhorn", args, backend).function(*args)
    return result


def sinkhorn_torch(
    z: Tensor, prototypes: Tensor, temperature: float, iterations: int, reduce: Reduce | None, a: Tensor | None
) -> tuple[Tensor, Tensor]:
    z, prototypes = as_operands(z, prototypes)
    size = chunk_size(len(z), z.dtype)
    chunks = prototypes.split(size)
    kept = product(z, prototypes.T) if len(chunks) == 1 else None

    def logits_minus(offset: Tensor, chunk: Tensor) -> Tensor:
        logits = product(z, chunk.T) if kept is None else kept
        return torch.add(-offset, logits, alpha=1 / temperature, out=logits if kept is None else None)

    def over_samples(b: Tensor) -> Tensor:
        return torch.cat([log_sum_exp_(logits_minus(b[:, None], chunk), 0) for chunk in chunks])

    def over_prototypes(a: Tensor) -> Tensor:
        parts = zip(a.split(size), chunks, strict=True)
        return torch.stack([log_sum_exp_(logits_minus(part, chunk), 1) for part, chunk in parts]).logsumexp(0)

    wide = torch.promote_types(z.dtype, torch.float32)
    b = z.new_zeros(len(z), dtype=wide)
    return _alternate(over_samples, over_prototypes, b, iterations, reduce, a if a is None else a.to(wide))


def _alternate(
    over_samples: Reduce, over_prototypes: Reduce, b: Tensor, iterations: int, reduce: Reduce | None, a: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The iterations, from b = 0. `over_samples` maps b to a, `over_prototypes` maps a to b."""
    if a is not None:
        return a, over_prototypes(a)
    for _ in range(iterations):
        a = over_samples(b)
        a = a if reduce is None else reduce(a)
        b = over_prototypes(a)
    assert a is not None
    return a, b


# The kernel


def sinkhorn_triton(
    z: Tensor, prototypes: Tensor, temperature: float, iterations: int, reduce: Reduce | None, a: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = _backends.promoted(z, prototypes)
    z, w = z.to(dtype), prototypes.to(dtype)
    b = z.new_zeros(len(z), dtype=torch.promote_types(dtype, torch.float32))
    return _alternate(
        lambda b: lse(w, z, b, 1 / temperature),
        lambda a: lse(z, w, a, 1 / temperature),
        *(b, iterations, reduce, a if a is None else a.to(b.dtype)),
    )


# log sum_j exp(x_i . y_j * scale - offset_j), (rows,), for x (rows, D), y (columns, D) and offset (columns,)
lse = _registry.register(
    "sinkhorn_lse(Tensor x, Tensor y, Tensor? offset, float scale) -> Tensor",
    _registry.launcher("sinkhorn", "sinkhorn_lse"),
    lambda x, y, offset, scale: x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32)),
)


def _sample(device: torch.device, dtype: torch.dtype) -> tuple[object, ...] | None:
    if dtype == E4M3:
        return None
    return *(torch.empty(rows, 256, device=device, dtype=dtype) for rows in (128, 65536)), 0.07, 3, None, None


# torch is first because the kernel has not been measured on a GPU yet.
SINKHORN = Op(
    "sinkhorn",
    (
        Implementation("torch", sinkhorn_torch, has_backward=False, why=_backends.UNMEASURED),
        _backends.triton(sinkhorn_triton, dtypes=_backends.FLOATS, has_backward=False),
    ),
    {"sinkhorn": _sample},
)
