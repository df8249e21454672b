"""`accelerate`: models of other libraries compute the same with our ops, and stay what they are."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dinov2_fast
from dinov2_fast import accelerate, accelerated, ops, restore
from dinov2_fast.integrations import forms
from dinov2_fast.integrations.blocks import AcceleratedBlock
from dinov2_fast.integrations.steps import is_layer_norm
from dinov2_fast.ops.dispatch import use_backend
from tests.helpers.devices import DEVICE, runs_triton
from tests.helpers.library_models import (
    KINDS,
    SOME,
    LibraryModel,
    LowRank,
    assert_same,
    assert_same_gradients,
    filled,
    gradients,
    hub_model,
    images,
    needs,
    tensors,
    timm_model,
    transformers_model,
)
from tests.reference import assert_obeys_rule


@pytest.fixture(params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> LibraryModel:
    needs(request.param)
    return request.param


@pytest.fixture(params=SOME, ids=str)
def some(request: pytest.FixtureRequest) -> LibraryModel:
    needs(request.param)
    return request.param


def pair(kind: LibraryModel, **settings: Any) -> tuple[Any, Any]:
    """An accelerated model, and the same untouched."""
    model = kind.build(**settings)
    untouched = copy.deepcopy(model)
    assert accelerate(model) is model
    return model, untouched


def blocks_of(model: nn.Module, kind: LibraryModel) -> list[Any]:
    return list(model.get_submodule(kind.blocks))


# The same results


def test_outputs_hidden_states_and_losses_are_the_models_own(kind: LibraryModel) -> None:
    model, untouched = pair(kind)
    x = images()
    for call in kind.calls:
        with torch.no_grad():
            assert_same(call(model, x), call(untouched, x))
        assert_same(call(model, x), call(untouched, x))


def test_gradients_of_every_parameter_are_the_models_own(kind: LibraryModel) -> None:
    model, untouched = (model.train() for model in pair(kind))
    x = images()
    run = lambda model: kind.calls[0](model, x)  # noqa: E731
    assert_same_gradients(gradients(model, run), gradients(untouched, run))


def test_bf16_is_as_near_to_exact_results_as_the_model_itself(some: LibraryModel) -> None:
    model, untouched = pair(some)
    x = images()
    call = some.calls[0]
    with torch.no_grad():
        exact = tensors(call(copy.deepcopy(untouched).double(), x.double()))
        usual = tensors(call(untouched.bfloat16(), x.bfloat16()))
        found = tensors(call(model.bfloat16(), x.bfloat16()))
    assert max(assert_obeys_rule(*each) for each in zip(found, exact, usual, strict=True)) > 0


def test_autocast_gives_the_models_dtypes(some: LibraryModel) -> None:
    model, untouched = pair(some)
    x = images()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(some.calls[0](model, x), some.calls[0](untouched, x), 3e-2)


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_stochastic_depth_draws_the_same_random_numbers(some: LibraryModel, rate: float) -> None:
    model, untouched = (model.train() for model in pair(some, drop_path=rate))
    x = images(batch=6)
    run = lambda model: some.calls[0](model, x)  # noqa: E731
    torch.manual_seed(1)
    found = tensors(run(model))[0]
    torch.manual_seed(1)
    assert_same(found, tensors(run(untouched))[0])
    assert_same_gradients(gradients(model, run), gradients(untouched, run))


def test_training_goes_the_same_way(some: LibraryModel) -> None:
    model, untouched = (model.train() for model in pair(some, drop_path=0.1))
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
    model, _ = pair(some)
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
    for name in ("attend", "attend_packed"):
        spy(forms, name)
    depth = len(blocks_of(model, some))
    with torch.no_grad():
        some.calls[0](model, images())
    counts = {name: used.count(name) for name in used}
    separate = "Dinov2" in some.name
    expected = dict.fromkeys(("layer_norm.plain", "layer_norm.add", "add_residual"), depth)
    expected |= {"attend" if separate else "attend_packed": depth, "linear": depth * (6 if separate else 4)}
    if any(name.endswith("gate_proj") for name, _ in model.named_modules()):  # newer transformers: apart, so no SwiGLU
        expected["linear"] += depth
    else:
        gated = "swiglu" in some.name or "giant" in some.name
        expected |= {"activation.swiglu" if gated else "activation.gelu": depth}
    assert counts == expected


@runs_triton
def test_kernels_run_inside_when_asked_for(some: LibraryModel) -> None:
    model, untouched = (m.to(DEVICE) for m in pair(some))
    x = images(1).to(DEVICE)
    with torch.no_grad(), use_backend("attention=triton,layer_norm=triton,activation=triton", strict=True):
        found = some.calls[0](model, x)
    with torch.no_grad():
        assert_same(found, some.calls[0](untouched, x))


# The same object


def test_nothing_else_of_the_model_changes(kind: LibraryModel) -> None:
    model = kind.build()
    untouched = copy.deepcopy(model)
    before = {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    modules = {name: id(module) for name, module in model.named_modules()}
    accelerate(model)
    assert {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]} == before
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert list(model.state_dict()) == list(untouched.state_dict())
    assert str(model) == str(untouched)
    for ours, theirs in zip(blocks_of(model, kind), blocks_of(untouched, kind), strict=True):
        assert isinstance(ours, type(theirs))
        assert isinstance(ours, AcceleratedBlock)
        assert (type(ours).__name__, type(ours).__module__) == (type(theirs).__name__, type(theirs).__module__)
        assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)
    model.load_state_dict(untouched.state_dict())


def test_restored_models_give_the_same_bits(kind: LibraryModel) -> None:
    model, untouched = pair(kind)
    x = images()
    with torch.no_grad():
        for call in kind.calls:
            call(model, x)
        assert restore(model) is model
        for call in kind.calls:
            for ours, theirs in zip(tensors(call(model, x)), tensors(call(untouched, x)), strict=True):
                assert torch.equal(ours, theirs)
    for ours, theirs in zip(model.modules(), untouched.modules(), strict=True):
        assert type(ours) is type(theirs)
        assert vars(ours).keys() == vars(theirs).keys()
    accelerate(model)


def test_copies_and_pickles_are_accelerated_models_of_their_own(some: LibraryModel) -> None:
    model, _ = pair(some)
    x = images()
    copies = [copy.deepcopy(model)]
    if not some.name.startswith("hub") and "Backbone" not in some.name:  # transformers' own hooks on it refuse
        copies.append(pickle.loads(pickle.dumps(model)))
    for made in copies:
        assert type(blocks_of(made, some)[0]) is type(blocks_of(model, some)[0])
        with torch.no_grad():
            assert torch.equal(tensors(made(x))[0], tensors(model(x))[0])
            for parameter in made.parameters():
                parameter.add_(1)
            assert not torch.equal(tensors(made(x))[0], tensors(model(x))[0])


def test_calling_it_again_changes_nothing(some: LibraryModel) -> None:
    model, _ = pair(some)
    kinds = [type(module) for module in model.modules()]
    assert [type(module) for module in accelerate(model).modules()] == kinds


# Hooks, adapters and surgery


def test_hooks_on_every_part_see_what_they_saw(some: LibraryModel) -> None:
    model, untouched = pair(some)
    x = images()
    names = [name for name, _ in blocks_of(model, some)[0].named_modules()]
    for name in names:
        seen: list[list[Tensor]] = []
        for each in (model, untouched):
            module = blocks_of(each, some)[0].get_submodule(name)
            outputs: list[Tensor] = []
            handle = module.register_forward_hook(lambda m, args, out, outputs=outputs: outputs.extend(tensors(out)))
            with torch.no_grad():
                each(x)
            handle.remove()
            seen.append(outputs)
        assert_same(*seen)


def test_hooks_that_change_a_result_change_the_output(some: LibraryModel) -> None:
    model, untouched = pair(some)
    for name, module in blocks_of(untouched, some)[0].named_modules():
        if list(module.children()):
            continue
        handles = [
            blocks_of(each, some)[0].get_submodule(name).register_forward_hook(lambda m, args, out: 1.5 * out)
            for each in (model, untouched)
        ]
        with torch.no_grad():
            assert_same(model(images()), untouched(images()))
        for handle in handles:
            handle.remove()


def adapt(model: nn.Module) -> nn.Module:
    torch.manual_seed(7)
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear and "classifier" not in name]
    for name in linears:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LowRank(model.get_submodule(name)))  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("first", ["adapters", "accelerate"])
def test_adapters_in_place_of_linears_are_called(some: LibraryModel, first: str) -> None:
    untouched = adapt(some.build())
    model = adapt(some.build()) if first == "adapters" else accelerate(some.build())
    model = accelerate(model) if first == "adapters" else adapt(model)
    run = lambda model: some.calls[0](model, images())  # noqa: E731
    with torch.no_grad():
        assert_same(run(model), run(untouched))
    assert_same_gradients(gradients(model.train(), run), gradients(untouched.train(), run))


def _activation_of(mlp: Any) -> str:
    """Its name: timm's and Meta's, transformers' of 5.23, and that of 5.17."""
    return next(name for name in ("act", "activation_fn", "activation") if hasattr(mlp, name))


