"""The models as modules: bad input, dtypes, copies, state dicts, hooks, compiling and exporting."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov2_fast.huggingface import BaseModelOutputWithPooling, Dinov2Config, Dinov2Model, ImageClassifierOutput
from tests.helpers.huggingface_peers import (
    FAMILIES,
    KIND_NAMES,
    KINDS,
    assert_close,
    images,
    make_pair,
    our_class,
    worst,
)

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "num_labels": 3}
TASKS = ("Model", "ForImageClassification", "Backbone")


@pytest.fixture(params=KINDS, ids=KIND_NAMES)
def model(request: pytest.FixtureRequest) -> Any:
    family, swiglu = request.param
    return make_pair(family, **SMALL, use_swiglu_ffn=swiglu).ours


def small(family: str = "Dinov2", task: str = "Model", **fields: Any) -> Any:
    return make_pair(family, task, **{**SMALL, **fields}).ours


def first(output: Any) -> Tensor:
    """Tokens, logits or the first feature map of what a model returned."""
    return output[0][0] if isinstance(output[0], tuple) else output[0]


@pytest.fixture(autouse=True)
def _no_compiled_code_of_other_tests() -> Iterator[None]:
    yield
    torch.compiler.reset()


# Bad input


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("pixels", "error", "message"),
    [
        (None, ValueError, "pixel_values is missing"),
        (torch.zeros(2, 4, 56, 56), ValueError, "takes 3 channels, got 4"),
        (torch.zeros(3, 56, 56), ValueError, r"shape \(3, 56, 56\)\. Add a batch dimension"),
        (torch.zeros(1, 1, 3, 56, 56), ValueError, "batch of images"),
        (torch.zeros(2, 3, 56, 56, dtype=torch.uint8), TypeError, "floating-point images, got torch.uint8"),
        (torch.zeros(2, 3, 13, 56), ValueError, r"\(13, 56\) pixels, smaller than one patch of 14"),
        (torch.zeros(2, 3, 56, 0), ValueError, "smaller than one patch"),
    ],
    ids=["none", "channels", "rank 3", "rank 5", "integers", "small", "empty"],
)
def test_bad_images_are_refused(task: str, pixels: Tensor | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small(task=task)(pixels)


def test_bad_masks_are_refused(model: Any) -> None:
    with pytest.raises(
        ValueError, match=r"masks must be \(batch, patches\) = \(2, 16\) for these images, got \(2, 15\)"
    ):
        model(images(56), torch.zeros(2, 15, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"got \(1, 16\)"):
        model(images(56), torch.zeros(1, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match="use_mask_token=False"):
        small(use_mask_token=False)(images(56), torch.zeros(2, 16, dtype=torch.bool))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["attention_mask", "head_mask"])
def test_attention_and_head_masks_are_refused(task: str, name: str) -> None:
    with pytest.raises(ValueError, match="attention_mask and head_mask are not supported"):
        small(task=task)(images(56), **{name: torch.ones(2, 17)})
    small(task=task)(images(56), **{name: None})


def test_an_empty_batch_gives_empty_features(model: Any) -> None:
    assert model(images(56, batch=0)).pooler_output.shape == (0, 32)


# dtypes and devices


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("task", TASKS)
def test_low_precision_models_take_float32_images(task: str, dtype: torch.dtype) -> None:
    model = small(task=task)
    low = copy.deepcopy(model).to(dtype)
    assert low.dtype is dtype
    out = first(low(images(56)))
    assert out.dtype is dtype
    assert torch.equal(out, first(low(images(56).to(dtype))))
    assert 0 < worst(out.float(), first(model(images(56)))) < (0.02 if dtype is torch.float16 else 0.15)


def test_half_and_to_convert_the_model(model: Any) -> None:
    assert model.half() is model
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert model.to(torch.float64).dtype is torch.float64
    assert model(images(56)).pooler_output.dtype is torch.float64
    assert model.to("meta").device.type == "meta"
    assert model(images(56).to("meta")).pooler_output.shape == (2, 32)


# Copies and state dicts


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_the_same(task: str, clone: Any) -> None:
    model = small(task=task)
    expected = model(images(56)).to_tuple()
    twin = clone(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.config.output_hidden_states = True
    assert_close(twin(images(56)).to_tuple(), expected, 0.0)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_dict_loads_back(family: str, task: str) -> None:
    model = small(family, task)
    empty = our_class(family, task)(model.config).eval()
    assert empty.load_state_dict(model.state_dict()) == ([], [])
    assert_close(empty(images(56)).to_tuple(), model(images(56)).to_tuple(), 0.0)
    names = set(model.base_model.state_dict())
    assert {"cls_token", "pos_embed", "blocks.1.attn.qkv.weight", "norm.bias"} <= names
    if task == "ForImageClassification":
        prefix = model.base_model_prefix + "."
        assert set(model.state_dict()) == {prefix + name for name in names} | {"classifier.weight", "classifier.bias"}


def test_head_of_another_model_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"Missing \(2\): classifier.weight, classifier.bias"):
        small(task="ForImageClassification").load_state_dict(small().state_dict())


def test_train_and_eval_switch_dropout() -> None:
    model = small(hidden_dropout_prob=0.5)
    first = model(images(56)).pooler_output
    assert torch.equal(model(images(56)).pooler_output, first)
    model.train()
    assert worst(model(images(56)).pooler_output, first) > 0.01
    model.eval()
    assert torch.equal(model(images(56)).pooler_output, first)
    assert Dinov2Model(Dinov2Config(**SMALL)).training, "a module is in train mode until eval() is called"


def test_parts_are_found_by_transformers_names(model: Any) -> None:
    assert model.base_model is model
    assert model.get_input_embeddings() is model.patch_embed
    classifier = small(task="ForImageClassification")
    assert classifier.base_model is classifier.dinov2
    assert classifier.get_input_embeddings() is classifier.dinov2.patch_embed
    assert classifier.num_labels == 3
    assert classifier.main_input_name == "pixel_values"
    assert classifier.get_output_embeddings() is None
    assert not classifier.can_generate()


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_counted_as_transformers_counts(family: str) -> None:
    ours, theirs = make_pair(family, "ForImageClassification", **SMALL)
    ours.base_model.register_buffer("something", torch.zeros(7))
    theirs.base_model.register_buffer("something", torch.zeros(7))
    for arguments in ({}, {"only_trainable": True}, {"exclude_embeddings": True}):
        assert ours.num_parameters(**arguments) == theirs.num_parameters(**arguments) > 0
    assert ours.get_memory_footprint() == theirs.get_memory_footprint()
    assert ours.get_memory_footprint(return_buffers=False) == ours.get_memory_footprint() - 28


def test_every_attention_implementation_is_this_one(model: Any) -> None:
    before = model(images(56)).pooler_output
    model.set_attn_implementation("eager")
    assert torch.equal(model(images(56)).pooler_output, before)


def test_printing_shows_the_backends() -> None:
    assert re.search(r"  activation +torch +the others need a GPU\n", repr(small(task="ForImageClassification")))


# Hooks

PARTS = ("", "norm1", "attn", "attn.qkv", "ls1", "norm2", "mlp", "mlp.fc1", "ls2")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("part", PARTS, ids=[part or "block" for part in PARTS])
def test_hooks_fire_and_may_change_the_output(part: str, task: str) -> None:
    model = small(task=task)
    module = model.base_model.blocks[1].get_submodule(part)
    before = model(images(56)).to_tuple()
    seen: list[Tensor] = []
    watch = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    assert_close(model(images(56)).to_tuple(), before, 1e-6)
    assert len(seen) == 1
    watch.remove()
    change = module.register_forward_hook(lambda _module, _inputs, output: output + 1.0 * output.flip(-1))
    after = model(images(56)).to_tuple()
    change.remove()
    assert worst(first(after), first(before)) > 1e-3
    assert_close(model(images(56)).to_tuple(), before, 0.0)


def test_hidden_states_show_what_hooks_changed(model: Any) -> None:
    handle = model.blocks[0].register_forward_hook(lambda _module, _inputs, output: torch.zeros_like(output))
    assert not model(images(56), output_hidden_states=True).hidden_states[1].any()
    handle.remove()


def test_a_replaced_part_is_used(model: Any) -> None:
    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    x = images(56)
    gamma = model.blocks[0].ls1.gamma
    with torch.no_grad():
        gamma.mul_(2)
        expected = model(x).pooler_output
        gamma.div_(2)
    model.blocks[0].ls1 = Doubled(model.blocks[0].ls1)
    assert worst(model(x).pooler_output, expected) < 1e-6


# Compiling and exporting

OUTPUTS = {"Model": BaseModelOutputWithPooling, "ForImageClassification": ImageClassifierOutput}


@pytest.mark.parametrize("task", OUTPUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_compiles_as_one_graph(family: str, task: str) -> None:
    model = small(family, task)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for i, (size, batch) in enumerate([(56, 2), (70, 2), (60, 3)]):
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            x, asked = images(size, batch=batch), {"output_hidden_states": True, "output_attentions": True}
            output = compiled(x, **asked)
            assert type(output) is OUTPUTS[task]
            assert list(output) == list(model(x, **asked))
            assert_close(output.to_tuple(), model(x, **asked).to_tuple(), 1e-5)


def test_compiles_with_labels_masks_and_tuples() -> None:
    classifier, x = small(task="ForImageClassification", problem_type="single_label_classification"), images(56)
    compiled = torch.compile(classifier, fullgraph=True, backend="eager")
    labels = torch.tensor([0, 2])
    assert_close(compiled(x, labels=labels).to_tuple(), classifier(x, labels=labels).to_tuple(), 1e-5)
    model, mask = small(), torch.arange(32).view(2, 16) % 3 == 0
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    as_tuple = compiled(x, mask, return_dict=False)
    assert type(as_tuple) is tuple
    assert_close(as_tuple, model(x, mask).to_tuple(), 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_backbone_compiles(family: str) -> None:
    model = small(family, "Backbone")
    model.out_indices = [1, 2]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(images(56)).feature_maps, model(images(56)).feature_maps, 1e-5)


@pytest.mark.slow
def test_compiles_to_machine_code() -> None:
    model = small("Dinov2WithRegisters", "ForImageClassification", num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch in (2, 3):
        x = images(56, batch=batch)
        with torch.no_grad():
            assert_close(compiled(x).to_tuple(), model(x).to_tuple(), 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_exports_with_a_dynamic_batch(family: str) -> None:
    model = small(family)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images(70),), dynamic_shapes={"pixel_values": {0: batch}})
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {target.split(".")[0] for target in targets if "getitem" not in target} == {"aten"}
    for count in (1, 2, 5):
        x = images(70, batch=count)
        output = program.module()(x)
        assert isinstance(output, BaseModelOutputWithPooling)
        assert_close(output.to_tuple(), model(x).to_tuple(), 1e-5)


# torch warns that the checks of the input's shape are not part of the trace, which is so and meant.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("task", TASKS)
def test_traces_for_any_size(task: str) -> None:
    """`torch.jit.trace` with tuples, as transformers' documentation shows it."""
    model = small(task=task)
    model.config.return_dict = False
    with torch.no_grad():
        traced = torch.jit.trace(model, (images(56),))
        for size, batch in ((56, 2), (98, 3)):
            x = images(size, batch=batch)
            assert_close(first(traced(x)), first(model(x)), 1e-5)
