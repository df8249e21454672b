"""The CUDA C++ extension: a file in this folder that registers `torch.ops.dinov2_fast_cuda`.

It is loaded once, without output, when it is first needed. The package works without it if it is missing or does not
fit this version of torch. `make build` or `pip install --no-build-isolation .` builds it (setup.py).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from dinov2_fast.torch_private import has_kernel

FILE = Path(__file__).with_name("_cuda.abi3.so")
LAUNCHES = ("dinov2_fast_cuda::linear_forward", "dinov2_fast_cuda::attention_forward")
CUDA = "13"  # the major version of the CUDA runtime that the extension is built with and calls


class Extension(NamedTuple):
    """`reason` says why the extension is not available; None if it is."""

    path: Path
    reason: str | None


@cache
def load() -> Extension:
    """Loads the extension when it is first called. Never raises."""
    return Extension(FILE, _load_file(FILE))


def availability() -> str:
    """One line for users: "loaded <file>" or "not available (<reason>)"."""
    path, reason = load()
    return f"loaded {path}" if reason is None else f"not available ({reason})"


def _load_file(file: Path) -> str | None:
    """Loads the extension and returns None, or the reason why it cannot be loaded."""
    if not file.is_file():
        return "not built: see CONTRIBUTING.md"
    if torch.version.cuda is None or torch.version.cuda.split(".")[0] != CUDA:
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        return f"built for CUDA {CUDA}, and this torch has {build}"
    try:
        torch.ops.load_library(file)
    except (OSError, RuntimeError) as error:  # built for another torch, or no library
        return str(error.__cause__ or error).splitlines()[0]
    register_fakes()
    return None


def register_fakes() -> None:
    """Registers fakes for torch.compile: a launch returns nothing and writes into its arguments."""
    for launch in LAUNCHES:
        torch.library.register_fake(launch, _writes_into_its_arguments)


def _writes_into_its_arguments(*args: object, **kwargs: object) -> None:
    return None


def is_built_for(device_type: str) -> bool:
    """Whether the loaded extension has launches for this type of device: "cuda", or "cpu" in a build for tests."""
    return has_kernel(LAUNCHES[0], device_type)
