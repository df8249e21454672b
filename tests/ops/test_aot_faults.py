"""Each fault that tests/helpers/aot.py looks for in a compiled kernel is found in a kernel that has it."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.helpers.aot import (
    ALL,
    ARCHITECTURES,
    SHARED_MEMORY,
    Report,
    compiling,
    faults,
)

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures("compiler")]


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
    """They need additions in fp32, and the machine code of fast accumulation has none."""
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
