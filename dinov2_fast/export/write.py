"""Backbones as ONNX or torch.export files, which are compared with the model before they take their place.

The graph takes `pixel_values` (batch, 3, height, width), scaled and normalised as the image processor does, and gives
the outputs asked for, in its own dtype:

==========  =======================  ==================================================
cls         (batch, dim)             class token after the final norm
patch_mean  (batch, dim)             mean of the patch tokens after the final norm
patches     (batch, patches, dim)    patch tokens after the final norm
registers   (batch, registers, dim)  register tokens after the final norm
logits      (batch, classes)         the outputs of a classifier, where one is given
==========  =======================  ==================================================
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_fast import __version__
from dinov2_fast.data.batches import Failures, readable_batches
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.data.sources import require_images
from dinov2_fast.errors import InvalidValueError
from dinov2_fast.export.check import Difference, compare, file_runner, noise
from dinov2_fast.export.graph import GraphModule, copy_for_export, trace, write_onnx
from dinov2_fast.export.settings import (
    DTYPES,
    LOGITS,
    METADATA,
    OPSET,
    check_images,
    check_packages,
    check_path,
    check_settings,
)
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.weights.architecture import plan_weights, read_tensor
from dinov2_fast.weights.files import open_weights
from dinov2_fast.weights.load import HEADS, load

CHECKED_SIZES = ((224, 224), (154, 280))  # of the images to compare on, where the size is free


@dataclass(frozen=True)
class Exported:
    """What was written, and how it was checked."""

    files: tuple[Path, ...]  # the graph's comes first
    differences: tuple[Difference, ...]  # from the model; empty where onnxruntime is missing
    failures: Failures = field(default_factory=Failures)  # images that cannot be read, left out of the check
    unused_classifier: str | None = None  # why a classifier in the checkpoint was left out


def export(
    model: DinoVisionTransformer,
    path: str | os.PathLike[str],
    *,
    classifier: nn.Linear | None = None,
    format: str = "onnx",
    outputs: Sequence[str] = ("cls", "patches"),
    dtype: str = "fp32",
    opset: int | None = None,
    batch_size: int | None = None,
    size: tuple[int, int] | None = None,
    images: Sequence[Tensor] | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Writes the model to `path` and compares the file with it. A file that computes something else is not kept.

    An ONNX file is compared in onnxruntime. Without that package it is kept unchecked, and `images` are an error.

    The graph takes any batch size and any height and width of two patches or more, unless they are fixed. With a fixed
    size the positions are resampled beforehand, and the graph contains no float64, which some runtimes lack.

    Args:
        model: in eval mode; it is not changed.
        path: ends in ``.onnx`` or ``.pt2``. ONNX weights above 1.9 GB go into a second file, ``PATH.data``.
        classifier: for the output "logits": a linear layer on the CLS token, or on it and the mean of the patch tokens,
            as :class:`dinov2_fast.Dinov2ForImageClassification` has it.
        format: "onnx" (operators of the standard only, domain "") or "torch-export" (aten operators only).
        outputs: names in the order of the outputs; see the module's description.
        dtype: of weights, input and outputs, "fp32", "fp16" or, for "torch-export", "bf16".
        opset: the version of ONNX's operators, 18 or newer; default 20.
        batch_size: fixes the number of images.
        size: fixes (height, width) in pixels.
        images: batches (images, 3, height, width) in fp32 to compare file and model on; default noise of two sizes.
            With a fixed batch size they run in batches of that size, the last one filled up. For ONNX this needs
            onnxruntime.
        metadata: stored as JSON in the file, with outputs, dtype, position interpolation and version.
        overwrite: replace a file that exists.

    Raises:
        TypeError: not a `DinoVisionTransformer`.
        ValueError: a setting that does not exist, or does not go with the model or with another setting.
        FileExistsError: `path` exists and `overwrite` is not set.
        ExportError: torch cannot export the model, a package is missing, `path` cannot be written, or the file computes
            something else.
    """
    check_settings(model, classifier, format, outputs, dtype, opset, batch_size, size)
    path = Path(path)
    check_path(path, format, overwrite)
    check_packages(format, images)
    batches = noise(model, size) if images is None else images
    check_images(model, batches, size)
    about = {"outputs": list(outputs), "dtype": dtype, "position_interpolation": model.position_interpolation}
    text = json.dumps({**(metadata or {}), **about, "version": __version__})
    program = trace(GraphModule(copy_for_export(model, DTYPES[dtype], size), outputs, classifier), batch_size, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        written = Path(folder) / path.name
        if format == "onnx":
            write_onnx(program, written, outputs, opset or OPSET, text)
        else:
            torch.export.save(program, written, extra_files={METADATA: text})
        del program
        run = file_runner(written, format)
        exact = copy.deepcopy(model).float() if model.pos_embed.dtype.itemsize < 4 else model
        differences = compare(run, GraphModule(exact, outputs, classifier), batches, dtype, batch_size) if run else ()
        return Exported(_move(written, path), differences)


def _move(written: Path, path: Path) -> tuple[Path, ...]:
    """Moves the files into place, the graph's last, since readers look for that one."""
    names = sorted((file.name for file in written.parent.iterdir()), reverse=True)  # PATH.data, PATH
    for name in names:
        os.replace(written.with_name(name), path.with_name(name))
    return tuple(path.with_name(name) for name in reversed(names))


def export_checkpoint(
    model: str,
    path: str | os.PathLike[str],
    *,
    weights: str | None = None,
    position_interpolation: str | None = None,
    format: str = "onnx",
    outputs: Sequence[str] | None = None,
    dtype: str = "fp32",
    opset: int | None = None,
    batch_size: int | None = None,
    size: tuple[int, int] | None = None,
    images: Iterable[str | os.PathLike[str]] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Loads a model in fp32 and exports it.

    Args:
        model, weights, position_interpolation: see :func:`dinov2_fast.load`.
        outputs: by default the class token and the patches, and the logits if the checkpoint has a classifier.
        images: paths of images to compare file and model on, see :mod:`dinov2_fast.data.sources`; default noise.
        path, format, dtype, opset, batch_size, size, overwrite: see `export`.

    Raises:
        WeightsError: the weights cannot be found or read.
        ValueError: no image can be read, or as `export`.
        FileExistsError, ExportError: as `export`.
    """
    check_path(Path(path), format, overwrite)
    failures = Failures()
    batches = None if images is None else _read(images, size, failures)
    loaded = load(model, weights=weights, dtype="float32", position_interpolation=position_interpolation)
    classifier, unused = _classifier_beside(loaded)
    if outputs is None:
        outputs = ("cls", "patches", *[LOGITS] * (classifier is not None))
    elif unused is not None and LOGITS in outputs:
        raise InvalidValueError(unused)
    processor = Dinov2ImageProcessor()
    about: dict[str, Any] = {"model": model, "weights": loaded.loaded_from}
    about |= {"mean": processor.image_mean, "std": processor.image_std}
    exported = export(
        loaded,
        path,
        classifier=classifier,
        format=format,
        outputs=outputs,
        dtype=dtype,
        opset=opset,
        batch_size=batch_size,
        size=size,
        images=batches,
        metadata=about,
        overwrite=overwrite,
    )
    return replace(exported, failures=failures, unused_classifier=unused)


def _read(paths: Iterable[str | os.PathLike[str]], size: tuple[int, int] | None, failures: Failures) -> list[Tensor]:
    """All images in one batch, of the fixed size or of 224 x 224; where the size is free, the first in another too."""
    sources = list(require_images(paths))
    sizes = (size,) if size else CHECKED_SIZES
    batches = []
    for sides in sizes:
        read = list(readable_batches(sources, Dinov2ImageProcessor.for_size(sides), failures))
        batches.append(torch.cat([pixels for _, pixels in read]))
        sources, failures = read[0][0][:1], Failures()
    return batches


def _classifier_beside(model: DinoVisionTransformer) -> tuple[nn.Linear | None, str | None]:
    """The classifier in the model's checkpoint; or None, and why one that is there cannot be exported."""
    source = str(model.loaded_from)
    if source.startswith("random:"):
        return None, None
    plan = plan_weights(open_weights(Path(source)))
    prefix = next((prefix for prefix in HEADS if f"{prefix}weight" in plan.recipes), None)
    if prefix is None:
        return None, None
    parameters = {name: read_tensor(plan, key) for name in ("weight", "bias") if (key := prefix + name) in plan.recipes}
    classes, inputs = parameters["weight"].shape
    if inputs not in (model.embed_dim, 2 * model.embed_dim):
        return None, (
            f"The classifier in {source} is left out: it takes {inputs} features. It can be exported if it takes "
            f"{model.embed_dim}, of the CLS token, or {2 * model.embed_dim}, with the mean of the patches."
        )
    classifier = nn.Linear(inputs, classes, bias="bias" in parameters)
    classifier.load_state_dict(parameters)
    return classifier, None
