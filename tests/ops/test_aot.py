"""Ahead-of-time compilation: the harness sees what it should, and every kernel fits every GPU that it may run on."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dinov2_fast.kernels import (
    activation,
    activation_backward,
    attention,
    attention_backward,
    attention_pool,
    common,
    layer_norm,
    layer_norm_backward,
    linear,
    patches,
    residual,
    residual_backward,
)
from tests.helpers.aot import (
    ALL,
    ARCHITECTURES,
    FP8_ARCHITECTURES,
    MULTIPROCESSORS,
    SHARED_MEMORY,
    Report,
    compiling,
    faults,
)

pytestmark = pytest.mark.aot


@pytest.fixture(scope="session", autouse=True)
def _compiler(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[None]:
    """A cache of this run's own, shared by its workers, unless the environment names one."""
    if triton.knobs.runtime.interpret:
        pytest.fail("tests marked aot compile kernels: run them in a process without TRITON_INTERPRET")
    base = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        base = base.parent
    with triton.knobs.cache.scope():
        if "TRITON_CACHE_DIR" not in os.environ:
            triton.knobs.cache.dir = str(base / "triton")
        yield


@triton.jit
def _scale_kernel(x, y, size, stride, factor, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + index * stride, mask=index < size, other=0.0)
    tl.store(y + index, value * factor, mask=index < size)


@triton.jit
def _hoarding_kernel(x, y, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    value = tl.load(x + index)
    tl.store(y + index, value / tl.sum(value))


@triton.jit
def _dot_kernel(
    a, b, c, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, SUMS: tl.constexpr
):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BLOCK_K):
        left = tl.load(a + m[:, None] * K + (start + k)[None, :])
        right = tl.load(b + n[None, :] * K + (start + k)[:, None])
        total = tl.dot(left, right, total, input_precision=PRECISION, max_num_imprecise_acc=SUMS)
    tl.store(c + m[:, None] * N + n[None, :], total)


@triton.jit
def _descriptor_kernel(a, b, c, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BLOCK_K):
        total = tl.dot(a.load([0, start]), b.load([0, start]).T, total)
    out = tl.make_tensor_descriptor(c, [M, N], [N, 1], [M, N])
    out.store([0, 0], total)


def _scale(x: torch.Tensor, factor: float = 2.0) -> torch.Tensor:
    y = torch.empty_like(x)
    _scale_kernel[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](
        x, y, x.numel(), x.stride(0), factor, BLOCK=1024, num_warps=8
    )
    return y


def _hoard(size: int, warps: int) -> None:
    x = torch.empty(size, device="cuda")
    _hoarding_kernel[(1,)](x, x, BLOCK=size, num_warps=warps)


def _dot(
    dtype: torch.dtype,
    block: tuple[int, int, int] = (128, 128, 64),
    stages: int = 3,
    precision: str = "ieee",
    sums: int | None = None,
) -> None:
    m, n, k = block
    a, b = (torch.empty(rows, 1024, device="cuda", dtype=dtype) for rows in (m, n))
    c = torch.empty(m, n, device="cuda")
    _dot_kernel[(1,)](
        a, b, c, 1024, M=m, N=n, BLOCK_K=k, PRECISION=precision, SUMS=sums, num_warps=8, num_stages=stages
    )


def _dot_by_descriptors(m: int, n: int, k: int) -> None:
    a, b = (torch.empty(rows, 1024, device="cuda", dtype=torch.bfloat16) for rows in (m, n))
    c = torch.empty(m, n, device="cuda")
    a, b = (TensorDescriptor.from_tensor(x, [x.shape[0], k]) for x in (a, b))
    _descriptor_kernel[(1,)](a, b, c, 1024, M=m, N=n, BLOCK_K=k, num_warps=8, num_stages=3)


WAITING = "dots whose products wait for one another"


def _sentences(report: Report, **limits: Any) -> list[str]:
    return [sentence.partition(": ")[0] for sentence in faults(report, **limits)]


def _spills_of_ptxas(ptx: str, tmp_path: Path) -> tuple[int, int]:
    """Bytes of spill stores and loads, as ptxas itself reports them."""
    (tmp_path / "kernel.ptx").write_text(ptx)
    command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
    log = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stderr
    return tuple(int(number) for number in re.findall(r"(\d+) bytes spill", log))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_plain_kernel_fits_everywhere(arch: int) -> None:
    with compiling(arch) as reports:
        y = _scale(torch.empty(5008, device="cuda"))
    assert (y.shape, y.device.type) == ((5008,), "cuda")
    (report,) = reports
    assert faults(report) == []
    assert (report.name, report.arch, report.grid) == ("_scale_kernel", arch, (5,))
    assert (report.num_warps, report.stack, report.shared) == (8, 0, 0)
    assert 8 <= report.registers <= 64
    assert report.uses("LDG.E.128")
    assert not report.uses("LDG.E.12")
    assert not report.uses("HMMA")


