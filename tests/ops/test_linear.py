"""The op linear: a matrix product with an epilogue, also in place and in e4m3, for inference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dinov2_fast.ops import _backends, _linear_peers, linear
from dinov2_fast.ops.dispatch import BackendError, use_backend
from dinov2_fast.ops.linear import LINEAR, interleave
from tests import reference
from tests.helpers.devices import (
    BACKENDS,
    DEVICE,
    assert_compiles_whole,
    each_backend,
    fakes_cuda,
    poisoned_memory,
    random,
    runs_triton,
    skip_without_opcheck,
)
from tests.helpers.linear_cases import (
    E4M3,
    SIGNIFICANT_BITS,
    assert_e4m3_result,
    assert_fp8_residual_in_fp32,
    exact_fp8,
    exact_linear,
    plain_linear,
    random_fp8_operands,
    random_operands,
    random_stream,
    run_fp8,
    run_linear,
    swish,
    tensor_core_slack,
    tensor_core_sums,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMS = ["none", "gelu", "swiglu", "residual"]
# (rows, out_features, in_features): together they reach each tile of the launcher, with and without tails.
SIZES = [(0, 96, 40), (1, 6, 8), (130, 258, 40), (257, 256, 72), (5, 130, 33)]

each_form = pytest.mark.parametrize("form", FORMS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_path = pytest.mark.parametrize(
    "backend", [*BACKENDS, pytest.param("triton without TMA", marks=[runs_triton, pytest.mark.triton])], indirect=True
)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name, _, without_tma = request.param.partition(" ")
    if without_tma:
        monkeypatch.setattr("dinov2_fast.kernels.linear._can_use_tma", lambda matrix: False)
    return name


@pytest.mark.parametrize("size", SIZES, ids=str)
@each_dtype
@each_form
@each_path
def test_every_form_obeys_the_rule(backend: str, form: str, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    operands = random_operands(*size, dtype)
    with poisoned_memory():
        y = run_linear(form, backend, *operands)
    reference.assert_obeys_rule(y, exact_linear(form, *operands), plain_linear(form, *operands))


@each_form
@each_path
def test_many_tiles_in_groups_and_no_bias(backend: str, form: str) -> None:
    x, weight, _ = random_operands(1100, 258, 16, torch.float16)
    with poisoned_memory():
        y = run_linear(form, backend, x, weight, None)
    reference.assert_obeys_rule(y, exact_linear(form, x, weight, None), plain_linear(form, x, weight, None))


@each_dtype
@each_form
@each_backend
def test_a_small_row_among_large_ones_obeys_the_rule_by_itself(backend: str, form: str, dtype: torch.dtype) -> None:
    x, weight, _ = random_operands(7, 66, 72, dtype)
    x[3] /= 1000
    y, exact, plain = (f(x, weight) for f in (
        lambda x, w: run_linear(form, backend, x, w, None),
        lambda x, w: exact_linear(form, x, w, None),
        lambda x, w: plain_linear(form, x, w, None),
    ))  # fmt: skip
    for row in range(7):
        reference.assert_obeys_rule(y[row], exact[row], plain[row])


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_backend
def test_the_stream_may_be_wider_and_the_operands_stay_unchanged(
    backend: str, dtype: torch.dtype, with_bias: bool
) -> None:
    x, weight, bias = (
        t.view(2, 5, -1) if t.ndim == 2 and len(t) == 10 else t for t in random_operands(10, 72, 40, dtype)
    )
    residual = random_stream(x, weight, torch.float32)
    arguments = [x, weight, bias if with_bias else None]
    before = [None if t is None else t.clone() for t in arguments]
    exact = residual.double() + reference.linear(*arguments)
    plain = residual + F.linear(*arguments)
    linear(*arguments, epilogue="residual", residual=residual, backend=backend)
    reference.assert_obeys_rule(residual, exact, plain)
    for now, then in zip(arguments, before, strict=True):
        assert now is then is None or torch.equal(now, then)


@each_path
def test_the_surroundings_of_the_stream_stay(backend: str) -> None:
    x, weight, bias = random_operands(131, 70, 40, torch.float32)
    residual = random_stream(x, weight)
    buffer = torch.full((133, 90), float("nan"), device=DEVICE)
    buffer[1:-1, 8:78] = residual
    linear(x, weight, bias, epilogue="residual", residual=buffer[1:-1, 8:78], backend=backend)
    reference.assert_obeys_rule(
        buffer[1:-1, 8:78], exact_linear("residual", x, weight, bias), plain_linear("residual", x, weight, bias)
    )
    buffer[1:-1, 8:78] = float("nan")
    assert buffer.isnan().all()


@each_path
def test_the_stream_may_be_the_first_token_of_each_image(backend: str) -> None:
    x, weight, bias = random_operands(4, 72, 40, torch.float32)
    stream = random(4, 3, 72)
    expected = reference.linear(x, weight, bias) + stream[:, 0]
    linear(x[:, None], weight, bias, epilogue="residual", residual=stream[:, :1], backend=backend)
    torch.testing.assert_close(stream[:, 0].double(), expected, atol=1e-5, rtol=0)


STRIDES = {
    "transposed": lambda x: x.transpose(0, 1),
    "strided": lambda x: x[:, ::2],
    "expanded": lambda x: x[:1].expand(4, -1, -1),
    "columns": lambda x: x[..., ::2],
    "misaligned": lambda x: x[..., 1:33],
    "slice": lambda x: x[..., 8:40],
}


@pytest.mark.parametrize("make", STRIDES.values(), ids=STRIDES)
@each_form
@each_path
def test_strided_operands_give_what_copies_give(backend: str, form: str, make: Any) -> None:
    x, weight = make(random(6, 4, 64)), make(random(6, 4, 64))[0]
    weight = weight[: len(weight) // 2 * 2]  # an even number of rows, for SwiGLU
    bias = random(1).expand(weight.shape[0])
    strided = run_linear(form, backend, x, weight, bias)
    copied = run_linear(form, backend, x.contiguous(), weight.contiguous(), bias.contiguous())
    torch.testing.assert_close(strided, copied, atol=2e-6, rtol=1e-6)


@each_form
@each_path
def test_what_lies_around_the_operands_is_not_read(backend: str, form: str) -> None:
    x, weight, bias = random_operands(67, 66, 40, torch.float16)
    wide_x, wide_weight = (
        torch.full((len(t) + 2, 56), float("nan"), device=DEVICE, dtype=t.dtype) for t in (x, weight)
    )
    wide_x[1:-1, 8:48], wide_weight[1:-1, 8:48] = x, weight
    y = run_linear(form, backend, wide_x[1:-1, 8:48], wide_weight[1:-1, 8:48], bias)
    reference.assert_obeys_rule(y, exact_linear(form, x, weight, bias), plain_linear(form, x, weight, bias))


@pytest.mark.sanitize
@each_form
@each_path
def test_nan_and_inf_stay_in_their_row_and_column(backend: str, form: str) -> None:
    x, weight, bias = random_operands(70, 66, 40, torch.float32)
    x[3, 7], weight[10, 2] = float("nan"), float("nan")
    wrong = run_linear(form, backend, x, weight, bias).isnan()
    expected = torch.zeros_like(wrong)
    expected[3], expected[:, 5 if form == "swiglu" else 10] = True, True
    assert torch.equal(wrong, expected)
    x[3, 7], weight[10, 2] = float("inf"), 0.0
    y = run_linear(form, backend, x, weight, bias)
    assert torch.equal(y.isfinite(), torch.arange(70, device=DEVICE)[:, None].expand_as(y) != 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@each_path
def test_gelu_is_the_exact_one_in_precise_dtypes(backend: str, dtype: torch.dtype) -> None:
    x = torch.linspace(-6, 6, 64 * 8, device=DEVICE).view(-1, 8).to(dtype)
    y = linear(x, torch.eye(8, device=DEVICE, dtype=dtype), None, epilogue="gelu", backend=backend)
    exact = reference.gelu(x)
    rounding = exact.abs() * 2.0 ** (-10 if dtype == torch.float16 else -22)
    assert ((y.double() - exact).abs() <= 1e-6 + rounding).all()  # the polynomial is off by 3e-6, the tanh by 5e-4


@each_path
def test_swiglu_takes_gate_and_value_in_turn(backend: str) -> None:
    weight = torch.tensor([[-30.0], [30.0], [2.0], [3.0]], device=DEVICE)
    x = torch.ones(1, 1, device=DEVICE)
    y = linear(x, weight, None, epilogue="swiglu", interleaved=True, backend=backend)
    torch.testing.assert_close(y, swish(torch.tensor([[-30.0, 2.0]], device=DEVICE)) * weight[1::2].T)


@each_backend
def test_interleaved_parameters_give_the_swiglu_of_packed_halves(backend: str) -> None:
    x, weight, bias = random_operands(9, 12, 16, torch.float32)
    packed = F.linear(x, weight, bias)
    y = linear(x, interleave(weight), interleave(bias), epilogue="swiglu", interleaved=True, backend=backend)
    torch.testing.assert_close(y, swish(packed[:, :6]) * packed[:, 6:])
    torch.testing.assert_close(linear(x, weight, bias, epilogue="swiglu", backend="torch"), y)
    if backend in ("triton", "cuda"):
        with pytest.raises(BackendError, match="got all gates first"):
            linear(x, weight, bias, epilogue="swiglu", backend=backend)
    assert interleave(torch.arange(6)).tolist() == [0, 3, 1, 4, 2, 5]


# e4m3


@pytest.mark.parametrize("size", [(0, 32, 32), (1, 6, 16), (130, 258, 144), (65, 66, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_form
@each_path
def test_fp8_operands_obey_the_rule(backend: str, form: str, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    operands, matrices = random_fp8_operands(size)
    with poisoned_memory():
        y = run_fp8(form, backend, operands, dtype)
    exact = exact_fp8(form, operands, *matrices, dtype)
    reference.assert_obeys_rule(y, exact, exact.float().to(dtype))


@pytest.mark.parametrize("size", [(66, 40, 48), (130, 258, 144), (32, 64, 1552)], ids=str)
def test_the_slack_allows_for_tensor_cores_and_no_more(size: tuple[int, int, int]) -> None:
    (*_, weight_scale, _), (x, weight) = random_fp8_operands(size)
    exact, slack = reference.linear(x, weight, None), tensor_core_slack(x, weight)

    def share(sums: Tensor) -> float:
        """The error of the worst element as a share of the slack."""
        return ((sums - exact).abs() / slack).max().item()

    assert 0 < share(tensor_core_sums(x, weight, SIGNIFICANT_BITS)) < share(tensor_core_sums(x, weight, 13)) < 1
    assert share(tensor_core_sums(x, weight, 10)) > 1
    assert share(reference.linear(x[:, 1:], weight[:, 1:], None)) > 1  # without one of the products
    assert share(exact * (weight_scale.roll(1) / weight_scale)) > 1  # with the scales of other columns


def test_the_error_of_tensor_cores_is_far_below_that_of_rounding_to_e4m3() -> None:
    real = random(16, 4096, scale=50).double(), random(64, 4096, scale=50).double()
    x, weight = (matrix.to(E4M3).double() for matrix in real)
    rounded = reference.linear(x, weight, None)
    from_rounding = (rounded - reference.linear(*real, None)).norm()
    assert 20 * (tensor_core_sums(x, weight, SIGNIFICANT_BITS) - rounded).norm() < from_rounding
    assert 20 * (tensor_core_sums(x, weight, 12) - rounded).norm() > from_rounding


@pytest.mark.parametrize("form", ["gelu", "swiglu"])
@each_path
def test_e4m3_results_are_one_step_from_the_formula(backend: str, form: str) -> None:
    assert_e4m3_result(form, backend, (130, 258, 144))


@each_backend
def test_fp8_residual_in_fp32(backend: str) -> None:
    assert_fp8_residual_in_fp32(backend)


# Registration with torch, and the choice of an implementation


@runs_triton
@pytest.mark.parametrize("strided", [False, True])
def test_registered_ops_pass_opcheck(strided: bool) -> None:
    skip_without_opcheck()
    x = random(3, 5, 32).transpose(0, 1) if strided else random(5, 3, 32)
    weight, bias = random(8, 64)[:, ::2] if strided else random(8, 32), random(8)
    library, check = torch.ops.dinov2_fast, torch.library.opcheck
    for form in ("none", "gelu", "swiglu"):
        check(library.linear.default, (x, weight, bias, form))
    check(library.linear_residual_.default, (random(5, 3, 8), x, weight, bias, 1.0, None))
    fp8, scales = (x.to(E4M3), weight.to(E4M3), bias), (0.5, torch.rand(8, device=DEVICE))
    # all tests but test_schema, which compares inputs, because torch cannot compare e4m3 on a CPU
    most = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for form, dtype in (("none", torch.float16), ("gelu", torch.bfloat16), ("gelu", E4M3), ("swiglu", E4M3)):
        check(library.linear_fp8.default, (*fp8, form, *scales, dtype, 0.5), test_utils=most)
    check(library.linear_residual_.default, (random(5, 3, 8), *fp8, *scales), test_utils=most)


@each_backend
def test_compiled_as_one_graph_and_in_inference_mode(backend: str) -> None:
    def block(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        residual = x * 2
        y = linear(x, weight, bias, backend=backend)
        linear(y, weight, bias, epilogue="residual", residual=residual, backend=backend)
        hidden = linear(residual, weight, bias, epilogue="gelu", backend=backend)
        y = linear(hidden, weight, bias, epilogue="swiglu", interleaved=True, backend=backend)
        return y + residual[..., ::2]

    assert_compiles_whole(block, (random(2, 5, 32), random(32, 32, scale=0.2), random(32)))


@each_form
@each_backend
def test_autocast_gives_the_dtype_torch_gives(backend: str, form: str) -> None:
    operands = random_operands(3, 8, 16, torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert run_linear(form, backend, *operands).dtype == run_linear(form, "torch", *operands).dtype


@each_backend
def test_autograd_sees_that_the_stream_was_overwritten(backend: str) -> None:
    x, weight, bias = random_operands(3, 8, 16, torch.float32)
    residual = random_stream(x, weight)
    versions = [residual._version]
    linear(x, weight, bias, epilogue="residual", residual=residual, backend=backend)
    versions.append(residual._version)
    scales = {"scale": 1.0, "weight_scale": bias.abs()}
    linear(x.to(E4M3), weight.to(E4M3), bias, epilogue="residual", residual=residual, **scales, backend=backend)
    assert versions[0] < versions[1] < residual._version


def test_onednn_is_first_on_a_cpu_with_avx512_only(monkeypatch) -> None:
    """Elsewhere torch is first until the others are measured."""
    cpu = torch.device("cpu")
    for first in (True, False):
        monkeypatch.setattr(_backends, "HAS_AVX512", first)
        onednn = _backends.onednn(_linear_peers.linear_onednn)
        assert onednn.is_for(cpu) == first
        assert onednn.refusal_of_kind(cpu, torch.float32, False, forced=True) is None
    assert LINEAR.backends("none")[:2] == ["onednn", "torch"]


@fakes_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, E4M3], ids=str)
@each_form
def test_on_a_gpu_torch_comes_first(form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov2_fast.ops._backends.capability", lambda device: (9, 0))
    monkeypatch.setattr("dinov2_fast.ops._backends.missing_extension", lambda: None)
    with FakeTensorMode(), torch.no_grad():
        assert LINEAR.choose(form, LINEAR.sample_inputs[form](torch.device("cuda"), dtype)).backend == "torch"


@fakes_cuda
@pytest.mark.parametrize("name", ["cublas", "cuda"])
def test_a_backend_without_a_form_leaves_it_to_the_default(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dinov2_fast.ops._backends.capability", lambda device: (9, 0))
    monkeypatch.setattr("dinov2_fast.ops._backends.missing_extension", lambda: None)

    def chosen(form: str, dtype: torch.dtype) -> str:
        return LINEAR.choose(form, LINEAR.sample_inputs[form](torch.device("cuda"), dtype)).backend

    with FakeTensorMode(), torch.no_grad(), use_backend(f"linear={name}", strict=True):
        assert chosen("none", torch.bfloat16) == "torch"
        assert {chosen(form, torch.bfloat16) for form in ("gelu", "swiglu", "residual")} == {name}
        assert {chosen(form, E4M3) for form in FORMS} == {name}
    assert not caplog.records


@each_form
@each_backend
def test_gradients_are_refused(backend: str, form: str) -> None:
    x, weight, bias = random_operands(2, 4, 8, torch.float32)
    weight.requires_grad_()
    with pytest.raises(BackendError, match="inference only"):
        run_linear(form, backend, x, weight, bias)
    with torch.no_grad():
        run_linear(form, backend, x, weight, bias)


def _e4m3(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    scales = {"scale": 1.0, "weight_scale": torch.ones(len(weight), device=x.device)}
    return linear(x.to(E4M3), weight.to(E4M3), bias, **scales | options)


def _add(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str = "torch") -> Tensor:
    return linear(x, weight, bias, epilogue="residual", residual=residual, backend=backend)


REFUSALS = {
    "takes fp16, bf16, fp32 and e4m3, got torch.float64": lambda x, w, b: linear(x.double(), w, b, backend="triton"),
    "takes x and weight of one dtype": lambda x, w, b: linear(x, w.half(), b, backend="triton"),
    "is accurate enough for bf16 results only": lambda x, w, b: linear(x, w, b, epilogue="gelu", backend="cublas"),
    "takes tensors of one dtype, got torch.bfloat16, torch.bfloat16, torch.float32": lambda x, w, b: linear(
        x.bfloat16(), w.bfloat16(), b, epilogue="gelu", backend="cublas"
    ),
    "takes all gates first": lambda x, w, b: linear(x, w, b, epilogue="swiglu", interleaved=True, backend="cublas"),
    "takes interleaved gate and value features": lambda x, w, b: linear(x, w, b, epilogue="swiglu", backend="triton"),
    "adds no bias": lambda x, w, b: _add(x, x, w, b, "cublas"),
    "got torch.float32, torch.float32, torch.float16": lambda x, w, b: _add(x.half(), x, w, None, "cublas"),
    "evenly spaced rows": lambda x, w, b: _add(x[:1].expand(4, 16), x, w, b, "triton"),
    "adds to fp16, bf16 and fp32": lambda x, w, b: _add(x.double(), x, w, b, "triton"),
    "features in multiples of 16, got 16 in and 8 out": lambda x, w, b: _e4m3(x, w[:8], None, backend="cublas"),
    "takes a bf16 bias": lambda x, w, b: _e4m3(x, w, b, backend="cublas"),
    "too coarse for an fp16 stream": lambda x, w, b: _e4m3(
        x, w, None, epilogue="residual", residual=x.half(), backend="cublas"
    ),
    "has no backend 'cublas'": lambda x, w, b: linear(x, w, b, backend="cublas"),
    "has no backend 'onednn'": lambda x, w, b: _e4m3(x, w, b, backend="onednn"),
}


@fakes_cuda
@pytest.mark.parametrize("reason", REFUSALS)
def test_refusals_say_why(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov2_fast.ops._backends.capability", lambda device: (9, 0))
    with FakeTensorMode():
        x, weight, bias = (torch.empty(shape, device="cuda") for shape in ((4, 16), (16, 16), (16,)))
        with pytest.raises(BackendError, match=reason):
            REFUSALS[reason](x, weight, bias)


@pytest.mark.parametrize("backend", ["cublas", "triton"])
@pytest.mark.parametrize("form", FORMS)
def test_fp8_needs_a_device_with_e4m3(form: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov2_fast.ops._backends.capability", lambda device: (8, 0))
    with FakeTensorMode():
        x, scale = torch.empty(16, 16, device="cuda").to(E4M3), torch.empty(16, device="cuda")
        with pytest.raises(BackendError, match="needs a device with e4m3, sm_89 or newer, got sm_80"):
            run_fp8(form, backend, (x, 1.0, x, scale, None), torch.bfloat16)


MISTAKES = {
    "weight has shape": lambda x, w, b: linear(x, w[:, 1:], b),
    "which does not fit x": lambda x, w, b: linear(x[0, 0], w, b),
    "bias has shape": lambda x, w, b: linear(x, w, b[1:], epilogue="gelu"),
    "nothing to multiply": lambda x, w, b: linear(x[:, :0], w[:, :0], b),
    "pairs of gate and value": lambda x, w, b: linear(x, w[1:], b[1:], epilogue="swiglu"),
    "no form 'relu', only none, gelu, swiglu, residual": lambda x, w, b: linear(x, w, b, epilogue="relu"),
    "residual has shape": lambda x, w, b: _add(x[1:], x, w, b),
    "needs a residual": lambda x, w, b: linear(x, w, b, epilogue="residual"),
    "other epilogues take none": lambda x, w, b: linear(x, w, b, residual=x),
    "of shape .7,., but must be torch.float32 of shape .8,.": lambda x, w, b: _e4m3(x, w, b, weight_scale=b[1:]),
    "weight_scale is torch.float16": lambda x, w, b: _e4m3(x, w, b, weight_scale=b.half()),
    "for x and weight in e4m3": lambda x, w, b: linear(x, w, b, scale=1.0, weight_scale=b),
    "scale, weight_scale and dtype are for": lambda x, w, b: linear(x, w, b, dtype=torch.bfloat16),
    "need scale and weight_scale": lambda x, w, b: linear(x.to(E4M3), w.to(E4M3), b),
    "operands need scale": lambda x, w, b: _e4m3(x, w, b, scale=None),
    "The result of 'none' can be": lambda x, w, b: _e4m3(x, w, b, dtype=E4M3),
    "The result has the dtype of the residual, torch.bfloat16: leave out dtype=torch.float32": lambda x, w, b: _e4m3(
        x, w, b, epilogue="residual", residual=x.bfloat16(), dtype=torch.float32
    ),
    "The result of 'residual' can be": lambda x, w, b: _e4m3(x, w, b, epilogue="residual", residual=x.double()),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_arguments_that_do_not_fit_together_are_an_error(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MISTAKES[message](random(4, 8), random(8, 8), random(8))
