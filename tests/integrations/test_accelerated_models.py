"""An accelerated model stays the object that it was: with its names, hooks, adapters, copies, and a way back."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov2_fast import accelerate, unaccelerate
from dinov2_fast.integrations.block import AcceleratedBlock
from tests.helpers.library_models import (
    LibraryModel,
    LowRank,
    accelerated_pair,
    assert_same,
    assert_same_gradients,
    blocks_of,
    filled,
    gradients,
    hub_model,
    images,
    tensors,
    transformers_model,
)


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


def test_unaccelerated_models_give_the_same_bits(kind: LibraryModel) -> None:
    model, untouched = accelerated_pair(kind.build())
    x = images()
    with torch.no_grad():
        for call in kind.calls:
            call(model, x)
        assert unaccelerate(model) is model
        for call in kind.calls:
            for ours, theirs in zip(tensors(call(model, x)), tensors(call(untouched, x)), strict=True):
                assert torch.equal(ours, theirs)
    for ours, theirs in zip(model.modules(), untouched.modules(), strict=True):
        assert type(ours) is type(theirs)
        assert vars(ours).keys() == vars(theirs).keys()
    accelerate(model)


def test_copies_and_pickles_are_accelerated_models_of_their_own(some: LibraryModel) -> None:
    model, _ = accelerated_pair(some.build())
    x = images()
    copies = [copy.deepcopy(model)]
    if not some.name.startswith("hub") and "Backbone" not in some.name:  # transformers' hooks cannot be pickled
        copies.append(pickle.loads(pickle.dumps(model)))
    for made in copies:
        assert type(blocks_of(made, some)[0]) is type(blocks_of(model, some)[0])
        with torch.no_grad():
            assert torch.equal(tensors(made(x))[0], tensors(model(x))[0])
            for parameter in made.parameters():
                parameter.add_(1)
            assert not torch.equal(tensors(made(x))[0], tensors(model(x))[0])


def test_accelerating_twice_changes_nothing(some: LibraryModel) -> None:
    model, _ = accelerated_pair(some.build())
    kinds = [type(module) for module in model.modules()]
    assert [type(module) for module in accelerate(model).modules()] == kinds


def test_hooks_on_every_part_see_what_they_saw(some: LibraryModel) -> None:
    model, untouched = accelerated_pair(some.build())
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
    model, untouched = accelerated_pair(some.build())
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
    """The name of the activation in timm and Meta's code, in transformers 5.23, and in 5.17."""
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
        assert_same(found, unaccelerate(model)(images()))


def test_a_model_that_was_wrapped_since_cannot_be_unaccelerated() -> None:
    model = accelerate(filled(hub_model()))
    block: Any = model.blocks[0]
    block.__class__ = type("Wrapped", (type(block),), {})
    with pytest.raises(ValueError, match="Wrapped is a subclass of an accelerated class"):
        unaccelerate(model)
