"""`accelerate` follows, or refuses in words, what a user changes in a block that is no tensor and no submodule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dinov2_fast import accelerate, accelerated
from dinov2_fast.integrations.blocks import AcceleratedBlock
from tests.foreign_models import KINDS, Foreign, needs, pictures, tensors
from tests.test_accelerate import assert_same

LIBRARIES = {name: next(kind for kind in KINDS if kind.name == name) for name in ("Dinov2Model", "hub-mlp")}
LIBRARIES["timm"] = next(kind for kind in KINDS if kind.name == "timm-small_patch14_reg4_dinov2")

Change = Callable[[Any, pytest.MonkeyPatch], None]


def attention_of(block: Any) -> Any:
    return block.attention.attention if hasattr(block.attention, "attention") else block.attention


def halved(kind: type) -> Callable[..., Any]:
    """The forward of a class, giving half of it."""
    forward = kind.forward

    def half(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = forward(self, *args, **kwargs)
        return (0.5 * result[0], *result[1:]) if isinstance(result, tuple) else 0.5 * result

    return half


def patch_class(of: Callable[[Any], Any]) -> Change:
    """Another forward on the class of a part."""

    def change(block: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        part = of(block)
        kind = part.origin[1] if isinstance(part, AcceleratedBlock) else type(part)
        if kind.forward.__name__ != "half":
            monkeypatch.setattr(kind, "forward", halved(kind))

    return change


def replace_class(of: Callable[[Any], Any]) -> Change:
    """A class made of that of a part."""

    def change(block: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        part = of(block)
        part.__class__ = type("Halved", (type(part),), {"forward": halved(type(part))})

    return change


def set_forward(of: Callable[[Any], Any]) -> Change:
    """Another forward on the instance of a part."""

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


def changed_model(library: str, name: str, patch: pytest.MonkeyPatch, first: bool) -> tuple[Any, Any]:
    """A model whose blocks are changed, before it is accelerated or after, and what it gives in its own code."""
    kind: Foreign = LIBRARIES[library]
    needs(kind)
    change = CHANGES[library][name]
    stock, model = kind.build(), kind.build()
    if name == "output's forward" and not hasattr(stock.get_submodule(kind.blocks)[0].attention, "output"):  # type: ignore[index]
        pytest.skip("this transformers has no such module")
    before = tensors(stock(pictures()))[0]
    if not first:
        accelerate(model)
    for each in (stock, model):
        for block in each.get_submodule(kind.blocks):  # type: ignore[union-attr]
            change(block, patch)
    wanted = stock(pictures())
    assert (tensors(wanted)[0] - before).abs().max() > 1e-3 * before.abs().max()  # it is a change
    return model, wanted


@pytest.mark.parametrize(("library", "name"), CASES, ids=[f"{library}-{name}" for library, name in CASES])
def test_a_change_afterwards_is_followed_and_reported(library: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, wanted = changed_model(library, name, monkeypatch, first=False)
    with torch.no_grad():
        assert_same(model(pictures()), wanted)
    (row,) = accelerated(model).rows
    assert bool(row.reasons) == (name != "eps" or "eps was changed" in row.reasons[0])
    assert row.accelerated == (0 if name == "block's class" else 2)


@pytest.mark.parametrize(("library", "name"), CASES, ids=[f"{library}-{name}" for library, name in CASES])
def test_a_change_beforehand_is_followed_or_refused_in_words(
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
        assert_same(model(pictures()), wanted)


@pytest.mark.parametrize("name", ["scaling", "heads", "mlp's forward"])
def test_a_compiled_model_follows_a_change(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = LIBRARIES["Dinov2Model"]
    needs(kind)
    stock, model = kind.build(), kind.build()
    torch._dynamo.reset()
    compiled = torch.compile(accelerate(model), backend="eager")
    with torch.no_grad():
        compiled(pictures())
        for each in (stock, model):
            for block in each.get_submodule(kind.blocks):  # type: ignore[union-attr]
                CHANGES["Dinov2Model"][name](block, monkeypatch)
        assert_same(tensors(compiled(pictures()))[0], tensors(stock(pictures()))[0])
    torch._dynamo.reset()
