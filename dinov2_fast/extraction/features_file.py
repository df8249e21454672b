"""The Parquet file of features: one row for each picture, in the order given, written whole or not at all.

====================  =====================  ====================================================================
id                    int64                  position in the list of pictures
path                  string                 as given; bytes that are not UTF-8 are written as ``\\xNN``
width, height         int32                  of the picture, EXIF rotation applied; null where it cannot be read
error                 string                 null, or why there are no features
cls                   fixed_size_list<float> class token after the final norm; null where there is an error
patch_mean            fixed_size_list<float> mean of the patch tokens after the final norm (no registers); likewise
====================  =====================  ====================================================================

The file's metadata holds one JSON object under the key ``dinov2_fast``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dinov2_fast.extraction.decoding import Decoded

FILE_NAME = "features.parquet"
METADATA_KEY = b"dinov2_fast"
ROW_GROUP = 4096


def output_path(folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Where the features go.

    Raises:
        FileExistsError: there are features already, and `overwrite` is not set.
        NotADirectoryError: `folder` is a file.
    """
    path = Path(folder) / FILE_NAME
    if path.parent.exists() and not path.parent.is_dir():
        raise NotADirectoryError(f"The output folder {str(folder)!r} is a file.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{str(path)!r} exists already; choose another folder or ask to overwrite it.")
    return path


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object that `FeaturesFile` stored in the file."""
    metadata: dict[str, Any] = json.loads(pq.read_schema(path).metadata[METADATA_KEY])
    return metadata


class FeaturesFile:
    """Writes features to a temporary file beside `path`, which takes its place when the ``with`` block ends well."""

    def __init__(self, path: Path, embed_dim: int, metadata: Mapping[str, Any]) -> None:
        self.path = path
        self._part = path.with_name(f".{path.name}.{os.getpid()}.part")
        vector = pa.list_(pa.float32(), embed_dim)
        fields = [("id", pa.int64()), ("path", pa.string()), ("width", pa.int32()), ("height", pa.int32())]
        fields += [("error", pa.string()), ("cls", vector), ("patch_mean", vector)]
        self._schema = pa.schema(fields, metadata={METADATA_KEY: json.dumps(metadata)})
        self._rows = 0
        self._batches: list[pa.RecordBatch] = []

    def __enter__(self) -> FeaturesFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._part, "wb")
        self._writer = pq.ParquetWriter(self._file, self._schema, use_dictionary=["path", "error"])
        return self

    def write(
        self,
        paths: Sequence[str],
        pictures: Sequence[Decoded],
        cls: NDArray[np.float32],
        patch_mean: NDArray[np.float32],
    ) -> None:
        """Adds rows; `cls` and `patch_mean` are (rows, embed_dim), ignored where the picture has an error."""
        missing = np.array([picture.error is not None for picture in pictures])
        columns = [
            pa.array(range(self._rows, self._rows + len(paths)), pa.int64()),
            pa.array([_as_text(path) for path in paths], pa.string()),
            pa.array([picture.width for picture in pictures], pa.int32()),
            pa.array([picture.height for picture in pictures], pa.int32()),
            pa.array([picture.error for picture in pictures], pa.string()),
            _vectors(cls, missing),
            _vectors(patch_mean, missing),
        ]
        self._batches.append(pa.record_batch(columns, schema=self._schema))
        self._rows += len(paths)
        if sum(batch.num_rows for batch in self._batches) >= ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._batches:
            self._writer.write_table(pa.Table.from_batches(self._batches), row_group_size=ROW_GROUP)
        self._batches = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
            self._writer.close()  # after an error as well, or its finaliser writes to the closed file
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                os.replace(self._part, self.path)
        finally:
            self._file.close()
            self._part.unlink(missing_ok=True)


def _vectors(values: NDArray[np.float32], missing: NDArray[np.bool_]) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values, np.float32).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1], mask=pa.array(missing))


def _as_text(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")
