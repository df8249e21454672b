"""Every launch of every kernel, compiled ahead of time for every GPU that it may run on, has no fault."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dinov2_fast.kernels import (
    activation,
    activation_backward,
    attention,
    attention_backward,
    attention_pool,
    layer_norm,
    layer_norm_backward,
    linear,
    patches,
    prototype_loss,
    residual,
    residual_backward,
    sinkhorn,
)
from tests.helpers.aot import (
    ARCHITECTURES,
    FP8_ARCHITECTURES,
    compiling,
    faults,
)

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures("compiler")]


SMALL_SPILL = 16  # bytes of a thread: a few registers that are needed only after the loop


@dataclass(frozen=True)
class Case:
    """The launches of an op as the package makes them: `launch(dtype, *size)` for each size.

    `sizes` are those of the backbones. `more` lead to the other configurations that the launchers choose. `alike` are
    dtypes with the configuration of one of `dtypes`; for them, one size shows that they compile. `max_spill` and
    `fast` are arguments of `faults`.
    """

    launch: Callable[..., None]
    sizes: tuple[tuple[int, ...], ...]
    more: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    alike: tuple[torch.dtype, ...] = (torch.float16,)
    architectures: tuple[int, ...] = ARCHITECTURES
    max_spill: int = SMALL_SPILL
    fast: bool = True


def _cuda(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device="cuda", dtype=dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _layer_norm(dtype: torch.dtype, rows: int, hidden: int) -> None:
    x, vector, statistic = _cuda(1, rows, hidden, dtype=dtype), _cuda(hidden), _cuda(1, rows, dtype=_wide(dtype))
    forward = layer_norm.layer_norm_forward
    forward(x, vector, vector, 1e-6)
    forward(x, vector.to(dtype), vector.to(dtype), 1e-6, statistics=True)
    forward(x, vector.to(dtype), vector.to(dtype), 1e-6, deferred_bias=vector)
    layer_norm_backward.layer_norm_backward(x, x, vector.to(dtype), statistic, statistic)


def _add_layer_norm(dtype: torch.dtype, rows: int, hidden: int) -> None:
    x, vector, statistic = _cuda(1, rows, hidden, dtype=dtype), _cuda(hidden), _cuda(1, rows, dtype=_wide(dtype))
    drop_scale, same = _cuda(1, dtype=dtype), vector.to(dtype)
    forward, backward = layer_norm.layer_norm_forward, layer_norm_backward.layer_norm_backward
    forward(x, same, same, 1e-6, branch=x)
    forward(x, same, same, 1e-6, branch=x, gamma=same, drop_scale=drop_scale, statistics=True)
    forward(x.to(_wide(dtype)), vector, vector, 1e-6, branch=x, gamma=vector, statistics=True)
    backward(x, x, same, statistic, statistic, dtotal=x, branch=x, gamma=same, drop_scale=drop_scale, dx_dtype=dtype)


def _layer_norm_e4m3(dtype: torch.dtype, rows: int, hidden: int) -> None:
    x, vector = _cuda(1, rows, hidden, dtype=dtype), _cuda(hidden, dtype=dtype)
    layer_norm.layer_norm_forward(x, vector, vector, 1e-6, scale=0.125)
    layer_norm.layer_norm_forward(x, vector, vector, 1e-6, scale=0.125, deferred_bias=_cuda(hidden))


def _activation(dtype: torch.dtype, rows: int, hidden: int) -> None:
    x = _cuda(rows, 2 * hidden, dtype=dtype)
    for kind, width in (("gelu", hidden), ("swiglu", 2 * hidden)):
        activation.activation_forward(x[:, :width], kind)
        activation_backward.activation_backward(x[:, :hidden], x[:, :width], kind)


def _activation_e4m3(dtype: torch.dtype, rows: int, hidden: int) -> None:
    x = _cuda(rows, 2 * hidden, dtype=dtype)
    for kind, width in (("gelu", hidden), ("identity", hidden), ("swiglu", 2 * hidden)):
        activation.activation_forward(x[:, :width], kind, scale=0.0625)


def _attention(dtype: torch.dtype, seq_len: int, heads: int, head_dim: int, batch: int = 8) -> None:
    qkv = _cuda(batch, seq_len, 3, heads, head_dim, dtype=dtype)
    out, lse = attention.attention_forward(qkv)
    attention_backward.attention_backward(out, qkv, out, lse)


def _attention_varlen(dtype: torch.dtype, max_seqlen: int, heads: int, head_dim: int, tokens: int = 4096) -> None:
    qkv, cu_seqlens = _cuda(1, tokens, 3, heads, head_dim, dtype=dtype), _cuda(9, dtype=torch.int32)
    out, lse = attention.attention_forward(qkv, cu_seqlens, max_seqlen)
    attention_backward.attention_backward(out, qkv, out, lse, cu_seqlens, max_seqlen)


def _attention_e4m3(dtype: torch.dtype, seq_len: int, heads: int, head_dim: int, batch: int = 8) -> None:
    attention.attention_forward(_cuda(batch, seq_len, 3, heads, head_dim, dtype=dtype), scale=0.0625)


def _attention_varlen_e4m3(dtype: torch.dtype, max_seqlen: int, heads: int, head_dim: int, tokens: int = 4096) -> None:
    qkv, cu_seqlens = _cuda(1, tokens, 3, heads, head_dim, dtype=dtype), _cuda(9, dtype=torch.int32)
    attention.attention_forward(qkv, cu_seqlens, max_seqlen, scale=0.0625)


def _attention_probabilities(dtype: torch.dtype, seq_len: int, heads: int, head_dim: int, batch: int = 8) -> None:
    qkv = _cuda(batch, seq_len, 3, heads, head_dim, dtype=dtype)
    attention.attention_probabilities_forward(qkv, 0, 1, 1)
    attention.attention_probabilities_forward(qkv, 0, seq_len, 1)


def _attention_pool(dtype: torch.dtype, batch: int, hidden: int, tokens: int = 257) -> None:
    x, vector = _cuda(batch, tokens, hidden, dtype=dtype), _cuda(hidden, dtype=dtype)
    absorbed = _cuda(batch, max(1, hidden // 64), hidden, dtype=dtype)
    attention_pool.attention_pool_forward(x, absorbed, vector, vector, 1e-6)


def _linear(dtype: torch.dtype, rows: int, in_features: int, out_features: int) -> None:
    x, weight = _cuda(rows, in_features, dtype=dtype), _cuda(out_features, in_features, dtype=dtype)
    bias = _cuda(out_features, dtype=dtype)
    for epilogue in ("none", "gelu", "swiglu"):
        linear.linear_forward(x, weight, bias, epilogue)
    for stream in {dtype, torch.float32}:
        linear.linear_residual_forward_(_cuda(rows, out_features, dtype=stream), x, weight, bias)


def _linear_e4m3(dtype: torch.dtype, rows: int, in_features: int, out_features: int) -> None:
    x, weight = _cuda(rows, in_features, dtype=E4M3), _cuda(out_features, in_features, dtype=E4M3)
    bias = _cuda(out_features, dtype=dtype)
    scales = {"scale": 0.125, "weight_scale": _cuda(out_features)}
    linear.linear_forward(x, weight, bias, "none", dtype=dtype, **scales)
    for epilogue in ("gelu", "swiglu"):
        linear.linear_forward(x, weight, bias, epilogue, dtype=dtype, **scales)
        linear.linear_forward(x, weight, bias, epilogue, dtype=E4M3, out_scale=0.0625, **scales)
    for stream in (dtype, torch.float32):
        linear.linear_residual_forward_(_cuda(rows, out_features, dtype=stream), x, weight, bias, **scales)


def _patches(dtype: torch.dtype, pixels: int, padded_to: int, batch: int = 8) -> None:
    for source in (torch.uint8, dtype):
        images = _cuda(batch, 3, pixels, pixels, dtype=source)
        for x in (images, images.contiguous(memory_format=torch.channels_last)):
            patches.patches_forward(x, 14, padded_to, dtype)


def _sinkhorn(dtype: torch.dtype, samples: int, prototypes: int, width: int) -> None:
    z, w = (_cuda(rows, width, dtype=dtype) for rows in (samples, prototypes))
    a, b = (_cuda(rows, dtype=_wide(dtype)) for rows in (prototypes, samples))
    sinkhorn.sinkhorn_lse(w, z, b, 1 / 0.07)
    sinkhorn.sinkhorn_lse(z, w, a, 1 / 0.07)
    sinkhorn.sinkhorn_lse(z, w, None, 1 / 0.07)


def _prototype_loss(dtype: torch.dtype, samples: int, prototypes: int, width: int) -> None:
    s, v = (_cuda(rows, width, dtype=dtype) for rows in (samples, prototypes))
    a, b = (_cuda(rows, dtype=_wide(dtype)) for rows in (prototypes, samples))
    prototype_loss.prototype_sum(s, v, v, b, a, 1 / 0.07)
    prototype_loss.prototype_sum(s, v, v, b, None, 1 / 0.1)
    prototype_loss.prototype_sum(v, s, s, None, b, 1 / 0.1)
    prototype_loss.prototype_sum(v, s, s, a, b, 1 / 0.07)


def _residual(dtype: torch.dtype, seq_len: int, hidden: int, batch: int = 8) -> None:
    x, gamma = _cuda(batch, seq_len, hidden, dtype=dtype), _cuda(hidden, dtype=dtype)
    drop_scale = _cuda(batch, dtype=dtype)
    index, wide = _cuda(min(batch, 5), dtype=torch.int64), x.to(_wide(dtype))
    residual.add_residual_forward(x, x, gamma, drop_scale)
    residual.add_residual_forward(wide, x, gamma)
    residual.add_residual_forward(x, x[:5], gamma, index=index, scale=1.6)
    residual.gather_rows_forward([x], [index])
    residual_backward.add_residual_backward(x, x)
    residual_backward.add_residual_backward(x, x, gamma, drop_scale)
    residual_backward.add_residual_backward(x, x[:5], gamma, index=index, scale=1.6)


ROWS = tuple((64 * 257, hidden) for hidden in (384, 768, 1024, 1536))
MORE_ROWS = ((1, 384), (257, 384), (771, 384), (2056, 384), (257, 1536), (257, 383), (257, 4096))
E4M3 = torch.float8_e4m3fn
FP16_AND_64 = (torch.float16, torch.float64)
# in_features of patches: 592 is padded for TMA, 588 is not, so it is read without TMA. Few rows lead to a small tile.
FEATURES = ((16448, 384, 1536), (16448, 1024, 4096), (16448, 4096, 1536))
MORE_FEATURES = ((16448, 592, 384), (16448, 588, 384), (257, 384, 384), (257, 383, 386), (1, 384, 384))
# Triton compiles integer arguments that are 1 as constants. Batch, rows, tokens and heads can be 1.
ONE_TOKEN = ((1, 6, 64), (1, 1, 64, 1))
# Tails of 16 and 32 keys; then no tail, other head_dims, a tail of 64 keys, tiles of 64 and of 128 queries.
HEADS: dict[str, tuple[tuple[int, ...], ...]] = {
    "sizes": ((257, 6, 64), (257, 16, 64), (1370, 6, 64), (1370, 16, 64)),
    "more": (
        *((seq_len, 6, 64) for seq_len in (64, 128, 129, 200, 230, 261)),
        *((seq_len, 6, head_dim) for seq_len in (257, 1370) for head_dim in (32, 128)),
        *((257, 1, 64, 1), (1370, 1, 64, 1), *ONE_TOKEN),
    ),
}
PROTOTYPES = ((640, 65536, 256), (4900, 131072, 384))
MORE_PROTOTYPES = ((128, 512, 128), (1, 24, 8))
CASES = {
    "layer_norm": Case(_layer_norm, ROWS, MORE_ROWS, alike=FP16_AND_64),
    "add_layer_norm": Case(_add_layer_norm, ROWS, MORE_ROWS, alike=FP16_AND_64),
    # far wider than any DINOv2: the rows of the backward do not fit in the registers
    "layer_norm_wide": Case(_layer_norm, ((257, 8192),), alike=FP16_AND_64),
    "add_layer_norm_wide": Case(_add_layer_norm, ((257, 8192),), alike=FP16_AND_64, max_spill=384),
    "layer_norm_e4m3": Case(_layer_norm_e4m3, ROWS, MORE_ROWS, architectures=FP8_ARCHITECTURES),
    "activation": Case(
        _activation, ((8 * 257, 1536), (8 * 257, 4096)), ((8 * 257, 768), (8 * 257, 383), (1, 8)), alike=FP16_AND_64
    ),
    "activation_e4m3": Case(
        _activation_e4m3, ((8 * 257, 1536), (8 * 257, 4096)), ((257, 383), (1, 1536)), architectures=FP8_ARCHITECTURES
    ),
    "residual": Case(
        _residual,
        ((257, 384), (257, 768), (257, 1024), (257, 1536)),
        ((257, 383), (257, 8192), (257, 384, 1), (1, 384), (1, 384, 1)),
        alike=FP16_AND_64,
    ),
    # at head_dim 32, which DINOv2 does not have, sm_100 gives 80 registers to a thread and reads 16 bytes twice
    "attention": Case(_attention, **HEADS, max_spill=32),
    # at head_dim 128, which DINOv2 does not have, sm_120 spills a little more
    "attention_varlen": Case(
        _attention_varlen, ((257, 6, 64),), ((64, 16, 64), (257, 6, 32), (257, 6, 128), *ONE_TOKEN), max_spill=24
    ),
    "attention_e4m3": Case(_attention_e4m3, **HEADS, architectures=FP8_ARCHITECTURES, max_spill=32),
    "attention_varlen_e4m3": Case(
        _attention_varlen_e4m3,
        ((257, 6, 64),),
        ((64, 16, 64), (257, 6, 32), (257, 6, 128), *ONE_TOKEN),
        architectures=FP8_ARCHITECTURES,
    ),
    # one query row in a tile of 16, besides all rows in tiles of 64
    "attention_probabilities": Case(
        _attention_probabilities,
        ((257, 6, 64),),
        ((1370, 16, 64), (257, 6, 32), (257, 6, 128), (257, 1, 64, 1), *ONE_TOKEN),
        fast=False,
    ),
    # one query per head: the heads of an image are too few rows for HGMMA
    "attention_pool": Case(
        _attention_pool,
        ((64, 384), (64, 768), (64, 1024), (64, 1536)),
        ((1, 384), (1, 1536), (8, 383), (8, 384, 1), (1, 384, 1)),
        alike=FP16_AND_64,
        fast=False,
    ),
    "linear": Case(_linear, FEATURES, MORE_FEATURES),
    "linear_e4m3": Case(_linear_e4m3, FEATURES, MORE_FEATURES, (torch.bfloat16,), architectures=FP8_ARCHITECTURES),
    # class tokens of 64 images with 10 crops, and masked patches; the widths of the reference's bottlenecks
    "sinkhorn": Case(_sinkhorn, PROTOTYPES, MORE_PROTOTYPES, alike=FP16_AND_64),
    "prototype_loss": Case(_prototype_loss, PROTOTYPES, MORE_PROTOTYPES, alike=FP16_AND_64, max_spill=32),
    "patches": Case(_patches, ((224, 592),), ((518, 588), (224, 640), (14, 592), (14, 592, 1)), alike=FP16_AND_64),
}


def _faults(case: Case, arch: int, dtype: torch.dtype, sizes: tuple[tuple[int, ...], ...]) -> list[str]:
    with compiling(arch) as reports:
        for size in sizes:
            case.launch(dtype, *size)
    assert reports, "no kernel was launched"
    # fp64 is there for gradcheck, whose speed does not matter
    max_spill = 2**20 if dtype == torch.float64 else case.max_spill
    return [fault for report in reports for fault in faults(report, max_spill, case.fast)]


@pytest.mark.parametrize("name", CASES)
def test_default_configurations_are_good_on_sm_90(name: str) -> None:
    case = CASES[name]
    assert _faults(case, 90, case.dtypes[0], case.sizes) == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arch"), [(name, arch) for name in CASES for arch in CASES[name].architectures])
def test_every_configuration_is_good(name: str, arch: int) -> None:
    case = CASES[name]
    found = [fault for dtype in case.dtypes for fault in _faults(case, arch, dtype, case.sizes + case.more)]
    found += [fault for dtype in case.alike for fault in _faults(case, arch, dtype, case.sizes[:1])]
    assert found == []


# (dtype, epilogue, rows, in_features, out_features), rows and columns of the tile, programs on 132 multiprocessors
TILES = [
    (torch.bfloat16, "none", 16448, 384, 1536, (128, 256, 132)),
    (E4M3, "none", 16448, 384, 1536, (128, 256, 132)),
    (E4M3, "none", 16448, 1024, 384, (128, 128, 264)),  # 256 columns would pad 384 to 512
    (torch.bfloat16, "gelu", 16448, 1024, 1536, (128, 256, 132)),
    (E4M3, "gelu", 16448, 1024, 1536, (128, 128, 264)),  # its epilogue needs overlap up to twice as many in_features
    (E4M3, "gelu", 16448, 2048, 1536, (128, 256, 132)),
    (E4M3, "none", 257, 384, 384, (64, 64, 30)),
]


def test_linear_takes_the_largest_tile_that_keeps_the_gpu_busy() -> None:
    with compiling(90) as reports:
        for dtype, epilogue, rows, in_features, out_features, _ in TILES:
            x, weight = (_cuda(n, in_features, dtype=dtype) for n in (rows, out_features))
            scales = {"dtype": torch.bfloat16, "weight_scale": _cuda(out_features)} if dtype == E4M3 else {}
            linear.linear_forward(x, weight, None, epilogue, **scales)
    found = [(report.constants["BLOCK_M"], report.constants["BLOCK_N"], *report.grid) for report in reports]
    assert found == [tile for *_, tile in TILES]


@pytest.mark.parametrize("seq_len", [257, 1370, 5477])
def test_attention_on_sm_90_leaves_room_for_two_programs_and_loads_ahead(seq_len: int) -> None:
    with compiling(90) as reports:
        _attention(torch.bfloat16, seq_len, 6, 64)
    forward, _, keys, queries = reports
    assert min(report.programs for report in (forward, keys, queries)) >= 2
    assert max(report.stack for report in (forward, keys, queries)) == 0
    # when a loop waits for the copies of its tile, the copies of the next tile are under way
    for report in (forward, keys, queries):
        assert max(map(int, re.findall(r"cp\.async\.wait_group\s+(\d+)", report.ptx))) >= 2, report
    # for each tile, before and in the loop, a thread copies one number of lse and delta
    assert keys.opcodes["LDGSTS.E"] == keys.num_stages, keys
