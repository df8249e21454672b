"""How features were made, as the manifest records it, and features of new images made in the same way."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from torch import nn

from dinov2_fast import __version__
from dinov2_fast.configs import BACKBONES
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.data.images import FORMATS
from dinov2_fast.data.sources import ImageSource
from dinov2_fast.errors import InvalidValueError, WeightsError
from dinov2_fast.extraction.compute import Outputs, tensor_of
from dinov2_fast.features.store import Features
from dinov2_fast.inference import Engine
from dinov2_fast.inference.loading import find_device, load_model
from dinov2_fast.inference.optimize import why_slow
from dinov2_fast.inference.plan import precision_name


def provenance(outputs: Outputs, processor: Dinov2ImageProcessor, max_pixels: int) -> dict[str, Any]:
    """The entries of a manifest that name the model, the preprocessing and the versions that determine the features."""
    model, tensor = outputs.model, tensor_of(outputs.model)
    engine = isinstance(model, Engine)
    return {
        "model": architecture(model),
        "weights": fingerprint(model),
        "position_interpolation": model.position_interpolation,
        "processor": processor.to_dict(),
        "decoder": {"pillow": PIL.__version__, "formats": list(FORMATS), "max_pixels": max_pixels},
        "features": {f.name: {"shape": list(f.shape), "dtype": f.dtype} for f in outputs.features},
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "precision": model.precision if engine else precision_name(tensor.dtype),
        "engine": _engine_settings(model) if engine else None,
        "device": tensor.device.type,
        "backends": {row.label: row.backend for row in getattr(model, "backends", list)()},
        "versions": {"dinov2_fast": __version__, "torch": torch.__version__, "numpy": np.__version__},
    }


def architecture(model: Any) -> dict[str, Any]:
    """The sizes of a model; its weights do not show all of them, such as the number of heads and the stride."""
    names = ("embed_dim", "n_blocks", "num_heads", "patch_size", "num_register_tokens")
    found = {name: getattr(model, name) for name in names if hasattr(model, name)}
    return {**found, "stride": list(model.stride)}


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of all parameters and buffers; the same on every device.

    For an engine, those of its model.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted((model.model if isinstance(model, Engine) else model).state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def _engine_settings(engine: Engine) -> dict[str, Any]:
    plan = engine.plan
    calibration = hashlib.sha256(repr(plan.calibration.scales).encode()).hexdigest() if plan.calibration else None
    return {
        "residual_dtype": str(plan.residual_dtype).removeprefix("torch."),
        "skip_layers": list(plan.skip_layers),
        "calibration": calibration,
    }


def extract_as_stored(
    features: Features,
    images: Sequence[ImageSource],
    name: str,
    *,
    model: Any = None,
    weights: str | os.PathLike[str] | None = None,
    device: str | None = None,
) -> tuple[NDArray[np.float32], list[str | None]]:
    """One feature of images, by the model and the preprocessing that made the features of a folder.

    The precision is that of the folder, unless it is slow on the device. The options and the errors of the model are
    those of :func:`dinov2_fast.curation.neighbours.search`.

    Returns:
        The feature (images, …) in fp32, NaN for an image with an error; and the error or None for each image.
    """
    manifest = features.manifest
    processor = processor_of(manifest)
    if model is None:
        model, weights = _recorded_model(features)
    if not isinstance(model, nn.Module):
        model = _load(features, model, weights, processor, device)
    _check_same(model, features)
    outputs = Outputs(model, processor, [name], "fp32")
    found = np.full((len(images), *outputs.features[0].shape), np.nan, np.float32)
    errors: list[str | None] = []
    for decoded, values in outputs.run(images, max_pixels=manifest["decoder"]["max_pixels"]):
        for image, value in zip(decoded, values[name], strict=True):
            if image.error is None:
                found[len(errors)] = value
            errors.append(image.error)
    return found, errors


def processor_of(manifest: Mapping[str, Any]) -> Dinov2ImageProcessor:
    """The preprocessing that a manifest records."""
    known = Dinov2ImageProcessor().settings()
    return Dinov2ImageProcessor(**{name: value for name, value in manifest["processor"].items() if name in known})


def _recorded_model(features: Features) -> tuple[str, str | None]:
    """The model that the manifest names, and its weights if they can be found and the name is that of a backbone."""
    about = features.manifest["about"]
    name, weights = about.get("model"), about.get("weights")
    if name is None:
        raise InvalidValueError(
            f"The features in {str(features.folder)!r} do not say which model made them: give the model."
        )
    can_be_found = name in BACKBONES and weights and (weights.startswith("random:") or Path(weights).is_file())
    return name, weights if can_be_found else None


def _load(features: Features, name: Any, weights: Any, processor: Dinov2ImageProcessor, device: str | None) -> Any:
    """A model with the settings of the extraction; an engine gets another precision if that one is slow here."""
    manifest = features.manifest
    precision, engine = manifest["precision"], manifest["engine"] is not None
    if engine and why_slow(precision, find_device(device)):
        precision = "auto"
    try:
        return load_model(
            name,
            processor,
            weights=weights,
            position_interpolation=manifest["position_interpolation"],
            device=device,
            precision=precision,
            engine=engine,
            stride=manifest["model"]["stride"],
        )
    except WeightsError as error:
        raise WeightsError(
            f"The model {str(name)!r} for the features in {str(features.folder)!r} cannot be had: "
            f"{str(error).rstrip('.')}. Give the model that made them, by the name that it has here."
        ) from None


def _check_same(model: Any, features: Features) -> None:
    manifest, folder = features.manifest, str(features.folder)
    if fingerprint(model) != manifest["weights"]:
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
