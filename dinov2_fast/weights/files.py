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

from dinov2_fast.weights.errors import WeightsError
from dinov2_fast.weights.harmless import harmless_left_out, is_harmless

SAFETENSORS = (".safetensors",)
TORCH = (".pth", ".pt", ".bin", ".ckpt")
INDEX_ENDING = ".index.json"

_ZIP_START, _PICKLE_START = b"PK", b"\x80"
MAX_COMPRESSION = 4  # of a PyTorch file, which torch itself writes without any; else a small one could fill the memory


class SafetensorsFiles(Mapping[str, Tensor]):
    """The tensors of one or several safetensors files, mapped from disk when asked for: copy what is to be kept.

    A file is opened for each tensor, so that no mapped page stays resident once its tensor has been used.

    Raises:
        WeightsError: a file is damaged, or another one than when it was opened first.
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
        """Raises if a file is another one, or was written to, since it was opened first."""
        for path, version in self._versions.items():
            if _version(path) != version:
                raise WeightsError(f"{path} was replaced or written to while it was read. Load it again.")

    @contextmanager
    def _open(self, path: Path) -> Iterator[Any]:
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                yield file
            self.check_unchanged()
        except (safetensors.SafetensorError, OSError) as error:
            raise WeightsError(
                f"{path} is damaged or no safetensors file ({error}). Delete it and fetch it again."
            ) from error


def _version(path: Path) -> tuple[int, ...]:
    """What is another number for another file of the same name, or after a change of it."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def open_weights(path: Path) -> Mapping[str, Any]:
    """The state dict in `path`: a file, or the index (``*.index.json``) of a sharded checkpoint.

    The first bytes of a file say what it is; its name does not matter. Neither format has a checksum that is looked at
    here: a changed bit within a tensor is not noticed.

    Raises:
        WeightsError: missing, damaged, of an unknown kind, or holding more than tensors.
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
        f"{path} is damaged or no checkpoint: it begins neither as a safetensors nor as a PyTorch file does. Delete it "
        "and fetch it again."
    )


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: with the length of a JSON object, and that."""
    return _first_bytes(path)[8:] == b"{"


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(9)
    except OSError as error:
        raise WeightsError(
            f"{path} cannot be read ({error.strerror}). Look at its permissions and its disk."
        ) from error


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
    """`torch.load` of tensors, and with stand-ins for harmless objects only where there are some."""

    def load() -> Any:
        with path.open("rb") as file, warnings.catch_warnings():  # given the path, torch 2.13 goes by the name
            warnings.simplefilter("ignore", UserWarning)  # of oddities in the file; an error says it better
            return torch.load(file, map_location="cpu", weights_only=True)

    try:
        return load()
    except Exception as error:
        if not is_harmless(_refused_name(error)):
            raise
    with harmless_left_out():
        return load()


def _check_compression(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except Exception:  # zipfile raises whatever the damage causes, and torch says it better
        return
    if unpacked > MAX_COMPRESSION * path.stat().st_size:
        raise WeightsError(
            f"{path} would be {unpacked / path.stat().st_size:.0f} times as large in memory, which no checkpoint that "
            "PyTorch writes is: refused. Save it again with torch.save, or as safetensors."
        )


def _refused_name(error: Exception) -> str | None:
    """The object for which torch refused to load a file."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    return refused[1] if refused else None


def _why_not_loaded(path: Path, error: Exception) -> str:
    """A message without torch's own advice, which is to try again unsafely."""
    text = str(error)
    refused = _refused_name(error)
    if refused or "TorchScript" in text:
        what = f"more than tensors ({refused})" if refused else "a TorchScript program"
        return (
            f"{path} holds {what}, and loading it could run code, so it was refused. If you trust where it is from, "
            f"save its state dict again as safetensors."
        )
    detail = re.search(r"WeightsUnpickler error:\s*(.+)", text) or re.match(r"\s*(.+?)(?:\. |$)", text)
    reason = detail[1] if detail else type(error).__name__
    return f"{path} is damaged or no PyTorch file ({reason}). Delete it and fetch it again."
