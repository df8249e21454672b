"""Features of other images, made as those of a folder were: by the same model, after the same preprocessing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from dinov2_fast.configs import BACKBONES
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.data.sources import ImageSource
from dinov2_fast.data.workers import decode_all
from dinov2_fast.errors import InvalidValueError
from dinov2_fast.extraction.batches import run_batches
from dinov2_fast.extraction.compute import Outputs
from dinov2_fast.features.manifest import architecture, fingerprint
from dinov2_fast.features.store import Features
from dinov2_fast.inference import Engine
from dinov2_fast.inference.loading import find_device, load_model
from dinov2_fast.inference.optimize import why_slow
from dinov2_fast.weights import WeightsError

BATCH = 32


def extract_as_stored(
    features: Features,
    images: Sequence[ImageSource],
    name: str,
    *,
    model: Any = None,
    weights: str | os.PathLike[str] | None = None,
    device: str | None = None,
) -> tuple[NDArray[np.float32], list[str | None]]:
    """One feature of images, as those of a folder were made.

    Args:
        features: the folder's.
        images: where they are.
        name: of the feature, see :mod:`.outputs`.
        model, weights: for :func:`dinov2_fast.load`, or a model in eval mode; by default what the folder names.
        device: by default a GPU where there is one. The precision is the folder's unless it is slow there.

    Returns:
        The feature (images, …), NaN where there is an error, and for each image None or why it has none.

    Raises:
        WeightsError: the weights cannot be had.
        ValueError: the folder names no model, or the model is not that of the folder.
    """
    manifest = features.manifest
    processor = processor_of(manifest)
    if model is None:
        model, weights = _source(features)
    if not isinstance(model, nn.Module):
        model = _load(features, model, weights, processor, device)
    _check_same(model, features)
    outputs = Outputs(model, processor, [name], "fp32")
    found = np.full((len(images), *outputs.features[0].shape), np.nan, np.float32)
    errors: list[str | None] = []
    decoded = decode_all(images, outputs.decoder, workers=0, max_pixels=manifest["decoder"]["max_pixels"])
    for pending in run_batches(outputs, decoded, range(len(images)), BATCH):
        batch = pending.result()
        for image, values in zip(batch.images, batch.features[name], strict=True):
            if image.error is None:
                found[len(errors)] = values
            errors.append(image.error)
    return found, errors


def processor_of(manifest: Mapping[str, Any]) -> Dinov2ImageProcessor:
    """The preprocessing of a folder's images."""
    known = Dinov2ImageProcessor().settings()
    return Dinov2ImageProcessor(**{name: value for name, value in manifest["processor"].items() if name in known})


def _source(features: Features) -> tuple[str, str | None]:
    """The model that an extraction named, and of the weights beside a name those that are there."""
    about = features.manifest["about"]
    name, weights = about.get("model"), about.get("weights")
    if name is None:
        raise InvalidValueError(
            f"The features in {str(features.folder)!r} do not say which model made them: give the model."
        )
    there = name in BACKBONES and weights and (weights.startswith("random:") or Path(weights).is_file())
    return name, weights if there else None


def _load(features: Features, name: Any, weights: Any, processor: Dinov2ImageProcessor, device: str | None) -> Any:
    """A model that runs as that of the extraction did; an engine in another precision where that one is slow."""
    manifest = features.manifest
    precision, engine = manifest["precision"], manifest["engine"] is not None
    if engine and why_slow(precision, find_device(device)):
        precision = "auto"
    way = {"position_interpolation": manifest["position_interpolation"], "precision": precision, "engine": engine}
    stride = manifest["model"].get("stride")
    try:
        return load_model(name, processor, weights=weights, device=device, stride=stride, **way)
    except WeightsError as error:
        raise WeightsError(
            f"The model {str(name)!r} for the features in {str(features.folder)!r} cannot be had: "
            f"{str(error).rstrip('.')}. Give the model that made them, by the name that it has here."
        ) from None


def _check_same(model: Any, features: Features) -> None:
    """Raises `ValueError` if it is not the model that made the features."""
    manifest, folder = features.manifest, str(features.folder)
    if fingerprint(model._model if isinstance(model, Engine) else model) != manifest["weights"]:
        raise InvalidValueError(
            f"The features in {folder!r} are of {manifest['about'].get('model', 'another model')!r}, and this model "
            "has other weights: features of two models cannot be compared. Give the model that made them."
        )
    if architecture(model) != manifest["model"]:
        raise InvalidValueError(
            f"The features in {folder!r} are of a model with {manifest['model']}, and this one has "
            f"{architecture(model)}: give the model that made them."
        )
    if model.position_interpolation != manifest["position_interpolation"]:
        raise InvalidValueError(
            f"The features in {folder!r} were made with position_interpolation "
            f"{manifest['position_interpolation']!r}, and this model has {model.position_interpolation!r}: set it on "
            "the model."
        )
