"""Versions, devices, and what runs and why: what a bug report should show. ``dinov2-fast info`` prints it."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

import torch
from huggingface_hub import try_to_load_from_cache

from dinov2_fast import __version__, environment, extension
from dinov2_fast.configs import BACKBONES
from dinov2_fast.inference.loading import find_device
from dinov2_fast.ops.choices import backend_choices, format_choices
from dinov2_fast.weights.sources import FILE_NAMES, find_cached

OPTIONAL = ("triton", "xformers", "transformers", "timm")
REQUIRED = ("torch", "numpy", "pillow", "pyarrow", "safetensors", "huggingface_hub")


def installation_report(
    device: str | None = None, dtype: torch.dtype = torch.float32, *, training: bool = False
) -> str:
    """Versions, devices, the implementation of each op and why it is chosen, settings, and cached weights.

    `device` (by default cuda where there is one), `dtype` and `training` are those for which the ops choose.
    """
    device = device or str(find_device(None))
    mode = "training" if training else "inference"
    sections = {
        "Versions": _versions(),
        "Device": _devices(),
        f"What runs on {device} ({str(dtype).removeprefix('torch.')}, {mode})": _ops(device, dtype, training),
        "Settings": _settings(),
        "Weights": _weights(),
    }
    return "\n\n".join("\n  ".join([title, *lines]) for title, lines in sections.items())


def _versions() -> Iterator[str]:
    yield f"{'dinov2_fast':16} {__version__}"
    yield f"{'python':16} {platform.python_version()}"
    for name in (*REQUIRED, *OPTIONAL):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed" + (" (optional)" if name in OPTIONAL else "")
        yield f"{name:16} {version}"


def _devices() -> Iterator[str]:
    yield f"cpu              {platform.machine()}, {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield f"cuda:{index:<11} {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        yield f"cuda             none ({'torch was built without it' if not torch.version.cuda else 'no device found'})"
    yield f"extension: {extension.availability()}"


def _ops(device: str, dtype: torch.dtype, training: bool) -> Iterator[str]:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        yield f"this torch has no device {device!r}"
        return
    yield from format_choices(backend_choices(device, dtype, training))


def _settings() -> Iterator[str]:
    folder = environment.cache_dir()
    yield f"DINOV2_FAST_BACKEND  {environment.backend_setting() or 'not set: each op takes the first that can run'}"
    yield f"DINOV2_FAST_CACHE    {folder}{'' if folder.is_dir() else ' (no such folder yet)'}"
    if environment.xformers_disabled():
        yield "XFORMERS_DISABLED    set: xformers is not used"


def _weights() -> Iterator[str]:
    for name, config in BACKBONES.items():
        on_hub = (try_to_load_from_cache(config.huggingface_id, file) for file in FILE_NAMES)
        path = find_cached(config.file_stem) or next((found for found in on_hub if isinstance(found, str)), None)
        yield f"{name:20} {path or 'not on this machine'}"
