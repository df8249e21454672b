"""Attention of other libraries, for the op attention: oneDNN's on a CPU, xformers' and torch's varlen on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate, product
from typing import Any

import torch
from torch import Tensor

from dinov2_fast import environment
from dinov2_fast.ops import _backends
from dinov2_fast.ops._backends import HALF
from dinov2_fast.ops.activation import into_e4m3
from dinov2_fast.ops.implementation import Implementation, records_gradient
from dinov2_fast.torch_private import (
    constant_when_traced,
    fused_by_onednn,
    is_fake_mode_active,
    is_in_dispatch_mode,
    is_plain,
    is_traced,
)

# oneDNN

ONEDNN_MIN_SCORES = 1 << 16  # from this many scores on, oneDNN's attention is faster than torch's
# The most scores that one call computes, unless those of one head are more. The first call for a shape holds three
# copies of its scores.
ONEDNN_MAX_SCORES = 1 << 25

# The time of oneDNN as a share of torch's, whose products are MKL's (AMD EPYC of family 26 with AVX-512, 2 threads,
# torch 2.11, head_dim 64; AVX2 by ONEDNN_MAX_CPU_ISA and the like):
#   batch x heads    1 x 6    8 x 6    1 x 6     2 x 12    1 x 6
#   tokens             257      257     1370       1370     5477
#   AVX-512           0.54     0.49     0.53       0.50     0.58
#   AVX2              0.98     0.98     1.03
ONEDNN_WHY = "takes 0.5 to 0.6 of torch's time on a CPU with AVX-512"


def onednn_attention(qkv: Tensor) -> Tensor | None:
    """oneDNN's fused attention of `qkv` (batch, seq_len, 3, heads, head_dim); None if torch's should run.

    It runs in fp32, for enough scores, and only if nothing observes the ops: no trace, mode, autocast, gradient or
    subclass.

    oneDNN adds up p @ v one key after another. If the mean of the values is not 0, its error is more than twice that of
    torch. So oneDNN gets v minus its mean, and the mean is added to the result. The sum is the same, because each row
    of p sums to 1.
    """
    observed = is_traced() or is_in_dispatch_mode() or torch.is_autocast_enabled(qkv.device.type) or not is_plain(qkv)
    if observed or qkv.dtype != torch.float32 or records_gradient([qkv]):
        return None
    batch, seq_len, _, heads, head_dim = qkv.shape
    scores = heads * seq_len**2
    if batch * scores < ONEDNN_MIN_SCORES:
        return None
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # each (batch, heads, seq_len, head_dim)
    mean = v.mean(2, keepdim=True)
    v = v - mean
    out = qkv.new_empty(batch, seq_len, heads, head_dim)
    images = max(1, ONEDNN_MAX_SCORES // scores)
    heads_at_once = min(heads, max(1, ONEDNN_MAX_SCORES // seq_len**2))
    for image, head in product(range(0, batch, images), range(0, heads, heads_at_once)):
        part = slice(image, image + images), slice(head, head + heads_at_once)
        operands = q[part], k[part], v[part]
        fused = _fused(*((x.shape, x.stride()) for x in operands), threads=torch.get_num_threads())
        if fused is None:
            return None
        torch.add(fused(*operands), mean[part], out=out.transpose(1, 2)[part])
    return out


@lru_cache(maxsize=256)
def _fused(*layouts: tuple[torch.Size, tuple[int, ...]], threads: int) -> Callable[..., Tensor] | None:
    """oneDNN's attention for q, k and v of these sizes and strides, on `threads` threads; None if it has none."""
    root = layouts[0][0][-1] ** 0.5

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) / root).softmax(-1) @ v

    with torch.inference_mode(False):
        return fused_by_onednn(formula, *(torch.empty_strided(*layout, device="cpu").zero_() for layout in layouts))


# Packed sequences

CACHED_SEQ_LENS = 1024  # lists of lengths whose cu_seqlens are cached; batches of natural images seldom repeat one


