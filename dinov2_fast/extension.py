"""The CUDA C++ extension: one file beside this one, which registers `torch.ops.dinov2_fast_cuda`.

It is loaded when something first asks for it, once and quietly; where it is not there or does not fit this torch, the
package is complete without it. `make build` or `pip install --no-build-isolation .` builds it (setup.py).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from dinov2_fast.torch_private import has_kernel

FILE = Path(__file__).with_name("_cuda.abi3.so")
LAUNCHES = ("dinov2_fast_cuda::linear_forward", "dinov2_fast_cuda::attention_forward")
CUDA = "13"  # the major version it is built with: its machine code calls that runtime


class Extension(NamedTuple):
    """`reason` says why there is none, or is None."""

    path: Path
    reason: str | None


@cache
def load() -> Extension:
    """Loads the extension the first time it is called. Never raises."""
    return Extension(FILE, _reason_against(FILE))


def describe() -> str:
    """One line for people: "loaded <file>" or "not available (<reason>)"."""
    path, reason = load()
    return f"loaded {path}" if reason is None else f"not available ({reason})"


def _reason_against(file: Path) -> str | None:
    if not file.is_file():
        return "not built: see CONTRIBUTING.md"
    if torch.version.cuda is None or torch.version.cuda.split(".")[0] != CUDA:
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        return f"built for CUDA {CUDA}, and this torch has {build}"
    try:
        torch.ops.load_library(file)
    except (OSError, RuntimeError) as error:  # another torch, or a file that is no such library
        return str(error.__cause__ or error).splitlines()[0]
    register_fakes()
    return None


def register_fakes() -> None:
    """For torch.compile: a raw launch returns nothing, it writes into what it is given."""
    for launch in LAUNCHES:
        torch.library.register_fake(launch, _writes_into_its_arguments)


def _writes_into_its_arguments(*args: object, **kwargs: object) -> None:
    return None


def is_built_for(device_type: str) -> bool:
    """Whether what is loaded has launches for this type of device: "cuda", or in a build of the tests' own "cpu"."""
    return has_kernel(LAUNCHES[0], device_type)
