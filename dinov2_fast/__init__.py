"""DINOv2 as a drop-in for torch.hub, transformers and timm, on kernels written for it.

Importing this package is silent and cheap: the public names below are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# In a checkout the kernels lie beside this folder, in an installed package inside it.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

_PUBLIC = {
    "BACKBONES": "configs",
    "DinoVisionTransformer": "model",
    "Dinov2Backbone": "huggingface",
    "Dinov2Config": "huggingface",
    "Dinov2FastError": "errors",
    "Dinov2ForImageClassification": "huggingface",
    "Dinov2ImageProcessor": "data.image_processor",
    "Dinov2Model": "huggingface",
    "Dinov2WithRegistersBackbone": "huggingface",
    "Dinov2WithRegistersConfig": "huggingface",
    "Dinov2WithRegistersForImageClassification": "huggingface",
    "Dinov2WithRegistersModel": "huggingface",
    "Extractor": "extraction.extractor",
    "TimmVisionTransformer": "timm_adapter",
    "WeightsError": "weights",
    "accelerate": "integrations",
    "acceleration_report": "integrations",
    "convert_state_dict": "weights",
    "create_model": "timm_adapter",
    "load": "weights",
    "load_features": "features.store",
    "optimize_for_inference": "inference",
    "search": "curation.neighbours",
    "set_backend": "ops",
    "unaccelerate": "integrations",
    "use_backend": "ops",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
