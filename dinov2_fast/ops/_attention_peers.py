"""Attention of other libraries as implementations of the op attention: torch's for packed sequences, and xformers'."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from dinov2_fast import environment
from dinov2_fast.ops import _backends
from dinov2_fast.ops.activation import into_e4m3
from dinov2_fast.ops.implementation import Implementation
from dinov2_fast.torch_private import constant_when_traced, is_fake_mode_active

PACKED_KINDS = 1024  # packings whose boundaries are kept: in lists of natural images hardly any comes twice
_XFORMERS_IS_INSTALLED = _backends.is_installed("xformers")


def packing(qkv: Tensor, seq_lens: tuple[int, ...]) -> tuple[Tensor, int]:
    """What kernels ask of packed sequences: :func:`cu_seqlens`, and the greatest length."""
    return cu_seqlens(tuple(seq_lens), qkv.device), max(seq_lens, default=0)


@constant_when_traced  # the lengths are constants of a compiled graph
def cu_seqlens(seq_lens: tuple[int, ...], device: torch.device) -> Tensor:
    """(sequences + 1,) int32: the first token of each sequence, and at the end the number of tokens.

    Kept for good: the copy waits for the device, so that it cannot be part of a CUDA graph, and a graph reads it later.
    The first call for some lengths comes before the capture.
    """
    make = _copy_cu_seqlens.__wrapped__ if is_fake_mode_active() else _copy_cu_seqlens
    return make(seq_lens, device)


@lru_cache(maxsize=PACKED_KINDS)
def _copy_cu_seqlens(seq_lens: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # or autograd could not save it later
        return torch.tensor([0, *accumulate(seq_lens)], dtype=torch.int32, device=device)


def varlen_attn(qkv: Tensor, seq_lens: tuple[int, ...], dropout_p: float, scale: float | None) -> Tensor:
    from torch.nn.attention import varlen

    q, k, v = qkv.unbind(1)
    offsets, longest = packing(qkv, seq_lens)
    out = varlen.varlen_attn(q, k, v, offsets, offsets, longest, longest)
    assert isinstance(out, Tensor)  # a tuple only where auxiliary results are asked for
    return into_e4m3(out.contiguous(), scale)


def xformers_attention(qkv: Tensor, seq_lens: tuple[int, ...] | None, dropout_p: float, scale: float | None) -> Tensor:
    from xformers.ops import memory_efficient_attention

    if seq_lens is None:
        return into_e4m3(memory_efficient_attention(*qkv.unbind(2), p=dropout_p).contiguous(), scale)
    mask = _block_diagonal_mask(tuple(seq_lens), qkv.device)
    out = memory_efficient_attention(*qkv[None].unbind(2), attn_bias=mask, p=dropout_p)[0]
    return into_e4m3(out.contiguous(), scale)


@lru_cache(maxsize=PACKED_KINDS)
def _block_diagonal_mask(seq_lens: tuple[int, ...], device: torch.device) -> Any:
    from xformers.ops.fmha import BlockDiagonalMask

    with torch.inference_mode(False):
        return BlockDiagonalMask.from_seqlens(seq_lens, device=device)


def _refuses(qkv: Tensor, seq_lens: object, dropout_p: float, scale: float | None) -> str | None:
    return f"takes a head_dim that 8 divides, got {qkv.shape[-1]}" if qkv.shape[-1] % 8 else None


def _refuses_varlen_attn(qkv: Tensor, seq_lens: object, dropout_p: float, scale: float | None) -> str | None:
    if dropout_p > 0:
        return f"has no dropout, asked for with p = {dropout_p}"
    if qkv.shape[-1] > 256:
        return f"takes a head_dim up to 256, got {qkv.shape[-1]}"
    return _refuses(qkv, seq_lens, dropout_p, scale)


@constant_when_traced
def _xformers_is_absent(device: torch.device) -> str | None:
    if not _XFORMERS_IS_INSTALLED:
        return "needs xformers, which is not installed"
    return "is switched off by XFORMERS_DISABLED" if environment.xformers_disabled() else None


_HALF = (torch.float16, torch.bfloat16)
_FLOATS = (*_HALF, torch.float32)
VARLEN_ATTN = Implementation("varlen_attn", varlen_attn, _refuses_varlen_attn, ("cuda",), _HALF, ("varlen",))
XFORMERS = Implementation(
    "xformers", xformers_attention, _refuses, ("cuda",), _FLOATS, ("batch", "varlen"), unavailable=_xformers_is_absent
)
