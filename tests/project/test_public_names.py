"""The public names: type checkers and the interpreter agree on them, and a misspelt name or keyword fails in mypy."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pytest

import dinov2_fast
from dinov2_fast.inference.optimize import EngineOptions

ROOT = Path(__file__).resolve().parents[2]


def test_type_checkers_and_the_interpreter_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "dinov2_fast" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    for_type_checkers = {
        alias.asname: (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    at_run_time = {name: (f"dinov2_fast.{module}", name) for name, module in dinov2_fast._MODULES.items()}
    assert for_type_checkers == at_run_time
    assert dinov2_fast.__all__ == ["__version__", *sorted(at_run_time)]


@pytest.mark.parametrize("name", sorted(dinov2_fast._MODULES))
def test_a_public_name_is_the_object_of_its_module(name: str) -> None:
    module = import_module(f"dinov2_fast.{dinov2_fast._MODULES[name]}")
    assert getattr(dinov2_fast, name) is getattr(module, name)
    assert name in dir(dinov2_fast)


def test_type_checkers_know_the_engine_options_of_accelerate() -> None:
    types = get_type_hints(dinov2_fast.optimize_for_inference)
    del types["model"], types["return"]
    assert get_type_hints(EngineOptions) == types


def test_a_misspelt_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"'dinov2_fast' has no attribute 'lod'"):
        dinov2_fast.lod  # noqa: B018


SNIPPET = """
import torch
import dinov2_fast
from dinov2_fast import (
    DinoVisionTransformer, Dinov2Config, Dinov2Model, accelerate, convert_state_dict, create_model, extract, load,
    load_features, optimize_for_inference, pretrain, unaccelerate, use_backend,
)

model: DinoVisionTransformer = load("dinov2_vits14", pretrained=False, seed=1, dtype="bfloat16")
x = torch.zeros(1, 3, 28, 28)
cls_token: torch.Tensor = model.forward_features(x)["x_norm_clstoken"]
patches: torch.Tensor = model.forward_features([x, x])[1]["x_norm_patchtokens"]
converted: dict[str, torch.Tensor] = convert_state_dict(model.state_dict(), to="timm")
hub: Dinov2Model = Dinov2Model.from_pretrained("facebook/dinov2-small", dtype=torch.float16)
Dinov2Model(Dinov2Config(hidden_size=384))
unaccelerate(accelerate(create_model("vit_small_patch14_dinov2", pretrained=True), inference=True, precision="fp32"))
extract("images", "dinov2_vits14", out="features", batch_size=8)
load_features("features")
pretrain("images", out="run", config="tiny", evaluate=("train", "val"))
with use_backend("torch"):
    optimize_for_inference(model.eval(), precision="fp32")

{wrong}
"""
MISTAKES = {
    "misspelt attribute": ('dinov2_fast.lod("dinov2_vits14")', '"lod"'),
    "misspelt import": ("from dinov2_fast import Dinov2Modle", '"Dinov2Modle"'),
    "type of weights": ("load(3)", "arg-type"),
    "type of the seed": ('load("dinov2_vits14", pretrained=False, seed="1")', "arg-type"),
    "keyword of convert_state_dict": ('convert_state_dict({}, too="timm")', '"too"'),
    "keyword of optimize_for_inference": ('optimize_for_inference(model, precison="fp32")', '"precison"'),
    "keyword of accelerate": ('accelerate(model, inference=True, precison="fp32")', '"precison"'),
    "keyword of extract": ('extract("images", "dinov2_vits14", outt="features")', '"outt"'),
    "option of extract by position": ('extract("images", "dinov2_vits14", "features")', "Too many positional"),
    "keyword of pretrain": ('pretrain("images", out="run", confg="tiny")', '"confg"'),
    "options are keyword-only": ('load("dinov2_vits14", "file.pth")', "Too many positional arguments"),
    "keyword of forward_features": ("model.forward_features(x, mask=None)", "No overload variant"),
    "features of a list": ('model.forward_features([x])["x_prenorm"]', "No overload variant"),
    "misspelt feature": ('model.forward_features(x)["x_norm_cls"]', '"x_norm_cls"'),
    "type of the result": ('number: int = load("dinov2_vits14")', "assignment"),
}


@pytest.mark.slow
def test_mypy_rejects_wrong_names_keywords_and_types_and_accepts_correct_use(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="runs mypy, which is not installed")
    file = tmp_path / "snippet.py"
    wrong = "\n".join(code for code, _ in MISTAKES.values())
    file.write_text(SNIPPET.format(wrong=wrong), encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", "--no-warn-unreachable", str(file)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    first = SNIPPET[: SNIPPET.index("{wrong}")].count("\n") + 1
    by_line: dict[int, str] = {}
    for error in (line for line in run.stdout.splitlines() if ": error: " in line):
        # The folder may be that of an earlier run with the same text: mypy keeps errors in its cache.
        place = re.search(r"/snippet\.py:(\d+): error: ", error)
        assert place, error
        by_line[int(place[1])] = by_line.get(int(place[1]), "") + error
    assert sorted(by_line) == list(range(first, first + len(MISTAKES))), run.stdout + run.stderr
    for line, (name, (_, message)) in zip(sorted(by_line), MISTAKES.items(), strict=True):
        assert message in by_line[line], name
