"""Launches csrc/activation.cu and csrc/activation_backward.cu; allocates what they write."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_fast.ops import _cuda

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BLOCKS_PER_MULTIPROCESSOR = 4  # of the backward with a bias: each leaves partial sums to be added
THREADS = 256


def refuses(x: Tensor, bias: Tensor | None, swiglu: bool) -> str | None:
    """Why the kernels take none of these, or None. Shapes have been checked."""
    multiple = 2 * _cuda.CHUNK if swiglu else _cuda.CHUNK
    if x.dtype not in DTYPES:
        return f"takes fp16, bf16 and fp32, got {x.dtype}"
    if x.shape[-1] % multiple or not x.shape[-1]:
        return f"takes a last dimension that is a multiple of {multiple}, got {x.shape[-1]}"
    if bias is not None and bias.dtype != x.dtype:
        return f"takes a bias in the dtype of x, {x.dtype}, got {bias.dtype}"
    return None


def forward(x: Tensor, bias: Tensor | None, *, swiglu: bool = False, e4m3: bool = False, scale: float = 1.0) -> Tensor:
    """GELU of `x` (..., hidden), or SwiGLU of `x` (..., 2 * hidden); e4m3 values are over `scale`."""
    hidden = x.shape[-1] // 2 if swiglu else x.shape[-1]
    y = x.new_empty((*x.shape[:-1], hidden), dtype=torch.float8_e4m3fn if e4m3 else x.dtype)
    if x.numel():
        launches = _cuda.launches()
        launches.activation_forward(_cuda.rows(x), _cuda.vector(bias), swiglu, 1.0 / scale, _cuda.flat_rows(y))
    return y


def backward(dy: Tensor, x: Tensor, bias: Tensor | None, swiglu: bool) -> tuple[Tensor, Tensor]:
    """Gradients of `x` and, in fp32, of `bias`: of no elements without one."""
    dx = x.new_empty(x.shape)
    if not x.numel():
        return dx, x.new_empty(0) if bias is None else x.new_zeros(bias.shape, dtype=torch.float32)
    flat = _cuda.rows(x)
    partial = None
    if bias is not None:
        across = -(-dy.shape[-1] // (THREADS * _cuda.CHUNK))  # blocks side by side
        blocks = max(1, BLOCKS_PER_MULTIPROCESSOR * _cuda.multiprocessors(x.device) // across)
        partial = x.new_empty((min(flat.shape[0], blocks), flat.shape[1]), dtype=torch.float32)
    _cuda.launches().activation_backward(_cuda.rows(dy), flat, _cuda.vector(bias), swiglu, _cuda.flat_rows(dx), partial)
    return dx, x.new_empty(0) if partial is None else partial.sum(0)