def packed_lengths(qkv: Tensor, seq_lens: tuple[int, ...]) -> tuple[Tensor, int]:
    """What kernels need to know of packed sequences: :func:`cu_seqlens`, and the largest length."""
    return cu_seqlens(tuple(seq_lens), qkv.device), max(seq_lens, default=0)


@constant_when_traced  # the lengths are constants of a compiled graph
def cu_seqlens(seq_lens: tuple[int, ...], device: torch.device) -> Tensor:
    """(sequences + 1,) int32: the first token of each sequence, and at the end the number of tokens.

    The tensor is cached, because copying it to the device waits for the device, which a CUDA graph must not do. So the
    first call with new lengths must come before the capture. The graph then reads the cached tensor.
    """
    make = _copy_cu_seqlens.__wrapped__ if is_fake_mode_active() else _copy_cu_seqlens
    return make(seq_lens, device)


@lru_cache(maxsize=CACHED_SEQ_LENS)
def _copy_cu_seqlens(seq_lens: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # autograd cannot save an inference tensor
        return torch.tensor([0, *accumulate(seq_lens)], dtype=torch.int32, device=device)


# Libraries on a GPU


def varlen_attn(qkv: Tensor, seq_lens: tuple[int, ...], dropout_p: float, scale: float | None) -> Tensor:
    from torch.nn.attention import varlen

    q, k, v = qkv.unbind(1)
    offsets, max_seqlen = packed_lengths(qkv, seq_lens)
    out = varlen.varlen_attn(q, k, v, offsets, offsets, max_seqlen, max_seqlen)
    assert isinstance(out, Tensor)  # a tuple only if auxiliary outputs are requested
    return into_e4m3(out.contiguous(), scale)


def xformers_attention(qkv: Tensor, seq_lens: tuple[int, ...] | None, dropout_p: float, scale: float | None) -> Tensor:
    from xformers.ops import memory_efficient_attention

    if seq_lens is None:
        return into_e4m3(memory_efficient_attention(*qkv.unbind(2), p=dropout_p).contiguous(), scale)
    mask = _block_diagonal_mask(tuple(seq_lens), qkv.device)
    out = memory_efficient_attention(*qkv[None].unbind(2), attn_bias=mask, p=dropout_p)[0]
    return into_e4m3(out.contiguous(), scale)


@lru_cache(maxsize=CACHED_SEQ_LENS)
def _block_diagonal_mask(seq_lens: tuple[int, ...], device: torch.device) -> Any:
    from xformers.ops.fmha import BlockDiagonalMask

    with torch.inference_mode(False):
        return BlockDiagonalMask.from_seqlens(seq_lens, device=device)


def _refuses(qkv: Tensor, seq_lens: object, dropout_p: float, scale: float | None) -> str | None:
    return f"takes a head_dim that is a multiple of 8, got {qkv.shape[-1]}" if qkv.shape[-1] % 8 else None


def _refuses_varlen_attn(qkv: Tensor, seq_lens: object, dropout_p: float, scale: float | None) -> str | None:
    if dropout_p > 0:
        return f"has no dropout, got dropout_p = {dropout_p}"
    if qkv.shape[-1] > 256:
        return f"takes a head_dim up to 256, got {qkv.shape[-1]}"
    return _refuses(qkv, seq_lens, dropout_p, scale)


_XFORMERS_IS_INSTALLED = _backends.is_installed("xformers")


@constant_when_traced
def _xformers_refuses_device(device: torch.device) -> str | None:
    if not _XFORMERS_IS_INSTALLED:
        return "needs xformers, which is not installed"
    return "is switched off by XFORMERS_DISABLED" if environment.xformers_disabled() else None


VARLEN_ATTN = Implementation("varlen_attn", varlen_attn, _refuses_varlen_attn, ("cuda",), HALF, ("varlen",))
XFORMERS = Implementation(
    "xformers",
    xformers_attention,
    _refuses,
    ("cuda",),
    (*HALF, torch.float32),
    ("batch", "varlen"),
    refuses_device=_xformers_refuses_device,
)
