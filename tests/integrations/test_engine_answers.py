"""With `accelerate(model, inference=True)` an engine answers plain calls through a model's own `forward`."""

from __future__ import annotations

import copy
import logging
import pickle
import re
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov2_fast import accelerate, acceleration_report, unaccelerate
from tests.helpers import facebook_model
from tests.helpers.library_models import (
    LibraryModel,
    LowRank,
    accelerated_pair,
    assert_same,
    assert_same_gradients,
    filled,
    gradients,
    hub_model,
    images,
    tensors,
    timm_model,
)
from tests.helpers.library_models import transformers_model as hf


def _hub(**arguments: Any) -> Any:
    return filled(hub_model(**arguments)).eval()


def _timm() -> Any:
    return filled(timm_model("vit_small_patch14_dinov2", dynamic_img_size=True)).eval()


def test_plain_calls_are_answered_by_the_engine_with_the_models_outputs(
    kind: LibraryModel, answered: list[str]
) -> None:
    model, untouched = accelerated_pair(kind.build(), inference=True)
    assert list(model.state_dict()) == list(untouched.state_dict())
    with torch.no_grad():
        for call in kind.calls:
            assert_same(call(model, images()), call(untouched, images()))
        answered.clear()
        assert_same(model(images()), untouched(images()))
    assert len(answered) == 1
    assert isinstance(model, type(untouched))
    assert str(model) == str(untouched)
    groups = acceleration_report(model).groups
    assert [(group.accelerated, group.count, group.reasons) for group in groups] == [(2, 2, ()), (1, 1, ())]
    unaccelerate(model)
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
    model, untouched = accelerated_pair(filled(hf("Dinov2", task)).eval(), inference=True)
    x = images(1, height, width)
    with torch.no_grad():
        assert_same(model(x), untouched(x))
    assert len(answered) == 1


def test_images_of_any_size_as_timm_and_the_hub_models_take_them(answered: list[str]) -> None:
    pytest.importorskip("timm")
    model, untouched = accelerated_pair(
        filled(timm_model("vit_small_patch14_dinov2", dynamic_img_size=True)).eval(), inference=True
    )
    with torch.no_grad():
        assert_same(model(images(1, 84, 98)), untouched(images(1, 84, 98)))
    assert len(answered) == 1
    fixed, _ = accelerated_pair(filled(timm_model("vit_small_patch14_dinov2")).eval(), inference=True)
    with pytest.raises(AssertionError, match="doesn't match model"):
        fixed(images(1, 84, 84))
    model, untouched = accelerated_pair(filled(hub_model()).eval(), inference=True)
    with torch.no_grad():
        assert_same(model(images(1, 84, 98)), untouched(images(1, 84, 98)))
        with pytest.raises(AssertionError, match="no multiple of the patch size"):
            model(images(1, 60, 60))


def test_outputs_keep_the_dtype_of_the_model(some: LibraryModel) -> None:
    model, untouched = accelerated_pair(some.build(), precision="bf16", allow_slow=True, inference=True)
    with torch.no_grad():
        ours, theirs = tensors(model(images()))[0], tensors(untouched(images()))[0]
        assert ours.dtype == theirs.dtype == torch.float32
        assert 1e-4 < (ours - theirs).abs().max() / theirs.abs().max() < 0.05
        model.bfloat16()
        assert tensors(model(images().bfloat16()))[0].dtype == torch.bfloat16


def test_copies_and_pickles_have_engines_of_their_own(some: LibraryModel, answered: list[str]) -> None:
    model, _ = accelerated_pair(some.build(), inference=True)
    copies = [copy.deepcopy(model)]
    if not some.name.startswith("hub") and "Backbone" not in some.name:  # transformers' hooks cannot be pickled
        copies.append(pickle.loads(pickle.dumps(model)))
    for made in copies:
        with torch.no_grad():
            assert_same(made(images()), model(images()))
            for parameter in made.parameters():
                parameter.add_(1)
            assert not torch.equal(tensors(made(images()))[0], tensors(model(images()))[0])
    assert len(answered) == 4 * len(copies)


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


def test_only_the_methods_of_a_copied_backbone_that_agree_are_answered(answered: list[str]) -> None:
    model, untouched = accelerated_pair(filled(_Vendored(registers=2)).eval(), inference=True)
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
    assert "get_intermediate_layers runs its own code: it returns a list in place of a tuple" in str(
        acceleration_report(model)
    )


