"""The backbone that a configuration of pretraining asks for."""

from __future__ import annotations

from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.position_embeddings import position_interpolation
from dinov2_fast.pretraining.config import PretrainingConfig


def make_backbone(config: PretrainingConfig) -> DinoVisionTransformer:
    """The backbone of a configuration, with random weights of torch's generator."""
    model = config.model
    offset, antialias = position_interpolation(model.position_interpolation)
    backbone = DinoVisionTransformer(
        img_size=config.crops.global_size,
        patch_size=model.patch_size,
        embed_dim=model.hidden_size,
        depth=model.depth,
        num_heads=model.num_heads,
        mlp_ratio=model.mlp_ratio,
        drop_path_rate=model.drop_path,
        drop_path_uniform=True,
        init_values=model.layer_scale,
        ffn_layer=model.ffn,
        block_chunks=0,
        num_register_tokens=model.num_register_tokens,
        interpolate_offset=offset,
        interpolate_antialias=antialias,
    )
    backbone.set_grad_checkpointing(model.gradient_checkpointing)
    return backbone
