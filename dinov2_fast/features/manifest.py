"""The manifest of an output folder: of what the features are and how they were made, so that only the same goes on.

Everything in it is compared when an extraction is resumed or shared, but the entries ``about`` and ``added``.
Images are in it by their paths: ``inputs`` has their number and a SHA-256 of the paths, ``added`` the same of images
added later, and their first shard. Copied files are the same files; each row has a SHA-256 of the bytes that it is of.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch import nn

from dinov2_fast import __version__
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.data.images import FORMATS
from dinov2_fast.errors import Dinov2FastError
from dinov2_fast.extraction.compute import Outputs, place_of
from dinov2_fast.features.schema import MANIFEST, find_manifest, find_shards
from dinov2_fast.features.store import Section, read_manifest
from dinov2_fast.features.whole_files import part_of, whole_file
from dinov2_fast.inference import Engine

PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
INPUTS = "inputs"
NOT_COMPARED = ("about", "added")


class ManifestError(Dinov2FastError, ValueError):
    """The folder holds features that were made otherwise; the message names what differs."""


def describe(outputs: Outputs, processor: Dinov2ImageProcessor, max_pixels: int) -> dict[str, Any]:
    """The part of a manifest that model, preprocessing and machine decide."""
    model, place = outputs.model, place_of(outputs.model)
    engine = isinstance(model, Engine)
    return {
        "model": architecture(model),
        "weights": fingerprint(model._model if engine else model),
        "position_interpolation": model.position_interpolation,
        "processor": processor.to_dict(),
        "decoder": {"pillow": PIL.__version__, "formats": list(FORMATS), "max_pixels": max_pixels},
        "features": {f.name: {"shape": list(f.shape), "dtype": f.dtype} for f in outputs.features},
        "dtype": str(place.dtype).removeprefix("torch."),
        "precision": model.precision if engine else PRECISIONS.get(place.dtype, str(place.dtype)),
        "engine": _engine(model) if engine else None,
        "device": place.device.type,
        "backends": {row.label: row.backend for row in getattr(model, "backends", list)()},
        "versions": {"dinov2_fast": __version__, "torch": torch.__version__, "numpy": np.__version__},
    }


def about() -> dict[str, Any]:
    """What is recorded and not compared."""
    return {"python": platform.python_version(), "machine": platform.machine()}


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers, the same on every device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def claim(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Makes `manifest` that of the folder, unless it has one, which must then be the same.

    Raises:
        ManifestError: the folder's differs, or it holds shards and no manifest.
    """
    if find_manifest(folder) is None:
        _refuse_shards(folder)
        _create(folder / MANIFEST, manifest)
    compare(folder, manifest)


def compare(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Checks that the folder's manifest says the same; where `manifest` has no inputs, of everything else.

    Raises:
        ManifestError: it differs.
    """
    there, here = read_manifest(folder), json.loads(json.dumps(manifest))
    if INPUTS not in here:
        del there[INPUTS]
    differing = list(_differences(there, here))
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
    """Deletes the features in a folder: the manifest last, so that what an interrupted call leaves is known as ours.

    Raises:
        ManifestError: the folder holds shards and no manifest.
        ValueError: the manifest is damaged, or another program's.
    """
    manifest = find_manifest(folder)
    if manifest is None:
        return _refuse_shards(folder)
    read_manifest(folder)
    for path in find_shards(folder):
        path.unlink()
    manifest.unlink()


def write_sections(folder: Path, sections: Sequence[Section]) -> None:
    """Puts other sections into the manifest of a folder: an extraction's own images, and what was added."""
    manifest, path = read_manifest(folder), find_manifest(folder)
    assert path is not None
    first, *added = sections if sections[0].first_shard == 0 else [Section(0, 0), *sections]
    manifest[INPUTS] = {"images": first.images, "sha256": first.sha256}
    manifest["added"] = [asdict(section) for section in added]
    with whole_file(path) as file:
        file.write(_encoded(manifest))


def _refuse_shards(folder: Path) -> None:
    if any(find_shards(folder)):
        raise ManifestError(
            f"{str(folder)!r} holds features without a {MANIFEST}: nobody knows how they were made. Choose another "
            "folder, or delete them."
        )


def _create(path: Path, manifest: Mapping[str, Any]) -> None:
    """Writes the file, unless another process was faster."""
    part = part_of(path)
    try:
        with open(part, "wb") as file:
            file.write(_encoded(manifest))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(part, path)  # fails where there is one, unlike a rename
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _encoded(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, indent=2).encode() + b"\n"


def _differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
    """One sentence for each value that differs, by its dotted name."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in dict.fromkeys([*there, *here]):
            if name or key not in NOT_COMPARED:
                yield from _differences(there.get(key), here.get(key), f"{name}.{key}" if name else key)
    elif there != here:
        yield f"{name} is {_shown(there)} there and {_shown(here)} here"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def architecture(model: Any) -> dict[str, Any]:
    """What the weights do not show."""
    names = ("embed_dim", "n_blocks", "num_heads", "patch_size", "num_register_tokens")
    found = {name: getattr(model, name) for name in names if hasattr(model, name)}
    if model.stride != (model.patch_size, model.patch_size):  # older manifests have none
        found["stride"] = list(model.stride)
    return found


def _engine(engine: Engine) -> dict[str, Any]:
    plan = engine.plan
    calibration = hashlib.sha256(repr(plan.calibration.scales).encode()).hexdigest() if plan.calibration else None
    return {
        "residual": str(plan.residual_dtype).removeprefix("torch."),
        "skip_layers": list(plan.skip_layers),
        "calibration": calibration,
    }
