"""What csrc's launchers say of tensors they do not take: checks.h by itself, and each launcher as built for the CPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_fast import extension

CSRC = Path(__file__).resolve().parents[1] / "csrc"
EPS = 1e-6
BF16 = torch.bfloat16
on_host = pytest.mark.skipif(
    extension.load().reason is not None or not extension.is_built_for("cpu"), reason="needs -p tests.cuda_on_host"
)

# A (4, 64) matrix in bf16 on device 0, and what becomes of it; the sentence, or "fine".
CHECKED = {
    "check_matrix(x, 4, 64, 0)": "fine",
    "check_matrix(x, 4, 32, 0)": "x must have the shape (4, 32), got (4, 64)",
    "check_matrix(x, 4, 64, 1)": "x must be on device 1, got 0",
    "x.dim = 1; check_matrix(x, 4, 64, 0)": "x must have the shape (4, 64), got (4)",
    "x.dim = 3; check_matrix(x, 4, 64, 0)": "x must have the shape (4, 64), got (4, 64, ...)",
    "x.strides[1] = 2; check_matrix(x, 4, 64, 0)": "x must have neighbouring elements side by side",
    "x.strides[0] = 68; check_matrix(x, 4, 64, 0)": "x must have rows a multiple of 16 bytes apart, got a stride of 68",
    "x.strides[0] = 72; check_matrix(x, 4, 64, 0)": "fine",
    "x.strides[0] = 72; check_output(x, 4, 64, 0)": "x must be contiguous",
    "x.data = (char*)x.data + 8; check_matrix(x, 4, 64, 0)": "x must begin at a multiple of 16 bytes",
    "x.data = (char*)x.data + 8; x.dtype = Dtype::e4m3; check_matrix(x, 4, 64, 0)": "fine",
    "check_dtype(x, {Dtype::bf16})": "fine",
    "check_dtype(x, {Dtype::fp16, Dtype::fp32})": "x must be fp16 or fp32, got bf16",
    "x.dtype = Dtype::other; check_dtype(x, {Dtype::e4m3})": "x must be e4m3, got another dtype",
    "check_vector(x, 64, 0)": "x must have the shape (64), got (4, 64)",
    "x.dim = 1; x.strides[0] = 2; check_vector(x, 4, 0)": "x must have neighbouring elements side by side",
    "x.dim = 1; x.strides[0] = 1; x.device = 1; check_vector(x, 4, 0)": "x must be on device 0, got 1",
    "x.dim = 1; x.strides[0] = 1; check_vector(x, 4, 0)": "fine",
}
PROGRAM = """
#include <cstdio>
#include "checks.h"
using namespace dinov2_fast;
alignas(16) char memory[1024];
template <typename Check>
void say(Check check) {
  Tensor x{"x", memory, Dtype::bf16, 0, 2, {4, 64}, {64, 1}, true};
  try { check(x); std::puts("fine"); } catch (const std::invalid_argument& error) { std::puts(error.what()); }
}
int main() { %s }
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_checks_give_a_sentence(tmp_path: Path) -> None:
    calls = "".join(f"say([](Tensor& x) {{ {check}; }});\n" for check in CHECKED)
    (tmp_path / "program.cpp").write_text(PROGRAM % calls)
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}", "program.cpp", "-o", "program"]
    subprocess.run(command, cwd=tmp_path, check=True)
    said = subprocess.run(["./program"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.splitlines()
    assert dict(zip(CHECKED, said, strict=True)) == CHECKED


def _x(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def _forward(**changes: Any) -> None:
    """A launch of layer_norm_forward that is right but for the changes."""
    names = "x branch gamma drop_scale deferred_bias weight bias eps rows_per_picture inverse_scale total y mean rstd"
    arguments: dict[str, Any] = dict.fromkeys(names.split())
    arguments |= {
        "x": _x(6, 64),
        "weight": _x(64),
        "bias": _x(64),
        "eps": EPS,
        "rows_per_picture": 3,
        "row_scale": None,
    }
    arguments |= {"inverse_scale": 1.0, "y": _x(6, 64)}
    torch.ops.dinov2_fast_cuda.layer_norm_forward(**(arguments | changes))


def _backward(**changes: Any) -> None:
    names = "dy dtotal x branch gamma drop_scale weight mean rstd rows_per_picture dx dbranch partial"
    arguments: dict[str, Any] = dict.fromkeys(names.split())
    arguments |= {"x": _x(6, 64), "dy": _x(6, 64), "dx": _x(6, 64), "weight": _x(64), "rows_per_picture": 3}
    row = _x(6, dtype=torch.float32)
    arguments |= {"mean": row, "rstd": row.clone(), "partial": _x(2, 128, dtype=torch.float32)}
    torch.ops.dinov2_fast_cuda.layer_norm_backward(**(arguments | changes))


def _activation(**changes: Any) -> None:
    arguments = {"x": _x(6, 64), "bias": None, "swiglu": False, "inverse_scale": 1.0, "y": _x(6, 64)}
    torch.ops.dinov2_fast_cuda.activation_forward(**(arguments | changes))


def _activation_backward(**changes: Any) -> None:
    arguments = {"dy": _x(6, 64), "x": _x(6, 64), "bias": None, "swiglu": False, "dx": _x(6, 64), "partial": None}
    torch.ops.dinov2_fast_cuda.activation_backward(**(arguments | changes))


FP32, FP64 = torch.float32, torch.float64
SAID: list[tuple[str, Callable[..., None], dict[str, Any]]] = [
    ("x must be bf16 or fp16 or fp32, got another dtype", _forward, {"x": _x(6, 64, dtype=FP64)}),
    ("a hidden size that is a multiple of 8, up to 2048, got 12", _forward, {"x": _x(6, 12)}),
    ("a hidden size that is a multiple of 8, up to 2048, got 2056", _forward, {"x": _x(6, 2056)}),
    ("weight must be bf16, got fp32", _forward, {"weight": _x(64, dtype=FP32)}),
    ("bias must have the shape (64), got (8)", _forward, {"bias": _x(8)}),
    ("gamma, drop_scale, deferred_bias and total go with a branch", _forward, {"gamma": _x(64)}),
    ("total must be bf16, got another dtype", _forward, {"branch": _x(6, 64)}),
    ("branch must be bf16, got fp32", _forward, {"branch": _x(6, 64, dtype=FP32), "total": _x(6, 64)}),
    ("branch must have the shape (6, 64), got (5, 64)", _forward, {"branch": _x(5, 64), "total": _x(6, 64)}),
    (
        "drop_scale must have the shape (2), got (3)",
        _forward,
        {"branch": _x(6, 64), "total": _x(6, 64), "drop_scale": _x(3)},
    ),
    (
        "rows_per_picture must divide the 6 rows of x, got 4",
        _forward,
        {"branch": _x(6, 64), "total": _x(6, 64), "drop_scale": _x(3), "rows_per_picture": 4},
    ),
    ("y must be bf16 or e4m3, got fp16", _forward, {"y": _x(6, 64, dtype=torch.float16)}),
    ("y must be contiguous", _forward, {"y": _x(6, 128)[:, :64]}),
    ("mean and rstd go together", _forward, {"mean": _x(6, dtype=FP32)}),
    ("row_scale goes with a y of e4m3", _forward, {"row_scale": _x(6, dtype=FP32)}),
    ("mean must be fp32, got bf16", _forward, {"mean": _x(6), "rstd": _x(6)}),
    ("dy must have the shape (6, 64), got (5, 64)", _backward, {"dy": _x(5, 64)}),
    ("dx must be contiguous", _backward, {"dx": _x(6, 128)[:, :64]}),
    ("dbranch must be bf16, got another dtype", _backward, {"branch": _x(6, 64)}),
    ("gamma, drop_scale and dbranch go with a branch", _backward, {"gamma": _x(64)}),
    ("partial must have the shape (2, 128), got (2, 64)", _backward, {"partial": _x(2, 64, dtype=FP32)}),
    ("rstd must be fp32, got bf16", _backward, {"rstd": _x(6)}),
    ("x must have columns in a multiple of 8, got 12", _activation, {"x": _x(6, 12)}),
    ("x must have columns in a multiple of 16, got 24", _activation, {"x": _x(6, 24), "swiglu": True}),
    ("y must have the shape (6, 32), got (6, 64)", _activation, {"swiglu": True}),
    ("bias must be bf16, got fp32", _activation, {"bias": _x(64, dtype=FP32)}),
    ("x must have two dimensions, got (2, 3, ...)", _activation, {"x": _x(2, 3, 64)}),
    ("bias and partial go together", _activation_backward, {"bias": _x(64)}),
    ("dy must be bf16, got fp32", _activation_backward, {"dy": _x(6, 64, dtype=FP32)}),
    ("dx must have the shape (6, 64), got (6, 32)", _activation_backward, {"dx": _x(6, 32)}),
]


@on_host
@pytest.mark.parametrize("launch", [_forward, _backward, _activation, _activation_backward])
def test_what_is_right_is_launched(launch: Callable[..., None]) -> None:
    launch()


@on_host
@pytest.mark.parametrize(("sentence", "launch", "changes"), SAID, ids=[case[0] for case in SAID])
def test_launchers_say_what_is_wrong(sentence: str, launch: Callable[..., None], changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        launch(**changes)
