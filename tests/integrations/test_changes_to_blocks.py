"""Accelerated blocks follow what a user changes in them: attributes, classes, methods, hooks, submodules, modes."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dinov2_fast import accelerate, acceleration_report
from dinov2_fast.integrations import parts
from dinov2_fast.integrations.block import AcceleratedBlock
from tests.helpers.library_models import KINDS, LibraryModel, assert_same, images, needs, tensors

LIBRARIES = {name: next(kind for kind in KINDS if kind.name == name) for name in ("Dinov2Model", "hub-mlp")}
LIBRARIES["timm"] = next(kind for kind in KINDS if kind.name == "timm-small_patch14_reg4_dinov2")

Change = Callable[[Any, pytest.MonkeyPatch], None]


def attention_of(block: Any) -> Any:
    return block.attention.attention if hasattr(block.attention, "attention") else block.attention


def halved(kind: type) -> Callable[..., Any]:
    """A forward that returns half of what the forward of a class returns."""
    forward = kind.forward

    def half(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = forward(self, *args, **kwargs)
        return (0.5 * result[0], *result[1:]) if isinstance(result, tuple) else 0.5 * result

    return half


def patch_class(of: Callable[[Any], Any]) -> Change:
    """Replaces the forward of a part's class."""

    def change(block: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        part = of(block)
        kind = part.class_swap.original if isinstance(part, AcceleratedBlock) else type(part)
        if kind.forward.__name__ != "half":
            monkeypatch.setattr(kind, "forward", halved(kind))

    return change


def replace_class(of: Callable[[Any], Any]) -> Change:
    """Gives a part a subclass of its class."""

    def change(block: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        part = of(block)
        part.__class__ = type("Halved", (type(part),), {"forward": halved(type(part))})

    return change


def set_forward(of: Callable[[Any], Any]) -> Change:
    """Sets a forward on the instance of a part."""

    def change(block: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        part = of(block)
        part.forward = halved(type(part)).__get__(part)

    return change


def assign(of: Callable[[Any], Any], **values: Any) -> Change:
    def change(block: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in values.items():
            setattr(of(block), name, value)

    return change


def _norm2(block: Any) -> Any:
    return block.norm2


def _mlp(block: Any) -> Any:
    return block.mlp


def _attn(block: Any) -> Any:
    return block.attn


CHANGES: dict[str, dict[str, Change]] = {
    "Dinov2Model": {
        "scaling": assign(attention_of, scaling=0.05),
        "heads": assign(attention_of, num_attention_heads=4, attention_head_size=32, scaling=32**-0.5),
        "causal": assign(attention_of, is_causal=True),
        "eps": assign(_norm2, eps=0.5),
        "attention's class": patch_class(attention_of),
        "outer attention's class": patch_class(lambda block: block.attention),
        "mlp's class": patch_class(_mlp),
        "scale's class": patch_class(lambda block: block.layer_scale1),
        "another class of attention": replace_class(attention_of),
        "another class of mlp": replace_class(_mlp),
        "attention's forward": set_forward(attention_of),
        "mlp's forward": set_forward(_mlp),
        "norm's forward": set_forward(_norm2),
        "output's forward": set_forward(lambda block: block.attention.output),
    },
    "timm": {
        "unfused scale": assign(_attn, fused_attn=False, scale=0.05),
        "heads": assign(_attn, num_heads=6, head_dim=32),
        "eps": assign(_norm2, eps=0.5),
        "attention's class": patch_class(_attn),
        "mlp's class": patch_class(_mlp),
        "norm's class": patch_class(_norm2),
        "scale's class": patch_class(lambda block: block.ls2),
        "another class of attention": replace_class(_attn),
        "attention's forward": set_forward(_attn),
    },
    "hub-mlp": {
        "heads": assign(_attn, num_heads=4),
        "eps": assign(_norm2, eps=0.5),
        "attention's class": patch_class(_attn),
        "mlp's class": patch_class(_mlp),
        "scale's class": patch_class(lambda block: block.ls1),
        "block's class": patch_class(lambda block: block),
        "another class of mlp": replace_class(_mlp),
        "mlp's forward": set_forward(_mlp),
    },
}
CASES = [(library, name) for library, changes in CHANGES.items() for name in changes]


def call_plainly(model: Any) -> Any:
    """Calls `model` once, after which its blocks have chosen their functions."""
    with torch.no_grad():
        return model(images())


def changed_model(library: str, name: str, patch: pytest.MonkeyPatch, first: bool) -> tuple[Any, Any]:
    """A model whose blocks are changed, before it is accelerated if `first`, and the outputs of its own code."""
    kind: LibraryModel = LIBRARIES[library]
    needs(kind)
    change = CHANGES[library][name]
    stock, model = kind.build(), kind.build()
    if name == "output's forward" and not hasattr(stock.get_submodule(kind.blocks)[0].attention, "output"):  # type: ignore[index]
        pytest.skip("this transformers has no such module")
    before = tensors(stock(images()))[0]
    if not first:
        call_plainly(accelerate(model))
    for each in (stock, model):
        for block in each.get_submodule(kind.blocks):  # type: ignore[union-attr]
            change(block, patch)
    wanted = stock(images())
    assert (tensors(wanted)[0] - before).abs().max() > 1e-3 * before.abs().max()  # the change has an effect
    return model, wanted


@pytest.mark.parametrize(("library", "name"), CASES, ids=[f"{library}-{name}" for library, name in CASES])
def test_a_change_afterwards_is_followed_and_reported(library: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, wanted = changed_model(library, name, monkeypatch, first=False)
    with torch.no_grad():
        assert_same(model(images()), wanted)
    (group,) = acceleration_report(model).groups
    assert ("eps was changed" if name == "eps" else "runs its own code") in group.reasons[0]
    assert group.accelerated == (0 if name == "block's class" else 2)


@pytest.mark.parametrize(("library", "name"), CASES, ids=[f"{library}-{name}" for library, name in CASES])
def test_a_change_beforehand_is_followed_or_refused_with_a_reason(
    library: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, wanted = changed_model(library, name, monkeypatch, first=True)
    refusal = "computes something else"
    try:
        accelerate(model)
    except TypeError as error:
        refusal = str(error)
    assert "computes something else" in refusal
    with torch.no_grad():
        assert_same(model(images()), wanted)


@pytest.mark.parametrize("name", ["scaling", "heads", "mlp's forward"])
def test_a_compiled_model_follows_a_change(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = LIBRARIES["Dinov2Model"]
    needs(kind)
    stock, model = kind.build(), kind.build()
    torch._dynamo.reset()
    compiled = torch.compile(accelerate(model), backend="eager")
    with torch.no_grad():
        compiled(images())
        for each in (stock, model):
            for block in each.get_submodule(kind.blocks):  # type: ignore[union-attr]
                CHANGES["Dinov2Model"][name](block, monkeypatch)
        assert_same(tensors(compiled(images()))[0], tensors(stock(images()))[0])
    torch._dynamo.reset()


def _doubles(module: Any, *args: Any) -> Any:
    """A hook that doubles what it may replace: the arguments before a call, or the result after it."""
    return tuple(2 * each for each in args[-1]) if isinstance(args[-1], tuple) else 2 * args[-1]


def _add_hook_anew(module: Any) -> None:
    module._forward_hooks = OrderedDict()
    module.register_forward_hook(_doubles)


def _replace_buffer(module: Any) -> None:
    weight = module.weight.detach()
    del module.weight
    module.register_buffer("weight", 2 * weight)


# How to change a part of timm's block, and which parts to change.
SMALL_CHANGES: dict[str, tuple[Callable[[Any], object], tuple[str, ...]]] = {
    "hook": (
        lambda m: m.register_forward_hook(_doubles),
        ("", "norm1", "attn", "attn.qkv", "mlp.act", "ls1", "mlp.drop2"),
    ),
    "hook before": (lambda m: m.register_forward_pre_hook(_doubles), ("attn", "attn.proj", "mlp", "drop_path1")),
    "new hooks": (_add_hook_anew, ("attn.qkv", "norm2", "mlp.norm")),
    "mode": (lambda m: m.train(), ("attn.attn_drop", "attn.proj_drop", "mlp.drop1")),
    "rate": (lambda m: setattr(m.train(), "p", 1.0), ("mlp.drop1",)),
    "weight": (lambda m: setattr(m, "weight", nn.Parameter(2 * m.weight.detach())), ("attn.qkv", "norm1", "norm2")),
    "weight in place": (lambda m: m.weight.data.mul_(2), ("attn.qkv", "norm1", "norm2")),
    "buffer": (_replace_buffer, ("attn.proj", "norm1", "norm2")),
    "scale": (lambda m: setattr(m, "gamma", nn.Parameter(2 * m.gamma.detach())), ("ls1", "ls2")),
    "submodule": (lambda m: setattr(m, "act", nn.ReLU()), ("mlp",)),
    "dropout": (lambda m: setattr(m, "drop2", nn.Tanh()), ("mlp",)),
    "part": (lambda m: setattr(m, "mlp", nn.Linear(192, 192)), ("",)),
}


@pytest.mark.parametrize(
    ("name", "part"), [(name, part) for name, (_, parts) in SMALL_CHANGES.items() for part in parts]
)
def test_a_change_between_two_calls_is_followed_and_so_is_its_removal(name: str, part: str) -> None:
    kind = LIBRARIES["timm"]
    needs(kind)
    rates = {"attention_dropout": 0.2, "proj_drop_rate": 0.2}
    stock, model = kind.build(**rates), accelerate(kind.build(**rates))
    call_plainly(model)
    before = call_plainly(stock)
    results = []
    for each in (stock, model):
        block: Any = each.blocks[0]  # type: ignore[union-attr]
        torch.manual_seed(0)
        undone = SMALL_CHANGES[name][0](block.get_submodule(part))
        results.append(call_plainly(each))
        if isinstance(undone, torch.utils.hooks.RemovableHandle):
            undone.remove()
            assert_same(call_plainly(each), before)
    assert_same(results[1], results[0])
    # timm looks at the mode of the attention, not of its dropout
    assert torch.equal(results[0], before) == (part == "attn.attn_drop")


@pytest.mark.parametrize("part", ["", "blocks.1", "blocks.1.drop_path1"])
@pytest.mark.parametrize("library", ["timm", "hub-mlp"])
def test_training_between_two_calls_is_followed(library: str, part: str) -> None:
    kind = LIBRARIES[library]
    needs(kind)
    stock, model = (kind.build(drop_path=0.1).train() for _ in range(2))
    accelerate(model)
    for training in (True, False, True):
        results = []
        for each in (stock, model):
            each.get_submodule(part).training = training
            torch.manual_seed(1)
            results.append(call_plainly(each))
        assert_same(results[1], results[0])


def test_a_hook_on_all_modules_is_followed() -> None:
    kind = LIBRARIES["timm"]
    needs(kind)
    model = accelerate(kind.build())
    call_plainly(model)
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(type(m).__name__))
    try:
        call_plainly(model)
    finally:
        handle.remove()
    assert seen.count("Linear") == 2 * 4


def test_a_replaced_forward_of_torchs_own_class_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = LIBRARIES["hub-mlp"]
    needs(kind)
    stock, model = kind.build(), accelerate(kind.build())
    call_plainly(model)
    monkeypatch.setattr(nn.LayerNorm, "forward", halved(nn.LayerNorm))
    assert_same(call_plainly(model), call_plainly(stock))


def test_another_implementation_of_attention_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = LIBRARIES["Dinov2Model"]
    needs(kind)
    model: Any = accelerate(kind.build())
    calls: list[int] = []
    attend = parts.attend
    monkeypatch.setattr(parts, "attend", lambda *args: calls.append(1) or attend(*args))
    for implementation, expected in (("sdpa", 2), ("eager", 0), ("sdpa", 2)):
        model.set_attn_implementation(implementation)
        calls.clear()
        call_plainly(model)
        assert len(calls) == expected


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))])
def test_a_copy_of_a_block_that_ran_is_computed_with_its_own_parts(copied: Callable[[Any], Any]) -> None:
    kind = LIBRARIES["timm"]
    needs(kind)
    block: Any = accelerate(kind.build()).blocks[0]  # type: ignore[union-attr]
    x = torch.randn(1, 3, 192)
    with torch.no_grad():
        before = block(x)
        made = copied(block)
        made._modules = {**made._modules, "mlp": nn.Identity()}
        assert not torch.equal(made(x), before)
        assert torch.equal(block(x), before)


def test_a_model_that_ran_holds_no_replaced_weight_and_is_freed_at_once() -> None:
    kind = LIBRARIES["timm"]
    needs(kind)
    model: Any = accelerate(kind.build())
    call_plainly(model)
    replaced = weakref.ref(model.blocks[0].attn.qkv.weight)
    model.blocks[0].attn.qkv.weight = nn.Parameter(torch.zeros(576, 192))
    assert replaced() is None
    gc.disable()
    block = weakref.ref(model.blocks[0])
    del model
    gc.enable()
    assert block() is None
