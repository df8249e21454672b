"""Small models of this package whose weights make every part of the model matter."""

from __future__ import annotations

import zlib
from typing import Any

import torch

from dinov2_fast.model import DinoVisionTransformer

SIZES = {"img_size": 70, "patch_size": 14, "embed_dim": 32, "depth": 3, "num_heads": 2, "block_chunks": 0}
KINDS_OF_MODEL = {
    "mlp": {},
    "swiglu": {"ffn_layer": "swiglufused"},
    "registers": {"num_register_tokens": 4},
    "swiglu, registers": {"ffn_layer": "swiglu", "num_register_tokens": 2},
    "chunked, no LayerScale, no biases": {
        "block_chunks": 2,
        "init_values": None,
        "qkv_bias": False,
        "proj_bias": False,
        "ffn_bias": False,
    },
}
KINDS_TO_COMPILE = {
    "mlp": {},
    "size": {"interpolate_offset": 0.0},
    "registers": {"num_register_tokens": 4, "interpolate_antialias": True, "interpolate_offset": 0.0},
    "swiglu": {"ffn_layer": "swiglufused"},
}


def small(**kwargs) -> DinoVisionTransformer:
    """A small model whose LayerScale, norms and biases are not at their initial values."""
    model = DinoVisionTransformer(**{**SIZES, "init_values": 1.0, **kwargs})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def wild(kind: dict[str, Any], **kwargs: Any) -> DinoVisionTransformer:
    """A model with LayerScale and norms far from their initial values, and outliers in some channels."""
    model = small(**{"embed_dim": 128, "depth": 4, **kind, **kwargs})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.copy_(10 ** torch.empty_like(parameter).uniform_(-2, 0.5))
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(torch.empty_like(parameter).uniform_(0.2, 3))
            elif parameter.ndim > 1 and "blocks" in name:
                # With larger scores the softmax would be nearly one-hot, and any error would change its maximum.
                spread = 0.3 if name.endswith("qkv.weight") else 1
                parameter.copy_(spread * torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
        for block in (module for module in model.modules() if hasattr(module, "norm1")):
            block.norm2.weight[5] = 20
            block.attn.proj.weight[[3, 70]] *= 30
    return model.eval()


def with_biases(model: DinoVisionTransformer) -> DinoVisionTransformer:
    """Fills the biases of the model, where it has any, with random numbers."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    return model


def filled(model: Any) -> Any:
    """Random weights by name; LayerScale, norms and biases are not at their initial values of 1, 1 and 0."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if "lambda1" in name or "gamma" in name:
            noise = 0.1 + 0.3 * noise.abs()
        elif "norm" in name:
            noise = 0.1 * noise + name.endswith("weight")
        elif parameter.ndim > 1 and name.endswith("weight"):
            noise = noise / parameter[0].numel() ** 0.5
        elif name.endswith("bias"):
            noise = 0.1 * noise
        parameter.data.copy_(noise)
    return model
