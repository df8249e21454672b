"""The entry points of ``torch.hub``: the reference's names, signatures and behaviour."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hubconf
from dinov2_fast import BACKBONES, DinoVisionTransformer, WeightsError, hub
from tests.helpers.checkpoints import assert_same
from tests.helpers.weight_folders import (
    TINY,
    WeightFolders,
    isolate,
    refuse_network,
    tiny_backbone,
    tiny_weights,
    write,
)

ROOT = Path(hubconf.__file__).parent
NAMES = [f"dinov2_vit{size}14{registers}" for registers in ("", "_reg") for size in "sblg"]
WITH_HEADS = [
    *(f"{name}_lc" for name in NAMES),
    *(f"dinov2_vit{size}14_{head}" for head in ("ld", "dd", "ls") for size in "sblg"),
]


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    attempts = refuse_network(monkeypatch)
    yield isolate(monkeypatch, tmp_path)
    assert attempts == []


def test_hubconf_offers_the_references_models() -> None:
    assert sorted(NAMES) == sorted(BACKBONES)
    offered = {name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")}
    assert offered == {*NAMES, *WITH_HEADS}
    assert all(getattr(hubconf, name).__name__ == name for name in offered)


@pytest.mark.parametrize("name", NAMES)
def test_a_signature_is_that_of_the_reference(name: str) -> None:
    entry_point = getattr(hubconf, name)
    assert entry_point is getattr(hub, name)
    assert entry_point.__name__ == name
    parameters = inspect.signature(entry_point).parameters
    assert [(p.name, p.kind, p.default) for p in parameters.values()] == [
        ("pretrained", inspect.Parameter.KEYWORD_ONLY, True),
        ("weights", inspect.Parameter.KEYWORD_ONLY, hub.BackboneWeights.LVD142M),
        ("kwargs", inspect.Parameter.VAR_KEYWORD, inspect.Parameter.empty),
    ]
    with pytest.raises(TypeError):
        entry_point(True)


@pytest.mark.parametrize("name", NAMES)
def test_models_without_weights_are_the_references(name: str, folders: WeightFolders) -> None:
    with torch.device("meta"):
        model = getattr(hubconf, name)(pretrained=False)
    assert isinstance(model, DinoVisionTransformer)
    assert model.training
    sizes = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "g": (1536, 40, 24)}[name[10]]
    assert (model.embed_dim, model.n_blocks, model.num_heads) == sizes
    assert model.patch_size == 14
    assert model.pos_embed.shape == (1, 1 + 37 * 37, model.embed_dim)
    assert model.num_register_tokens == (4 if name.endswith("_reg") else 0)
    assert (model.interpolate_antialias, model.interpolate_offset) == ((True, 0.0) if "_reg" in name else (False, 0.1))
    assert hasattr(model.blocks[0].mlp, "w12") == ("vitg" in name)
    assert not model.chunked_blocks
    assert "blocks.0.ls1.gamma" in model.state_dict()


def test_arguments_go_to_the_model(folders: WeightFolders) -> None:
    model = hub.dinov2_vits14(pretrained=False, img_size=28, drop_path_rate=0.2, block_chunks=4)
    assert model.pos_embed.shape == (1, 5, 384)
    assert model.chunked_blocks
    with pytest.raises(TypeError, match="nonsense"):
        hub.dinov2_vits14(pretrained=False, nonsense=1)


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("weights", ["nope", "lvd142m", ""])
def test_unknown_weights_are_an_assertion_error(weights: str, pretrained: bool, folders: WeightFolders) -> None:
    with pytest.raises(AssertionError, match=f"Unsupported weights: {weights}; the published ones are LVD142M"):
        hub.dinov2_vits14(weights=weights, pretrained=pretrained)


def test_the_error_for_a_file_as_weights_names_load() -> None:
    with pytest.raises(
        AssertionError, match=r"weights: /file\.pth; .* dinov2_fast\.load\('dinov2_vits14', weights=file\)"
    ):
        hub.dinov2_vits14(weights="/file.pth")


@pytest.mark.parametrize("weights", ["LVD142M", hub.BackboneWeights.LVD142M])
def test_published_weights_are_loaded(weights: Any, folders: WeightFolders, monkeypatch: pytest.MonkeyPatch) -> None:
    entry_point = hub.backbone_entry_point(tiny_backbone(monkeypatch))
    assert entry_point.__name__ == TINY
    own = tiny_weights(1)
    write(own, folders.torch_hub / "dinov2_vitt14_pretrain.pth")
    model = entry_point(weights=weights, drop_path_rate=0.5)
    assert_same(model.state_dict(), own)
    assert model.training
    assert model.blocks[1].drop_path1.drop_prob == 0.5


def test_offline_without_a_file_the_error_says_where_to_put_it(
    folders: WeightFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinov2_fast.weights.sources._hub_answers", lambda: False)
    monkeypatch.setattr("dinov2_fast.weights.sources.download", _nobody)
    with pytest.raises(WeightsError, match=r"dinov2_vits14_pretrain\.pth on a machine with a network and put it at"):
        hub.dinov2_vits14()


def _nobody(*args: Any) -> Any:
    raise WeightsError("nobody answers")


def test_torch_hub_loads_from_a_checkout(tmp_path: Path) -> None:
    script = f"""
import torch
model = torch.hub.load({str(ROOT)!r}, "dinov2_vits14_reg", source="local", pretrained=False)
print(type(model).__module__, tuple(model.eval()(torch.zeros(1, 3, 28, 42)).shape))
"""
    # From another folder and without the checkout on the path, as a user of torch.hub runs it.
    result = subprocess.run(
        [sys.executable, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (result.stdout, result.returncode) == ("dinov2_fast.model (1, 384)\n", 0), result.stderr
