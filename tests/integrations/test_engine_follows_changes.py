"""The engine in a model of another library follows what a user changes: weights, settings, methods."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov2_fast import accelerate, acceleration_report
from dinov2_fast.inference import Engine, weight_watch
from dinov2_fast.inference.weight_watch import WeightWatch
from tests.helpers.library_models import (
    LibraryModel,
    accelerated_pair,
    assert_same,
    filled,
    hub_model,
    images,
    loss_of,
    tensors,
    timm_model,
)
from tests.helpers.library_models import transformers_model as hf


def test_the_engine_follows_the_weights(some: LibraryModel, answered: list[str]) -> None:
    model, untouched = accelerated_pair(some.build(), inference=True)
    for each in (model, untouched):
        each.train()
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(each.parameters(), lr=0.05)
        loss_of(some.calls[0](each, images())).backward()
        optimizer.step()
        each.eval()
    assert not answered
    with torch.no_grad():
        assert_same(model(images()), untouched(images()), 1e-4)
    fresh = some.build()
    model.load_state_dict(fresh.state_dict())
    with torch.no_grad():
        assert_same(model(images()), fresh(images()))
        model.double()
        assert tensors(model(images().double()))[0].dtype == torch.float64
    assert len(answered) == 3


def test_the_engine_follows_the_settings(answered: list[str]) -> None:
    pytest.importorskip("transformers")
    model, untouched = accelerated_pair(filled(hf("Dinov2", "Backbone")).eval(), inference=True)
    for each in (model, untouched):
        each.out_features = ["stage1", "stage2"]
        each.config.apply_layernorm = False
    with torch.no_grad():
        assert_same(model(images()), untouched(images()))
    hub, untouched = accelerated_pair(filled(hub_model()).eval(), inference=True)
    for each in (hub, untouched):
        each.interpolate_offset = 0.0
    with torch.no_grad():
        assert_same(hub(images(1, 98, 98)), untouched(images(1, 98, 98)))
    assert len(answered) == 2


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs of engines and checks for changes, in the order in which they happen on a GPU."""
    monkeypatch.setattr(weight_watch, "is_asynchronous", lambda device: True)
    happened: list[str] = []
    call, changed = Engine._call, WeightWatch.changed
    monkeypatch.setattr(Engine, "_call", lambda *given: happened.append("run") or call(*given))
    monkeypatch.setattr(WeightWatch, "changed", lambda self: happened.append("check") or changed(self))
    return happened


@torch.no_grad()
def test_on_a_gpu_the_engine_answers_before_it_looks_for_changes(some: LibraryModel, checks: list[str]) -> None:
    model, untouched = accelerated_pair(some.build(), inference=True)
    checks.clear()
    assert_same(model(images()), untouched(images()))
    assert checks == ["run", "check"]
    for each in (model, untouched):
        for parameter in each.parameters():
            parameter.mul_(1.1)
    checks.clear()
    assert_same(model(images()), untouched(images()))
    assert checks == ["run", "check", "run"]
    checks.clear()
    model(images())
    assert checks == ["run", "check"]


@torch.no_grad()
def test_without_follow_weights_the_engine_follows_nothing(some: LibraryModel, checks: list[str]) -> None:
    model, _ = accelerated_pair(some.build(), follow_weights=False, inference=True)
    copied = copy.deepcopy(model)
    for made in (model, copied):
        before = tensors(made(images()))[0]
        for parameter in made.parameters():
            parameter.mul_(1.1)
        assert torch.equal(tensors(made(images()))[0], before)
        accelerate(made, inference=True, follow_weights=False)
        assert not torch.equal(tensors(made(images()))[0], before)
    assert checks == ["run"] * 6


@torch.no_grad()
def test_accelerating_again_sees_changes_that_were_not_noticed(some: LibraryModel, answered: list[str]) -> None:
    model, untouched = accelerated_pair(some.build(), inference=True)
    for each in (model, untouched):
        for parameter in each.parameters():
            parameter.data.mul_(1.1)
    accelerate(model, inference=True)
    assert_same(model(images()), untouched(images()))
    assert len(answered) == 1


