"""The interface of timm: `create_model` in place of ``timm.create_model``, without timm."""

from dinov2_fast.timm_adapter.factory import create_model
from dinov2_fast.timm_adapter.features import FeatureGetter, FeatureInfo
from dinov2_fast.timm_adapter.model import TimmVisionTransformer

__all__ = ["FeatureGetter", "FeatureInfo", "TimmVisionTransformer", "create_model"]
