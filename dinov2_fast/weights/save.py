"""Saving weights: a file that is whole or absent, in safetensors or as PyTorch writes it."""

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
    """A name beside `path`, another each time, for what is renamed to it when it is whole."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")


def save_weights(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Writes a state dict: into a temporary file beside `path`, to the disk, and renamed.

    Args:
        tensors: by name, as `dinov2_fast.convert_state_dict` gives them.
        path: ends in ``.safetensors``, or in ``.pth``, ``.pt``, ``.bin`` or ``.ckpt`` for a file that ``torch.load``
            reads; its folder is made.
        overwrite: replace a file that is there.

    Returns:
        The path.

    Raises:
        FileExistsError: the file is there, and `overwrite` is not set.
        ValueError: another ending.
    """
    path = check_target(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    own = {name: _alone(tensor) for name, tensor in tensors.items()}
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
    """`path`, if `save_weights` may write there; raises as it does."""
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
    """Gives a finished file its name, once all of it is on the disk."""
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def _alone(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, in a storage that holds nothing else: a file would keep all of it."""
    tensor = tensor.detach().cpu()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor.contiguous()
