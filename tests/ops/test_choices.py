"""What runs each op, and the table that shows it. tests/ops/test_dispatch.py tests the single choices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dinov2_fast.ops import _backends, dispatch, use_backend
from dinov2_fast.ops._linear_peers import ONEDNN
from dinov2_fast.ops.choices import backend_choices, format_choices
from dinov2_fast.ops.linear import LINEAR, linear_triton


def test_every_op_has_a_choice_on_every_device() -> None:
    for device in ("cpu", "meta", *(["cuda"] if torch.backends.cuda.is_built() else [])):
        chosen = {row.name: row.backend for row in backend_choices(device)}
        assert {name.partition(".")[0] for name in chosen} == set(dispatch.all_ops())
        assert (
            len(chosen) == sum(len(op.sample_inputs) for op in dispatch.all_ops().values()) - 1
        )  # "identity" is e4m3's alone
        others = {name for op, name in chosen.items() if not op.startswith(("linear", "attention"))}
        assert others == {"torch"}
        assert set(chosen.values()) <= ({"torch", "cpu", "onednn"} if device == "cpu" else {"torch"})


def test_e4m3_has_the_forms_that_read_or_write_it() -> None:
    names = {row.name for row in backend_choices("cpu", torch.float8_e4m3fn)}
    linears = {f"linear.{epilogue}" for epilogue in ("none", "gelu", "swiglu", "residual")}
    others = {"layer_norm.plain", "attention.batch", "attention.varlen"}
    others |= {f"activation.{kind}" for kind in ("gelu", "swiglu", "identity")}
    assert names == linears | others


def test_what_the_others_need_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LINEAR, "implementations", (_backends.triton(linear_triton), *LINEAR.implementations[1:2]))
    with_onednn = replace(ONEDNN, devices=("cpu with AVX-512",)), *LINEAR.implementations
    assert _because("linear.none") == "the others need a GPU"
    monkeypatch.setattr(LINEAR, "implementations", with_onednn)
    assert _because("linear.none") == "the others need a GPU or a CPU with AVX-512"


def _because(name: str) -> str:
    (row,) = [row for row in backend_choices("cpu") if row.name == name]
    return row.because


def test_forms_that_run_alike_share_a_line() -> None:
    with use_backend("linear=torch,linear.gelu=onednn"):
        lines = format_choices(row for row in backend_choices("cpu") if row.op in ("linear", "patches"))
    assert [line.split() for line in lines] == [
        ["operation", "run", "by", "because"],
        ["linear", "(none,", "swiglu,", "residual)", "torch", "was", "asked", "for"],
        ["linear", "(gelu)", "onednn", "was", "asked", "for"],
        ["patches", "torch", "the", "others", "need", "a", "GPU"],
    ]
    assert (
        len({line.index(backend) for line, backend in zip(lines[1:], ("torch", "onednn", "torch"), strict=True)}) == 1
    )
