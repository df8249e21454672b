"""`load_features`: what an extraction wrote, as numpy arrays."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.features.manifest import read_manifest, stored_features, stored_sections
from dinov2_fast.features.schema import COLUMNS, shard_numbers
from dinov2_fast.features.shards import open_shards


def load_features(folder: str | os.PathLike[str], *, partial: bool = False) -> Features:
    """What ``dinov2-fast extract`` or :func:`dinov2_fast.extract` wrote to a folder.

    This call only finds out which shards there are. A column or feature is read when it is asked for, in full: if
    memory cannot hold all its rows, go through `Features.shards`. With `partial`, an extraction that is not finished
    gives the rows of the shards that it has written; otherwise it is an error.

    Raises:
        FileNotFoundError: the folder has no manifest.
        InvalidValueError: the extraction is not finished, or the manifest is damaged.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    sections = [section.shards(manifest["shard_size"]) for section in stored_sections(manifest)]
    wanted = sum(map(len, sections))
    shards = open_shards(folder, manifest["format"], stored_features(manifest))
    listed = [shard for shard in shard_numbers(folder) if any(shard in section for section in sections)]
    complete = [shard for shard in listed if shards.count(shard) is not None]
    if len(complete) < wanted and not partial:
        raise InvalidValueError(
            f"{wanted - len(complete)} of the {wanted} shards in {str(folder)!r} are missing: the extraction is "
            "not finished. Run it again, which does what is missing, or pass partial=True."
        )
    return Features(folder, manifest, tuple(complete))


class Features:
    """The rows of an extraction, one for each image, in the order of the images; made by `load_features`.

    ``len(features)`` is the number of rows. ``features["cls"]`` is a feature by its name
    (:mod:`dinov2_fast.extraction.compute`), a numpy array with one entry for each row: (rows, dim) for "cls" and
    "patch_mean", (rows, patches, dim) for "patches", (rows, registers, dim) for "registers", in float32 or float16 as
    it was stored, NaN in rows with an error. A name that was not extracted is a KeyError. In the npy format, a feature
    of a single shard is a read-only memory map. Iterating gives the names of the features.

    Attributes:
        folder: the output folder.
        manifest: the content of ``_manifest.json``.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], shards: tuple[int, ...]) -> None:
        self.folder, self.manifest, self._numbers = folder, manifest, shards
        self._features = {feature.name: feature for feature in stored_features(manifest)}
        self._shards = open_shards(folder, manifest["format"], list(self._features.values()))

    @property
    def id(self) -> NDArray[np.int64]:
        """(rows,): shard size x shard + row in the shard; the row numbers if no shard is missing or was added."""
        return np.array(self._columns["id"], np.int64)

    @property
    def path(self) -> list[str]:
        """As given or found; bytes that are not UTF-8 are written as ``\\xNN``."""
        return self._columns["path"]

    @property
    def error(self) -> list[str | None]:
        """Why a row has no features; None if it has them."""
        return self._columns["error"]

    @property
    def width(self) -> NDArray[np.int32]:
        """(rows,), pixels after EXIF rotation; 0 if the image could not be read."""
        return np.array([width or 0 for width in self._columns["width"]], np.int32)

    @property
    def height(self) -> NDArray[np.int32]:
        """As `width`."""
        return np.array([height or 0 for height in self._columns["height"]], np.int32)

    @property
    def sha256(self) -> list[str | None]:
        """Of the bytes of each file; None if another try may succeed (:mod:`.schema`), or if they could not be read."""
        return self._columns["sha256"]

    def shards(self) -> Iterator[Features]:
        """The same rows in parts, one for each shard."""
        for shard in self._numbers:
            yield Features(self.folder, self.manifest, (shard,))

    def __len__(self) -> int:
        sections, size = stored_sections(self.manifest), self.manifest["shard_size"]
        return sum(
            next(section.rows(shard, size) for section in sections if shard in section.shards(size))
            for shard in self._numbers
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._features)

    def __contains__(self, name: object) -> bool:
        return name in self._features

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._features:
            raise KeyError(f"no feature {name!r} was extracted; there are {', '.join(self._features)}")
        feature = self._features[name]
        if len(self._numbers) == 1:
            return self._shards.feature(self._numbers[0], feature)
        values, first = np.empty((len(self), *feature.shape), feature.dtype), 0
        for shard in self._numbers:
            part = self._shards.feature(shard, feature)
            values[first : first + len(part)] = part
            first += len(part)
        return values

    def __repr__(self) -> str:
        described = ", ".join(f"{f.name} {f.shape} {f.dtype}" for f in self._features.values())
        return f"<Features of {len(self)} images in {str(self.folder)!r}: {described}>"

    @cached_property
    def _columns(self) -> dict[str, list[Any]]:
        parts = [self._shards.columns(shard) for shard in self._numbers]
        return {name: [value for part in parts for value in part[name]] for name in COLUMNS}
