"""What the checks of csrc/checks.h say of tensors that a launcher does not take."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"

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
