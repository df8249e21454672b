"""Opening checkpoint files safely: safetensors one tensor at a time, or `torch.load` with `weights_only=True`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from dinov2_fast.weights.errors import WeightsError

SAFETENSORS = (".safetensors",)
TORCH = (".pth", ".pt", ".bin")


class SafetensorsFiles(Mapping[str, Tensor]):
    """The tensors of one or several safetensors files, read from disk when asked for.

    A file is opened for each tensor, so that no mapped page stays resident once its tensor has been used.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._file_of: dict[str, Path] = {}
        for path in paths:
            with _open(path) as file:
                self._file_of.update(dict.fromkeys(file.keys(), path))

    def __getitem__(self, key: str) -> Tensor:
        with _open(self._file_of[key]) as file:
            return file.get_tensor(key).clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def open_weights(path: Path) -> Mapping[str, Any]:
    """The state dict in `path`: a file, or the index (``*.index.json``) of a sharded checkpoint.

    Raises:
        WeightsError: missing, damaged, of an unknown kind, or holding more than tensors.
    """
    if not path.is_file():
        raise WeightsError(f"There is no file {path}.")
    if path.name.endswith(".index.json"):
        return _open_shards(path)
    if path.suffix in SAFETENSORS:
        return SafetensorsFiles([path])
    if path.suffix in TORCH:
        return _torch_load(path)
    raise WeightsError(f"{path} is no checkpoint known here; the endings are {', '.join(SAFETENSORS + TORCH)}.")


def _open(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} is damaged or no safetensors file ({error}). Delete it and fetch it again."
        ) from error


def _torch_load(path: Path) -> Mapping[str, Any]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the damage causes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise WeightsError(
                f"{path} holds more than tensors, and loading it could run code, so it was refused. If you trust where "
                f"it is from, save its state dict again as safetensors. ({reason})"
            ) from error
        raise WeightsError(f"{path} is damaged or no PyTorch file ({reason}). Delete it and fetch it again.") from error
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{path} holds a {type(loaded).__name__}, not a state dict.")
    return loaded


def _open_shards(index: Path) -> Mapping[str, Any]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise WeightsError(f"{index} is no index of a sharded checkpoint ({error!r}).") from error
    for name in names:
        if Path(name).name != name:
            raise WeightsError(f"{index} names the file {name!r}, outside its folder; refused.")
    paths = [index.parent / name for name in names]
    if all(path.suffix in SAFETENSORS for path in paths):
        return SafetensorsFiles(paths)
    merged: dict[str, Any] = {}
    for path in paths:
        merged.update(open_weights(path))
    return merged