SURGERY: dict[str, Callable[[Any], None]] = {
    "activation": lambda block: setattr(block.mlp, _activation_of(block.mlp), nn.ReLU()),
    "tanh": lambda block: setattr(block.mlp, _activation_of(block.mlp), nn.GELU(approximate="tanh")),
    "norm": lambda block: setattr(block, "norm2", nn.RMSNorm(block.norm2.normalized_shape)),
    "no norm": lambda block: setattr(block, "norm1", nn.Identity()),
    "no affine": lambda block: setattr(block, "norm2", nn.LayerNorm(block.norm2.normalized_shape, bias=False)),
    "scale": lambda block: setattr(block, "ls1" if hasattr(block, "ls1") else "layer_scale1", nn.Tanh()),
    "no scale": lambda block: setattr(block, "ls2" if hasattr(block, "ls1") else "layer_scale2", nn.Identity()),
    "mlp": lambda block: setattr(block, "mlp", nn.Linear(*2 * [block.norm2.normalized_shape[0]])),
}


@pytest.mark.parametrize("change", SURGERY)
@pytest.mark.parametrize("make", [lambda: transformers_model("Dinov2", "Model"), hub_model], ids=["hf", "hub"])
def test_parts_that_are_replaced_later_are_called(make: Callable[[], nn.Module], change: str) -> None:
    pytest.importorskip("transformers")
    model = accelerate(filled(make()).eval())
    torch.manual_seed(0)
    block = next(module for module in model.modules() if isinstance(module, AcceleratedBlock))
    SURGERY[change](block)
    with torch.no_grad():
        found = model(images())
        assert_same(found, restore(model)(images()))


