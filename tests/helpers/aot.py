"""Compiles what a launcher would launch, without a GPU, and reads the compiler's output.

    with compiling(90) as reports:
        layer_norm_forward(torch.empty(257, 384, device="cuda"), ...)
    assert faults(reports[0]) == []

Inside the block tensors are fake, `torch.cuda` describes a GPU of that architecture, and `kernel[grid](...)` compiles
exactly the specialisation that a launch would compile (types, constants, alignment, warps and stages), and launches
nothing. Every tensor starts at an aligned address, and a view at its offset from it. Triton caches by content, so a
kernel that was compiled before costs nothing.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from dinov2_fast.kernels import common
from tests.helpers.wgmma_races import unordered_writes

# Shared memory that one block can ask for, in bytes: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability". Multiprocessors of an A100, A40, L40S, H200, B200 and RTX 5090.
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
MULTIPROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 170}
ARCHITECTURES = tuple(SHARED_MEMORY)
FP8_ARCHITECTURES = (89, 90, 100, 120)

# How many products of a dot the tensor cores of sm_90 add up with some 14 bits before the sum goes to fp32 registers,
# by the operands' type in MLIR: all of e4m3 (fast accumulation: dinov2_fast/ops/linear.py says what that costs), and
# none of other types.
ALL = 2**30
FAST_ACCUMULATION = {"f8E4M3FN": ALL}

WARP_GROUP = 4  # warps of sm_90 that execute a wgmma together

_GRID_LIMITS = (2**31 - 1, 65535, 65535)
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}  # bytes; 4 without a suffix
_DOT = re.compile(r"\btt\.dot (.*?) : tensor<[0-9x]*x(\w+)> \*")
_TENSOR_CORES = {"bf16": "HGMMA", "f16": "HGMMA", "f8E4M3FN": "QGMMA"}  # of sm_90, by operand
_WGMMA = ("HGMMA", "QGMMA", "WARPGROUP.ARRIVE")  # products, and what stands before each group of them
_INSTRUCTION = re.compile(r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]+)[^;:]*;", re.MULTILINE)


@dataclass(frozen=True)
class Dot:
    """A matrix product in a kernel: the type of its operands in MLIR ("bf16"), and how precise it is."""

    operands: str
    imprecise: int  # how many products an fp8 dot may add up imprecisely
    tf32: bool


@dataclass(frozen=True)
class Report:
    """One compiled kernel. Registers are per thread, `stack` in bytes per thread, `shared` in bytes per block."""

    name: str
    arch: int
    grid: tuple[int, ...]
    constants: dict[str, Any]  # the constexpr arguments, and those that the launch fixed at None or 1
    aligned: frozenset[str]  # arguments that are known to be divisible by 16
    num_warps: int
    num_stages: int
    registers: int
    stack: int
    shared: int
    dots: tuple[Dot, ...]
    ptx: str = field(repr=False)
    cubin: bytes = field(repr=False)

    @property
    def opcodes(self) -> Counter[str]:
        """The number of times that each instruction occurs in the machine code: "LDG.E.128", "HGMMA.64x…"."""
        return _opcodes(self.cubin)

    def uses(self, opcode: str) -> bool:
        """Whether an instruction occurs: "HGMMA" finds it with any modifiers, "LDG.E.128" only with these."""
        return any(found == opcode or found.startswith(opcode + ".") for found in self.opcodes)

    @property
    def serialised(self) -> bool:
        """Whether on sm_90 each matrix product waits for the one before; ptxas warns of this as C7510 to C7515."""
        count = {opcode: sum(n for found, n in self.opcodes.items() if found.startswith(opcode)) for opcode in _WGMMA}
        return 1 < count["HGMMA"] + count["QGMMA"] <= count["WARPGROUP.ARRIVE"]

    @property
    def programs(self) -> int:
        """How many programs a multiprocessor of sm_90 holds at once, by its 64 K registers and 228 KB of shared memory.

        Registers are given out in eights for each thread; each program takes 1 KB of shared memory besides its own.
        """
        registers = -(-self.registers // 8) * 8 * 32 * self.num_warps
        return min((64 << 10) // registers, (228 << 10) // (self.shared + (1 << 10)))

    @property
    def spill_stores(self) -> int:
        """Bytes that the instructions of one thread write to local memory; an instruction in a loop counts once."""
        return self._local_bytes("STL")

    @property
    def spill_loads(self) -> int:
        return self._local_bytes("LDL")

    def _local_bytes(self, opcode: str) -> int:
        if not self.stack:
            return 0
        modifiers = [(found.split("."), count) for found, count in self.opcodes.items()]
        return sum(
            count * next((_WIDTHS[m] for m in parts if m in _WIDTHS), 4)
            for parts, count in modifiers
            if parts[0] == opcode
        )

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={value}" for name, value in self.constants.items())
        return (
            f"{self.name} sm_{self.arch}: {self.registers} registers, spills {self.spill_stores}/{self.spill_loads} B, "
            f"{self.shared} B shared, {self.num_warps} warps, {self.num_stages} stages ({sizes})"
        )


def faults(report: Report, max_spill: int = 0, fast: bool = True) -> list[str]:
    """What is wrong with a kernel, one sentence each.

    Faults are: more shared memory than the GPU has; spilled registers of more than `max_spill` bytes, stored or loaded;
    a dot that rounds its fp32 operands to tf32. On sm_90 also: products that are not added up as `FAST_ACCUMULATION`
    says; if `fast`, a dot without wgmma, which needs 64 rows; dots whose instructions wait for one another; a write
    over operands that another warp group may still read (tests/helpers/wgmma_races.py).
    """
    found = []
    excess = report.shared - SHARED_MEMORY[report.arch]
    if excess > 0:
        found.append(f"{excess} B of shared memory too many")
    if max(report.spill_stores, report.spill_loads) > max_spill:
        found.append(f"spills above the limit of {max_spill} B")
    found += [f"a dot of {dot.operands} in tf32" for dot in report.dots if dot.tf32]
    if report.arch == 90:
        wrong = {dot for dot in report.dots if dot.imprecise != FAST_ACCUMULATION.get(dot.operands, 0)}
        found += sorted(f"{dot.imprecise} products of a dot of {dot.operands} added up imprecisely" for dot in wrong)
        if fast:
            wanted = {_TENSOR_CORES[dot.operands] for dot in report.dots if dot.operands in _TENSOR_CORES}
            found += [f"a dot without {opcode}" for opcode in sorted(wanted) if not report.uses(opcode)]
            found += ["a dot on HMMA, the slow path"] if report.uses("HMMA") else []
        if report.serialised:
            found.append("dots whose products wait for one another")
        if report.num_warps > WARP_GROUP:
            found += unordered_writes(report.ptx)
    return [f"{sentence}: {report}" for sentence in found]


@contextmanager
def compiling(arch: int) -> Iterator[list[Report]]:
    """Makes launches compile for `arch` (90 for sm_90) and appends a report for each.

    Raises:
        RuntimeError: Triton's interpreter is on, under which nothing is compiled.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("Kernels were imported for Triton's interpreter: compile without TRITON_INTERPRET.")
    reports: list[Report] = []
    compile_or_launch = JITFunction.run

    def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        args, options = _with_addresses(args), {name: _with_addresses(value) for name, value in options.items()}
        compiled = compile_or_launch(kernel, *args, grid=grid, warmup=True, **options)
        reports.append(_report(kernel, compiled, arch, _checked_grid(kernel, grid, args, options)))
        return compiled

    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(_torch_cuda_of(arch))
        stack.enter_context(mock.patch.object(driver, "_active", _Driver(arch)))
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        yield reports


