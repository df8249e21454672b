"""Builds the kernels of csrc for the CPU and uses them as the extension: ``pytest -p tests.cuda_on_host``.

The tests of the ops linear and attention then run on the backend `cuda` without a GPU, as those of Triton's kernels do
in Triton's interpreter. The checks, the choice of a tile and the epilogue are those of a GPU, shuffles included
(cuda_on_host.h). The products, which use Hopper's instructions, and attention's softmax between them are plain loops
(*_on_host.cu). What only a GPU has does not show: its memory, its fast approximations, real concurrency. The build
needs g++ and the CUDA headers that Triton ships, not nvcc.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("bindings.cpp", "linear.cu", "attention.cu")  # the products are in *_on_host.cu
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-w", "-DDINOV2_FAST_ON_HOST", "-ffp-contract=off")
FLAGS += ("-DTORCH_TARGET_VERSION=0x020a000000000000",)


def reason_against() -> str | None:
    """Why the kernels cannot be built for the CPU here, or None."""
    if shutil.which("g++") is None:
        return "needs g++"
    if headers() is None:
        return "needs the CUDA headers that come with triton"
    return None


def headers() -> Path | None:
    triton = find_spec("triton")
    folder = triton and Path(triton.origin).parent / "backends" / "nvidia" / "include"
    return folder if folder and (folder / "cuda_fp8.h").is_file() else None


def build(csrc: Path = ROOT / "csrc") -> Path:
    """Builds the library in the system's folder for temporary files, once for the same sources and torch."""
    torch_folder = Path(torch.__file__).parent
    files = sorted([*csrc.glob("*.*"), *Path(__file__).parent.glob("*.h"), *Path(__file__).parent.glob("*.cu")])
    contents = b"".join(file.read_bytes() for file in files) + f"{torch.__version__}{FLAGS}".encode()
    library = Path(tempfile.gettempdir(), f"dinov2_fast_on_host_{hashlib.sha256(contents).hexdigest()[:16]}.so")
    if library.is_file():
        return library
    includes = [torch_folder / "include", Path(__file__).parent, headers(), csrc]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        command = [
            "g++",
            *FLAGS,
            *(f"-I{path}" for path in includes),
            "-x",
            "c++",
            *(csrc / name for name in SOURCES),
            *Path(__file__).parent.glob("*_on_host.cu"),
            "-x",
            "none",
        ]
        command += ["-o", Path(folder, "library.so"), f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the kernels do not compile for the CPU:\n{done.stderr[:4000]}")
        Path(folder, "library.so").replace(library)
    return library


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Loads the library before anything asks for the extension."""
    from dinov2_fast import extension

    reason = reason_against()
    if reason is not None:
        raise RuntimeError(f"tests.cuda_on_host {reason}")
    library = build()
    torch.ops.load_library(library)
    extension.register_fakes()
    extension.load = lambda: extension.Extension(library, None)
