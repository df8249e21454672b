"""Launches csrc/attention.cu, whose kernels are built from CUTLASS' example for Hopper, and allocates their outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_fast.ops import _backends
from dinov2_fast.ops.implementation import records_gradient

HEAD_DIM = 64  # as in csrc/attention.h


def refuses(qkv: Tensor, seq_lens: None, dropout_p: float, scale: float | None) -> str | None:
    """Any strides are taken, because qkv is copied if TMA cannot read it in place."""
    if reason := _backends.refuses_other_than_sm_90(qkv):
        return reason
    if qkv.shape[-1] != HEAD_DIM:
        return f"takes a head_dim of {HEAD_DIM}, got {qkv.shape[-1]}"
    if dropout_p > 0:
        return f"has no dropout, got dropout_p = {dropout_p}"
    if records_gradient([qkv]) and not _backends.TRITON_IS_INSTALLED:
        return "needs triton for its gradient, which is not installed"
    return None


def attention_forward(qkv: Tensor, with_lse: bool) -> tuple[Tensor, Tensor]:
    """out and lse as `dinov2_fast.kernels.attention.attention_forward` returns them; lse is empty without
    `with_lse`.
    """
    out, lse = attention_forward_fake(qkv, with_lse)
    torch.ops.dinov2_fast_cuda.attention_forward(_operand(qkv), out, lse if with_lse else None)
    return out, lse


def attention_forward_fake(qkv: Tensor, with_lse: bool) -> tuple[Tensor, Tensor]:
    batch, tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(batch, tokens, heads, head_dim)
    return out, qkv.new_empty((batch, heads, tokens) if with_lse else (0,), dtype=torch.float32)


def _operand(qkv: Tensor) -> Tensor:
    """`qkv`, or a copy if TMA cannot read it: heads must start at multiples of 16 bytes and must not overlap."""
    steps = [step for size, step in zip(qkv.shape[:-1], qkv.stride()[:-1], strict=True) if size > 1]
    aligned = qkv.data_ptr() % 16 == 0 and all(step * qkv.itemsize % 16 == 0 for step in steps)
    readable = aligned and qkv.stride(-1) == 1 and all(step >= HEAD_DIM for step in steps)
    return qkv if readable else qkv.clone(memory_format=torch.contiguous_format)