def test_only_a_plain_layer_norm_is_computed_by_the_op() -> None:
    assert is_layer_norm(nn.LayerNorm(8))
    for other in (nn.LayerNorm(8, bias=False), nn.LayerNorm(8, elementwise_affine=False), nn.LayerNorm((4, 8))):
        assert not is_layer_norm(other)
    assert not is_layer_norm(type("LayerNorm", (nn.LayerNorm,), {})(8))


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
    model = accelerate(filled(transformers_model("Dinov2", "Backbone")).eval())  # its hooks hang there from the start
    calls: list[int] = []
    attend = forms.attend
    monkeypatch.setattr(forms, "attend", lambda *args: calls.append(1) or attend(*args))
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


def test_masks_and_settings_of_timm_run_its_own_code() -> None:
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
    for each in (model, untouched):  # how people get timm's attention maps
        each.blocks[0].attn.fused_attn = False
        each.blocks[0].attn.attn_drop.register_forward_hook(lambda m, args, out: weights.append(out))
        each(images())
    assert_same(*weights)


def test_lists_and_masks_of_the_hub_models_run_as_they_did() -> None:
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
def test_it_compiles_to_one_graph(library: str) -> None:
    pytest.importorskip(library)
    made = timm_model("vit_small_patch14_dinov2") if library == "timm" else transformers_model("Dinov2", "Model")
    model = filled(made).eval()
    untouched = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(accelerate(model), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same(tensors(compiled(images()))[0], tensors(untouched(images()))[0])
    torch._dynamo.reset()


def test_it_exports_and_traces() -> None:
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


# What is found, and what is refused


def test_towers_inside_larger_models_are_found_and_the_rest_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    transformers = pytest.importorskip("transformers")
    text = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50
    )
    tower = transformers_model("Dinov2", "Model")
    config = transformers.LlavaConfig(vision_config=tower.config, text_config=text)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    before = {name: type(module) for name, module in model.named_modules()}
    with caplog.at_level(logging.INFO, logger="dinov2_fast"):
        accelerate(model)
    changed = {name for name, module in model.named_modules() if type(module) is not before[name]}
    assert changed == {f"model.vision_tower.encoder.layer.{i}" for i in range(2)}
    line = "model.vision_tower.encoder.layer: 2 of 2 Dinov2Layer accelerated"
    assert str(accelerated(model)) == line
    assert caplog.messages == [line]