def test_what_a_launch_would_specialise_is_compiled() -> None:
    x = {"device": "cuda", "dtype": torch.bfloat16}
    with compiling(90) as reports:
        _scale(torch.empty(4096, **x))
        _scale(torch.empty(4097, **x))
        _scale(torch.empty(8192, **x)[::2])
        _scale(torch.empty(4104, **x)[8:])
        _scale(torch.empty(4097, **x)[1:])
    plain, odd, strided, shifted, misaligned = reports
    assert plain.constants == {"stride": 1, "BLOCK": 1024}
    assert plain.aligned == {"x", "y", "size"}
    assert odd.aligned == {"x", "y"}
    assert strided.constants == {"BLOCK": 1024}
    assert shifted.aligned == plain.aligned
    assert misaligned.aligned == {"y", "size"}
    assert plain.uses("STG.E.128") or plain.uses("STG.E.64")
    assert not misaligned.uses("LDG.E.128")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_launcher_sees_the_architecture(arch: int) -> None:
    device = torch.device("cuda", 0)
    with compiling(arch):
        assert common.capability(device) == divmod(arch, 10)
        assert common.multiprocessors(device) == MULTIPROCESSORS[arch]
        with common.on_device(torch.empty(1, device="cuda")):
            pass
    assert common.capability.cache_info().currsize == 0


def test_spills_are_seen(tmp_path: Path) -> None:
    ptx: list[str] = []
    with compiling(90) as reports:
        _hoard(16384, warps=4)
        _hoard(16384, warps=1)
        x = torch.empty(16384, device="cuda")
        compiled = _hoarding_kernel[(1,)](x, x, BLOCK=16384, num_warps=1)
        ptx.append(compiled.asm["ptx"])
    roomy, cramped, _ = reports
    assert faults(roomy) == []
    assert cramped.stack > 1000
    assert (cramped.spill_stores, cramped.spill_loads) == _spills_of_ptxas(ptx[0], tmp_path)
    assert _sentences(cramped) == ["spills above the limit of 0 B"]
    assert faults(cramped, max_spill=max(cramped.spill_stores, cramped.spill_loads)) == []


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_shared_memory_above_the_chips_is_seen(arch: int) -> None:
    with compiling(arch) as reports:
        _dot(torch.float16, (64, 64, 64))
        _dot(torch.float16, (128, 128, 128), stages=8)
    small, large = reports
    assert faults(small) == []
    excess = large.shared - SHARED_MEMORY[arch]
    assert excess > 0
    assert _sentences(large, max_spill=10**9)[0] == f"{excess} B of shared memory too many"


def _tensor_cores(report: Report) -> str:
    return " ".join(opcode for opcode in ("HGMMA", "QGMMA", "HMMA", "QMMA") if report.uses(opcode))


def test_tensor_cores_are_seen() -> None:
    with compiling(90) as reports:
        for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float32):
            _dot(dtype)
        _dot_by_descriptors(128, 128, 64)
        _dot(torch.bfloat16, (16, 64, 64))
    *fast, slow = reports
    assert [_tensor_cores(report) for report in fast] == ["HGMMA", "HGMMA", "QGMMA", "", "HGMMA"]
    assert [_sentences(report) for report in fast] == [[WAITING], [WAITING], [WAITING], [], [WAITING]]  # as ptxas says
    slow_path, no_hgmma = "a dot on HMMA, the slow path", "a dot without HGMMA"
    assert _sentences(slow) == [no_hgmma, slow_path]
    assert faults(slow, fast=False) == []
    assert fast[-1].uses("UTMALDG")
    assert fast[-1].uses("UTMASTG")
    assert not fast[0].uses("UTMALDG")
    with compiling(80) as reports:
        _dot(torch.bfloat16)
        _dot_by_descriptors(64, 64, 64)
    assert [_tensor_cores(report) for report in reports] == ["HMMA", "HMMA"]


def test_imprecise_dots_are_seen() -> None:
    with compiling(90) as reports:
        for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
            _dot(dtype)
        _dot(torch.float32, precision="tf32")
        _dot(torch.float8_e5m2)
    *right, tf32, e5m2 = reports
    assert [dot.operands for report in right for dot in report.dots] == ["f32", "bf16", "f8E4M3FN"]
    assert [_sentences(report) for report in right] == [[], [WAITING], [WAITING]]
    assert _sentences(tf32) == ["a dot of f32 in tf32", WAITING]
    assert _sentences(e5m2) == [f"{ALL} products of a dot of f8E5M2 added up imprecisely", WAITING]


def test_sums_of_e4m3_that_leave_the_tensor_cores_are_seen() -> None:
    """They take additions in fp32 that the machine code of fast accumulation has none of."""
    with compiling(90) as reports:
        _dot(torch.float8_e4m3fn)
        _dot(torch.float8_e4m3fn, sums=64)
    fast, slow = reports
    assert _sentences(slow) == ["64 products of a dot of f8E4M3FN added up imprecisely"]
    assert [report.opcodes["FADD"] > 0 for report in reports] == [False, True]
    assert slow.registers > fast.registers


