"""Builds the kernels of csrc for the CPU and loads them as the extension: ``pytest -p tests.cuda_on_host``.

With this plugin, the tests of the ops linear and attention run the backend `cuda` without a GPU, as Triton's
interpreter runs Triton's kernels. The checks, the choice of a tile and the epilogues, including their shuffles
(cuda_on_host.h), are those of the GPU. The products, which use instructions of Hopper, and attention's softmax between
them are computed by plain loops (*_on_host.cu). The memory of a GPU, its fast approximations and real concurrency are
not tested. The build needs g++ and the CUDA headers that Triton ships, but not nvcc.
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
SOURCES = ("bindings.cpp", "linear.cu", "attention.cu")  # besides *_on_host.cu
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
    """The library, in the system's temporary folder. It is built once for the same sources and torch."""
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
    """Loads the library before a test can ask for the extension."""
    from dinov2_fast import extension

    reason = reason_against()
    if reason is not None:
        raise RuntimeError(f"tests.cuda_on_host {reason}")
    library = build()
    torch.ops.load_library(library)
    extension.register_fakes()
    extension.load = lambda: extension.Extension(library, None)
