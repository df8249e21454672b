"""The manifest of an output folder: what its features are and how they were made.

An extraction that is resumed or shared compares every entry with its own, except ``about`` and ``added``. Images are
identified by their paths, and by their places in archives: ``inputs`` has their number and a SHA-256 of the paths and
places; each entry of ``added`` has the same for images that were added later, and the number of their first shard. So
another file under the same path counts as the same image. Each row has the SHA-256 of the bytes that were read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dinov2_fast.errors import Dinov2FastError, InvalidValueError
from dinov2_fast.features.schema import MANIFEST, Feature, find_shards, holds_features
from dinov2_fast.features.whole_files import whole_file

INPUTS = "inputs"
NOT_COMPARED = ("about", "added")


class ManifestError(Dinov2FastError, ValueError):
    """The folder holds features that were made in another way, or shards without a manifest; the message says which."""


@dataclass(frozen=True)
class Section:
    """Images that were extracted together, in consecutive shards: their number, and the SHA-256 of paths and places.

    The SHA-256 is None for shards that are left of a section whose other shards were lost or never written.
    """

    first_shard: int
    images: int
    sha256: str | None = None

    def shards(self, shard_size: int) -> range:
        """The numbers of its shards."""
        return range(self.first_shard, self.first_shard - (-self.images // shard_size))

    def rows(self, shard: int, shard_size: int) -> int:
        """The number of its images in one of its shards."""
        return min(shard_size, self.images - (shard - self.first_shard) * shard_size)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an output folder.

    Raises:
        FileNotFoundError: there is none.
        InvalidValueError: it is damaged.
    """
    if not holds_features(folder):
        raise FileNotFoundError(f"{str(folder)!r} holds no features: there is no {MANIFEST}.")
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        shard_size, sections, _ = manifest["shard_size"], stored_sections(manifest), manifest["format"]
        counts = [shard_size, *(count for section in sections for count in (section.first_shard, section.images))]
        if any(type(count) is not int or not 0 <= count < 1 << 62 for count in counts) or shard_size == 0:
            raise InvalidValueError(f"sections {sections} in shards of {shard_size}")
        stored_features(manifest)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidValueError(f"{str(path)!r} is no manifest of features: {error!r}.") from None
    return dict(manifest)


def stored_features(manifest: Mapping[str, Any]) -> list[Feature]:
    """The features that a manifest lists."""
    return [Feature(name, tuple(entry["shape"]), entry["dtype"]) for name, entry in manifest["features"].items()]


def stored_sections(manifest: Mapping[str, Any]) -> list[Section]:
    """The images of the first extraction, and those that were added, in the order of their shards."""
    inputs = manifest[INPUTS]
    added = manifest.get("added", [])
    return [Section(0, inputs["images"], inputs.get("sha256")), *(Section(**section) for section in added)]


def claim(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest to a folder that has none; a manifest that is there must say the same (`compare`).

    Raises:
        ManifestError: they differ, or the folder holds shards without a manifest.
    """
    if not holds_features(folder):
        _refuse_shards(folder)
        _write(folder, manifest, keep_existing=True)  # another process may have written it
    compare(folder, manifest)


def compare(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Checks that the manifest in the folder says the same; if `manifest` has no inputs, these are not compared.

    Raises:
        ManifestError: they differ.
    """
    stored, wanted = read_manifest(folder), json.loads(json.dumps(manifest))
    if INPUTS not in wanted:
        del stored[INPUTS]
    differing = list(_differences(stored, wanted))
    if not differing:
        return
    more = f" (and {len(differing) - 3} more)" if len(differing) > 3 else ""
    only_inputs = all(text.startswith(INPUTS) for text in differing)
    add = "add the images that are new with --add (add=True), " * only_inputs
    raise ManifestError(
        f"The features in {str(folder)!r} were made otherwise: {'; '.join(differing[:3])}{more}. Choose another "
        f"folder, {add}or begin anew with --overwrite (overwrite=True)."
    )


def discard(folder: Path) -> None:
    """Deletes the features in a folder, the manifest last, so that a call after an interruption can delete the rest.

    Raises:
        ManifestError: the folder holds shards without a manifest.
        InvalidValueError: the manifest is damaged.
    """
    if not holds_features(folder):
        return _refuse_shards(folder)
    read_manifest(folder)
    for path in find_shards(folder):
        path.unlink()
    (folder / MANIFEST).unlink()


def write_sections(folder: Path, sections: Sequence[Section]) -> None:
    """Replaces the sections in the manifest of a folder."""
    manifest = read_manifest(folder)
    first, *added = sections if sections[0].first_shard == 0 else [Section(0, 0), *sections]
    manifest[INPUTS] = {"images": first.images, "sha256": first.sha256}
    manifest["added"] = [asdict(section) for section in added]
    _write(folder, manifest)


def _refuse_shards(folder: Path) -> None:
    if any(find_shards(folder)):
        raise ManifestError(
            f"{str(folder)!r} holds features without a {MANIFEST}, which would say how they were made. Choose another "
            "folder, or delete them."
        )


def _write(folder: Path, manifest: Mapping[str, Any], *, keep_existing: bool = False) -> None:
    with whole_file(folder / MANIFEST, keep_existing=keep_existing) as file:
        file.write(json.dumps(manifest, indent=2).encode() + b"\n")


def _differences(stored: Any, wanted: Any, name: str = "") -> Iterator[str]:
    """A sentence for each value that differs, with its dotted name."""
    if isinstance(stored, dict) and isinstance(wanted, dict):
        for key in dict.fromkeys([*stored, *wanted]):
            if name or key not in NOT_COMPARED:
                yield from _differences(stored.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    elif stored != wanted:
        yield f"{name} is {_shortened(stored)} there and {_shortened(wanted)} here"


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
