"""Opening checkpoint files safely: safetensors one tensor at a time, or `torch.load` with `weights_only=True`."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from dinov2_fast.weights.errors import WeightsError

SAFETENSORS = (".safetensors",)
TORCH = (".pth", ".pt", ".bin", ".ckpt")
INDEX_ENDING = ".index.json"


class SafetensorsFiles(Mapping[str, Tensor]):
    """The tensors of one or several safetensors files, mapped from disk when asked for: copy what is to be kept.

    A file is opened for each tensor, so that no mapped page stays resident once its tensor has been used.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._file_of: dict[str, Path] = {}
        for path in paths:
            with _open_safetensors(path) as file:
                self._file_of.update(dict.fromkeys(file.keys(), path))

    def __getitem__(self, key: str) -> Tensor:
        with _open_safetensors(self._file_of[key]) as file:
            return file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def open_weights(path: Path) -> Mapping[str, Any]:
    """The state dict in `path`: a file, or the index (``*.index.json``) of a sharded checkpoint.

    Neither format has a checksum that is looked at here: a changed bit within a tensor is not noticed.

    Raises:
        WeightsError: missing, damaged, of an unknown kind, or holding more than tensors.
    """
    if not path.is_file():
        raise WeightsError(f"There is no file {path}.")
    if path.name.endswith(INDEX_ENDING):
        return _open_shards(path)
    if path.suffix in SAFETENSORS:
        return SafetensorsFiles([path])
    if path.suffix in TORCH:
        return _torch_load(path)
    raise WeightsError(f"{path} is no checkpoint known here; the endings are {', '.join(SAFETENSORS + TORCH)}.")


def shards(index: Path) -> list[Path]:
    """The files that the index of a sharded checkpoint names; they need not exist.

    Raises:
        WeightsError: not an index, or it names something other than checkpoint files in its own folder.
    """
    try:
        names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{index} is no index of a sharded checkpoint ({error!r}).") from error
    for name in names:
        if Path(name).name != name or "\\" in name:
            raise WeightsError(f"{index} names the file {name!r}, outside its folder; refused.")
        if Path(name).suffix not in SAFETENSORS + TORCH:
            raise WeightsError(f"{index} names the file {name!r}, which is no checkpoint; refused.")
    return [index.parent / name for name in names]


def _open_shards(index: Path) -> Mapping[str, Any]:
    paths = shards(index)
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise WeightsError(f"{index} names files that are not beside it: {', '.join(missing)}.")
    if all(path.suffix in SAFETENSORS for path in paths):
        return SafetensorsFiles(paths)
    merged: dict[str, Any] = {}
    for path in paths:
        merged.update(open_weights(path))
    return merged


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except (safetensors.SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} is damaged or no safetensors file ({error}). Delete it and fetch it again."
        ) from error


def _torch_load(path: Path) -> Mapping[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of oddities in the file; an error says it better
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the damage causes
        raise WeightsError(_why_not_loaded(path, error)) from error
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{path} holds a {type(loaded).__name__}, not a state dict.")
    return loaded


def _why_not_loaded(path: Path, error: Exception) -> str:
    """A message without torch's own advice, which is to try again unsafely."""
    text = str(error)
    refused = re.search(r"GLOBAL (\S+)", text)
    if refused or "TorchScript" in text:
        what = f"more than tensors ({refused[1]})" if refused else "a TorchScript program"
        return (
            f"{path} holds {what}, and loading it could run code, so it was refused. If you trust where it is from, "
            f"save its state dict again as safetensors."
        )
    detail = re.search(r"WeightsUnpickler error:\s*(.+)", text) or re.match(r"\s*(.+?)(?:\. |$)", text)
    reason = detail[1] if detail else type(error).__name__
    return f"{path} is damaged or no PyTorch file ({reason}). Delete it and fetch it again."
