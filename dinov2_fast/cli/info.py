"""``dinov2-fast info``: versions, devices, the implementation of each op and why it is chosen, and cached weights."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from collections.abc import Iterator

OPTIONAL = ("triton", "xformers", "transformers", "timm")
REQUIRED = ("torch", "numpy", "pillow", "pyarrow", "safetensors", "huggingface_hub")
HELP = "show versions, device, ops and cache"
DESCRIPTION = """\
Shows versions, devices, which implementation of each op runs and why, and the
cached weights.
"""
EPILOG = None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--device", help="for the table of ops: cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="for the table of ops (default: float32)",
    )
    parser.add_argument("--training", action="store_true", help="show the table of ops for training")


def run(args: argparse.Namespace) -> int:
    """Prints all sections to stdout; 0."""
    from dinov2_fast.inference.loading import find_device

    device = args.device or str(find_device(None))
    mode = "training" if args.training else "inference"
    sections = {
        "Versions": _versions(),
        "Device": _device(),
        f"What runs on {device} ({args.dtype}, {mode})": _ops(device, args.dtype, args.training),
        "Settings": _settings(),
        "Weights": _weights(),
    }
    for number, (title, lines) in enumerate(sections.items()):
        print(("\n" if number else "") + title)
        for line in lines:
            print(f"  {line}")
    return 0


def _versions() -> Iterator[str]:
    import dinov2_fast

    yield f"{'dinov2_fast':16} {dinov2_fast.__version__}"
    yield f"{'python':16} {platform.python_version()}"
    for name in (*REQUIRED, *OPTIONAL):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed" + (" (optional)" if name in OPTIONAL else "")
        yield f"{name:16} {version}"


def _device() -> Iterator[str]:
    import torch

    from dinov2_fast import extension

    yield f"cpu              {platform.machine()}, {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield f"cuda:{index:<11} {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        yield f"cuda             none ({'torch was built without it' if not torch.version.cuda else 'no device found'})"
    yield f"extension: {extension.availability()}"


def _ops(device: str, dtype: str, training: bool) -> Iterator[str]:
    import torch

    from dinov2_fast.ops.choices import backend_choices, format_choices

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        yield f"this torch has no device {device!r}"
        return
    yield from format_choices(backend_choices(device, getattr(torch, dtype), training))


def _settings() -> Iterator[str]:
    from dinov2_fast import environment

    folder = environment.cache_dir()
    yield f"DINOV2_FAST_BACKEND  {environment.backend_setting() or 'not set: each op takes the first that can run'}"
    yield f"DINOV2_FAST_CACHE    {folder}{'' if folder.is_dir() else ' (no such folder yet)'}"
    if environment.xformers_disabled():
        yield "XFORMERS_DISABLED    set: xformers is not used"


def _weights() -> Iterator[str]:
    from huggingface_hub import try_to_load_from_cache

    from dinov2_fast.configs import BACKBONES
    from dinov2_fast.weights.sources import FILE_NAMES, find_cached

    for name, config in BACKBONES.items():
        on_hub = (try_to_load_from_cache(config.huggingface_id, file) for file in FILE_NAMES)
        path = find_cached(config.file_stem) or next((found for found in on_hub if isinstance(found, str)), None)
        yield f"{name:20} {path or 'not on this machine'}"
