"""`load_features`: what an extraction wrote, as numpy arrays."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.features.schema import MANIFEST, Feature, find_manifest, format_named, shard_numbers, stem


def load_features(folder: str | os.PathLike[str], *, partial: bool = False) -> Features:
    """What ``dinov2-fast extract`` or :func:`dinov2_fast.extraction.extract.extract` wrote to a folder.

    At once only what says which shards are there is read. Columns and features are read when they are asked for, all
    rows of one: for more features than memory holds go through `Features.shards`.

    Args:
        folder: the output folder.
        partial: take the shards that are there where the extraction is not finished; otherwise that is an error.

    Raises:
        FileNotFoundError: the folder has no manifest.
        ValueError: the extraction is not finished, or the manifest is not one of this version.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    sections = [section.shards(manifest["shard_size"]) for section in stored_sections(manifest)]
    wanted = sum(map(len, sections))
    features = stored_features(manifest)
    format_ = format_named(manifest["format"])
    present = [shard for shard in shard_numbers(folder) if any(shard in section for section in sections)]
    there = [shard for shard in present if format_.count(stem(folder, shard), features) is not None]
    if len(there) < wanted and not partial:
        raise InvalidValueError(
            f"{wanted - len(there)} of the {wanted} shards in {str(folder)!r} are missing: the extraction is "
            "not finished. Run it again, which does what is missing, or pass partial=True."
        )
    return Features(folder, manifest, tuple(there))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an output folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    path = find_manifest(folder)
    if path is None:
        raise FileNotFoundError(f"{str(folder)!r} holds no features: there is no {MANIFEST}.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        shard_size, sections = manifest["shard_size"], stored_sections(manifest)
        counts = [shard_size, *(count for section in sections for count in (section.first_shard, section.images))]
        if any(type(count) is not int or not 0 <= count < 1 << 62 for count in counts) or shard_size == 0:
            raise InvalidValueError(f"sections {sections} in shards of {shard_size}")
        stored_features(manifest)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidValueError(f"{str(path)!r} is no manifest of features: {error!r}.") from None
    return dict(manifest)


def stored_features(manifest: Mapping[str, Any]) -> list[Feature]:
    """The features that a manifest lists."""
    return [Feature(name, tuple(about["shape"]), about["dtype"]) for name, about in manifest["features"].items()]


@dataclass(frozen=True)
class Section:
    """Images that were extracted together.

    Attributes:
        first_shard: the number of their first shard; they have the following ones too.
        images: how many they are.
        sha256: of their paths, in hexadecimal; None where others were to be among them.
    """

    first_shard: int
    images: int
    sha256: str | None = None

    def shards(self, shard_size: int) -> range:
        """The numbers of its shards."""
        return range(self.first_shard, self.first_shard - (-self.images // shard_size))

    def rows(self, shard: int, shard_size: int) -> int:
        """How many of its images are in one of its shards."""
        return min(shard_size, self.images - (shard - self.first_shard) * shard_size)


def stored_sections(manifest: Mapping[str, Any]) -> list[Section]:
    """An extraction's own images, and what was added, in the order of the shards."""
    inputs = manifest["inputs"]
    added = manifest.get("added", [])
    return [Section(0, inputs["images"], inputs.get("sha256")), *(Section(**section) for section in added)]


class Features:
    """The rows of an extraction, one for each image, in the order of the images; made by `load_features`.

    ``len(features)`` is their number. ``features["cls"]`` is a feature by its name (:mod:`.outputs`), a numpy array
    with one entry for each row: (rows, dim) for "cls" and "patch_mean", (rows, patches, dim) for "patches",
    (rows, registers, dim) for "registers", in float32 or float16 as it was stored. Rows with an error are NaN there. It
    is read at each request; as npy files in one shard it is a read-only memory map. Iterating gives the names.

    Attributes:
        folder: where they are.
        manifest: the dictionary of ``_manifest.json``.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], shards: tuple[int, ...]) -> None:
        self.folder, self.manifest, self._shards = folder, manifest, shards
        self._features = {feature.name: feature for feature in stored_features(manifest)}
        self._format = format_named(manifest["format"])

    @property
    def id(self) -> NDArray[np.int64]:
        """Positions among all images of the extraction; these are the row numbers, unless shards are left out or added.

        Images that were added go on from the next multiple of the shards' size.
        """
        return np.array(self._columns["id"], np.int64)

    @property
    def path(self) -> list[str]:
        """As given or found; bytes that are not UTF-8 are written as ``\\xNN``."""
        return self._columns["path"]

    @property
    def error(self) -> list[str | None]:
        """Why a row has no features; None where it has."""
        return self._columns["error"]

    @property
    def width(self) -> NDArray[np.int32]:
        """Pixels, EXIF rotation applied; 0 where the image could not be read."""
        return np.array([width or 0 for width in self._columns["width"]], np.int32)

    @property
    def height(self) -> NDArray[np.int32]:
        """As `width`."""
        return np.array([height or 0 for height in self._columns["height"]], np.int32)

    @property
    def sha256(self) -> list[str | None]:
        """Of the file's bytes, in hexadecimal; None where they could not be read, or time or memory ran out.

        With such an error an image is worth another try, as ``extract --retry-failed`` does it.
        """
        return self._columns["sha256"]

    def shards(self) -> Iterator[Features]:
        """The same rows in parts, one for each shard."""
        for shard in self._shards:
            yield Features(self.folder, self.manifest, (shard,))

    def __len__(self) -> int:
        return sum(self._rows(shard) for shard in self._shards)

    def _rows(self, shard: int) -> int:
        sections, size = stored_sections(self.manifest), self.manifest["shard_size"]
        return next(section.rows(shard, size) for section in sections if shard in section.shards(size))

    def __iter__(self) -> Iterator[str]:
        return iter(self._features)

    def __contains__(self, name: object) -> bool:
        return name in self._features

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._features:
            raise KeyError(f"no feature {name!r} was extracted; there are {', '.join(self._features)}")
        feature = self._features[name]
        if len(self._shards) == 1:
            return self._format.feature(stem(self.folder, self._shards[0]), feature)
        values, first = np.empty((len(self), *feature.shape), feature.dtype), 0
        for shard in self._shards:
            part = self._format.feature(stem(self.folder, shard), feature)
            values[first : first + len(part)] = part
            first += len(part)
        return values

    def __repr__(self) -> str:
        described = ", ".join(f"{f.name} {f.shape} {f.dtype}" for f in self._features.values())
        return f"<Features of {len(self)} images in {str(self.folder)!r}: {described}>"

    @cached_property
    def _columns(self) -> dict[str, list[Any]]:
        parts = [self._format.columns(stem(self.folder, shard)) for shard in self._shards]
        names = parts[0] if parts else ("id", "path", "width", "height", "sha256", "error")
        return {name: [value for part in parts for value in part[name]] for name in names}
