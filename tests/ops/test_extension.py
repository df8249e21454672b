"""The CUDA extension: it loads or says why not, its build does what it says, and the compiler's reports on its kernels.

What needs the built extension or its reports (`make build`) is skipped without them. What the kernels compute is tested
with the ops: on a GPU, or on the CPU by `make test-cuda-on-host`.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dinov2_fast import extension, ops
from dinov2_fast.cli import main
from dinov2_fast.ops.choices import backend_choices
from dinov2_fast.ops.dispatch import BackendError, use_backend
from tests.helpers.devices import fakes_cuda

ROOT = Path(__file__).resolve().parents[2]
REPORTS = ROOT / "build" / "extension" / "csrc"
needs_build = pytest.mark.skipif(not extension.FILE.is_file(), reason="the extension is not built: make build")
needs_reports = pytest.mark.skipif(not [*REPORTS.glob("*.ptxas")], reason="no compiler's reports: make build")


# Loading it


def test_a_file_that_is_not_there_is_a_reason(tmp_path: Path) -> None:
    assert extension._load_file(tmp_path / "none.so") == "not built: see CONTRIBUTING.md"


def test_a_file_that_is_no_library_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    file = tmp_path / "_cuda.abi3.so"
    file.write_bytes(b"text")
    reason = extension._load_file(file)
    assert reason is not None
    assert re.search(r"_cuda\.abi3\.so: (file too short|invalid ELF header)", reason), reason


@pytest.mark.parametrize(("cuda", "has"), [("12.8", "CUDA 12.8"), (None, "no CUDA")])
def test_another_cuda_is_a_reason(cuda: str | None, has: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    (tmp_path / "a.so").touch()
    assert extension._load_file(tmp_path / "a.so") == f"built for CUDA 13, and this torch has {has}"


@pytest.mark.parametrize("reason", [None, "not built"])
def test_info_says_so(reason: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path("/folder/_cuda.abi3.so")
    monkeypatch.setattr(extension, "load", lambda: extension.Extension(file, reason))
    assert main(["info", "--device", "cpu"]) == 0
    line = f"extension: loaded {file}" if reason is None else "extension: not available (not built)"
    assert [words.strip() for words in capsys.readouterr().out.splitlines() if "extension:" in words] == [line]


def test_an_op_on_a_cpu_does_not_load_it() -> None:
    script = (
        "import sys, torch, dinov2_fast.ops as ops; from dinov2_fast import extension; "
        "ops.attention(torch.randn(1, 2, 3, 1, 64)); sys.exit(extension.load.cache_info().currsize)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@needs_build
def test_the_built_one_loads_without_a_gpu_and_registers_what_it_declares() -> None:
    """In a process of its own, because torch accepts only one library of that name."""
    script = (
        "import torch; from dinov2_fast import extension as e; assert e.load().reason is None, e.load();"
        "names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith('dinov2_fast_cuda::')];"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key;"
        "print(*sorted(n.split('::')[1] for n in names if has(n, 'CUDA') and has(n, 'Meta')), len(names));"
        "assert not torch.cuda.is_initialized()"
    )
    if torch.version.cuda is None:
        pytest.skip("this torch has no CUDA")
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True)
    *implemented, declared = run.stdout.split()
    schemas = re.findall(r'library\.def\(\s*"(\w+)\(', (ROOT / "csrc" / "bindings.cpp").read_text())
    assert implemented == sorted(schemas)
    assert int(declared) == len(schemas)
    assert run.stderr == ""


# Refusals


@pytest.fixture
def _available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov2_fast.ops._backends.missing_extension", lambda: None)
    monkeypatch.setattr("dinov2_fast.ops._backends.capability", lambda device: (9, 0))


def _gelu() -> None:
    x, weight = (torch.empty(rows, 16, dtype=torch.bfloat16, device="cuda") for rows in (2, 16))
    ops.linear(x, weight, None, epilogue="gelu", backend="cuda")


@fakes_cuda
@pytest.mark.usefixtures("_available")
def test_old_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov2_fast.ops._backends.capability", lambda device: (7, 5))
    with FakeTensorMode(), pytest.raises(BackendError, match="needs a device of sm_80 or newer, got sm_75"):
        _gelu()


@fakes_cuda
def test_without_the_extension_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov2_fast.ops._backends.missing_extension", lambda: "not built")
    with (
        FakeTensorMode(),
        pytest.raises(BackendError, match=r"needs the CUDA extension, .* not available \(not built\)"),
    ):
        _gelu()


@fakes_cuda
@pytest.mark.usefixtures("_available")
def test_it_is_never_chosen_by_default() -> None:
    """No kernel of it has run on a GPU yet."""
    rows = [*backend_choices("cuda", torch.bfloat16), *backend_choices("cuda", torch.float8_e4m3fn)]
    assert "cuda" not in {row.backend for row in rows}
    with use_backend("cuda"):
        rows = [*backend_choices("cuda", torch.bfloat16), *backend_choices("cuda", torch.float8_e4m3fn)]
    names = ["linear.gelu", "linear.swiglu", "linear.residual"]
    expected = ["attention.batch", *names, "attention.batch", "linear.none", *names]
    assert [row.name for row in rows if row.backend == "cuda"] == expected


# Building it


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dinov2_fast_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nvcc_is_the_one_of_cuda_home(setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup_py.find_nvcc() is None
    assert setup_py.reason_against_extension() == "nvcc is not installed"
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 12.8, V12.8.1\n")
    nvcc.chmod(0o755)
    assert setup_py.find_nvcc() == str(nvcc)
    assert setup_py.reason_against_extension() == f"{nvcc} is not of CUDA 13"


def test_a_cutlass_without_the_example_of_attention_is_a_reason(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(setup_py.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="release 13.0"))
    monkeypatch.setattr(setup_py, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(setup_py, "cutlass_folder", lambda: tmp_path)
    (tmp_path / "include").mkdir()
    example = tmp_path / "examples" / "88_hopper_fmha"
    reason = f"{setup_py.CUTLASS} is needed: the installed CUTLASS has no {example}"
    assert setup_py.reason_against_extension() == reason
    example.mkdir(parents=True)
    assert setup_py.reason_against_extension() is None


def test_one_cutlass_is_named(setup_py: ModuleType) -> None:
    assert f"CUTLASS := {setup_py.CUTLASS}\n" in (ROOT / "Makefile").read_text()


# The compiler's reports


class Kernel(NamedTuple):
    """ptxas' report on one kernel. Spills and stack are in bytes."""

    name: str
    arch: str
    registers: int
    stack: int
    spills: int


