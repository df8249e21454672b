"""`ImageTable`: the images of a run, which are read in random order, in little memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import islice

import pyarrow as pa

from dinov2_fast.data.sources import ImageSource
from dinov2_fast.extraction.image_list import from_row, record_batch, to_row

ROWS = 1 << 16  # of a batch


class ImageTable:
    """Images by number, from 0. An image takes the bytes of its path and of its archive's, and some 30 more.

    Attributes:
        sha256: of the paths, with offsets and sizes in archives.
    """

    def __init__(self, images: Iterable[ImageSource]) -> None:
        digest, remaining = hashlib.sha256(), iter(images)
        self._batches: list[pa.RecordBatch] = []
        self._count = 0
        while rows := [to_row(image) for image in islice(remaining, ROWS)]:
            for row in rows:
                digest.update(repr(row).encode())
            self._batches.append(record_batch(rows))
            self._count += len(rows)
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return self._count  # asked for at each position of a run

    def __getitem__(self, number: int) -> ImageSource:
        batch, row = divmod(number, ROWS)
        return from_row(column[row].as_py() for column in self._batches[batch].columns)
