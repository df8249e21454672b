"""`read_architecture`: the sizes of a model, read from its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dinov2_fast import BACKBONES, DinoVisionTransformer, WeightsError, convert_state_dict
from dinov2_fast.weights.architecture import read_architecture
from tests.helpers import golden


@pytest.mark.parametrize("case", golden.cases())
def test_sizes_are_read_from_the_weights(case: str) -> None:
    arguments, weights, _ = golden.load_case(case)
    model = DinoVisionTransformer(**read_architecture(weights))
    assert model.num_heads == arguments["num_heads"]
    assert model.num_register_tokens == arguments["num_register_tokens"]
    assert model.position_interpolation == ("antialias" if "reg4" in case or "chunked" in case else "offset")
    model.load_state_dict(weights)


@pytest.mark.parametrize("name", list(BACKBONES))
def test_sizes_of_the_published_models_are_read_from_their_weights(name: str) -> None:
    wanted = {**BACKBONES[name].constructor_arguments(), "in_chans": 3}
    wanted |= {"qkv_bias": True, "ffn_bias": True, "proj_bias": True}
    with torch.device("meta"):
        weights = DinoVisionTransformer(**BACKBONES[name].constructor_arguments()).state_dict()
    for layout in ("facebook", "huggingface", "huggingface_memory", "timm"):
        assert read_architecture(convert_state_dict(weights, to=layout)) == wanted


@pytest.mark.parametrize(
    "overrides",
    [
        {"in_chans": 4, "patch_size": 7},
        {"qkv_bias": False, "init_values": None},
        {"ffn_bias": False, "proj_bias": False},
        {"ffn_layer": "identity"},
        {"mlp_ratio": 1.37, "embed_dim": 88, "num_heads": 1},  # 120 channels, but 88 * (120 / 88) < 120
        {"mlp_ratio": 2.0, "ffn_layer": "swiglu"},
    ],
    ids=str,
)
def test_sizes_of_unusual_models_are_read_from_their_weights(overrides: dict[str, Any]) -> None:
    arguments, _, _ = golden.load_case("facebook_mlp")
    weights = DinoVisionTransformer(**{**arguments, **overrides}).state_dict()
    model = DinoVisionTransformer(**read_architecture(weights))
    model.load_state_dict(weights)


def test_weights_of_another_model_or_a_bad_config_are_refused(tmp_path: Path) -> None:
    _, weights, _ = golden.load_case("facebook_mlp")
    with pytest.raises(WeightsError, match=r"not the weights of a DINOv2 backbone: cls_token, pos_embed, .* not found"):
        read_architecture({"conv1.weight": torch.ones(1)})
    config = tmp_path / "config.json"
    for content, wrong in (("{", "is not JSON"), ("[1]", "holds a list, not the fields of a configuration")):
        config.write_text(content)
        with pytest.raises(WeightsError, match=rf"config\.json {wrong}"):
            read_architecture(weights, config)
