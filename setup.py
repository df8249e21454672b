"""The packages, their folders and the CUDA extension; the rest of the distribution's description is in pyproject.toml.

The folders `kernels` and `csrc` at the top level are installed inside the package, as `dinov2_fast.kernels` and
`dinov2_fast.csrc`: a top-level module named `kernels` would collide with another distribution of that name.

The extension is one library for all versions of Python and every torch from 2.10 on with CUDA 13: it uses torch's
stable ABI and nothing of Python (dinov2_fast/extension.py loads it). It is built where nvcc, such a torch and CUTLASS
are installed; elsewhere the package is pure Python. nvcc is taken from CUDA_HOME if that is set, else from the PATH or
/usr/local/cuda.
MAX_JOBS is the number of compilers that run at once.
"""

import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

NOT_PACKAGES = ["*__pycache__"]
ARCHITECTURE = "-gencode=arch=compute_90a,code=sm_90a"  # the only one with kernels in csrc
CUDA = "13"
CUTLASS = "nvidia-cutlass==4.2.0.0"
FLAGS = ["-O3", "-std=c++17", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-Xcompiler=-fPIC"]
# Asserts of CUTLASS would call a function in the main loop, and ptxas would make each wgmma wait for the one before.
FLAGS += ["-DNDEBUG"]
FLAGS += ["-Xcompiler=-fvisibility=hidden", "--expt-relaxed-constexpr", "-Xptxas=-v", "-Xfatbin=-compress-all"]
# By op. Without -ftz, exp2f checks each power for subnormal numbers: three more instructions for each weight.
FLAGS_OF = {"attention": ["-ftz=true"]}


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which("nvcc", path=str(Path(home, "bin")))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def reason_against_extension() -> str | None:
    """Why the extension cannot be built here, or None."""
    if not Path("csrc", "bindings.cpp").is_file():
        return "there is no folder csrc"
    nvcc = find_nvcc()
    if nvcc is None:
        return "nvcc is not installed"
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    if f"release {CUDA}." not in version:
        return f"{nvcc} is not of CUDA {CUDA}"
    try:
        import torch
    except ImportError:
        return "torch is not installed (with pip: --no-build-isolation)"
    if torch.__version__ < (2, 10) or not (torch.version.cuda or "").startswith(f"{CUDA}."):
        return f"torch {torch.__version__} is older than 2.10 or not of CUDA {CUDA}"
    cutlass = cutlass_folder()
    if cutlass is None:
        return f"CUTLASS is not installed: pip install --no-deps {CUTLASS}"
    missing = [str(folder) for folder in include_folders(cutlass) if not folder.is_dir()]
    return f"{CUTLASS} is needed: the installed CUTLASS has no {missing[0]}" if missing else None


def cutlass_folder() -> Path | None:
    found = find_spec("cutlass_library")
    return found and Path(next(iter(found.submodule_search_locations)), "source")


def include_folders(cutlass: Path) -> list[Path]:
    """Headers of CUTLASS, and of its example on which the kernels of attention are based."""
    return [cutlass / "include", cutlass / "examples" / "88_hopper_fmha"]


class BuildExtension(build_ext):
    """Compiles sources with nvcc, several at once.

    An object is kept if it is newer than its source and all headers, and its command has not changed.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:  # the build takes minutes; `make build` puts the extension into the checkout
            self.extensions = []

    def build_extension(self, ext: Extension) -> None:
        import torch

        root = Path(torch.__file__).parent
        includes = [root / "include", *include_folders(cutlass_folder())]
        self.folder = Path(self.build_temp, "csrc")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.compiler_command = [find_nvcc(), *FLAGS, *(f"-isystem={path}" for path in includes)]
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(jobs) as pool:
            sources = map(Path, sorted(ext.sources, reverse=True))  # linear_*.cu first, which take longest
            objects = list(pool.map(self.compile, sources))
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        torch_libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-ltorch_cuda"]
        command = [find_nvcc(), "-shared", "-cudart=shared", "-o", library, *objects, *torch_libraries]
        run([*command, "-Xlinker=--no-as-needed,--no-undefined"])

    def compile(self, source: Path) -> Path:
        """Compiles a source to an object, and keeps ptxas' report and the command beside it."""
        target = self.folder / f"{source.stem}.o"
        flags = FLAGS_OF.get(source.stem.partition("_")[0], [])
        command = [*self.compiler_command, *flags, ARCHITECTURE, "-c", source, "-o", target]
        written, report = target.with_suffix(".command"), target.with_suffix(".ptxas")
        newest = max(path.stat().st_mtime for path in source.parent.iterdir() if path.suffix in (".h", ".cuh"))
        newest = max(newest, source.stat().st_mtime)
        fresh = target.is_file() and target.stat().st_mtime > newest
        if not fresh or not written.is_file() or written.read_text() != text(command):
            report.write_text(run(command))
            written.write_text(text(command))
        return target


def text(command: list) -> str:
    return shlex.join(str(word) for word in command)


def run(command: list) -> str:
    """Runs a command and returns its standard error; ends the build if it fails."""
    print(text(command), file=sys.stderr)
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}\ndinov2_fast: the CUDA extension could not be built")
    return done.stderr


def packages() -> dict:
    names = find_namespace_packages(include=["dinov2_fast", "dinov2_fast.*"], exclude=NOT_PACKAGES)
    folders = {}
    for folder in ("kernels", "csrc"):
        if Path(folder).is_dir():
            folders[f"dinov2_fast.{folder}"] = folder
            below = find_namespace_packages(folder, exclude=NOT_PACKAGES)
            names += [f"dinov2_fast.{folder}", *(f"dinov2_fast.{folder}.{name}" for name in below)]
    data = {"": ["*.json"], "dinov2_fast.csrc": ["*.cu", "*.cuh", "*.cpp", "*.h"]}
    return {"packages": names, "package_dir": folders, "package_data": data}


def extension() -> dict:
    reason = reason_against_extension()
    if reason is not None:
        print(f"dinov2_fast: pure Python build, without the CUDA extension: {reason}", file=sys.stderr)
        return {}
    sources = sorted(str(path) for suffix in ("cu", "cpp") for path in Path("csrc").glob(f"*.{suffix}"))
    return {
        "ext_modules": [Extension("dinov2_fast._cuda", sources, py_limited_api=True)],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if __name__ == "__main__":
    setup(**packages(), **extension())
