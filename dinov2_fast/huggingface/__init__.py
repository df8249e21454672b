"""The interface of transformers: its configurations, models and outputs by its names, without transformers."""

from dinov2_fast.huggingface.classification import (
    Dinov2ForImageClassification,
    Dinov2WithRegistersForImageClassification,
)
from dinov2_fast.huggingface.configuration import Dinov2Config, Dinov2WithRegistersConfig
from dinov2_fast.huggingface.modeling import (
    Dinov2Backbone,
    Dinov2Model,
    Dinov2WithRegistersBackbone,
    Dinov2WithRegistersModel,
)
from dinov2_fast.huggingface.outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput

__all__ = [
    "BackboneOutput",
    "BaseModelOutputWithPooling",
    "Dinov2Backbone",
    "Dinov2Config",
    "Dinov2ForImageClassification",
    "Dinov2Model",
    "Dinov2WithRegistersBackbone",
    "Dinov2WithRegistersConfig",
    "Dinov2WithRegistersForImageClassification",
    "Dinov2WithRegistersModel",
    "ImageClassifierOutput",
]
