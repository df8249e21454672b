"""How features were made: the model, the preprocessing and the machine, as the manifest records them."""

from __future__ import annotations

import hashlib
import platform
from typing import Any

import numpy as np
import PIL
import torch
from torch import nn

from dinov2_fast import __version__
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.data.images import FORMATS
from dinov2_fast.extraction.compute import Outputs, tensor_of
from dinov2_fast.inference import Engine

PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def provenance(outputs: Outputs, processor: Dinov2ImageProcessor, max_pixels: int) -> dict[str, Any]:
    """The entries of a manifest that the bits of the features depend on."""
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
        "precision": model.precision if engine else PRECISIONS.get(tensor.dtype, str(tensor.dtype)),
        "engine": _engine_settings(model) if engine else None,
        "device": tensor.device.type,
        "backends": {row.label: row.backend for row in getattr(model, "backends", list)()},
        "versions": {"dinov2_fast": __version__, "torch": torch.__version__, "numpy": np.__version__},
    }


def machine() -> dict[str, Any]:
    """What is recorded about the machine, and not compared."""
    return {"python": platform.python_version(), "machine": platform.machine()}


def architecture(model: Any) -> dict[str, Any]:
    """The sizes of a model that its weights do not show."""
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