def kernels_in(report: str) -> Iterator[Kernel]:
    for part in report.split("Compiling entry function '")[1:]:
        name, arch = re.match(r"(\w+)' for '(\w+)'", part).groups()
        (stack, stores, loads) = map(int, re.search(r"(\d+) bytes stack frame, (\d+) .*?, (\d+) ", part).groups())
        yield Kernel(name, arch, int(re.search(r"Used (\d+) registers", part)[1]), stack, max(stores, loads))


# The registers, and the bytes of spills and stack, that a kernel may use. Each of 384 threads can have 168 registers.
LIMITS = (168, 0, 0)


def above_limits(kernel: Kernel) -> list[str]:
    what = ("registers", "bytes of spills", "bytes of stack")
    found = zip(what, (kernel.registers, kernel.spills, kernel.stack), LIMITS, strict=True)
    return [f"{kernel.name} for {kernel.arch}: {n} {unit}, limit {limit}" for unit, n, limit in found if n > limit]


@needs_reports
def test_kernels_stay_within_their_registers() -> None:
    kernels = [kernel for file in sorted(REPORTS.glob("*.ptxas")) for kernel in kernels_in(file.read_text())]
    assert kernels
    assert [sentence for kernel in kernels for sentence in above_limits(kernel)] == []


# ptxas warns if each wgmma waits for the last one (C7510, C7512) and if it ignores setmaxnreg. The results are right in
# both cases, but slow.
LOSS = re.compile("Potential Performance Loss: .*")


