"""Accelerated blocks compute what the blocks themselves compute, in every call and mode."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov2_fast import accelerate, ops
from dinov2_fast.integrations import parts
from dinov2_fast.integrations.module_ops import is_layer_norm
from dinov2_fast.ops.dispatch import use_backend
from tests.helpers.devices import DEVICE, runs_triton
from tests.helpers.library_models import (
    LibraryModel,
    accelerated_pair,
    assert_same,
    assert_same_gradients,
    blocks_of,
    filled,
    gradients,
    hub_model,
    images,
    tensors,
    timm_model,
    transformers_model,
)
from tests.reference import assert_obeys_rule


def test_outputs_hidden_states_and_losses_are_the_models_own(kind: LibraryModel) -> None:
    model, untouched = accelerated_pair(kind.build())
    x = images()
    for call in kind.calls:
        with torch.no_grad():
            assert_same(call(model, x), call(untouched, x))
        assert_same(call(model, x), call(untouched, x))


def test_gradients_of_every_parameter_are_the_models_own(kind: LibraryModel) -> None:
    model, untouched = (model.train() for model in accelerated_pair(kind.build()))
    x = images()
    run = lambda model: kind.calls[0](model, x)  # noqa: E731
    assert_same_gradients(gradients(model, run), gradients(untouched, run))


def test_bf16_results_are_as_exact_as_the_models_own(some: LibraryModel) -> None:
    model, untouched = accelerated_pair(some.build())
    x = images()
    call = some.calls[0]
    with torch.no_grad():
        exact = tensors(call(copy.deepcopy(untouched).double(), x.double()))
        usual = tensors(call(untouched.bfloat16(), x.bfloat16()))
        found = tensors(call(model.bfloat16(), x.bfloat16()))
    assert max(assert_obeys_rule(*each) for each in zip(found, exact, usual, strict=True)) > 0


def test_autocast_gives_the_models_dtypes(some: LibraryModel) -> None:
    model, untouched = accelerated_pair(some.build())
    x = images()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(some.calls[0](model, x), some.calls[0](untouched, x), 3e-2)


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_stochastic_depth_draws_the_same_random_numbers(some: LibraryModel, rate: float) -> None:
    model, untouched = (model.train() for model in accelerated_pair(some.build(drop_path=rate)))
    x = images(batch=6)
    run = lambda model: some.calls[0](model, x)  # noqa: E731
    torch.manual_seed(1)
    found = tensors(run(model))[0]
    torch.manual_seed(1)
    assert_same(found, tensors(run(untouched))[0])
    assert_same_gradients(gradients(model, run), gradients(untouched, run))


def test_losses_in_training_are_the_models_own(some: LibraryModel) -> None:
    model, untouched = (model.train() for model in accelerated_pair(some.build(drop_path=0.1)))
    losses = [train(each, some) for each in (model, untouched)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-6)
    assert losses[1][-1] < 0.95 * losses[1][0]


def train(model: nn.Module, kind: LibraryModel, steps: int = 20) -> Tensor:
    torch.manual_seed(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (tensors(kind.calls[0](model, images()))[0] - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def test_the_ops_are_in_use(some: LibraryModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = accelerated_pair(some.build())
    used: list[str] = []

    def spy(place: Any, name: str, form: Callable[..., str] = lambda *args, **kwargs: "") -> None:
        function = getattr(place, name)

        def noting(*args: Any, **kwargs: Any) -> Any:
            used.append(name + form(*args, **kwargs))
            return function(*args, **kwargs)

        monkeypatch.setattr(place, name, noting)

    spy(ops, "layer_norm", lambda *args, branch=None, **kwargs: ".plain" if branch is None else ".add")
    spy(ops, "activation", lambda x, kind, **kwargs: f".{kind}")
    for name in ("add_residual", "linear"):
        spy(ops, name)
    spy(parts, "attend")
    spy(parts, "attend_packed")
    depth = len(blocks_of(model, some))
    with torch.no_grad():
        some.calls[0](model, images())
    counts = {name: used.count(name) for name in used}
    separate = "Dinov2" in some.name
    expected = dict.fromkeys(("layer_norm.plain", "layer_norm.add", "add_residual"), depth)
    expected |= {"attend" if separate else "attend_packed": depth, "linear": depth * (6 if separate else 4)}
    if any(name.endswith("gate_proj") for name, _ in model.named_modules()):  # newer transformers: no packed SwiGLU
        expected["linear"] += depth
    else:
        gated = "swiglu" in some.name or "giant" in some.name
        expected |= {"activation.swiglu" if gated else "activation.gelu": depth}
    assert counts == expected


@runs_triton
def test_kernels_run_when_asked_for(some: LibraryModel) -> None:
    model, untouched = (m.to(DEVICE) for m in accelerated_pair(some.build()))
    x = images(1).to(DEVICE)
    with torch.no_grad(), use_backend("attention=triton,layer_norm=triton,activation=triton", strict=True):
        found = some.calls[0](model, x)
    with torch.no_grad():
        assert_same(found, some.calls[0](untouched, x))


def test_only_a_plain_layer_norm_is_computed_by_the_op() -> None:
    assert is_layer_norm(nn.LayerNorm(8))
    for other in (nn.LayerNorm(8, bias=False), nn.LayerNorm(8, elementwise_affine=False), nn.LayerNorm((4, 8))):
        assert not is_layer_norm(other)
    assert not is_layer_norm(type("LayerNorm", (nn.LayerNorm,), {})(8))


def test_attention_dropout_runs_the_blocks_own_code_in_training(some: LibraryModel) -> None:
    model, untouched = accelerated_pair(some.build(attention_dropout=0.2))
    with torch.no_grad():
        assert_same(model(images()), untouched(images()))
    for each in (model, untouched):
        each.train()
    run = lambda model: some.calls[0](model, images())  # noqa: E731
    assert_same_gradients(gradients(model, run), gradients(untouched, run))


# What belongs to one library


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("task", ["Model", "Backbone"])
def test_transformers_records_the_same_attentions(task: str, attention: str) -> None:
    pytest.importorskip("transformers")
    model = filled(transformers_model("Dinov2", task, attention=attention)).eval()
    untouched = copy.deepcopy(model)
    accelerate(model)
    asked = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        found, wanted = model(images(), **asked), untouched(images(), **asked)
        assert_same(found, wanted)
        assert len(wanted.attentions or ()) == (2 if attention == "eager" else 0)
        model.set_attn_implementation("eager")
        untouched.set_attn_implementation("eager")
        assert_same(model(images(), **asked), untouched(images(), **asked))


def test_transformers_recorded_outputs_do_not_stop_our_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    model = accelerate(filled(transformers_model("Dinov2", "Backbone")).eval())  # it has recording hooks from the start
    calls: list[int] = []
    attend = parts.attend
    monkeypatch.setattr(parts, "attend", lambda *args: calls.append(1) or attend(*args))
    model(images())
    assert len(calls) == 2


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_checkpointed_blocks_have_the_same_gradients(library: str) -> None:
    pytest.importorskip(library)
    if library == "timm":
        model = filled(timm_model("vit_small_patch14_dinov2", drop_path=0.2))
        model.set_grad_checkpointing()
    else:
        model = filled(transformers_model("Dinov2", "Model", drop_path=0.2))
        model.gradient_checkpointing_enable()
    untouched = copy.deepcopy(model)
    accelerate(model)
    run = lambda model: model(images())  # noqa: E731
    assert_same_gradients(gradients(model, run), gradients(untouched, run))


def test_masks_and_unfused_attention_of_timm_run_its_own_code() -> None:
    pytest.importorskip("timm")
    model = filled(timm_model("vit_small_patch14_dinov2")).eval()
    untouched = copy.deepcopy(model)
    accelerate(model)
    mask = torch.ones(26, 26, dtype=torch.bool).tril()
    takes_masks = "attn_mask" in inspect.signature(untouched.forward_features).parameters  # not in 1.0.9
    for asked in ({"attn_mask": mask}, {"is_causal": True}) if takes_masks else ():
        with torch.no_grad():
            assert_same(model.forward_features(images(), **asked), untouched.forward_features(images(), **asked))
    weights: list[Tensor] = []
    for each in (model, untouched):  # the usual way to timm's attention maps
        each.blocks[0].attn.fused_attn = False
        each.blocks[0].attn.attn_drop.register_forward_hook(lambda m, args, out: weights.append(out))
        each(images())
    assert_same(*weights)


def test_lists_and_masks_of_hub_models_run_their_own_code() -> None:
    model = filled(hub_model()).eval()
    untouched = copy.deepcopy(model)
    accelerate(model)
    tokens = [torch.randn(2, length, 128) for length in (5, 9)]
    assert_same(model.blocks[0](tokens), untouched.blocks[0](tokens))
    masks = torch.rand(2, 25) < 0.5
    found, wanted = (each.forward_features(images(), masks) for each in (model, untouched))
    assert found.pop("masks") is wanted.pop("masks")
    assert_same(found, wanted)


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_an_accelerated_model_compiles_to_one_graph(library: str) -> None:
    pytest.importorskip(library)
    made = timm_model("vit_small_patch14_dinov2") if library == "timm" else transformers_model("Dinov2", "Model")
    model = filled(made).eval()
    untouched = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(accelerate(model), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same(tensors(compiled(images()))[0], tensors(untouched(images()))[0])
    torch._dynamo.reset()


def test_an_accelerated_model_can_be_exported_and_traced() -> None:
    pytest.importorskip("transformers")
    model = filled(transformers_model("Dinov2", "Model")).eval()
    wanted = model(images()).last_hidden_state
    accelerate(model)
    with torch.no_grad():
        exported = torch.export.export(model, (images(),), strict=False)
        traced = torch.jit.trace(model, images(), strict=False, check_trace=False)
    targets = {str(node.target).split(".")[0] for node in exported.graph.nodes if node.op == "call_function"}
    assert targets == {"aten"}
    assert_same(exported.module()(images()).last_hidden_state, wanted)
    assert_same(traced(images())["last_hidden_state"], wanted)
