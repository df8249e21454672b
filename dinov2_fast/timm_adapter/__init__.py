"""timm's face of the model: `create_model` in place of ``timm.create_model``, without timm."""

from dinov2_fast.timm_adapter.model import FeatureGetter, FeatureInfo, TimmVisionTransformer, create_model

__all__ = ["FeatureGetter", "FeatureInfo", "TimmVisionTransformer", "create_model"]