def test_a_missing_barrier_is_seen() -> None:
    with compiling(90) as reports:
        _dot(torch.float8_e4m3fn)
        _dot(torch.bfloat16)
        _dot_by_descriptors(128, 128, 64)
    for report in reports:
        without = replace(report, ptx=report.ptx.replace("bar.sync", "// bar.sync"))
        (sentence, *_) = set(_sentences(without)) - set(_sentences(report))
        assert sentence.endswith("over operands of wgmma that another warp group may still read")


def test_what_cannot_be_launched_is_refused() -> None:
    with compiling(90):
        x = torch.empty(1024, device="cuda")
        with pytest.raises(AssertionError, match=r"_scale_kernel cannot be launched on a grid of \(0,\)"):
            _scale(x[:0])
        with pytest.raises(AssertionError, match=r"cannot be launched on a grid of \(1, 65536\)"):
            _scale_kernel[(1, 65536)](x, x, 1024, 1, 2.0, BLOCK=1024)
        with pytest.raises(AssertionError, match="hands a CPU tensor to a kernel"):
            _scale(torch.empty(1024))
        with pytest.raises(AssertionError, match="starts at a multiple of 16 bytes, not at 4"):
            _descriptor_kernel[(1,)](TensorDescriptor(x[1:], [8, 8], [8, 1], [8, 8]), x, x, 8, M=8, N=8, BLOCK_K=8)


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="compile without TRITON_INTERPRET"), compiling(90):
        pass


SMALL_SPILL = 16  # bytes of a thread: a few registers, kept aside for what follows the loop


@dataclass(frozen=True)
class Case:
    """Launchers of an op as the package calls them: `launch(dtype, *size)` for each size.

    `sizes` are those of the backbones, `more` lead to the other configurations that the launchers choose. `alike` are
    dtypes configured as one of `dtypes` is; one size shows that they compile. `max_spill` and `fast`: see `faults`.
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
    for swiglu in (False, True):
        width = hidden * (1 + swiglu)
        activation.activation_forward(x[:, :width], "swiglu" if swiglu else "gelu")
        activation_backward.activation_backward(x[:, :hidden], x[:, :width], swiglu=swiglu)


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
    attention.attention_probabilities_forward(qkv, 0, 1)
    attention.attention_probabilities_forward(qkv, 0, seq_len)


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
# 592: patches padded for TMA, 588: not padded, so without it; few rows: a small tile
FEATURES = ((16448, 384, 1536), (16448, 1024, 4096), (16448, 4096, 1536))
MORE_FEATURES = ((16448, 592, 384), (16448, 588, 384), (257, 384, 384), (257, 383, 386), (1, 384, 384))
# Triton makes a constant of an integer that is 1: batch, rows, tokens and heads can be
ONE_TOKEN = ((1, 6, 64), (1, 1, 64, 1))
# tails of 16 and 32 keys; then none, another head_dim, 64 keys, tiles of 64 and of 128 queries
HEADS: dict[str, tuple[tuple[int, ...], ...]] = {
    "sizes": ((257, 6, 64), (257, 16, 64), (1370, 6, 64), (1370, 16, 64)),
    "more": (
        *((seq_len, 6, 64) for seq_len in (64, 128, 129, 200, 230, 261)),
        *((seq_len, 6, head_dim) for seq_len in (257, 1370) for head_dim in (32, 128)),
        *((257, 1, 64, 1), (1370, 1, 64, 1), *ONE_TOKEN),
    ),
}
CASES = {
    "layer_norm": Case(_layer_norm, ROWS, MORE_ROWS, alike=FP16_AND_64),
    "add_layer_norm": Case(_add_layer_norm, ROWS, MORE_ROWS, alike=FP16_AND_64),
    # far wider than any DINOv2: what the backward keeps of a row does not fit in the registers
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


def _each_case_on(architectures: Iterable[int]) -> pytest.MarkDecorator:
    cases = [(name, arch) for name in CASES for arch in CASES[name].architectures if arch in architectures]
    return pytest.mark.parametrize(("name", "arch"), cases)


@_each_case_on([80, 90, 120])  # the one that is measured, an older one, and a newer one with little shared memory
def test_default_configurations_are_good(name: str, arch: int) -> None:
    case = CASES[name]
    assert _faults(case, arch, case.dtypes[0], case.sizes) == []


@pytest.mark.slow
@_each_case_on(ARCHITECTURES)
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
    (E4M3, "gelu", 16448, 1024, 1536, (128, 128, 264)),  # an activation is hidden up to twice as many in_features
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
    # where a loop waits for the copies of its tile, those of the next (of keys and values, say) are under way
    for report in (forward, keys, queries):
        assert max(map(int, re.findall(r"cp\.async\.wait_group\s+(\d+)", report.ptx))) >= 2, report
    # a thread copies one number of lse and delta for a tile: for those before the loop, and in it
    assert keys.opcodes["LDGSTS.E"] == keys.num_stages, keys
