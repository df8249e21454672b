"""Tensors whose rows (dimension 0) are spread over processes, in safetensors files: one for each process.

Of n rows, each process has ``ceil(n / size)``, in the order of the ranks; the last ones may have fewer, or none. That
is how FSDP2 shards. A reader may belong to a run of another number of processes: it takes its rows out of all files.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from dinov2_fast.errors import WeightsError


class Written(NamedTuple):
    """A file when it was written."""

    bytes: int
    crc32: int


def row_bounds(rows: int, size: int) -> list[int]:
    """Where the rows of each of `size` processes begin, and where those of the last end: size + 1 numbers."""
    each = -(-rows // size)
    return [min(rank * each, rows) for rank in range(size + 1)]


def file_name(kind: str, rank: int, size: int) -> str:
    """The name of the file with the rows of one process."""
    return f"{kind}-{rank + 1:05d}-of-{size:05d}.safetensors"


def write_tensors(path: Path, shapes: Mapping[str, Sequence[int]], tensors: Iterable[Tensor]) -> Written:
    """Writes fp32 tensors as safetensors, to the disk. On the CPU there is a copy of one of them at a time.

    Args:
        path: of the new file.
        shapes: of the tensors, by name.
        tensors: as many, in the same order, on any device.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return write_bytes(path, chain((struct.pack("<Q", len(text)), text), map(_content, tensors)))


def _content(tensor: Tensor) -> memoryview:
    if tensor.dtype != torch.float32:
        raise TypeError(f"Checkpoints hold fp32 tensors, got {tensor.dtype}.")
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_bytes(path: Path, chunks: Iterable[bytes | memoryview]) -> Written:
    """Writes a file to the disk."""
    size = crc = 0
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
        file.flush()
        os.fsync(file.fileno())
    return Written(size, crc)


class RowReader:
    """Reads rows of tensors of one kind ("student", …), of whichever files they are in.

    Args:
        folder: the checkpoint.
        kind: of the tensors.
        state: what its ``state.json`` holds.
    """

    def __init__(self, folder: Path, kind: str, state: Mapping[str, Any]) -> None:
        entries, size = state["tensors"][kind], state["processes"]
        self.folder = folder
        self.shapes: dict[str, list[int]] = {name: entry["shape"] for name, entry in entries.items()}
        self._bounds: dict[str, list[int]] = {name: entry["rows"] for name, entry in entries.items()}
        paths = [folder / file_name(kind, rank, size) for rank in range(size)]
        try:
            self._files = [safetensors.safe_open(path, framework="pt") for path in paths]
        except (safetensors.SafetensorError, OSError) as error:
            raise WeightsError(f"{folder} cannot be read ({error}). Check its permissions and its disk.") from error

    def read(self, name: str, first: int, last: int) -> Tensor:
        """The rows from `first` to before `last` of a tensor, on the CPU."""
        bounds, parts = self._bounds[name], []
        for file, begin, end in zip(self._files, bounds, bounds[1:], strict=False):
            low, high = max(first, begin), min(last, end)
            if low < high:
                parts.append(file.get_slice(name)[low - begin : high - begin])
        return torch.cat(parts) if parts else torch.empty(0, *self.shapes[name][1:])
