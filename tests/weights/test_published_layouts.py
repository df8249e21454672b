"""Keys, shapes and sizes of the eight published models, against the numbers of the reference, transformers and timm."""

from __future__ import annotations

import math

import pytest
import torch

from dinov2_fast import BACKBONES, DinoVisionTransformer, convert_state_dict
from tests.helpers.checkpoints import shapes

# The reference's own counts: keys, bytes in fp32; and transformers' on disk: keys, parameters.
PUBLISHED = {
    "dinov2_vits14": (175, 88_226_304, 223, 22_056_576),
    "dinov2_vitb14": (175, 346_321_920, 223, 86_580_480),
    "dinov2_vitl14": (343, 1_217_474_560, 439, 304_368_640),
    "dinov2_vitg14": (567, 4_545_923_072, 727, 1_136_480_768),
    "dinov2_vits14_reg": (176, 88_232_448, 224, 22_058_112),
    "dinov2_vitb14_reg": (176, 346_334_208, 224, 86_583_552),
    "dinov2_vitl14_reg": (344, 1_217_490_944, 440, 304_372_736),
    "dinov2_vitg14_reg": (568, 4_545_947_648, 728, 1_136_486_912),
}


def published(name: str) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return DinoVisionTransformer(**BACKBONES[name].constructor_arguments()).state_dict()


def size(state_dict: dict[str, torch.Tensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in state_dict.values())


def test_the_table_of_backbones_is_complete() -> None:
    assert set(BACKBONES) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_models_have_the_published_keys_and_sizes(name: str) -> None:
    keys, size_in_bytes, huggingface_keys, parameters = PUBLISHED[name]
    own = published(name)
    assert (len(own), 4 * size(own)) == (keys, size_in_bytes)
    converted = convert_state_dict(own, to="huggingface")
    assert (len(converted), size(converted)) == (huggingface_keys, parameters)
    split = 2 * 40 if "vitg" in name else 0  # SwiGLU is one linear on disk and two in memory
    assert len(convert_state_dict(own, to="huggingface_memory")) == huggingface_keys + split


def test_keys_and_shapes_are_those_of_the_reference() -> None:
    for name, dim, depth, ffn in (
        ("dinov2_vitl14_reg", 1024, 24, {"fc1": (4096, 1024), "fc2": (1024, 4096)}),
        ("dinov2_vitg14_reg", 1536, 40, {"w12": (8192, 1536), "w3": (1536, 4096)}),
    ):
        wanted: dict[str, tuple[int, ...]] = {
            "cls_token": (1, 1, dim),
            "pos_embed": (1, 1370, dim),
            "register_tokens": (1, 4, dim),
            "mask_token": (1, dim),
            "patch_embed.proj.weight": (dim, 3, 14, 14),
            "patch_embed.proj.bias": (dim,),
            "norm.weight": (dim,),
            "norm.bias": (dim,),
        }
        for i in range(depth):
            block = f"blocks.{i}."
            linears = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
            linears |= {f"mlp.{layer}": shape for layer, shape in ffn.items()}
            for layer, shape in linears.items():
                wanted |= {f"{block}{layer}.weight": shape, f"{block}{layer}.bias": shape[:1]}
            for key in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
                wanted[block + key] = (dim,)
        assert shapes(published(name)) == wanted


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_and_shapes_are_those_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    backbone = BACKBONES[name]
    fields = {
        "hidden_size": backbone.embed_dim,
        "num_hidden_layers": backbone.depth,
        "num_attention_heads": backbone.num_heads,
        "use_swiglu_ffn": backbone.ffn_layer == "swiglufused",
        "image_size": 518,
        "patch_size": 14,
    }
    family = "Dinov2WithRegisters" if backbone.num_register_tokens else "Dinov2"
    config = getattr(transformers, f"{family}Config")(**fields)
    with torch.device("meta"):
        theirs = getattr(transformers, f"{family}Model")(config).state_dict()
    layout = "huggingface_memory" if any("q_proj" in key for key in theirs) else "huggingface"
    assert shapes(convert_state_dict(published(name), to=layout)) == shapes(theirs)
    assert shapes(convert_state_dict(theirs, to="facebook")) == shapes(published(name))


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_and_shapes_are_those_of_timm(name: str) -> None:
    timm = pytest.importorskip("timm", reason="compares with timm, which is not installed")
    with torch.device("meta"):
        theirs = timm.create_model(BACKBONES[name].timm_name).state_dict()
    assert shapes(convert_state_dict(published(name), to="timm")) == shapes(theirs)
    assert shapes(convert_state_dict(theirs, to="facebook")) == shapes(published(name))