class Doubled(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _set(path: str, value: Any) -> Callable[[Any], None]:
    owner, _, name = path.rpartition(".")
    return lambda model: setattr(model.get_submodule(owner), name, value)


def _method(path: str, change: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Sets a method on an instance, at `path`, that changes the result of the class's method."""
    owner, _, name = path.rpartition(".")

    def edit(model: Any) -> None:
        module = model.get_submodule(owner)
        own = getattr(type(module), name)
        setattr(module, name, MethodType(lambda self, *args, **kwargs: change(own(self, *args, **kwargs)), module))

    return edit


def _overlapping(model: Any) -> None:
    """Twice as many patches in each direction, without positions: a common trick for dense features."""
    model.patch_embed.proj.stride = (7, 7)
    _method("interpolate_pos_encoding", lambda positions: 0 * positions[:, :1])(model)


def _scaled(model: Any) -> None:
    attention = model.blocks[1].attn
    attention.scale, attention.fused_attn = 0.126, False  # the fused attention does not read `scale`


def _hub(**arguments: Any) -> Any:
    return filled(hub_model(**arguments)).eval()


def _timm() -> Any:
    return filled(timm_model("vit_small_patch14_dinov2", dynamic_img_size=True)).eval()


def _hf(task: str = "Model") -> Any:
    return filled(hf("Dinov2", task)).eval()


def _attention_of(layer: Any) -> Any:
    """The module that computes the scores; in transformers 4 it is inside another one."""
    return getattr(layer.attention, "attention", layer.attention)


EDITS: dict[str, tuple[Callable[[], Any], Callable[[Any], None], str]] = {
    "hub, overlapping patches": (_hub, _overlapping, "its interpolate_pos_encoding was set on the instance"),
    "hub, positions": (
        _hub,
        _method("interpolate_pos_encoding", torch.zeros_like),
        "its interpolate_pos_encoding was set",
    ),
    "hub, tokens": (
        _hub,
        _method("prepare_tokens_with_masks", lambda x: 1.01 * x),
        "its prepare_tokens_with_masks was set",
    ),
    "hub, padding": (_hub, _set("patch_embed.proj.padding", (7, 7)), r"its forward (returns|differs|fails)"),
    "hub, eps": (
        _hub,
        _set("blocks.0.norm1.eps", 0.1),
        r"its norms have eps \[1e-06, 0.1\]|in its norm1, eps was changed",
    ),
    "hub, a class": (
        _hub,
        lambda m: setattr(m.norm, "__class__", Doubled),
        r"norm is a tests\S*\.D",
    ),
    "transformers, positions": (
        _hf,
        _method("embeddings.interpolate_pos_encoding", torch.zeros_like),
        "its embeddings.interpolate_pos_encoding was set on the instance",
    ),
    "transformers, stride": (
        _hf,
        _set("embeddings.patch_embeddings.projection.stride", (7, 7)),
        "its forward (returns|fails)",
    ),
    "transformers, eps": (_hf, _set("layernorm.eps", 0.1), "its norms have eps"),
    "transformers, scaling": (
        _hf,
        lambda m: setattr(_attention_of(m.encoder.layer[0]), "scaling", 0.126),
        "layer.0: (in its attention, scaling was changed|its attention computes something else)",
    ),
    "timm, scale": (_timm, _scaled, "in its attn, .* changed|its forward differs by"),
    "timm, stride": (_timm, _set("patch_embed.proj.stride", (7, 7)), "its forward_features (returns|fails)"),
    "timm, positions": (_timm, _method("_pos_embed", lambda x: 1.1 * x), "its _pos_embed was set on the instance"),
}


@pytest.mark.parametrize("when", ["before", "after", "after, on a GPU"])
@pytest.mark.parametrize("case", EDITS)
def test_what_a_user_changed_is_followed(
    case: str, when: str, answered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("timm")
    monkeypatch.setattr(weight_watch, "is_asynchronous", lambda device: when == "after, on a GPU")
    build, edit, reason = EDITS[case]
    model, untouched = build(), build()
    edit(untouched)
    if when == "before":
        edit(model)
        with pytest.raises(TypeError, match=reason):
            accelerate(model, inference=True)
        accelerate(model)
    else:
        accelerate(model, inference=True)
        with torch.no_grad():
            model(images(1, 84, 84))
        edit(model)
    answered.clear()
    x = images(1, 84, 98)
    with torch.no_grad():
        try:
            expected = untouched(x)
        except RuntimeError as error:  # some edits do not fit the positions
            with pytest.raises(RuntimeError, match=re.escape(str(error))):
                model(x)
        else:
            assert_same(model(x), expected)
    assert not answered or when == "after, on a GPU"  # where the engine's answer was discarded
    if when != "before":
        assert re.search(reason, str(acceleration_report(model)))


def test_a_function_of_the_library_that_was_replaced_before_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    resample = timm.models.vision_transformer.resample_abs_pos_embed
    zeros = lambda *args, **kwargs: torch.zeros_like(resample(*args, **kwargs))  # noqa: E731
    monkeypatch.setattr(timm.models.vision_transformer, "resample_abs_pos_embed", zeros)
    with pytest.raises(TypeError, match="its forward_features differs by"):
        accelerate(_timm(), inference=True)


def test_fused_optimizers_are_followed(some: LibraryModel, answered: list[str]) -> None:
    model, untouched = accelerated_pair(some.build(), inference=True)
    for each in (model, untouched):
        optimizer = torch.optim.AdamW(each.train().parameters(), lr=0.01, fused=True)
        loss_of(some.calls[0](each, images())).backward()
        optimizer.step()
        each.eval()
    with torch.no_grad():
        assert_same(model(images()), untouched(images()), 1e-4)
    assert len(answered) == 1
