"""DINOv2 as a drop-in for torch.hub, transformers and timm, on kernels written for it.

Importing this package is silent and cheap: a public name is imported when it is first used. Type checkers see the
imports below; at run time `_NAMES` says the same (tests/project/test_public_names.py compares them).
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a checkout the kernels are beside this folder, in an installed package inside it.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

if TYPE_CHECKING:
    from dinov2_fast.configs import BACKBONES as BACKBONES
    from dinov2_fast.curation.neighbours import search as search
    from dinov2_fast.data.image_processor import Dinov2ImageProcessor as Dinov2ImageProcessor
    from dinov2_fast.errors import Dinov2FastError as Dinov2FastError
    from dinov2_fast.errors import WeightsError as WeightsError
    from dinov2_fast.extraction.extract import extract as extract
    from dinov2_fast.extraction.extractor import Extractor as Extractor
    from dinov2_fast.features.store import load_features as load_features
    from dinov2_fast.huggingface import Dinov2Backbone as Dinov2Backbone
    from dinov2_fast.huggingface import Dinov2Config as Dinov2Config
    from dinov2_fast.huggingface import Dinov2ForImageClassification as Dinov2ForImageClassification
    from dinov2_fast.huggingface import Dinov2Model as Dinov2Model
    from dinov2_fast.huggingface import Dinov2WithRegistersBackbone as Dinov2WithRegistersBackbone
    from dinov2_fast.huggingface import Dinov2WithRegistersConfig as Dinov2WithRegistersConfig
    from dinov2_fast.huggingface import (
        Dinov2WithRegistersForImageClassification as Dinov2WithRegistersForImageClassification,
    )
    from dinov2_fast.huggingface import Dinov2WithRegistersModel as Dinov2WithRegistersModel
    from dinov2_fast.inference import optimize_for_inference as optimize_for_inference
    from dinov2_fast.integrations.accelerate import accelerate as accelerate
    from dinov2_fast.integrations.accelerate import acceleration_report as acceleration_report
    from dinov2_fast.integrations.accelerate import unaccelerate as unaccelerate
    from dinov2_fast.model import DinoVisionTransformer as DinoVisionTransformer
    from dinov2_fast.ops import set_backend as set_backend
    from dinov2_fast.ops import use_backend as use_backend
    from dinov2_fast.pretraining.run import pretrain as pretrain
    from dinov2_fast.timm_adapter import TimmVisionTransformer as TimmVisionTransformer
    from dinov2_fast.timm_adapter import create_model as create_model
    from dinov2_fast.weights.convert import convert_state_dict as convert_state_dict
    from dinov2_fast.weights.load import load as load

_NAMES = {
    "configs": "BACKBONES",
    "curation.neighbours": "search",
    "data.image_processor": "Dinov2ImageProcessor",
    "errors": "Dinov2FastError WeightsError",
    "extraction.extract": "extract",
    "extraction.extractor": "Extractor",
    "features.store": "load_features",
    "huggingface": (
        "Dinov2Backbone Dinov2Config Dinov2ForImageClassification Dinov2Model Dinov2WithRegistersBackbone "
        "Dinov2WithRegistersConfig Dinov2WithRegistersForImageClassification Dinov2WithRegistersModel"
    ),
    "inference": "optimize_for_inference",
    "integrations.accelerate": "accelerate acceleration_report unaccelerate",
    "model": "DinoVisionTransformer",
    "ops": "set_backend use_backend",
    "pretraining.run": "pretrain",
    "timm_adapter": "TimmVisionTransformer create_model",
    "weights.convert": "convert_state_dict",
    "weights.load": "load",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = ["__version__", *sorted(_MODULES)]


if not TYPE_CHECKING:  # a type checker that sees `__getattr__` accepts every misspelt name

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
