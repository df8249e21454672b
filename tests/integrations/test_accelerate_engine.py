"""`accelerate(model, inference=True)`: an engine answers plain calls through a model's own `forward`."""

from __future__ import annotations

import copy
import logging
import pickle
import re
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dinov2_fast
from dinov2_fast import accelerate, accelerated, restore
from dinov2_fast.inference import Engine, watch
from dinov2_fast.inference.watch import ModelWatch
from tests.helpers import facebook_model
from tests.helpers.library_models import (
    KINDS,
    SOME,
    LibraryModel,
    LowRank,
    assert_same,
    filled,
    gradients,
    hub_model,
    images,
    loss_of,
    needs,
    tensors,
    timm_model,
)
from tests.helpers.library_models import transformers_model as hf


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods of engines that were called."""
    calls: list[str] = []
    call = Engine._call

    def spy(engine: Engine, method: str, args: Any, kwargs: Any) -> Any:
        calls.append(method)
        return call(engine, method, args, kwargs)

    monkeypatch.setattr(Engine, "_call", spy)
    return calls


def pair(model: Any, **options: Any) -> tuple[Any, Any]:
    untouched = copy.deepcopy(model)
    return accelerate(model, inference=True, **options), untouched


@pytest.fixture(params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> LibraryModel:
    needs(request.param)
    return request.param


@pytest.fixture(params=SOME, ids=str)
def some(request: pytest.FixtureRequest) -> LibraryModel:
    needs(request.param)
    return request.param


def test_plain_calls_are_answered_by_the_engine_with_the_models_outputs(
    kind: LibraryModel, answered: list[str]
) -> None:
    model, untouched = pair(kind.build())
    assert list(model.state_dict()) == list(untouched.state_dict())
    with torch.no_grad():
        for call in kind.calls:
            assert_same(call(model, images()), call(untouched, images()))
        answered.clear()
        assert_same(model(images()), untouched(images()))
    assert len(answered) == 1
    assert isinstance(model, type(untouched))
    assert str(model) == str(untouched)
    rows = accelerated(model).rows
    assert [(row.accelerated, row.count, row.reasons) for row in rows] == [(2, 2, ()), (1, 1, ())]
    restore(model)
    with torch.no_grad():
        for ours, theirs in zip(tensors(model(images())), tensors(untouched(images())), strict=True):
            assert torch.equal(ours, theirs)
    for ours, theirs in zip(model.modules(), untouched.modules(), strict=True):
        assert type(ours) is type(theirs)
        assert vars(ours).keys() == vars(theirs).keys()


@pytest.mark.parametrize(("height", "width"), [(70, 84), (98, 70), (60, 95)])
@pytest.mark.parametrize("task", ["Model", "Backbone"])
def test_images_of_any_size_as_transformers_takes_them(task: str, height: int, width: int, answered: Any) -> None:
    pytest.importorskip("transformers")
    model, untouched = pair(filled(hf("Dinov2", task)).eval())
    x = images(1, height, width)
    with torch.no_grad():
        assert_same(model(x), untouched(x))
    assert len(answered) == 1


def test_sizes_of_timm_and_of_the_hub(answered: list[str]) -> None:
    pytest.importorskip("timm")
    model, untouched = pair(filled(timm_model("vit_small_patch14_dinov2", dynamic_img_size=True)).eval())
    with torch.no_grad():
        assert_same(model(images(1, 84, 98)), untouched(images(1, 84, 98)))
    assert len(answered) == 1
    fixed, _ = pair(filled(timm_model("vit_small_patch14_dinov2")).eval())
    with pytest.raises(AssertionError, match="doesn't match model"):
        fixed(images(1, 84, 84))
    model, untouched = pair(filled(hub_model()).eval())
    with torch.no_grad():
        assert_same(model(images(1, 84, 98)), untouched(images(1, 84, 98)))
        with pytest.raises(AssertionError, match="no multiple of the patch size"):
            model(images(1, 60, 60))


def test_outputs_keep_the_dtype_of_the_model(some: LibraryModel) -> None:
    model, untouched = pair(some.build(), precision="bf16", allow_slow=True)
    with torch.no_grad():
        ours, theirs = tensors(model(images()))[0], tensors(untouched(images()))[0]
        assert ours.dtype == theirs.dtype == torch.float32
        assert 1e-4 < (ours - theirs).abs().max() / theirs.abs().max() < 0.05
        model.bfloat16()
        assert tensors(model(images().bfloat16()))[0].dtype == torch.bfloat16


# When the weights or settings change


def test_it_follows_the_weights(some: LibraryModel, answered: list[str]) -> None:
    model, untouched = pair(some.build())
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


def test_it_follows_the_settings(answered: list[str]) -> None:
    pytest.importorskip("transformers")
    model, untouched = pair(filled(hf("Dinov2", "Backbone")).eval())
    for each in (model, untouched):
        each.out_features = ["stage1", "stage2"]
        each.config.apply_layernorm = False
    with torch.no_grad():
        assert_same(model(images()), untouched(images()))
    hub, untouched = pair(filled(hub_model()).eval())
    for each in (hub, untouched):
        each.interpolate_offset = 0.0
    with torch.no_grad():
        assert_same(hub(images(1, 98, 98)), untouched(images(1, 98, 98)))
    assert len(answered) == 2


def test_copies_and_pickles_have_engines_of_their_own(some: LibraryModel, answered: list[str]) -> None:
    model, _ = pair(some.build())
    copies = [copy.deepcopy(model)]
    if not some.name.startswith("hub") and "Backbone" not in some.name:  # transformers' own hooks on it refuse
        copies.append(pickle.loads(pickle.dumps(model)))
    for made in copies:
        with torch.no_grad():
            assert_same(made(images()), model(images()))
            for parameter in made.parameters():
                parameter.add_(1)
            assert not torch.equal(tensors(made(images()))[0], tensors(model(images()))[0])
    assert len(answered) == 4 * len(copies)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In the order of a GPU: when engines ran, and when changes were looked for."""
    monkeypatch.setattr(watch, "is_asynchronous", lambda device: True)
    happened: list[str] = []
    call, changed = Engine._call, ModelWatch.changed
    monkeypatch.setattr(Engine, "_call", lambda *given: happened.append("run") or call(*given))
    monkeypatch.setattr(ModelWatch, "changed", lambda self: happened.append("check") or changed(self))
    return happened


