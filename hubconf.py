"""Entry points of ``torch.hub.load``, with the reference's names."""

from dinov2_fast.hub import (  # noqa: F401
    dinov2_vitb14,
    dinov2_vitb14_reg,
    dinov2_vitg14,
    dinov2_vitg14_reg,
    dinov2_vitl14,
    dinov2_vitl14_reg,
    dinov2_vits14,
    dinov2_vits14_reg,
)

dependencies = ["torch", "numpy", "safetensors", "huggingface_hub"]
