"""`Dinov2Model` against transformers' own, live, on the same random weights: outputs, masks, positions, sizes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov2_fast.configs import BACKBONES
from dinov2_fast.huggingface import BaseModelOutputWithPooling
from dinov2_fast.model import DinoVisionTransformer
from tests.helpers.huggingface_peers import (
    FAMILIES,
    KIND_NAMES,
    KINDS,
    SIZES,
    Pair,
    assert_close,
    both,
    images,
    make_pair,
    our_class,
    their_class,
    worst,
)


@pytest.fixture(scope="module", params=KINDS, ids=KIND_NAMES)
def model(request: pytest.FixtureRequest) -> Pair:
    family, swiglu = request.param
    return make_pair(family, swiglu=swiglu)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outputs_equal_those_of_transformers(model: Pair, size: tuple[int, int]) -> None:
    asked = {"output_hidden_states": True, "output_attentions": True}
    ours, theirs = both(model, images(*size, batch=1 if size == (518, 518) else 2), **asked)
    assert isinstance(ours, BaseModelOutputWithPooling)
    assert list(ours) == list(theirs)
    for name in theirs:
        assert_close(ours[name], theirs[name])
    assert len(ours.hidden_states) == 4
    assert len(ours.attentions) == 3


UNUSUAL: list[dict[str, Any]] = [
    {"layer_norm_eps": 0.1},
    {"qkv_bias": False},
    {"hidden_act": "relu", "mlp_ratio": 2},
    {"hidden_act": "gelu_pytorch_tanh"},
    {"hidden_act": "silu", "num_attention_heads": 8},
    {"patch_size": 7, "image_size": 70},
    {"num_channels": 5},
    {"mlp_ratio": 3, "swiglu": True, "num_attention_heads": 1},
]


@pytest.mark.parametrize("fields", UNUSUAL, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_unusual_settings_of_the_config_reach_the_model(family: str, fields: dict[str, Any]) -> None:
    usual = make_pair(family, num_hidden_layers=1).ours
    pair = make_pair(family, **{"num_hidden_layers": 1, **fields})
    x = images(56, channels=fields.get("num_channels", 3))
    ours, theirs = both(pair, x)
    assert_close(ours.to_tuple(), theirs.to_tuple())
    if "num_channels" not in fields:
        assert worst(ours.pooler_output, usual(x).pooler_output) > 1e-4, (
            "the setting has no effect, so the comparison proves nothing"
        )


def test_order_and_norm_of_the_outputs(model: Pair) -> None:
    """Stated without transformers: CLS first, then registers; hidden states end before the norm."""
    x = images(98)
    output = model.ours(x, output_hidden_states=True)
    features = model.ours.forward_features(x)
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])
    assert torch.equal(output.pooler_output, features["x_norm_clstoken"])
    assert torch.equal(output.last_hidden_state[:, 1 + model.registers :], features["x_norm_patchtokens"])
    assert torch.equal(output.hidden_states[-1], features["x_prenorm"])
    assert torch.equal(output.hidden_states[0], model.ours.prepare_tokens_with_masks(x))
    assert torch.equal(model.ours.norm(output.hidden_states[-1]), output.last_hidden_state)


def test_pixels_beyond_the_last_patch_are_ignored(model: Pair) -> None:
    x = images(60, 75)
    assert torch.equal(model.ours(x).last_hidden_state, model.ours(x[:, :, :56, :70]).last_hidden_state)


@pytest.mark.parametrize("size", [(98, 98), (60, 75)], ids=str)
def test_masked_patches_equal_those_of_transformers(model: Pair, size: tuple[int, int]) -> None:
    x = images(*size)
    mask = torch.rand(2, (size[0] // 14) * (size[1] // 14)) < 0.4
    ours, theirs = both(model, x, bool_masked_pos=mask, output_hidden_states=True)
    assert_close(ours.to_tuple(), theirs.to_tuple())
    assert worst(ours.last_hidden_state, model.ours(x).last_hidden_state) > 0.1
    assert torch.equal(model.ours(x, mask.int()).last_hidden_state, ours.last_hidden_state)


def test_a_masked_patch_has_no_influence(model: Pair) -> None:
    x, mask = images(98), torch.zeros(2, 49, dtype=torch.bool)
    mask[:, 0] = True
    with_nan = x.clone()
    with_nan[:, :, :14, :14] = float("nan")
    assert torch.equal(model.ours(with_nan, mask).last_hidden_state, model.ours(x, mask).last_hidden_state)


def test_attentions_are_the_weights_and_can_be_asked_for_by_layer(model: Pair) -> None:
    x = images(98)
    plain, every = model.ours(x), model.ours(x, output_attentions=True).attentions
    tokens = 1 + model.registers + 49
    assert all(a.shape == (2, 2, tokens, tokens) for a in every)
    assert worst(torch.stack(every).sum(-1), torch.ones(3, 2, 2, tokens)) < 1e-5
    some = model.ours(x, output_attentions=[0, -1])
    assert torch.equal(some.last_hidden_state, plain.last_hidden_state)
    assert some.attentions[1] is None
    assert torch.equal(some.attentions[0], every[0])
    assert torch.equal(some.attentions[2], every[2])
    with pytest.raises(ValueError, match=r"blocks \[3\]; the blocks are 0 to 2"):
        model.ours(x, output_attentions=[3])


def test_without_dictionary_the_same_values_as_a_tuple(model: Pair) -> None:
    x, asked = images(98), {"output_hidden_states": True, "output_attentions": True}
    for kwargs in ({}, asked):
        as_tuple = model.ours(x, **kwargs, return_dict=False)
        assert type(as_tuple) is tuple
        assert_close(as_tuple, model.ours(x, **kwargs).to_tuple(), 0.0)
        assert_close(as_tuple, model.theirs(x, **kwargs, return_dict=False))


def test_arguments_of_a_call_override_the_config(model: Pair) -> None:
    config, x = model.ours.config, images(98)
    try:
        config.return_dict, config.output_hidden_states, config.output_attentions = False, True, True
        assert len(model.ours(x)) == 4
        only_tokens = model.ours(x, return_dict=True, output_hidden_states=False, output_attentions=False)
        assert list(only_tokens) == ["last_hidden_state", "pooler_output"]
    finally:
        config.return_dict, config.output_hidden_states, config.output_attentions = True, False, False


# Position embeddings


@pytest.mark.parametrize(
    ("family", "position_interpolation"), [("Dinov2", "size"), ("Dinov2WithRegisters", "antialias")]
)
def test_the_default_position_interpolation_is_that_of_transformers(family: str, position_interpolation: str) -> None:
    config = our_class(family, "Config")(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    assert our_class(family, "Model")(config).position_interpolation == position_interpolation
    assert our_class(family, "Backbone")(config).position_interpolation == position_interpolation


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("position_interpolation", ["offset", "size", "antialias"])
def test_a_chosen_position_interpolation_is_the_references(family: str, position_interpolation: str) -> None:
    config = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 518, "patch_size": 14}
    ours = our_class(family, "Model")(
        our_class(family, "Config")(**config, position_interpolation=position_interpolation)
    ).eval()
    torch.nn.init.normal_(ours.pos_embed)
    registers = getattr(ours.config, "num_register_tokens", 0)
    reference = DinoVisionTransformer(
        518, 14, embed_dim=32, depth=1, num_heads=2, init_values=1.0, block_chunks=0, num_register_tokens=registers
    ).eval()
    reference.load_state_dict(ours.state_dict())
    reference.position_interpolation = position_interpolation
    x = images(98, 140)
    assert torch.equal(ours(x).pooler_output, reference(x))
    others = {"offset", "size", "antialias"} - {position_interpolation}
    for other in others:
        reference.position_interpolation = other
        assert (
            worst(ours(x).last_hidden_state[:, 1 + registers :], reference.forward_features(x)["x_norm_patchtokens"])
            > 0.01
        )


# The eight published sizes

PUBLISHED = {  # parameters without and with registers
    "dinov2_vits14": (22_056_576, 22_058_112),
    "dinov2_vitb14": (86_580_480, 86_583_552),
    "dinov2_vitl14": (304_368_640, 304_372_736),
    "dinov2_vitg14": (1_136_480_768, 1_136_486_912),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_number_of_parameters_is_that_of_transformers(family: str, name: str) -> None:
    sizes = BACKBONES[name].constructor_arguments()
    fields = {
        "hidden_size": sizes["embed_dim"],
        "num_hidden_layers": sizes["depth"],
        "num_attention_heads": sizes["num_heads"],
        "use_swiglu_ffn": name == "dinov2_vitg14",
        "image_size": 518,
        "patch_size": 14,
    }
    with torch.device("meta"):
        ours = our_class(family, "Model")(our_class(family, "Config")(**fields))
        theirs = their_class(family, "Model")(their_class(family, "Config")(**fields))
    assert ours.num_parameters() == theirs.num_parameters() == PUBLISHED[name][FAMILIES.index(family)]
    assert ours.num_parameters(only_trainable=True) == ours.num_parameters()
    ours.requires_grad_(False)
    assert ours.num_parameters(only_trainable=True) == 0


def test_transformers_is_not_needed() -> None:
    program = (
        "import sys; import dinov2_fast.huggingface; "
        "print([name for name in ('transformers', 'timm', 'xformers', 'triton') if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