@torch.no_grad()
def test_it_answers_before_it_looks_for_changes_once(some: LibraryModel, checks: list[str]) -> None:
    model, untouched = pair(some.build())
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
def test_it_follows_nothing_where_that_is_asked_for(some: LibraryModel, checks: list[str]) -> None:
    model, _ = pair(some.build(), follow_weights=False)
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
def test_accelerate_again_sees_what_was_not_noticed(some: LibraryModel, answered: list[str]) -> None:
    model, untouched = pair(some.build())
    for each in (model, untouched):
        for parameter in each.parameters():
            parameter.data.mul_(1.1)
    accelerate(model, inference=True)
    assert_same(model(images()), untouched(images()))
    assert len(answered) == 1


# What a user changed that is no weight


class Doubled(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _set(path: str, value: Any) -> Callable[[Any], None]:
    owner, _, name = path.rpartition(".")
    return lambda model: setattr(model.get_submodule(owner), name, value)


def _method(path: str, change: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Has the method at `path` return something else, on the instance."""
    owner, _, name = path.rpartition(".")

    def edit(model: Any) -> None:
        module = model.get_submodule(owner)
        own = getattr(type(module), name)
        setattr(module, name, MethodType(lambda self, *args, **kwargs: change(own(self, *args, **kwargs)), module))

    return edit


def _overlapping(model: Any) -> None:
    """Twice as many patches each way, without positions: the common trick for dense features."""
    model.patch_embed.proj.stride = (7, 7)
    _method("interpolate_pos_encoding", lambda positions: 0 * positions[:, :1])(model)


def _scaled(model: Any) -> None:
    attention = model.blocks[1].attn
    attention.scale, attention.fused_attn = 0.126, False  # the fused one has its own scale


def _hub(**arguments: Any) -> Any:
    return filled(hub_model(**arguments)).eval()


def _timm() -> Any:
    return filled(timm_model("vit_small_patch14_dinov2", dynamic_img_size=True)).eval()


def _hf(task: str = "Model") -> Any:
    return filled(hf("Dinov2", task)).eval()


def _attention_of(layer: Any) -> Any:
    """The module with the scores; transformers 4 has it in another one."""
    return getattr(layer.attention, "attention", layer.attention)


EDITS: dict[str, tuple[Callable[[], Any], Callable[[Any], None], str]] = {
    "hub, overlapping patches": (_hub, _overlapping, "it has a interpolate_pos_encoding of its own"),
    "hub, positions": (_hub, _method("interpolate_pos_encoding", torch.zeros_like), "a interpolate_pos_encoding of"),
    "hub, tokens": (_hub, _method("prepare_tokens_with_masks", lambda x: 1.01 * x), "a prepare_tokens_with_masks of"),
    "hub, padding": (_hub, _set("patch_embed.proj.padding", (7, 7)), r"its forward (returns|differs|fails)"),
    "hub, eps": (
        _hub,
        _set("blocks.0.norm1.eps", 0.1),
        r"its norms have eps \[1e-06, 0.1\]|of its norm1, eps was changed",
    ),
    "hub, a class": (
        _hub,
        lambda m: setattr(m.norm, "__class__", Doubled),
        r"norm is a tests\S*\.D",
    ),
    "transformers, positions": (
        _hf,
        _method("embeddings.interpolate_pos_encoding", torch.zeros_like),
        "embeddings has a interpolate_pos_encoding of its own",
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
        "layer.0: (of its attention, scaling was changed|its attention computes something else)",
    ),
    "timm, scale": (_timm, _scaled, "of its attn, .* changed|its forward differs by"),
    "timm, stride": (_timm, _set("patch_embed.proj.stride", (7, 7)), "its forward_features (returns|fails)"),
    "timm, positions": (_timm, _method("_pos_embed", lambda x: 1.1 * x), "a _pos_embed of its own"),
}


@pytest.mark.parametrize("when", ["before", "after", "after, on a GPU"])
@pytest.mark.parametrize("case", EDITS)
def test_what_a_user_changed_is_followed(
    case: str, when: str, answered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("timm")
    monkeypatch.setattr(watch, "is_asynchronous", lambda device: when == "after, on a GPU")
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
        except RuntimeError as error:  # some edits fit no positions
            with pytest.raises(RuntimeError, match=re.escape(str(error))):
                model(x)
        else:
            assert_same(model(x), expected)
    assert not answered or when == "after, on a GPU"  # where the engine's answer was dropped
    if when != "before":
        assert re.search(reason, str(accelerated(model)))


def test_a_function_of_the_library_that_was_replaced_before_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    resample = timm.models.vision_transformer.resample_abs_pos_embed
    zeros = lambda *args, **kwargs: torch.zeros_like(resample(*args, **kwargs))  # noqa: E731
    monkeypatch.setattr(timm.models.vision_transformer, "resample_abs_pos_embed", zeros)
    with pytest.raises(TypeError, match="its forward_features differs by"):
        accelerate(_timm(), inference=True)


@facebook_model.in_module("copied")
class _Vendored(facebook_model.Backbone):
    """A copy of Meta's code with a method that returns something else, and without `forward_features`."""

    __qualname__ = "DinoVisionTransformer"

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        x, outputs = self.prepare_tokens_with_masks(x), []
        for block in self.blocks:
            x = block(x)
            outputs.append(self.norm(x))
        return outputs[-n:]

    def forward(self, x: Tensor) -> Tensor:
        return self.get_intermediate_layers(x)[0][:, 0]


def test_of_a_copied_backbone_only_the_methods_that_agree_are_answered(answered: list[str]) -> None:
    model, untouched = pair(filled(_Vendored(registers=2)).eval())
    assert not hasattr(model, "forward_features")
    x = images(1, 84, 98)
    with torch.no_grad():
        assert_same(model(x), untouched(x))
        assert len(answered) == 1
        ours, theirs = model.get_intermediate_layers(x, 2), untouched.get_intermediate_layers(x, 2)
        assert type(ours) is type(theirs)
        for found, expected in zip(ours, theirs, strict=True):
            assert_same(found, expected)
    assert len(answered) == 1
    assert "get_intermediate_layers runs its own code: it returns a list in place of a tuple" in str(accelerated(model))


def test_timms_intermediate_outputs_are_answered(answered: list[str]) -> None:
    pytest.importorskip("timm")
    model, untouched = pair(filled(timm_model("vit_small_patch14_reg4_dinov2", dynamic_img_size=True)).eval())
    x = images(1, 84, 98)
    calls: list[Callable[[Any], Any]] = [
        lambda m: m.forward_intermediates(x),
        lambda m: m.forward_intermediates(x, [0], norm=True, output_fmt="NLC", intermediates_only=True),
        lambda m: m.forward_intermediates(x, 1, return_prefix_tokens=True, stop_early=True),
        lambda m: m.get_intermediate_layers(x, 2, reshape=True, return_prefix_tokens=True),
    ]
    with torch.no_grad():
        for call in calls:
            ours, theirs = call(model), call(untouched)
            assert type(ours) is type(theirs)
            for found, expected in zip(tensors(ours), tensors(theirs), strict=True):
                assert_same(found, expected)
    assert len(answered) == len(calls)
    averaged, untouched = pair(filled(timm_model("vit_small_patch14_dinov2", global_pool="avg", num_classes=3)).eval())
    with torch.no_grad():
        assert_same(averaged(images()), untouched(images()))
    assert len(answered) == len(calls) + 1


def test_a_forward_of_the_users_may_call_what_an_engine_answers(answered: list[str]) -> None:
    pytest.importorskip("timm")
    model, untouched = _timm(), _timm()
    for each in (model, untouched):
        each.forward = partial(each.get_intermediate_layers, n=[0])
    own = model.forward
    accelerate(model, inference=True)
    with torch.no_grad():
        assert_same(model(images())[0], untouched(images())[0])
    assert len(answered) == 1
    restore(model)
    assert model.forward is own
    hub, untouched = _hub(), _hub()
    for each in (hub, untouched):
        each.forward = MethodType(lambda self, x: self.norm(self.prepare_tokens_with_masks(x)), each)
    accelerate(hub, inference=True)
    with torch.no_grad():
        assert_same(hub(images()), untouched(images()))
    assert len(answered) == 1
    assert "forward runs its own code: it needs no engine" in str(accelerated(hub))


def test_fused_optimizers_are_followed(some: LibraryModel) -> None:
    model, untouched = pair(some.build())
    for each in (model, untouched):
        optimizer = torch.optim.AdamW(each.train().parameters(), lr=0.01, fused=True)
        loss_of(some.calls[0](each, images())).backward()
        optimizer.step()
        each.eval()
    with torch.no_grad():
        assert_same(model(images()), untouched(images()), 1e-4)


# What the engine does not answer


def test_other_calls_run_the_models_own_code(answered: list[str]) -> None:
    pytest.importorskip("transformers")
    model, untouched = pair(filled(hf("Dinov2", "Model", attention="eager")).eval())
    masks = torch.rand(2, 25, generator=torch.Generator().manual_seed(0)) < 0.5
    calls: list[Callable[[Any], Any]] = [
        lambda m: m(images(), bool_masked_pos=masks),
        lambda m: m(images(), masks),
        lambda m: m(images(), output_hidden_states=True),
        lambda m: m(images(), output_attentions=True),
        lambda m: m(images(), return_dict=False),
        lambda m: m((images() * 50 + 99).to(torch.uint8)),
        lambda m: m(images().requires_grad_()),
    ]
    for call in calls:
        assert_same(call(model), call(untouched))
    for name in ("output_hidden_states", "output_attentions"):
        for each in (model, untouched):
            setattr(each.config, name, True)
        assert_same(model(images()), untouched(images()))
    with pytest.raises((ValueError, AttributeError)) as wanted:  # newer transformers does not check it
        untouched()
    with pytest.raises(wanted.type, match=re.escape(str(wanted.value))):
        model()
    assert not answered


def test_training_mode_has_gradients(some: LibraryModel, answered: list[str]) -> None:
    model, untouched = pair(some.build(drop_path=0.1))
    ours, theirs = (gradients(each.train(), lambda m: m(images())) for each in (model, untouched))
    assert not answered
    for name, wanted in theirs.items():
        assert (ours[name] is None) == (wanted is None)
    assert not tensors(model.eval()(images()))[0].requires_grad


def test_hooks_that_come_later_are_heard(answered: list[str], caplog: pytest.LogCaptureFixture) -> None:
    model, untouched = pair(filled(hub_model()).eval())
    with torch.no_grad():
        handles = [each.blocks[1].mlp.register_forward_hook(lambda m, a, out: 2 * out) for each in (model, untouched)]
        assert_same(model(images()), untouched(images()))
        assert not answered
        assert "blocks.1.mlp has a hook" in caplog.text
        assert "blocks.1.mlp has a hook" in str(accelerated(model))
        for handle in handles:
            handle.remove()
        assert_same(model(images()), untouched(images()))
    assert len(answered) == 1


def _adapted(model: Any) -> Any:
    model.blocks[0].attn.qkv = LowRank(model.blocks[0].attn.qkv)
    return model


def _hooked(model: Any) -> Any:
    model.norm.register_forward_hook(lambda m, args, out: out)
    return model


def _changed(change: Callable[[Any], None], model: Any) -> Any:
    change(model)
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "adapters": (lambda: _adapted(hub_model()), "blocks.0.attn.qkv is a tests.helpers.library_models.LowRank"),
    "hooks": (lambda: _hooked(hub_model()), "norm has a hook"),
    "activation": (
        lambda: _changed(lambda m: setattr(m.blocks[1].mlp, "act", nn.ReLU()), hub_model()),
        "blocks.1: its activation is neither",
    ),
    "eps": (
        lambda: _changed(lambda m: setattr(m.norm, "eps", 1e-5), hub_model()),
        r"its norms have eps \[1e-06, 1e-05\] in place of \[1e-06\]",
    ),
    "weights": (
        lambda: _changed(lambda m: m.register_parameter("extra", nn.Parameter(torch.ones(1))), hub_model()),
        r"(?s)its weights or settings are not those of a DINOv2.*extra",
    ),
    "norm before": (lambda: timm_model("vit_small_patch14_dinov2", pre_norm=True), "it has a norm before the blocks"),
    "not square": (lambda: timm_model("vit_small_patch14_dinov2", img_size=(70, 84)), "on a square grid"),
    "no backbone": (lambda: hub_model().blocks, "its blocks are in no backbone"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_engine_can_be_behind_is_refused_and_left_as_it_was(case: str) -> None:
    pytest.importorskip("timm")
    make, reason = REFUSED[case]
    model = make().eval()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(TypeError, match=reason):
        accelerate(model, inference=True)
    assert [type(module) for module in model.modules()] == kinds


def test_wrong_options_are_refused_and_leave_the_model_as_it_was() -> None:
    model = hub_model().eval()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="There is no precision 'int3'"):
        accelerate(model, inference=True, precision="int3")
    assert [type(module) for module in model.modules()] == kinds


def test_one_of_two_towers(caplog: pytest.LogCaptureFixture, answered: list[str]) -> None:
    model = nn.ModuleDict({"plain": filled(hub_model()), "adapted": _adapted(filled(hub_model()))}).eval()
    untouched = copy.deepcopy(model)
    with caplog.at_level(logging.WARNING, logger="dinov2_fast"):
        accelerate(model, inference=True)
    assert "No engine is attached to adapted: blocks.0.attn.qkv is a" in caplog.text
    lines = [
        "plain.blocks: 2 of 2 NestedTensorBlock accelerated",
        "adapted.blocks: 2 of 2 NestedTensorBlock accelerated",
    ]
    assert str(accelerated(model)).splitlines() == [
        *lines,
        "plain: 1 of 1 DinoVisionTransformer by an engine accelerated",
    ]
    with torch.no_grad():
        for name in model:
            assert_same(model[name](images()), untouched[name](images()))
    assert len(answered) == 1


# In other people's programs


@pytest.mark.parametrize("inference", [False, True])
def test_the_pipeline_of_transformers(inference: bool, answered: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    from PIL import Image

    model = filled(hf("Dinov2", "Model")).eval()
    processor = transformers.BitImageProcessor(size={"shortest_edge": 70}, crop_size={"height": 70, "width": 70})
    pixels = np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)

    def features(model: nn.Module) -> Tensor:
        pipeline = transformers.pipeline("image-feature-extraction", model, image_processor=processor, device="cpu")
        return torch.tensor(pipeline(Image.fromarray(pixels)))

    wanted = features(model)
    assert_same(features(accelerate(model, inference=inference)), wanted)
    assert len(answered) == int(inference)


def _dense_model(name: str) -> Any:
    """A model for dense prediction of transformers on four stages of a `Dinov2Backbone`."""
    import transformers

    reshaped = name == "UperNet"
    stages = {"num_hidden_layers": 4, "out_indices": [0, 1, -2, -1], "reshape_hidden_states": reshaped}
    backbone = hf("Dinov2", "Backbone", **stages).config
    if reshaped:
        settings = {"hidden_size": 16, "pool_scales": [1], "use_auxiliary_head": False}
        config = transformers.UperNetConfig(backbone_config=backbone, **settings)
        return transformers.UperNetForSemanticSegmentation(config)
    sizes = {"patch_size": 14, "reassemble_hidden_size": 128, "neck_hidden_sizes": [8] * 4}
    config = transformers.DepthAnythingConfig(backbone_config=backbone, fusion_hidden_size=8, **sizes)
    return transformers.DepthAnythingForDepthEstimation(config)


@pytest.mark.parametrize("name", ["UperNet", "DepthAnything"])
def test_models_for_dense_prediction_take_our_backbone_and_accelerated_ones(name: str, answered: list[str]) -> None:
    pytest.importorskip("transformers")
    model = filled(_dense_model(name)).eval()
    x = images(1, 70, 98)
    with torch.no_grad():
        wanted = model(x)
        assert_same(accelerate(copy.deepcopy(model))(x), wanted, 1e-4)
        assert not answered
        assert_same(accelerate(copy.deepcopy(model), inference=True)(x), wanted, 1e-4)
        assert answered
        ours = dinov2_fast.Dinov2Backbone(model.backbone.config).eval()
        ours.load_state_dict(model.backbone.state_dict())
        model.backbone = ours
        assert_same(model(x), wanted, 1e-4)


def test_compiled_it_is_one_graph_of_the_blocks(answered: list[str]) -> None:
    pytest.importorskip("timm")
    model, untouched = pair(filled(timm_model("vit_small_patch14_dinov2")).eval())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_same(compiled(images()), untouched(images()))
    torch._dynamo.reset()
    assert not answered


@torch.no_grad()
def test_moved_to_the_meta_device_the_model_runs_without_an_engine(answered: list[str]) -> None:
    model = accelerate(filled(hub_model()).eval(), inference=True)
    model(images())
    assert answered
    answered.clear()
    assert model.to("meta")(images().to("meta")).shape[0] == len(images())
    assert not answered
    assert "on the meta device" in str(accelerated(model))
