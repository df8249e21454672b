"""Opening checkpoint files safely: safetensors one tensor at a time, or `torch.load` with `weights_only=True`."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from dinov2_fast.errors import WeightsError
from dinov2_fast.weights.harmless import ignoring_harmless_objects, is_harmless

SAFETENSORS = (".safetensors",)
TORCH = (".pth", ".pt", ".bin", ".ckpt")
INDEX_ENDING = ".index.json"

_ZIP_START, _PICKLE_START = b"PK", b"\x80"
MAX_COMPRESSION = 4  # of a PyTorch file, so that a small one cannot fill the memory; torch itself does not compress


class SafetensorsFiles(Mapping[str, Tensor]):
    """The tensors of safetensors files, each mapped from the disk when it is read. Copy a tensor to keep it.

    A file is opened anew for each tensor, so its mapped pages are released together with the tensor.

    Raises:
        WeightsError: a file is damaged, or has changed since it was first opened.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._file_of: dict[str, Path] = {}
        self._versions = {path: _version(path) for path in paths}
        for path in paths:
            with self._open(path) as file:
                self._file_of.update(dict.fromkeys(file.keys(), path))

    def __getitem__(self, key: str) -> Tensor:
        with self._open(self._file_of[key]) as file:
            return file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def check_unchanged(self) -> None:
        """Raises if a file was replaced or written to since it was first opened."""
        for path, version in self._versions.items():
            if _version(path) != version:
                raise WeightsError(f"{path} was replaced or written to while it was being read. Load it again.")

    @contextmanager
    def _open(self, path: Path) -> Iterator[Any]:
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                yield file
            self.check_unchanged()
        except (safetensors.SafetensorError, OSError) as error:
            raise WeightsError(
                f"{path} is damaged or no safetensors file ({error}). Delete it and download it again."
            ) from error


def _version(path: Path) -> tuple[int, ...]:
    """Numbers that change when the file is replaced or written to."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def open_weights(path: Path) -> Mapping[str, Any]:
    """The state dict in `path`: a checkpoint file, or the index (``*.index.json``) of a sharded checkpoint.

    The format is recognised by the first bytes of the file, not by its name. No checksum is verified: a changed bit
    inside a tensor is not noticed.

    Raises:
        WeightsError: the file is missing, damaged, of an unknown format, or holds more than tensors and harmless data.
    """
    if not path.is_file():
        raise WeightsError(f"There is no file {path}.")
    if path.name.endswith(INDEX_ENDING):
        return _open_shards(path)
    if is_safetensors(path):
        return SafetensorsFiles([path])
    if _first_bytes(path).startswith((_ZIP_START, _PICKLE_START)):
        return _torch_load(path)
    raise WeightsError(
        f"{path} is damaged or no checkpoint: its first bytes are those of neither a safetensors nor a PyTorch file. "
        "Delete it and download it again."
    )


def is_safetensors(path: Path) -> bool:
    """Whether a file begins like safetensors: with the length of a JSON object, then the object."""
    return _first_bytes(path)[8:] == b"{"


def is_pickle(path: Path) -> bool:
    """Whether a file begins like a PyTorch file older than the archive format."""
    return _first_bytes(path).startswith(_PICKLE_START)


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(9)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror}). Check its permissions and its disk.") from error


def shards(index: Path) -> list[Path]:
    """The files named in the index of a sharded checkpoint: only checkpoints in its own folder. They need not exist."""
    try:
        names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{index} is no index of a sharded checkpoint ({error!r}).") from error
    for name in names:
        if Path(name).name != name or "\\" in name:
            raise WeightsError(f"{index} is refused: it names the file {name!r}, outside its folder.")
        if Path(name).suffix not in SAFETENSORS + TORCH:
            raise WeightsError(f"{index} is refused: it names the file {name!r}, which is no checkpoint.")
    return [index.parent / name for name in names]


def _open_shards(index: Path) -> Mapping[str, Any]:
    paths = shards(index)
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise WeightsError(f"{index} names files that are not in its folder: {', '.join(missing)}.")
    if all(is_safetensors(path) for path in paths):
        return SafetensorsFiles(paths)
    merged: dict[str, Any] = {}
    for path in paths:
        merged.update(open_weights(path))
    return merged


def _torch_load(path: Path) -> Mapping[str, Any]:
    _check_compression(path)
    try:
        loaded = _load_tensors(path)
    except Exception as error:  # torch.load raises whatever the damage causes
        raise WeightsError(_why_not_loaded(path, error)) from error
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{path} holds a {type(loaded).__name__}, not a state dict.")
    return loaded


def _load_tensors(path: Path) -> Any:
    """`torch.load` of tensors. Stand-ins for harmless objects are used only if the file holds some."""

    def load() -> Any:
        with path.open("rb") as file, warnings.catch_warnings():  # given a path, torch 2.13 goes by the name
            warnings.simplefilter("ignore", UserWarning)  # about oddities in the file: an error reports them better
            return torch.load(file, map_location="cpu", weights_only=True)

    try:
        return load()
    except Exception as error:
        if not is_harmless(_refused_name(error)):
            raise
    with ignoring_harmless_objects():
        return load()


def _check_compression(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except Exception:  # zipfile raises whatever the damage causes; torch's own error is better
        return
    if unpacked > MAX_COMPRESSION * path.stat().st_size:
        raise WeightsError(
            f"{path} is refused: in memory it would be {unpacked / path.stat().st_size:.0f} times as large, unlike any "
            "checkpoint that PyTorch writes. Save it again with torch.save, or as safetensors."
        )


def _refused_name(error: Exception) -> str | None:
    """The class for which torch refused to load a file."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    return refused[1] if refused else None


def _why_not_loaded(path: Path, error: Exception) -> str:
    """An error message without torch's own advice, which is to load the file unsafely."""
    text = str(error)
    refused = _refused_name(error)
    if refused or "TorchScript" in text:
        what = f"more than tensors ({refused})" if refused else "a TorchScript program"
        return (
            f"{path} is refused: it holds {what}, and loading it could run code. If you trust its origin, save its "
            "state dict again as safetensors."
        )
    detail = re.search(r"WeightsUnpickler error:\s*(.+)", text) or re.match(r"\s*(.+?)(?:\. |$)", text)
    reason = detail[1] if detail else type(error).__name__
    return f"{path} is damaged or no PyTorch file ({reason}). Delete it and download it again."
