"""Products of samples and prototypes, a chunk of prototypes at a time, with logits in fp32 (or fp64)."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_fast.ops._backends import HALF, promoted

CHUNK_BYTES = 16 << 20  # of logits. It is near the caches of a CPU, and small problems are one chunk


def as_operands(*tensors: Tensor) -> list[Tensor]:
    """The tensors in their promoted dtype; on a CPU at least fp32, because it rounds the results of other products."""
    dtype = promoted(*tensors)
    if tensors[0].device.type != "cuda":
        dtype = torch.promote_types(dtype, torch.float32)
    return [tensor.to(dtype) for tensor in tensors]


def product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y of operands in one dtype, in fp32 or fp64. On a CPU that of half precision was rounded to it before."""
    if y.dtype not in HALF:
        return torch.mm(x, y)
    return torch.mm(x, y, out_dtype=torch.float32) if y.device.type == "cuda" else torch.mm(x, y).float()


def chunk_size(samples: int, dtype: torch.dtype) -> int:
    """The number of prototypes in a chunk of logits, (samples, prototypes)."""
    return max(CHUNK_BYTES // (max(samples, 1) * max(dtype.itemsize, 4)), 1)


def log_sum_exp_(logits: Tensor, dim: int) -> Tensor:
    """log(sum(exp(logits))) over `dim`, -inf over no elements. Leaves exp(logits - their largest) in `logits`."""
    if logits.shape[dim] == 0:
        return logits.logsumexp(dim)
    largest = logits.amax(dim, keepdim=True)
    return logits.sub_(largest).exp_().sum(dim).log_().add_(largest.squeeze(dim))