def test_two_towers_are_two_rows_and_a_strange_block_says_why(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"left": filled(hub_model()), "right": filled(hub_model())}).eval()
    model["right"].blocks[1].attn = nn.MultiheadAttention(128, 2)
    assert all(row.accelerated == 0 for row in accelerated(model).rows)
    untouched = copy.deepcopy(model)
    accelerate(model)
    left, right = accelerated(model).rows
    assert (left.name, left.accelerated, left.count, left.reasons) == ("left.blocks", 2, 2, ())
    assert (right.name, right.accelerated, right.count) == ("right.blocks", 1, 2)
    reason = "right.blocks.1: its attention is a torch.nn.modules.activation.MultiheadAttention"
    assert right.reasons == (reason,)
    assert reason in caplog.text
    assert type(model["right"].blocks[1]) is type(untouched["right"].blocks[1])
    assert str(accelerated(nn.Linear(2, 2))) == "no blocks of a DINOv2"


def _with_forward() -> nn.Module:
    model = hub_model()
    for block in model.blocks:
        block.forward = lambda x: x
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no blocks": (lambda: nn.Linear(2, 2), "The repeated modules it has are: none"),
    "another architecture": (
        lambda: __import__("transformers").ViTModel(
            __import__("transformers").ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
        ),
        r"are: transformers.models.vit.modeling_vit.ViTLayer",
    ),
    "attention dropout": (
        lambda: transformers_model("Dinov2", "Model", attention_dropout=0.1).train(),
        r"encoder.layer.0, encoder.layer.1: it is in training mode and drops attention weights \(p = 0.1\)",
    ),
    "hub attention dropout": (lambda: hub_model(attention_dropout=0.2).train(), r"drops attention weights \(p = 0.2\)"),
    "timm attention dropout": (
        lambda: timm_model("vit_small_patch14_dinov2", attention_dropout=0.2).train(),
        r"drops attention weights \(p = 0.2\)",
    ),
    "norms in attention": (
        lambda: timm_model("vit_small_patch14_dinov2", qk_norm=True),
        "its attention has q_norm and k_norm",
    ),
    "own forward": (_with_forward, "it has a forward of its own, set on the instance"),
    "our own": (lambda: dinov2_fast.DinoVisionTransformer(embed_dim=64, depth=2, num_heads=1), "of this package"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_taken_is_refused_with_the_reason_and_left_as_it_was(case: str) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("timm")
    make, reason = REFUSED[case]
    model = make()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(TypeError, match=reason):
        accelerate(model)
    assert [type(module) for module in model.modules()] == kinds


def test_attention_dropout_runs_the_blocks_own_code_in_training(some: LibraryModel) -> None:
    model, untouched = pair(some, attention_dropout=0.2)
    with torch.no_grad():
        assert_same(model(images()), untouched(images()))
    for each in (model, untouched):
        each.train()
    run = lambda model: some.calls[0](model, images())  # noqa: E731
    assert_same_gradients(gradients(model, run), gradients(untouched, run))


def test_options_of_the_engine_need_the_engine() -> None:
    with pytest.raises(TypeError, match="precision: the engine's options need inference=True"):
        accelerate(hub_model(), precision="bf16")


def test_wrapped_classes_are_not_restored() -> None:
    model = accelerate(filled(hub_model()))
    block: Any = model.blocks[0]
    block.__class__ = type("Wrapped", (type(block),), {})
    with pytest.raises(ValueError, match="A Wrapped was made of an accelerated class"):
        restore(model)
