"""Attention of other libraries as implementations of the op attention: torch's own kernels by name, and xformers.

The arguments are those of the op: packed qkv, for sequences of different lengths `seq_lens`, and dropout_p.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dinov2_fast import environment
from dinov2_fast.backends import Implementation
from dinov2_fast.ops import _registry_old as _registry

PACKED_KINDS = 1024  # packings whose boundaries are kept: in lists of natural pictures hardly any comes twice
_HALF = (torch.float16, torch.bfloat16)
_XFORMERS_IS_INSTALLED = _registry.is_installed("xformers")
_VARLEN_IS_INSTALLED = _registry.is_installed("torch.nn.attention.varlen")


def sdpa(function: Callable[..., Tensor]) -> tuple[Implementation, ...]:
    """`function`, which calls torch's scaled_dot_product_attention, held to each of its kernels in turn."""

    def held_to(backend: SDPBackend) -> Callable[..., Tensor]:
        def run(*args: Any) -> Tensor:
            with sdpa_kernel(backend):
                return function(*args)

        return run

    def is_cpu(device: torch.device) -> bool:
        return device.type == "cpu"

    return (
        Implementation("sdpa_cudnn", held_to(SDPBackend.CUDNN_ATTENTION), _refuses_cudnn, ("cuda",)),
        Implementation("sdpa_flash", held_to(SDPBackend.FLASH_ATTENTION), _refuses_flash, ("cuda",), is_cpu),
        Implementation("sdpa_efficient", held_to(SDPBackend.EFFICIENT_ATTENTION), _refuses_efficient, ("cuda",)),
    )


def _refuses_cudnn(qkv: Tensor, *rest: Any) -> str | None:
    lengths, _ = _lengths_and_dropout(qkv, *rest)
    if 1 in lengths:
        return "takes no sequence of one token"
    return _refuses_dtype(qkv, _HALF) or _refuses_head_dim(qkv, 128)


def _refuses_flash(qkv: Tensor, *rest: Any) -> str | None:
    if qkv.is_cuda:
        return _refuses_dtype(qkv, _HALF) or _refuses_head_dim(qkv, 256)
    _, dropout_p = _lengths_and_dropout(qkv, *rest)
    return _refuses_dropout(dropout_p, " on the CPU")


def _refuses_efficient(qkv: Tensor, *rest: Any) -> str | None:
    return _refuses_dtype(qkv, (*_HALF, torch.float32)) or _refuses_head_dim(qkv)


def _lengths_and_dropout(qkv: Tensor, *rest: Any) -> tuple[Sequence[int], float]:
    """From the arguments of `attention` (qkv has a batch) or of `attention_varlen`."""
    if qkv.ndim == 5:
        return (qkv.shape[1],), rest[0] if rest else 0.0
    return rest[0], rest[1] if len(rest) > 1 else 0.0


def _refuses_dtype(qkv: Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    if qkv.dtype in dtypes:
        return None
    return f"takes {', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}, got {qkv.dtype}"


def _refuses_head_dim(qkv: Tensor, greatest: int | None = None) -> str | None:
    head_dim = qkv.shape[-1]
    if head_dim % 8:
        return f"takes a head_dim that 8 divides, got {head_dim}"
    return f"takes a head_dim up to {greatest}, got {head_dim}" if greatest and head_dim > greatest else None


def _refuses_dropout(dropout_p: float, where: str = "") -> str | None:
    return f"has no dropout{where}, asked for with p = {dropout_p}" if dropout_p > 0 else None


# torch.nn.attention.varlen


def varlen_attn(qkv: Tensor, seq_lens: tuple[int, ...], dropout_p: float = 0.0) -> Tensor:
    from torch.nn.attention import varlen

    q, k, v = qkv.unbind(1)
    offsets, longest = cu_seqlens(tuple(seq_lens), qkv.device), max(seq_lens, default=0)
    out = varlen.varlen_attn(q, k, v, offsets, offsets, longest, longest)
    assert isinstance(out, Tensor)  # a tuple only where auxiliary results are asked for
    return out.contiguous()


def _refuses_varlen_attn(qkv: Tensor, seq_lens: tuple[int, ...], dropout_p: float = 0.0) -> str | None:
    if not _VARLEN_IS_INSTALLED:
        return "needs a newer torch"
    return _refuses_dropout(dropout_p) or _refuses_dtype(qkv, _HALF) or _refuses_head_dim(qkv, 256)


@_registry.constant_when_traced  # the lengths are constants of a compiled graph
def cu_seqlens(seq_lens: tuple[int, ...], device: torch.device) -> Tensor:
    """(sequences + 1,) int32: the first token of each sequence, and at the end the number of tokens.

    Kept for good: the copy waits for the device, so that it cannot be part of a CUDA graph, and a graph reads it later.
    The first call for some lengths comes before the capture.
    """
    is_fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
    make = _copy_cu_seqlens.__wrapped__ if is_fake else _copy_cu_seqlens
    return make(seq_lens, device)


@lru_cache(maxsize=PACKED_KINDS)
def _copy_cu_seqlens(seq_lens: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # or autograd could not save it later
        return torch.tensor([0, *accumulate(seq_lens)], dtype=torch.int32, device=device)


# xformers


def xformers_attention(qkv: Tensor, dropout_p: float = 0.0) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*qkv.unbind(2), p=dropout_p).contiguous()


def xformers_attention_varlen(qkv: Tensor, seq_lens: tuple[int, ...], dropout_p: float = 0.0) -> Tensor:
    from xformers.ops import memory_efficient_attention

    mask = _block_diagonal_mask(tuple(seq_lens), qkv.device)
    return memory_efficient_attention(*qkv[None].unbind(2), attn_bias=mask, p=dropout_p)[0].contiguous()


@lru_cache(maxsize=PACKED_KINDS)
def _block_diagonal_mask(seq_lens: tuple[int, ...], device: torch.device) -> Any:
    from xformers.ops.fmha import BlockDiagonalMask

    with torch.inference_mode(False):
        return BlockDiagonalMask.from_seqlens(seq_lens, device=device)


def _refuses_xformers(qkv: Tensor, *rest: Any) -> str | None:
    if not _XFORMERS_IS_INSTALLED:
        return "needs xformers, which is not installed"
    if _xformers_disabled():
        return "is switched off by XFORMERS_DISABLED"
    return _refuses_dtype(qkv, (*_HALF, torch.float32)) or _refuses_head_dim(qkv)


@_registry.constant_when_traced
def _xformers_disabled() -> bool:
    return environment.xformers_disabled()


VARLEN_ATTN = Implementation("varlen_attn", varlen_attn, _refuses_varlen_attn, ("cuda",))
XFORMERS = Implementation("xformers", xformers_attention, _refuses_xformers, ("cuda",))
XFORMERS_VARLEN = Implementation("xformers", xformers_attention_varlen, _refuses_xformers, ("cuda",))