@needs_reports
def test_ptxas_reports_no_performance_loss() -> None:
    assert [line for file in sorted(REPORTS.glob("*.ptxas")) for line in LOSS.findall(file.read_text())] == []


# The machine code


class Code(NamedTuple):
    arch: str
    kernels: dict[str, list[str]]  # instructions in the order of the code, by the kernel's name


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory: pytest.TempPathFactory) -> list[Code]:
    """The machine code of the built extension by file, read with tools that triton ships. They call sm_90a sm_90."""
    triton = pytest.importorskip("triton")
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    folder = tmp_path_factory.mktemp("cubins")
    subprocess.run([tools / "cuobjdump", "-xelf", "all", extension.FILE], cwd=folder, check=True, capture_output=True)
    codes = [code_of(cubin, tools) for cubin in sorted(folder.glob("*.cubin"))]
    return [code for code in codes if code.kernels]


def code_of(cubin: Path, tools: Path) -> Code:
    listing = subprocess.run([tools / "nvdisasm", "-c", cubin], check=True, capture_output=True, text=True).stdout
    kernels: dict[str, list[str]] = {}
    for section in re.split(r"^\s*\.section\s+", listing, flags=re.MULTILINE)[1:]:
        name = re.match(r"\.text\.(\w+)", section)
        if name:
            kernels[name[1]] = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", section)
    return Code(re.search(r"sm_\d+a?", cubin.name)[0], kernels)


PRODUCTS = {"HGMMA.64x128x16", "HGMMA.64x256x16", "QGMMA.64x128x32", "QGMMA.64x256x32"}  # 32 bytes of in_features each


def products_in(opcodes: list[str]) -> set[str]:
    """The matrix products of a kernel by their size: "QGMMA.64x128x32"."""
    return {".".join(opcode.split(".")[:2]) for opcode in opcodes if opcode.startswith(("HGMMA", "QGMMA", "HMMA"))}


def sums_between_products(opcodes: list[str]) -> int:
    """The number of fp32 additions between the matrix products, where CUTLASS would add up precise sums of e4m3."""
    products = [i for i, opcode in enumerate(opcodes) if opcode.startswith(("HGMMA", "QGMMA"))]
    return opcodes[products[0] : products[-1]].count("FADD")


@pytest.mark.slow
@needs_build
def test_linear_runs_on_the_tensor_cores_of_hopper_which_add_up_all_products(machine_code: list[Code]) -> None:
    of_linear = {
        name: opcodes for code in machine_code for name, opcodes in code.kernels.items() if "LinearEpilogue" in name
    }
    assert of_linear
    found = {name: products_in(opcodes) for name, opcodes in of_linear.items()}
    assert [name for name, products in found.items() if len(products) != 1] == []
    assert {product for products in found.values() for product in products} == PRODUCTS
    assert {name: n for name, opcodes in of_linear.items() if (n := sums_between_products(opcodes))} == {}


@pytest.mark.slow
@needs_build
def test_attention_runs_on_the_tensor_cores_of_hopper(machine_code: list[Code]) -> None:
    kernels = [
        opcodes for code in machine_code for name, opcodes in code.kernels.items() if "AttentionEpilogue" in name
    ]
    assert len(kernels) == 2  # for bf16 and fp16
    for opcodes in kernels:
        assert products_in(opcodes) == {"HGMMA.64x96x16", "HGMMA.64x64x16"}
        assert any(opcode.startswith("UTMALDG.4D") for opcode in opcodes)  # qkv is read in place
        # one exp2 for each score, without the comparison with which exp2f handles its full range
        assert sum(opcode.startswith("FSETP") for opcode in opcodes) < opcodes.count("MUFU.EX2") / 4