@facebook_model.in_module("copied")
class _Failing(facebook_model.DinoVisionTransformer):
    """A copy of Meta's code with a method that raises."""

    __qualname__ = "DinoVisionTransformer"

    def get_intermediate_layers(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("not copied")


def test_a_method_that_raises_is_not_answered() -> None:
    model = accelerate(filled(_Failing()).eval(), inference=True)
    with pytest.raises(NotImplementedError, match="not copied"):
        model.get_intermediate_layers(images())
    assert "it fails on a small image (not copied)" in str(acceleration_report(model))


def test_timms_intermediate_outputs_are_answered(answered: list[str]) -> None:
    pytest.importorskip("timm")
    model, untouched = accelerated_pair(
        filled(timm_model("vit_small_patch14_reg4_dinov2", dynamic_img_size=True)).eval(), inference=True
    )
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
    averaged, untouched = accelerated_pair(
        filled(timm_model("vit_small_patch14_dinov2", global_pool="avg", num_classes=3)).eval(), inference=True
    )
    with torch.no_grad():
        assert_same(averaged(images()), untouched(images()))
    assert len(answered) == len(calls) + 1


def test_a_forward_set_by_the_user_may_call_what_the_engine_answers(answered: list[str]) -> None:
    pytest.importorskip("timm")
    model, untouched = _timm(), _timm()
    for each in (model, untouched):
        each.forward = partial(each.get_intermediate_layers, n=[0])
    own = model.forward
    accelerate(model, inference=True)
    with torch.no_grad():
        assert_same(model(images())[0], untouched(images())[0])
    assert len(answered) == 1
    unaccelerate(model)
    assert model.forward is own
    hub, untouched = _hub(), _hub()
    for each in (hub, untouched):
        each.forward = MethodType(lambda self, x: self.norm(self.prepare_tokens_with_masks(x)), each)
    accelerate(hub, inference=True)
    with torch.no_grad():
        assert_same(hub(images()), untouched(images()))
    assert len(answered) == 1
    assert "forward runs its own code: it calls nothing that an engine answers" in str(acceleration_report(hub))


def test_other_calls_run_the_models_own_code(answered: list[str]) -> None:
    pytest.importorskip("transformers")
    model, untouched = accelerated_pair(filled(hf("Dinov2", "Model", attention="eager")).eval(), inference=True)
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
    with pytest.raises((ValueError, AttributeError)) as wanted:  # newer versions of transformers do not check it
        untouched()
    with pytest.raises(wanted.type, match=re.escape(str(wanted.value))):
        model()
    assert not answered


def test_training_mode_has_gradients(some: LibraryModel, answered: list[str]) -> None:
    model, untouched = accelerated_pair(some.build(drop_path=0.1), inference=True)
    assert_same_gradients(*(gradients(each.train(), lambda m: m(images())) for each in (model, untouched)))
    assert not answered
    assert not tensors(model.eval()(images()))[0].requires_grad


def test_hooks_added_later_run(answered: list[str], caplog: pytest.LogCaptureFixture) -> None:
    model, untouched = accelerated_pair(filled(hub_model()).eval(), inference=True)
    with torch.no_grad():
        handles = [each.blocks[1].mlp.register_forward_hook(lambda m, a, out: 2 * out) for each in (model, untouched)]
        assert_same(model(images()), untouched(images()))
        assert not answered
        assert "blocks.1.mlp has a hook" in caplog.text
        assert "blocks.1.mlp has a hook" in str(acceleration_report(model))
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
        r"its norms have eps \[1e-06, 1e-05\] instead of \[1e-06\]",
    ),
    "weights": (
        lambda: _changed(lambda m: m.register_parameter("extra", nn.Parameter(torch.ones(1))), hub_model()),
        r"(?s)its weights or settings are not those of a DINOv2.*extra",
    ),
    "norm before": (lambda: timm_model("vit_small_patch14_dinov2", pre_norm=True), "it has a norm before the blocks"),
    "not square": (lambda: timm_model("vit_small_patch14_dinov2", img_size=(70, 84)), "on a square grid"),
    "no backbone": (lambda: hub_model().blocks, "its blocks are not in a backbone"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_backbone_that_no_engine_can_compute_is_refused_and_left_as_it_was(case: str) -> None:
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


def test_only_one_of_two_backbones_gets_an_engine(caplog: pytest.LogCaptureFixture, answered: list[str]) -> None:
    model = nn.ModuleDict({"plain": filled(hub_model()), "adapted": _adapted(filled(hub_model()))}).eval()
    untouched = copy.deepcopy(model)
    with caplog.at_level(logging.WARNING, logger="dinov2_fast"):
        accelerate(model, inference=True)
    assert "No engine is attached to adapted: blocks.0.attn.qkv is a" in caplog.text
    lines = [
        "plain.blocks: 2 of 2 NestedTensorBlock accelerated",
        "adapted.blocks: 2 of 2 NestedTensorBlock accelerated",
    ]
    assert str(acceleration_report(model)).splitlines() == [
        *lines,
        "plain: 1 of 1 DinoVisionTransformer answered by an engine",
    ]
    with torch.no_grad():
        for name in model:
            assert_same(model[name](images()), untouched[name](images()))
    assert len(answered) == 1


def test_a_compiled_model_is_one_graph_of_the_accelerated_blocks(answered: list[str]) -> None:
    pytest.importorskip("timm")
    model, untouched = accelerated_pair(filled(timm_model("vit_small_patch14_dinov2")).eval(), inference=True)
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
    assert "on the meta device" in str(acceleration_report(model))