class _Driver(DriverBase):
    """The GPU to compile for, as Triton asks for it. The device number is the architecture: Triton caches by device."""

    def __init__(self, arch: int) -> None:
        super().__init__()
        self.arch = arch

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("nothing is launched")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing is launched, so nothing can be timed")


@contextmanager
def _torch_cuda_of(arch: int) -> Iterator[None]:
    """Patches what launchers read of `torch.cuda`, as on a machine with one GPU of this architecture."""
    major, minor = divmod(arch, 10)
    properties = SimpleNamespace(
        major=major,
        minor=minor,
        multi_processor_count=MULTIPROCESSORS[arch],
        shared_memory_per_block_optin=SHARED_MEMORY[arch],
    )
    _forget_devices()
    try:
        with mock.patch.multiple(
            torch.cuda,
            get_device_capability=lambda device=None: (major, minor),
            get_device_properties=lambda device=None: properties,
            device=lambda device: nullcontext(),
            current_device=lambda: 0,
            is_current_stream_capturing=lambda: False,
            current_stream=lambda device=None: SimpleNamespace(synchronize=lambda: None),
        ):
            yield
    finally:
        _forget_devices()


def _forget_devices() -> None:
    common.capability.cache_clear()
    common.multiprocessors.cache_clear()


@dataclass(frozen=True)
class _Address:
    """What Triton reads of a tensor argument: its type, and the alignment of its first element."""

    dtype: torch.dtype
    offset: int

    def data_ptr(self) -> int:
        return self.offset


