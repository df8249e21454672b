"""Saving weights as safetensors or PyTorch files. A file is complete or absent, never partial."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.weights.files import SAFETENSORS, TORCH


def part_of(path: Path) -> Path:
    """A new temporary name in the folder of `path`, for a file that gets the name `path` when it is complete."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")


def save_weights(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Writes a state dict to a temporary file beside `path`, flushes it to the disk and renames it.

    Args:
        tensors: by name, as `dinov2_fast.convert_state_dict` returns them.
        path: a name that ends in ``.safetensors``, or in ``.pth``, ``.pt``, ``.bin`` or ``.ckpt`` for a file that
            ``torch.load`` reads. Its folder is made.
        overwrite: replace an existing file.

    Returns:
        The path.

    Raises:
        FileExistsError: the file exists, and `overwrite` is not set.
        ValueError: `path` has another ending.
    """
    path = check_target(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    own = {name: _without_spare_storage(tensor) for name, tensor in tensors.items()}
    try:
        if path.suffix in SAFETENSORS:
            save_file(own, part, metadata={"format": "pt"})
        else:
            torch.save(own, part)
        move_into_place(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def check_target(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """`path` if `save_weights` may write there. Raises the errors of `save_weights` otherwise."""
    path = Path(path)
    if path.suffix not in SAFETENSORS + TORCH:
        raise InvalidValueError(
            f"{str(path)!r} must end in {', '.join(SAFETENSORS + TORCH)}; .safetensors is the safe one."
        )
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{str(path)!r} exists already; choose another name, or replace it with --overwrite (overwrite=True)."
        )
    return path


def move_into_place(part: Path, path: Path) -> None:
    """Flushes a finished file to the disk and gives it its name."""
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def _without_spare_storage(tensor: Tensor) -> Tensor:
    """`tensor` on the CPU, contiguous, with a storage of its own: a file would hold the whole storage."""
    tensor = tensor.detach().cpu()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor.contiguous()
