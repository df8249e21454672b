"""`export_checkpoint`: the export of a model by its name, with the classifier in its checkpoint, compared on images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dinov2_fast.data.batches import Failures, readable_batches
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.data.sources import require_images
from dinov2_fast.errors import InvalidValueError
from dinov2_fast.export.settings import LOGITS, check_path
from dinov2_fast.export.write import Exported, export
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.weights.architecture import plan_weights, read_tensor
from dinov2_fast.weights.files import open_weights
from dinov2_fast.weights.load import HEADS, load

CHECKED_SIZES = ((224, 224), (154, 280))  # where the size is free


@dataclass(frozen=True)
class CheckpointExport:
    """What `export_checkpoint` wrote.

    Attributes:
        exported: the files, and their differences from the model.
        failures: images that cannot be read and were left out of the check.
        unused_classifier: why a classifier in the checkpoint was left out; None if it was not, or there is none.
    """

    exported: Exported
    failures: Failures
    unused_classifier: str | None


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
) -> CheckpointExport:
    """Loads a model in fp32 and exports it.

    Args:
        model, weights, position_interpolation: see :func:`dinov2_fast.load`.
        outputs: by default the class token and the patches, and the logits if the checkpoint has a classifier.
        images: paths of images to compare file and model on, see :mod:`dinov2_fast.data.sources`; default noise.
        path, format, dtype, opset, batch_size, size, overwrite: see `export`.

    Raises:
        WeightsError: the weights cannot be had.
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
        metadata={
            "model": model,
            "weights": loaded.loaded_from,
            "mean": processor.image_mean,
            "std": processor.image_std,
        },
        overwrite=overwrite,
    )
    return CheckpointExport(exported, failures, unused)


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
