"""`export`: a backbone as an ONNX or torch.export file, compared with the model before it takes its place.

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

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_fast import __version__
from dinov2_fast.export.check import Difference, compare, file_runner, full_precision, noise
from dinov2_fast.export.graph import GraphModule, copy_for_export, trace, write_onnx
from dinov2_fast.export.settings import (
    DTYPES,
    METADATA,
    OPSET,
    check_classifier,
    check_images,
    check_model,
    check_packages,
    check_path,
    check_settings,
)
from dinov2_fast.model import DinoVisionTransformer


@dataclass(frozen=True)
class Exported:
    """The files written, the graph's first, and their differences from the model (empty: onnxruntime is missing)."""

    files: tuple[Path, ...]
    differences: tuple[Difference, ...]


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
    """Writes the model to `path`. The file is kept only if it computes what the model does.

    The graph takes any batch size and any height and width of two patches or more, unless they are fixed. With a fixed
    size the positions are resampled beforehand, and the graph contains no float64, which some runtimes lack.

    Args:
        model: in eval mode; it is not changed.
        path: ends in ``.onnx`` or ``.pt2``. Weights above 1.9 GB go into a second file, ``PATH.data``.
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
    check_model(model)
    check_settings(model, format, outputs, dtype, opset, batch_size, size)
    check_classifier(model, classifier, outputs)
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
        exact = GraphModule(full_precision(model), outputs, classifier)
        differences = compare(run, exact, batches, dtype, batch_size) if run else ()
        return Exported(_move(written, path), differences)


def _move(written: Path, path: Path) -> tuple[Path, ...]:
    """Moves the files into place, the graph's last, since readers look for that one."""
    names = sorted((file.name for file in written.parent.iterdir()), reverse=True)  # PATH.data, PATH
    for name in names:
        os.replace(written.with_name(name), path.with_name(name))
    return tuple(path.with_name(name) for name in reversed(names))
