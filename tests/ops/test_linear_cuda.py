"""The CUDA kernels of the op linear: the rules of tests/ops/test_linear.py, refusals, and checks of the launch.

Without a GPU, `-p tests.cuda_on_host` runs everything except the products.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dinov2_fast.ops import _linear_cuda, linear
from dinov2_fast.ops.dispatch import BackendError
from tests import reference
from tests.helpers.devices import (
    DEVICE,
    assert_compiles_whole,
    fakes_cuda,
    on_gpu,
    poisoned_memory,
    random,
    runs_cuda,
    skip_without_opcheck,
)
from tests.helpers.linear_cases import (
    E4M3,
    assert_e4m3_result,
    assert_fp8_residual_in_fp32,
    exact_fp8,
    exact_linear,
    fp8_slack,
    plain_linear,
    random_fp8_operands,
    random_operands,
    random_stream,
    run_fp8,
    run_linear,
    swish,
)

FORMS = ["gelu", "swiglu", "residual"]
FP8_FORMS = ["none", *FORMS]
sanitize = partial(pytest.param, marks=pytest.mark.sanitize)
# (rows, out_features, in_features): whole tiles and tails, and on a device of 2 multiprocessors each tile of TILES.
SIZES = [(0, 96, 40), (1, 16, 8), sanitize((70, 128, 24)), sanitize((130, 272, 40)), (257, 256, 72), (150, 512, 16)]
FP8_SIZES = [(0, 32, 32), (1, 16, 16), sanitize((70, 128, 32)), sanitize((130, 272, 144)), (257, 256, 48)]

COOPERATIVE, PINGPONG, PINGPONG_SMALL = (128, 256), (128, 128), (64, 128)  # rows and columns of the tiles
# (form, (rows, out_features, in_features), tile on 132 multiprocessors). Some blocks compute several tiles, so both
# warp groups of a ping-pong kernel compute. There are more steps over in_features than stages. All sizes have tails.
LARGE = [
    ("residual", (4104, 2296, 1552), COOPERATIVE),
    ("residual", (4104, 1144, 1552), PINGPONG),
    ("residual", (1160, 1528, 1552), PINGPONG_SMALL),
    ("gelu", (4104, 3088, 1552), PINGPONG),
    ("gelu", (1160, 1528, 1552), PINGPONG_SMALL),
    ("swiglu", (4104, 4112, 1552), PINGPONG),
    ("swiglu", (1160, 1520, 1552), PINGPONG_SMALL),
]
LARGE_FP8 = [*(("none", size, tile) for form, size, tile in LARGE if form == "residual"), *LARGE]

each_form = pytest.mark.parametrize("form", FORMS)
each_fp8_form = pytest.mark.parametrize("form", FP8_FORMS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
bf16_first = pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu_first)], ids=str
)


@runs_cuda
@pytest.mark.parametrize("size", SIZES, ids=str)
@each_dtype
@each_form
def test_every_form_obeys_the_rule(form: str, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    operands = random_operands(*size, dtype)
    with poisoned_memory():
        y = run_linear(form, "cuda", *operands)
    reference.assert_obeys_rule(y, exact_linear(form, *operands), plain_linear(form, *operands))


@on_gpu
@runs_cuda
@pytest.mark.parametrize(("form", "size"), [case[:2] for case in LARGE], ids=str)
@bf16_first
def test_large_products_obey_the_rule(form: str, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    operands = random_operands(*size, dtype)
    with poisoned_memory():
        y = run_linear(form, "cuda", *operands)
    reference.assert_obeys_rule(y, exact_linear(form, *operands), plain_linear(form, *operands))
    assert torch.equal(y, run_linear(form, "cuda", *operands))  # the order of the sums is fixed


@runs_cuda
@each_dtype
@each_form
def test_a_small_row_among_large_ones_obeys_the_rule_by_itself(form: str, dtype: torch.dtype) -> None:
    x, weight, _ = random_operands(7, 80, 72, dtype)
    x[3] /= 1000
    y, exact, plain = (
        run_linear(form, "cuda", x, weight, None),
        exact_linear(form, x, weight, None),
        plain_linear(form, x, weight, None),
    )
    for row in range(7):
        reference.assert_obeys_rule(y[row], exact[row], plain[row])


@runs_cuda
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float16, torch.bfloat16, None], ids=str)
@pytest.mark.parametrize("size", [(10, 72, 40), (200, 256, 16)], ids=str)
@each_dtype
def test_the_stream_may_be_wider_and_the_bias_of_any_dtype(
    dtype: torch.dtype, size: tuple[int, int, int], bias_dtype: torch.dtype | None
) -> None:
    x, weight, bias = random_operands(*size, dtype)
    residual = random_stream(x, weight, torch.float32)
    bias = None if bias_dtype is None else bias.to(bias_dtype)
    exact = residual.double() + reference.linear(x, weight, bias)
    plain = residual + F.linear(x, weight, None if bias is None else bias.to(dtype))
    linear(x, weight, bias, epilogue="residual", residual=residual, backend="cuda")
    reference.assert_obeys_rule(residual, exact, plain)


@pytest.mark.sanitize
@runs_cuda
@each_dtype
def test_the_surroundings_of_the_stream_stay(dtype: torch.dtype) -> None:
    x, weight, bias = random_operands(131, 72, 40, dtype)
    residual = random_stream(x, weight)
    buffer = torch.full((133, 96), float("nan"), device=DEVICE, dtype=dtype)
    inside = buffer[1:-1, 8:80]
    inside.copy_(residual)
    linear(x, weight, bias, epilogue="residual", residual=inside, backend="cuda")
    reference.assert_obeys_rule(
        inside, exact_linear("residual", x, weight, bias), plain_linear("residual", x, weight, bias)
    )
    inside.fill_(float("nan"))
    assert buffer.isnan().all()


@runs_cuda
@each_form
def test_what_lies_around_the_operands_is_not_read(form: str) -> None:
    x, weight, bias = random_operands(67, 80, 40, torch.float16)
    wide_x, wide_weight = (torch.full((len(t) + 2, 56), float("nan"), device=DEVICE).to(t) for t in (x, weight))
    wide_x[1:-1, 8:48], wide_weight[1:-1, 8:48] = x, weight
    y = run_linear(form, "cuda", wide_x[1:-1, 8:48], wide_weight[1:-1, 8:48], bias)
    assert torch.equal(y, run_linear(form, "cuda", x, weight, bias))


STRIDES = {
    "transposed": lambda x: x.transpose(0, 1),
    "expanded": lambda x: x[:1].expand(4, -1, -1),
    "columns": lambda x: x[..., ::2],
    "misaligned": lambda x: x[..., 1:33],
    "slice": lambda x: x[..., 8:40],
}


@runs_cuda
@pytest.mark.parametrize("make", STRIDES.values(), ids=STRIDES)
@each_form
def test_strided_operands_give_what_copies_give(form: str, make: Any) -> None:
    x, bias = make(random(6, 16, 64, dtype=torch.float16)), random(1, dtype=torch.float16).expand(16)
    weight = make(random(16, 16, 64, dtype=torch.float16))[0].expand(16, -1)
    strided = run_linear(form, "cuda", x, weight, bias)
    assert torch.equal(strided, run_linear(form, "cuda", x.contiguous(), weight.contiguous(), bias.contiguous()))


@runs_cuda
@each_dtype
@each_form
def test_nan_and_inf_stay_in_their_row_and_column(form: str, dtype: torch.dtype) -> None:
    x, weight, bias = random_operands(70, 80, 40, dtype)
    x[3, 7], weight[10, 2] = float("nan"), float("nan")
    wrong = run_linear(form, "cuda", x, weight, bias).isnan()
    expected = torch.zeros_like(wrong)
    expected[3], expected[:, 5 if form == "swiglu" else 10] = True, True
    assert torch.equal(wrong, expected)
    x[3, 7], weight[10, 2] = float("inf"), 0.0
    y = run_linear(form, "cuda", x, weight, bias)
    assert torch.equal(y.isfinite(), torch.arange(70, device=DEVICE)[:, None].expand_as(y) != 3)


@runs_cuda
def test_gelu_is_the_exact_one_in_precise_dtypes() -> None:
    x = torch.linspace(-6, 6, 64 * 8, device=DEVICE).view(-1, 8).half()
    y = linear(x, torch.eye(8, device=DEVICE).half(), None, epilogue="gelu", backend="cuda")
    exact = reference.gelu(x)
    assert ((y.double() - exact).abs() <= 1e-6 + exact.abs() * 2.0**-10).all()  # the polynomial is off by 3e-6


@runs_cuda
def test_swiglu_takes_gate_and_value_in_turn() -> None:
    weight = torch.zeros(16, 8, device=DEVICE, dtype=torch.bfloat16)
    weight[:, 0] = torch.arange(-8, 8)
    x = torch.zeros(1, 8, device=DEVICE, dtype=torch.bfloat16)
    x[0, 0] = 1.0
    gate, value = weight[0::2, 0].float(), weight[1::2, 0].float()
    y = linear(x, weight, None, epilogue="swiglu", interleaved=True, backend="cuda")
    torch.testing.assert_close(y[0], (swish(gate) * value).bfloat16(), atol=0.0, rtol=2.0**-8)


# e4m3


@runs_cuda
@pytest.mark.parametrize("size", FP8_SIZES, ids=str)
@each_fp8_form
def test_fp8_operands_obey_the_rule(form: str, size: tuple[int, int, int]) -> None:
    operands, matrices = random_fp8_operands(size)
    with poisoned_memory():
        y = run_fp8(form, "cuda", operands, torch.bfloat16)
    exact = exact_fp8(form, operands, *matrices, torch.bfloat16)
    reference.assert_obeys_rule(y, exact, exact.float().bfloat16())


@runs_cuda
@pytest.mark.parametrize("form", ["gelu", "swiglu"])
def test_e4m3_results_are_one_step_from_the_formula(form: str) -> None:
    assert_e4m3_result(form, "cuda", (130, 272, 144))


@runs_cuda
def test_fp8_residual_in_fp32() -> None:
    assert_fp8_residual_in_fp32("cuda")


@on_gpu
@runs_cuda
@pytest.mark.gpu_first
@pytest.mark.parametrize(("form", "size"), [case[:2] for case in LARGE_FP8], ids=str)
def test_large_fp8_products_are_as_close_as_the_tensor_cores_allow(form: str, size: tuple[int, int, int]) -> None:
    operands, matrices = random_fp8_operands(size)
    with poisoned_memory():
        y = run_fp8(form, "cuda", operands, torch.bfloat16)
    exact = exact_fp8(form, operands, *matrices, torch.bfloat16)
    rounding = 2.0**-8 * exact.abs() + 3e-6  # of bf16, and the error of the GELU's polynomial
    assert ((y.double() - exact).abs() <= rounding + _slack(form, operands, *matrices)).all()
    assert torch.equal(y, run_fp8(form, "cuda", operands, torch.bfloat16))


def _slack(form: str, operands: tuple[Any, ...], x: Tensor, weight: Tensor) -> Tensor:
    """How far a result may be off because tensor cores add up products of e4m3 with few bits: what `fp8_slack` says,
    times the steepest slope of what follows, 1.13 of the GELU, 1.1 of the SiLU, which is below its argument.
    """
    lost = fp8_slack(x, weight, "cuda")
    if form == "swiglu":
        gate, value = reference.linear(x, weight, operands[-1]).abs().unflatten(-1, (-1, 2)).unbind(-1)
        lost_gate, lost_value = lost.unflatten(-1, (-1, 2)).unbind(-1)
        return 1.1 * (lost_gate * value + gate * lost_value + lost_gate * lost_value)
    return 1.13 * lost if form == "gelu" else lost


# Registration with torch


@runs_cuda
def test_registered_ops_pass_opcheck() -> None:
    skip_without_opcheck()
    x, weight, bias = (random(*size, dtype=torch.bfloat16) for size in ((5, 3, 32), (16, 32), (16,)))
    library, check = torch.ops.dinov2_fast, torch.library.opcheck
    for form in ("gelu", "swiglu"):
        check(library.linear_cuda.default, (x, weight, bias, form, 1.0, None, None, 1.0))
    stream = random(5, 3, 16, dtype=torch.bfloat16)
    check(library.linear_residual_cuda_.default, (stream, x, weight, bias, 1.0, None))
    fp8, scales = (x.to(E4M3), weight.to(E4M3), bias), (0.5, torch.rand(16, device=DEVICE))
    # all tests but test_schema, which compares inputs, because torch cannot compare e4m3 on a CPU
    most = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for form, dtype in (("none", torch.bfloat16), ("gelu", torch.bfloat16), ("gelu", E4M3), ("swiglu", E4M3)):
        check(library.linear_cuda.default, (*fp8, form, *scales, dtype, 0.5), test_utils=most)
    check(library.linear_residual_cuda_.default, (random(5, 3, 16), *fp8, *scales), test_utils=most)


@runs_cuda
def test_compiled_as_one_graph_and_in_inference_mode() -> None:
    def block(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        residual = x * 2
        linear(x, weight, bias, epilogue="residual", residual=residual, backend="cuda")
        hidden = linear(residual, weight, bias, epilogue="gelu", backend="cuda")
        y = linear(hidden, weight, bias, epilogue="swiglu", interleaved=True, backend="cuda")
        return y + residual[..., ::2]

    assert_compiles_whole(block, [random(*size, dtype=torch.float16) for size in ((2, 5, 32), (32, 32), (32,))])


@runs_cuda
def test_autograd_sees_that_the_stream_was_overwritten() -> None:
    x, weight, _ = random_operands(3, 8, 8, torch.float16)
    residual = torch.zeros(3, 8, device=DEVICE, dtype=torch.float16)
    before = residual._version
    linear(x, weight, None, epilogue="residual", residual=residual, backend="cuda")
    assert residual._version > before


# Refusals


def _cuda(x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str = "gelu", **options: Any) -> Tensor:
    return linear(x, weight, bias, epilogue=epilogue, interleaved=epilogue == "swiglu", backend="cuda", **options)


def _half(x: Tensor, weight: Tensor, bias: Tensor, epilogue: str = "gelu", **options: Any) -> Tensor:
    return _cuda(x.half(), weight.half(), bias.half(), epilogue, **options)


def _e4m3(x: Tensor, weight: Tensor, bias: Tensor, epilogue: str = "gelu", **options: Any) -> Tensor:
    return _cuda(x.to(E4M3), weight.to(E4M3), None, epilogue, scale=1.0, weight_scale=bias, **options)


def _empty(*size: int) -> Tensor:
    return torch.empty(*size, device="cuda", dtype=torch.half)


REFUSALS = {
    "takes fp16 and bf16, got torch.float32": _cuda,
    "takes x and weight of one dtype": lambda x, w, b: _cuda(x.half(), w.bfloat16(), b),
    "in_features in multiples of 8 and out_features in multiples of 8, got 12 and 16": lambda x, w, b: _half(
        x[:, :12], w[:, :12], b
    ),
    "out_features in multiples of 16, got 16 and 8": lambda x, w, b: _half(x, w[:8], b[:8], "swiglu"),
    "in_features in multiples of 16 and": lambda x, w, b: _e4m3(x[:, :8], w[:, :8], b, "none"),
    "a bias in fp16, bf16 or fp32, got torch.float64": lambda x, w, b: _cuda(
        x.half(), w.half(), b.double(), "residual", residual=x.half()
    ),
    "returns bf16, or e4m3 after an activation": lambda x, w, b: _e4m3(x, w, b, dtype=torch.float16),
    "adds to torch.float16 or fp32, not to torch.bfloat16": lambda x, w, b: _half(
        x, w, b, "residual", residual=x.bfloat16()
    ),
    "adds to torch.bfloat16 or fp32, not to torch.float16": lambda x, w, b: _e4m3(
        x, w, b, "residual", residual=x.half()
    ),
    "rows start at multiples of 16 bytes": lambda x, w, b: _half(x, w, b, "residual", residual=_empty(4, 20)[:, 2:18]),
    "whose rows start at multiples of 16 bytes": lambda x, w, b: _half(
        x[:, None], w, b, "residual", residual=_empty(4, 1, 20)[..., :16]
    ),
    "evenly spaced rows": lambda x, w, b: _half(x, w, b, "residual", residual=x[:1].half().expand(4, 16)),
    "has no backend 'cuda'": lambda x, w, b: _half(x, w, b, "none"),
}


@fakes_cuda
@pytest.mark.parametrize("reason", REFUSALS)
def test_refusals_say_why(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov2_fast.ops._backends.capability", lambda device: (9, 0))
    monkeypatch.setattr("dinov2_fast.ops._backends.missing_extension", lambda: None)
    with FakeTensorMode():
        x, weight, bias = (torch.empty(shape, device="cuda") for shape in ((4, 16), (16, 16), (16,)))
        with pytest.raises(BackendError, match=reason):
            REFUSALS[reason](x, weight, bias)


@fakes_cuda
@pytest.mark.parametrize("capability", [(8, 9), (10, 0), (12, 0)])
def test_devices_other_than_sm_90_and_autocast_are_refused(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinov2_fast.ops._backends.capability", lambda device: capability)
    monkeypatch.setattr("dinov2_fast.ops._backends.missing_extension", lambda: None)
    with FakeTensorMode():
        x, weight = (torch.empty(16, 16, device="cuda", dtype=torch.half) for _ in range(2))
        with pytest.raises(BackendError, match=f"runs on sm_90 only, got sm_{capability[0]}{capability[1]}"):
            _cuda(x, weight, None)
        monkeypatch.setattr("dinov2_fast.ops._backends.capability", lambda device: (9, 0))
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        with pytest.raises(BackendError, match="does not follow autocast"):
            linear(x, weight, None, epilogue="gelu", backend="cuda")


def _wrong(**changes: Any) -> dict[str, Any]:
    """Arguments of the raw launch, correct except for the changes."""
    x, weight, out = (random(16, 16, dtype=torch.float16) for _ in range(3))
    right = {"x": x, "weight": weight, "bias": None, "weight_scale": None}
    return {**right, "scale": 1.0, "inverse_scale": 1.0, "form": 1, "out": out, **changes}


def _half_matrix(*size: int) -> Tensor:
    return random(*size, dtype=torch.float16)


MISTAKES = {
    "x must be bf16 or fp16 or e4m3, got fp32": lambda: _wrong(x=random(16, 16)),
    "weight must be fp16, got bf16": lambda: _wrong(weight=random(16, 16, dtype=torch.bfloat16)),
    "weight must have the shape": lambda: _wrong(weight=_half_matrix(16, 24)),
    "x must have rows a multiple of 16 bytes apart": lambda: _wrong(x=_half_matrix(16, 20)[:, :16]),
    "x must have rows that start at multiples of 16 bytes": lambda: _wrong(
        x=_half_matrix(16, 24).to(E4M3)[:, :16], weight=_half_matrix(16, 16).to(E4M3), weight_scale=random(16)
    ),
    "weight must have rows that start at multiples of 16 bytes": lambda: _wrong(
        weight=_half_matrix(1, 16).expand(16, 16)
    ),
    "in_features must be a multiple of 8, got 4": lambda: _wrong(
        x=_half_matrix(16, 8)[:, :4], weight=_half_matrix(16, 8)[:, :4]
    ),
    "out_features must be a multiple of 16, got 8": lambda: _wrong(form=2, weight=_half_matrix(8, 16)),
    "bias must have the shape": lambda: _wrong(bias=_half_matrix(8)),
    "bias must begin at a multiple of 16 bytes": lambda: _wrong(bias=_half_matrix(17)[1:]),
    "weight_scale must be given for e4m3 operands": lambda: _wrong(weight_scale=random(16)),
    "for e4m3 operands, and for no others": lambda: _wrong(
        x=_half_matrix(16, 16).to(E4M3), weight=_half_matrix(16, 16).to(E4M3)
    ),
    "weight_scale must have the shape": lambda: _wrong(
        x=_half_matrix(16, 16).to(E4M3), weight=_half_matrix(16, 16).to(E4M3), weight_scale=random(8)
    ),
    "weight_scale must be fp32, got fp16": lambda: _wrong(
        x=_half_matrix(16, 16).to(E4M3), weight=_half_matrix(16, 16).to(E4M3), weight_scale=_half_matrix(16)
    ),
    "out must be fp16, got fp32": lambda: _wrong(out=random(16, 16)),
    "out must be fp16 or fp32, got bf16": lambda: _wrong(form=3, out=random(16, 16, dtype=torch.bfloat16)),
    "out must have the shape": lambda: _wrong(out=_half_matrix(16, 8)),
    "out must have rows that do not overlap": lambda: _wrong(form=3, out=_half_matrix(1, 16).expand(16, 16)),
    "for bf16 and fp16 use cuBLAS": lambda: _wrong(form=0),
    "form must be 0 .none.": lambda: _wrong(form=4),
}  # fmt: skip


@runs_cuda
@pytest.mark.parametrize("sentence", MISTAKES)
def test_a_launch_with_wrong_arguments_says_what_is_wrong(sentence: str) -> None:
    arguments = MISTAKES[sentence]()
    with pytest.raises(ValueError, match=sentence):
        torch.ops.dinov2_fast_cuda.linear_forward(*arguments.values())


# The choice of a tile

TILES = [  # rows, out_features, form, tile
    (64 * 257, 1024, "none", COOPERATIVE),
    (64 * 257, 1024, "residual", COOPERATIVE),
    (64 * 257, 4096, "gelu", PINGPONG),  # an activation is overlapped
    (64 * 257, 8192, "swiglu", PINGPONG),
    (64 * 257, 384, "residual", PINGPONG),  # 256 columns would pad 384 to 512
    (257, 384, "residual", PINGPONG_SMALL),
    (257, 1536, "gelu", PINGPONG_SMALL),
    (128 * 65, 128, "residual", PINGPONG_SMALL),  # 65 tiles are too few for 132 multiprocessors
    (128 * 132, 128, "residual", PINGPONG),
    *((rows, features, form, tile) for form, (rows, features, _), tile in LARGE_FP8),
]
CHOOSE = """
import ctypes, json, sys, torch
choose_tile = ctypes.CDLL(sys.argv[1]).dinov2_fast_choose_tile
choose_tile.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
choose_tile.restype = ctypes.POINTER(2 * ctypes.c_int)  # at the tile's rows and columns
print([[*choose_tile(*arguments, 132).contents] for arguments in json.loads(sys.argv[2])])
"""


@pytest.mark.parametrize(("case", "size"), [*((case, 2) for case in LARGE), *((case, 1) for case in LARGE_FP8)])
def test_large_cases_fill_the_pipeline(case: tuple[str, tuple[int, ...], tuple[int, int]], size: int) -> None:
    _, (rows, out_features, in_features), (tile_rows, tile_columns) = case
    step = 128 // size
    assert math.ceil(rows / tile_rows) * math.ceil(out_features / tile_columns) > 132
    assert in_features // step > 9  # at most 9 stages fit
    assert rows % tile_rows
    assert out_features % tile_columns
    assert in_features % step


def test_the_tile_depends_on_the_shape() -> None:
    from tests import cuda_on_host

    if cuda_on_host.reason_against():
        pytest.skip(cuda_on_host.reason_against())
    arguments = [[rows, features, _linear_cuda.FORMS.index(form)] for rows, features, form, _ in TILES]
    # in a process of its own, because torch accepts the library's ops once and this process may have the extension
    command = [sys.executable, "-c", CHOOSE, str(cuda_on_host.build()), json.dumps(arguments)]
    chosen = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(chosen) == [[*tile] for *_, tile in TILES]
