"""The errors of csrc/checks.h and csrc/attention.h for tensors that a launcher does not take."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"

MANY = "qkv must have less than 2^31 tokens in an image and less than 2^31 tiles of 192 queries, got %d and %d"
# Statements about x, a (4, 64) matrix in bf16 on device 0, and their error, or "fine".
CHECKED = {
    "check_matrix(x, 4, 64, 0)": "fine",
    "check_matrix(x, 4, 32, 0)": "x must have the shape (4, 32), got (4, 64)",
    "check_matrix(x, 4, 64, 1)": "x must be on device 1, got 0",
    "x.dim = 1; check_matrix(x, 4, 64, 0)": "x must have the shape (4, 64), got (4)",
    "x.dim = 3; check_matrix(x, 4, 64, 0)": "x must have the shape (4, 64), got (4, 64, 0)",
    "x.dim = 6; check_matrix(x, 4, 64, 0)": "x must have the shape (4, 64), got (4, 64, 0, 0, 0, ...)",
    "x.strides[1] = 2; check_matrix(x, 4, 64, 0)": "x must have contiguous rows",
    "x.strides[0] = 68; check_matrix(x, 4, 64, 0)": "x must have rows a multiple of 16 bytes apart, got a stride of 68",
    "x.strides[0] = 72; check_matrix(x, 4, 64, 0)": "fine",
    "x.data = (char*)x.data + 8; check_matrix(x, 4, 64, 0)": "x must begin at a multiple of 16 bytes",
    "x.data = (char*)x.data + 8; x.dtype = Dtype::e4m3; check_matrix(x, 4, 64, 0)": "fine",
    "check_dtype(x, {Dtype::bf16})": "fine",
    "check_dtype(x, {Dtype::fp16, Dtype::fp32})": "x must be fp16 or fp32, got bf16",
    "x.dtype = Dtype::other; check_dtype(x, {Dtype::e4m3})": "x must be e4m3, got another dtype",
    "check_vector(x, 64, 0)": "x must have the shape (64), got (4, 64)",
    "x.dim = 1; x.strides[0] = 2; check_vector(x, 4, 0)": "x must be contiguous",
    "x.dim = 1; x.strides[0] = 1; x.device = 1; check_vector(x, 4, 0)": "x must be on device 0, got 1",
    "x.dim = 1; x.strides[0] = 1; check_vector(x, 4, 0)": "fine",
    "check_contiguous(x, {4, 64}, 0)": "fine",
    "check_contiguous(x, {4, 64, 1}, 0)": "x must have the shape (4, 64, 1), got (4, 64)",
    "check_contiguous(x, {4, 32}, 0)": "x must have the shape (4, 32), got (4, 64)",
    "x.strides[0] = 72; check_contiguous(x, {4, 64}, 0)": "x must be contiguous",
    "x.sizes[0] = 1; x.strides[0] = 72; check_contiguous(x, {1, 64}, 0)": "fine",
    "x.sizes[1] = 0; x.strides[0] = 1; check_contiguous(x, {4, 0}, 0)": "fine",
    "x.device = 1; check_contiguous(x, {4, 64}, 0)": "x must be on device 0, got 1",
    "x.data = (char*)x.data + 8; check_contiguous(x, {4, 64}, 0)": "x must begin at a multiple of 16 bytes",
    "check_attention(attention(x, 1))": "fine",
    "check_attention(attention(x, 1 << 28))": MANY % (2, 1 << 31),
    "AttentionForward a = attention(x, 1); a.qkv.sizes[1] = 1ll << 31; check_attention(a)": MANY % (1 << 31, 89478488),
    "AttentionForward a = attention(x, 1); a.out.device = 1; check_attention(a)": "out must be on device 0, got 1",
    "AttentionForward a = attention(x, 1); a.lse.device = 1; check_attention(a)": "lse must be on device 0, got 1",
}
PROGRAM = """
#include <cstdio>
#include "attention.h"
using namespace dinov2_fast;
alignas(16) char memory[1024];
AttentionForward attention(const Tensor& x, int64_t batch) {  // of 2 tokens and 8 heads
  Tensor qkv{"qkv", x.data, x.dtype, 0, 5, {batch, 2, 3, 8, 64}, {3072, 1536, 512, 64, 1}, true};
  Tensor out{"out", x.data, x.dtype, 0, 4, {batch, 2, 8, 64}, {1024, 512, 64, 1}, true};
  Tensor lse{"lse", x.data, Dtype::fp32, 0, 3, {batch, 8, 2}, {16, 2, 1}, true};
  return {qkv, out, lse};
}
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
