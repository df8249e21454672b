"""`WeightWatch`: which changes of a model it detects. `run_up_to_date`: when it checks for them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dinov2_fast.inference import weight_watch
from dinov2_fast.inference.weight_watch import SettingsWatch, WeightWatch, run_up_to_date
from tests.helpers.small_models import small


def _watched() -> Any:
    """A model with every kind of state that is compared."""
    model = small()
    model.config = type("Config", (), {})()
    model.config.scale = 1.0
    model.sizes, model.scale, model.table = [1, 2], nn.Parameter(torch.ones(1)), {"a": 1}
    model.register_buffer("count", torch.zeros(2, 2))
    model.register_buffer("later", None)
    model.tensor = torch.zeros(2)
    model.kept_hook = model.norm.register_forward_hook(lambda *args: None)
    return model


def _swap(model: Any) -> None:
    blocks = model.blocks._modules
    blocks["0"], blocks["1"] = blocks["1"], blocks["0"]


def _hook_in_a_new_dictionary(model: Any) -> None:
    model.blocks[0]._forward_hooks = OrderedDict()
    model.blocks[0].register_forward_hook(lambda *args: None)


def _in_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        model.norm.bias.add_(1)


WEIGHTS: dict[str, Callable[[Any], Any]] = {
    "written": lambda m: m.norm.bias.detach().add_(1),
    "written in inference mode": _in_inference_mode,
    "written, a buffer": lambda m: m.count.add_(1),
    "written, no parameter": lambda m: m.tensor.add_(1),
    "moved": lambda m: setattr(m.norm.bias, "data", m.norm.bias.data.clone()),
    "optimizer": lambda m: torch.optim.SGD([m.mask_token], lr=0.0).step(),
}
SETTINGS: dict[str, Callable[[Any], Any]] = {
    "another parameter": lambda m: setattr(m.norm, "bias", nn.Parameter(m.norm.bias.detach())),
    "another parameter, equal, of one element": lambda m: setattr(m, "scale", nn.Parameter(torch.ones(1))),
    "another parameter, in the dictionary": lambda m: m._parameters.update(scale=nn.Parameter(torch.ones(1))),
    "another view of the same data": lambda m: setattr(m, "count", m.count.mT),
    "another tensor": lambda m: setattr(m, "tensor", torch.zeros(2)),
    "a parameter less": lambda m: m._parameters.pop("scale"),
    "a parameter less, the last": lambda m: m.norm._parameters.pop("bias"),
    "one more parameter, the last": lambda m: m.norm.register_parameter("gamma", nn.Parameter(torch.ones(1))),
    "a first parameter": lambda m: m.blocks.register_parameter("gamma", nn.Parameter(torch.ones(1))),
    "a first buffer": lambda m: m.norm.register_buffer("mean", None),
    "a buffer for None": lambda m: setattr(m, "later", torch.ones(1)),
    "another module": lambda m: m.blocks.__setitem__(0, copy.deepcopy(m.blocks[0])),
    "modules in another order": _swap,
    "a module less": lambda m: m.blocks.__delitem__(1),
    "a first module": lambda m: m.norm.add_module("inside", nn.Identity()),
    "a hook": lambda m: m.blocks[0].register_forward_hook(lambda *args: None),
    "a hook before": lambda m: m.blocks[0].register_forward_pre_hook(lambda *args: None),
    "a hook in a new dictionary": _hook_in_a_new_dictionary,
    "one more hook": lambda m: m.norm.register_forward_hook(lambda *args: None),
    "a hook less": lambda m: m.kept_hook.remove(),
    "an attribute": lambda m: setattr(m.blocks[1].norm2, "eps", 0.1),
    "one more attribute": lambda m: setattr(m.blocks[1].norm2, "note", 1),
    "an attribute less": lambda m: delattr(m, "sizes"),
    "an attribute for another": lambda m: (delattr(m, "sizes"), setattr(m, "other", 1)),
    "an array": lambda m: setattr(m, "sizes", torch.ones(2)),
    "in a list": lambda m: m.sizes.append(3),
    "in a dictionary": lambda m: m.table.update(a=2),
    "in the config": lambda m: setattr(m.config, "scale", 2.0),
    "a class": lambda m: setattr(m.blocks[0].mlp.act, "__class__", nn.SiLU),
}


@pytest.mark.parametrize("name", [*WEIGHTS, *SETTINGS])
def test_every_change_is_detected_and_nothing_else(name: str) -> None:
    model = _watched()
    whole, settings = WeightWatch(model), SettingsWatch(model.modules())
    model(torch.randn(1, 3, 28, 28)).sum().backward()
    model.requires_grad_(False).requires_grad_(True).train().eval()
    assert not whole.changed()
    assert not settings.changed()
    (WEIGHTS | SETTINGS)[name](model)
    assert whole.changed()
    assert settings.changed() == (name in SETTINGS)


def test_a_patched_class_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    settings = SettingsWatch([model.blocks[0]])
    monkeypatch.setattr(type(model.norm), "note", 1, raising=False)
    assert not settings.changed(), "a class of torch's"
    monkeypatch.setattr(type(model.blocks[0]), "forward", lambda self, x: x)
    assert settings.changed()


def _order(asynchronous: bool, answers: list[bool], monkeypatch: pytest.MonkeyPatch, fails: int = 0) -> list[str]:
    """The steps of `run_up_to_date` if `changed` returns these answers and the first `fails` runs raise."""
    monkeypatch.setattr(weight_watch, "is_asynchronous", lambda device: asynchronous)
    happened: list[str] = []

    def run() -> int:
        happened.append("run")
        if happened.count("run") <= fails:
            raise ValueError
        return happened.count("run")

    def changed() -> bool:
        happened.append("check")
        return answers.pop(0)

    error = None
    try:
        result = run_up_to_date(run, changed, lambda: happened.append("renew"), torch.device("cpu"))
    except ValueError as raised:
        error = raised
    else:
        assert result == happened.count("run"), "the result is that of the last run"
    assert error is None or error.__context__ is None
    return [*happened, "error"] if error else happened


def test_changes_are_checked_before_the_run_or_while_the_device_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _order(False, [False], monkeypatch) == ["check", "run"]
    assert _order(False, [True], monkeypatch) == ["check", "renew", "run"]
    assert _order(True, [False], monkeypatch) == ["run", "check"]
    assert _order(True, [True], monkeypatch) == ["run", "check", "renew", "run"]


def test_an_error_of_the_run_is_raised_if_nothing_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _order(True, [False], monkeypatch, fails=1) == ["run", "check", "error"]
    assert _order(True, [True], monkeypatch, fails=1) == ["run", "check", "renew", "run"]
    assert _order(True, [True], monkeypatch, fails=2) == ["run", "check", "renew", "run", "error"]
    assert _order(False, [True], monkeypatch, fails=1) == ["check", "renew", "run", "error"]


def test_only_a_gpu_is_asynchronous() -> None:
    assert not any(weight_watch.is_asynchronous(torch.device(name)) for name in ("cpu", "meta"))
    assert all(weight_watch.is_asynchronous(torch.device(name)) for name in ("cuda", "cuda:1"))