def _with_addresses(argument: Any) -> Any:
    """Replaces the fake tensors among the arguments of a launch with addresses."""
    if isinstance(argument, FakeTensor):
        assert argument.is_cuda, "a launcher hands a CPU tensor to a kernel"
        return _Address(argument.dtype, argument.storage_offset() * argument.itemsize)
    if isinstance(argument, tuple):
        return tuple(_with_addresses(part) for part in argument)
    if isinstance(argument, TensorDescriptor):
        start = argument.base.storage_offset() * argument.base.itemsize
        assert start % 16 == 0, f"a tensor descriptor starts at a multiple of 16 bytes, not at {start}"
    return argument


def _checked_grid(kernel: JITFunction, grid: Any, args: Any, options: dict[str, Any]) -> tuple[int, ...]:
    if callable(grid):
        arguments = {name: value for name, value in options.items() if name in kernel.signature.parameters}
        bound = kernel.signature.bind(*args, **arguments)
        bound.apply_defaults()
        grid = grid(bound.arguments)
    grid = tuple(grid)
    for size, limit in zip(grid, _GRID_LIMITS, strict=False):
        assert 1 <= size <= limit, f"{kernel.__name__} cannot be launched on a grid of {grid}"
    return grid


def _report(kernel: JITFunction, compiled: Any, arch: int, grid: tuple[int, ...]) -> Report:
    cubin, names = compiled.asm["cubin"], kernel.arg_names
    usage = _run_tool(triton.knobs.nvidia.cuobjdump, cubin, "-res-usage")
    return Report(
        name=compiled.metadata.name,
        arch=arch,
        grid=grid,
        constants={names[path[0]]: value for path, value in compiled.src.constants.items()},
        aligned=frozenset(
            names[path[0]] for path, found in compiled.src.attrs.items() if ["tt.divisibility", 16] in found
        ),
        num_warps=compiled.metadata.num_warps,
        num_stages=compiled.metadata.num_stages,
        registers=max(int(number) for number in re.findall(r"\bREG:(\d+)", usage)),
        stack=max(int(number) for number in re.findall(r"\bSTACK:(\d+)", usage)),
        shared=compiled.metadata.shared,
        dots=tuple(_dots(compiled.asm["ttir"])),
        ptx=compiled.asm["ptx"],
        cubin=cubin,
    )


def _dots(ttir: str) -> Iterator[Dot]:
    for attributes, operands in _DOT.findall(ttir):
        imprecise = re.search(r"maxNumImpreciseAcc = (\d+)", attributes)
        tf32 = operands == "f32" and "tf32" in attributes
        yield Dot(operands, int(imprecise[1]) if imprecise else 0, tf32)


@cache
def _opcodes(cubin: bytes) -> Counter[str]:
    return Counter(_INSTRUCTION.findall(_run_tool(triton.knobs.nvidia.nvdisasm, cubin, "-c")))


def _run_tool(tool: Any, cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool.path, *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
