"""The op layer_norm, alone and with the residual addition before it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dinov2_fast import ops
from dinov2_fast.ops.dispatch import BackendError
from tests import reference
from tests.helpers.devices import (
    BACKENDS,
    DEVICE,
    each_backend,
    gradients,
    opcheck,
    poisoned_memory,
    random,
    runs_triton,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
ROWS = [0, 1, 257]
HIDDEN = [384, 768, 1024, 1536, 383, 1, 2048, 8192]
EPS = 1e-6
each_kernel = pytest.mark.parametrize("backend", BACKENDS[1:])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def _parameters(hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.rand(hidden).add(0.5).to(DEVICE, dtype), random(hidden, dtype=dtype)


def _stream(dtype: torch.dtype, hidden: int = 96, seq_len: int = 17) -> list[Tensor]:
    """residual, branch, gamma, drop_scale"""
    residual, branch = random(3, seq_len, hidden, dtype=dtype), random(3, seq_len, hidden, dtype=dtype)
    drop_scale = torch.tensor([0.0, 1.25, 1.25], device=DEVICE, dtype=dtype)
    return [residual, branch, torch.rand(hidden).to(DEVICE, dtype), drop_scale]


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("rows", ROWS)
@each_dtype
@each_backend
def test_forward_obeys_the_rule(backend: str, dtype: torch.dtype, rows: int, hidden: int) -> None:
    x = random(rows, hidden, dtype=dtype, scale=3, shift=1)
    weight, bias = _parameters(hidden, dtype)
    with poisoned_memory():
        y = ops.layer_norm(x, weight, bias, EPS, backend=backend)
    plain = F.layer_norm(x, (hidden,), weight, bias, EPS)
    reference.assert_obeys_rule(y, reference.layer_norm(x, weight, bias, EPS), plain)


@each_dtype
@each_backend
def test_a_small_row_among_large_ones_obeys_the_rule_by_itself(backend: str, dtype: torch.dtype) -> None:
    x = random(9, 384, dtype=dtype, scale=1000)
    x[4] /= 1000
    weight, bias = _parameters(384, dtype)
    y, plain = ops.layer_norm(x, weight, bias, EPS, backend=backend), F.layer_norm(x, (384,), weight, bias, EPS)
    for row, ref in enumerate(reference.layer_norm(x, weight, bias, EPS)):
        reference.assert_obeys_rule(y[row], ref, plain[row])


@each_backend
def test_fp64_equals_the_formula(backend: str) -> None:
    x = random(5, 384, dtype=torch.float64)
    weight, bias = _parameters(384, torch.float64)
    y = ops.layer_norm(x, weight, bias, EPS, backend=backend)
    torch.testing.assert_close(y, reference.layer_norm(x, weight, bias, EPS), rtol=0, atol=1e-13)


@pytest.mark.parametrize("left_out", [(), ("gamma",), ("drop_scale",), ("gamma", "drop_scale")], ids=str)
@each_dtype
@each_backend
def test_the_norm_of_a_sum_obeys_the_rule(backend: str, dtype: torch.dtype, left_out: tuple[str, ...]) -> None:
    residual, branch, gamma, drop_scale = _stream(dtype)
    gamma = None if "gamma" in left_out else gamma
    drop_scale = None if "drop_scale" in left_out else drop_scale
    weight, bias = _parameters(96, dtype)
    with poisoned_memory():
        total, y = ops.layer_norm(
            residual, weight, bias, EPS, branch=branch, gamma=gamma, drop_scale=drop_scale, backend=backend
        )
    ref = reference.add_residual(residual, branch, gamma, drop_scale)
    plain = branch if drop_scale is None else branch * drop_scale[:, None, None]
    plain = residual + (plain if gamma is None else plain * gamma)
    reference.assert_obeys_rule(total, ref, plain)
    # The stored, rounded sum is normalised, so the exact norm is that of the stored sum.
    reference.assert_obeys_rule(
        y, reference.layer_norm(total, weight, bias, EPS), F.layer_norm(total, (96,), weight, bias, EPS)
    )


@pytest.mark.parametrize("hidden", [384, 383, 1])
@pytest.mark.parametrize("rows", ROWS)
@each_dtype
@each_backend
def test_the_norm_with_a_deferred_bias_is_that_of_the_unrounded_sum(
    backend: str, dtype: torch.dtype, rows: int, hidden: int
) -> None:
    """Far from zero, where rounding the sum to 16 bits would destroy the norm."""
    x, deferred = random(rows, hidden, dtype=dtype), random(hidden, shift=10)
    weight, bias = _parameters(hidden, dtype)
    with poisoned_memory():
        y = ops.layer_norm(x, weight, bias, EPS, deferred_bias=deferred, backend=backend)
    assert y.dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    plain = F.layer_norm(x.to(wide) + deferred, (hidden,), weight.to(wide), bias.to(wide), EPS).to(dtype)
    reference.assert_obeys_rule(y, reference.layer_norm(x.double() + deferred.double(), weight, bias, EPS), plain)


@each_backend
def test_a_deferred_bias_is_for_inference_and_goes_without_a_branch(backend: str) -> None:
    x = random(2, 3, 64).requires_grad_()
    vector = random(64)
    with pytest.raises(BackendError, match="inference only"):
        ops.layer_norm(x, vector, vector, EPS, deferred_bias=vector, backend=backend)
    with pytest.raises(ValueError, match="add the branch first"):
        ops.layer_norm(x, vector, vector, EPS, branch=x, deferred_bias=vector, backend=backend)
    if backend != "torch":
        with pytest.raises(BackendError, match=r"takes deferred_bias of shape \(64,\)"):
            ops.layer_norm(x.detach(), vector, vector, EPS, deferred_bias=vector[:1], backend=backend)


@pytest.mark.parametrize("hidden", [96, 383, 768])
@each_dtype
@each_backend
def test_gradients_obey_the_rule(backend: str, dtype: torch.dtype, hidden: int) -> None:
    residual, branch, gamma, drop_scale = _stream(dtype, hidden)
    weight, bias = _parameters(hidden, dtype)

    def run(backend: str, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        residual, branch, gamma, weight, bias = inputs
        addends = {"branch": branch, "gamma": gamma, "drop_scale": drop_scale.to(residual.dtype)}
        total, y = ops.layer_norm(residual, weight, bias, EPS, **addends, backend=backend)
        return total, y, ops.layer_norm(total, weight, bias, EPS, backend=backend)

    inputs = [residual, branch, gamma, weight, bias]
    with poisoned_memory():
        ours = gradients(lambda *x: run(backend, *x), inputs)
    plain = gradients(lambda *x: run("torch", *x), inputs)
    exact = gradients(lambda *x: run("torch", *x), [x.double() for x in inputs])
    for gradient, ref, usual in zip(ours, exact, plain, strict=True):
        reference.assert_obeys_rule(gradient, ref, usual)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@each_backend
def test_gradients_far_from_zero_obey_the_rule(backend: str, dtype: torch.dtype) -> None:
    """Statistics in half precision would be too inaccurate. torch stores them so on a CPU if the weight is half."""
    inputs = [random(33, 96, dtype=dtype, shift=50), *_parameters(96, torch.float32)]

    def norm(backend: str):
        return lambda x, weight, bias: ops.layer_norm(x, weight, bias, EPS, backend=backend)

    exact = gradients(norm("torch"), [x.double() for x in inputs])
    for ours, ref, usual in zip(gradients(norm(backend), inputs), exact, gradients(norm("torch"), inputs), strict=True):
        reference.assert_obeys_rule(ours, ref, usual)


@each_backend
def test_mixed_dtypes_promote_as_in_torch(backend: str) -> None:
    residual, branch = random(2, 3, 64), random(2, 3, 64, dtype=torch.bfloat16)
    gamma, (weight, bias) = torch.rand(64, device=DEVICE), _parameters(64, torch.float32)

    def run(backend: str, *inputs: Tensor) -> tuple[Tensor, ...]:
        residual, branch, gamma, weight, bias = inputs
        return ops.layer_norm(residual, weight, bias, EPS, branch=branch, gamma=gamma, backend=backend)

    inputs = [residual, branch, gamma, weight, bias]
    for result, plain in zip(run(backend, *inputs), run("torch", *inputs), strict=True):
        assert result.dtype == plain.dtype == torch.float32
        torch.testing.assert_close(result, plain, atol=1e-5, rtol=0)
    plain = gradients(lambda *x: run("torch", *x), inputs)
    for result, usual in zip(gradients(lambda *x: run(backend, *x), inputs), plain, strict=True):
        torch.testing.assert_close(result, usual, atol=1e-4, rtol=0.01)
    x = branch[0]
    assert ops.layer_norm(x, weight.bfloat16(), bias.bfloat16(), EPS, backend=backend).dtype == torch.bfloat16


@each_backend
def test_gradients_equal_finite_differences_in_fp64(backend: str) -> None:
    residual, branch = torch.randn(2, 2, 3, 5, dtype=torch.float64, device=DEVICE, requires_grad=True).unbind(0)
    vectors = torch.randn(3, 5, dtype=torch.float64, device=DEVICE, requires_grad=True).unbind(0)
    scale = torch.tensor([0.0, 2.0], dtype=torch.float64, device=DEVICE)
    assert torch.autograd.gradcheck(
        lambda r, b, g, w, c: ops.layer_norm(r, w, c, EPS, branch=b, gamma=g, drop_scale=scale, backend=backend),
        (residual, branch, *vectors),
    )
    assert torch.autograd.gradcheck(
        lambda x, w, c: ops.layer_norm(x, w, c, EPS, backend=backend), (residual, *vectors[:2])
    )


@each_kernel
def test_a_gradient_of_only_one_output_and_of_few_inputs(backend: str) -> None:
    residual, branch, gamma, *_ = _stream(torch.float32)
    weight, bias = _parameters(96, torch.float32)
    for output in (0, 1):
        found = []
        for name in ("torch", backend):
            x = residual.clone().requires_grad_()
            outputs = ops.layer_norm(x, weight, bias, EPS, branch=branch, gamma=gamma, backend=name)
            outputs[output].pow(2).sum().backward()
            found.append(x.grad)
        torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)


STRIDES = {
    "transposed": lambda x: x.transpose(0, 1),
    "strided": lambda x: x[:, ::2],
    "expanded": lambda x: x[:1].expand(4, -1, -1),
    "offset": lambda x: x[1:, 1:],
    "columns": lambda x: x[..., ::2],
    "misaligned": lambda x: x.flatten()[1:1281].view(5, 4, 64),
}


def _copied(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)  # copies contiguous but misaligned tensors as well


def _assert_same(layout: str, *both: Tensor) -> None:
    """Equal bit by bit, except where narrower loads assign other elements to the threads."""
    if layout == "misaligned":
        torch.testing.assert_close(*both)
    else:
        assert torch.equal(*both)


@pytest.mark.parametrize("layout", STRIDES)
@each_backend
def test_strided_input_gives_what_a_copy_gives(backend: str, layout: str) -> None:
    x = STRIDES[layout](random(4, 6, 64))
    weight, bias = _parameters(x.shape[-1], torch.float32)
    copy = _copied(x)
    _assert_same(layout, *(ops.layer_norm(t, weight, bias, EPS, backend=backend) for t in (x, copy)))
    sums = [ops.layer_norm(t, weight, bias, EPS, branch=copy, gamma=weight, backend=backend) for t in (x, copy)]
    for strided, copied in zip(*sums, strict=True):
        _assert_same(layout, strided, copied)


@pytest.mark.parametrize("layout", STRIDES)
@each_kernel
def test_strided_gradients_give_what_a_copy_gives(backend: str, layout: str) -> None:
    dy = STRIDES[layout](random(4, 6, 64))
    x = random(*dy.shape).requires_grad_()
    weight, bias = (v.requires_grad_() for v in _parameters(dy.shape[-1], torch.float32))
    y = ops.layer_norm(x, weight, bias, EPS, backend=backend)
    both = [torch.autograd.grad(y, (x, weight, bias), g, retain_graph=True) for g in (dy, _copied(dy))]
    for strided, copied in zip(*both, strict=True):
        _assert_same(layout, strided, copied)


@pytest.mark.sanitize
@each_backend
def test_nan_and_inf_stay_in_their_row_and_constant_rows_give_the_bias(backend: str) -> None:
    x = random(4, 64)
    x[1, 3], x[2, 5], x[3] = float("nan"), float("inf"), 7.0
    weight, bias = _parameters(64, torch.float32)
    y = ops.layer_norm(x, weight, bias, EPS, backend=backend)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    assert y[2].isnan().all()
    torch.testing.assert_close(y[3], bias)


@each_backend
def test_huge_and_tiny_values_obey_the_rule(backend: str) -> None:
    weight, bias = _parameters(384, torch.float16)
    huge = random(3, 384, dtype=torch.float16).sign() * 6e4
    tiny = random(3, 384, dtype=torch.float16, scale=1e-4)  # eps counts as much as the variance
    for x in (huge, tiny):
        y = ops.layer_norm(x, weight, bias, 1e-8, backend=backend)
        plain = F.layer_norm(x, (384,), weight, bias, 1e-8)
        reference.assert_obeys_rule(y, reference.layer_norm(x, weight, bias, 1e-8), plain)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_gives_the_dtype_torch_gives(backend: str, dtype: torch.dtype) -> None:
    x, (weight, bias) = random(2, 3, 8, dtype=dtype), _parameters(8, torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = ops.layer_norm(x, weight, bias, EPS, backend=backend)
        assert y.dtype == F.layer_norm(x, (8,), weight, bias, EPS).dtype
        total, y = ops.layer_norm(x.float(), weight, bias, EPS, branch=x.bfloat16(), gamma=weight, backend=backend)
    assert total.dtype == y.dtype == torch.float32


# e4m3


@pytest.mark.parametrize("deferred", [False, True], ids=["", "deferred_bias"])
@pytest.mark.parametrize("hidden", [384, 383])
@each_dtype
@each_backend
def test_e4m3_values_are_one_step_from_the_formula(
    backend: str, dtype: torch.dtype, hidden: int, deferred: bool
) -> None:
    x = random(3, 17, hidden, dtype=dtype)
    weight, bias = _parameters(hidden, dtype)
    scale = 0.01  # large values saturate
    left_out = random(hidden, scale=10) if deferred else None
    with poisoned_memory():
        y = ops.layer_norm(x, weight, bias, EPS, deferred_bias=left_out, scale=scale, backend=backend)
    x = x.double() + (0 if left_out is None else left_out.double())
    expected = (reference.layer_norm(x, weight, bias, EPS) / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    steps = reference.e4m3_steps(y, expected)
    assert steps.max() <= 1
    assert (steps > 0).double().mean() < 0.01
    assert y.float().abs().max() == 448


@each_backend
def test_e4m3_is_for_inference_and_goes_without_a_branch(backend: str) -> None:
    x = random(2, 64).requires_grad_()
    with pytest.raises(BackendError, match="inference only"):
        ops.layer_norm(x, x[0], x[0], EPS, scale=1.0, backend=backend)
    with torch.no_grad():
        assert ops.layer_norm(x, x[0], x[0], EPS, scale=1.0, backend=backend).dtype == torch.float8_e4m3fn
        with pytest.raises(ValueError, match="no scale or deferred_bias with a branch"):
            ops.layer_norm(x, x[0], x[0], EPS, branch=x, scale=1.0, backend=backend)


@pytest.mark.parametrize("name", ["gamma", "drop_scale"])
def test_factors_of_a_branch_need_a_branch(name: str) -> None:
    x = random(2, 64)
    with pytest.raises(ValueError, match="gamma and drop_scale with a branch only"):
        ops.layer_norm(x, x[0], x[0], EPS, **{name: x[0]})


# Registration with torch


def _add_arguments(residual: Tensor, branch: Tensor) -> tuple:
    vector = torch.rand(residual.shape[-1], device=DEVICE)
    return residual, vector + 1, vector - 1, EPS, branch, vector, None


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
@each_kernel
def test_registered_ops_pass_opcheck(backend: str, requires_grad: bool, strided: bool) -> None:
    x = random(3, 5, 64).transpose(0, 1) if strided else random(5, 3, 64)
    x.requires_grad_(requires_grad)
    vector = torch.rand(64, device=DEVICE, requires_grad=requires_grad)

    def check(name: str, arguments: tuple) -> None:
        opcheck(getattr(torch.ops.dinov2_fast, name).default, arguments)

    check("layer_norm", (x, vector, vector, EPS))
    check("add_layer_norm", _add_arguments(x, x.detach()))
    if not requires_grad:
        check("layer_norm_forward", (x, vector, vector, EPS))
        check("add_layer_norm_forward", _add_arguments(x, x))
        check("layer_norm_inference", (x, vector, vector, EPS, None, 0.1))
        check("layer_norm_inference", (x, vector, vector, EPS, vector, None))
        row = torch.rand(x.shape[:-1], device=DEVICE)
        check("layer_norm_backward", (x, x, vector, row, row))
        backward = (x, x, vector, row, row, x, x.bfloat16(), vector, None, torch.float16)
        check("add_layer_norm_backward", backward)


@each_kernel
def test_compiled_as_one_graph_with_gradients(backend: str) -> None:
    def step(residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        total, y = ops.layer_norm(residual, weight, bias, EPS, branch=branch, gamma=weight, backend=backend)
        return ops.layer_norm(total * y, weight, bias, EPS, backend=backend)

    inputs = [random(2, 5, 64), random(2, 5, 64), *_parameters(64, torch.float32)]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(gradients(compiled, inputs), gradients(step, inputs), strict=True):
        torch.testing.assert_close(ours, eager)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(*inputs), step(*inputs))


@each_kernel
def test_forward_mode_differentiation_is_refused_not_dropped(backend: str) -> None:
    x, (weight, bias) = random(2, 8), _parameters(8, torch.float32)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: ops.layer_norm(x, weight, bias, EPS, backend=backend), (x,), (x,))


@runs_triton
def test_refusals_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = random(2, 8).to(torch.int32), random(8)
    with pytest.raises(BackendError, match=r"takes fp16, bf16, fp32 and fp64, got torch\.int32"):
        ops.layer_norm(x, weight, weight, EPS, backend="triton")
    x = random(4, 3, 8)
    for branch, gamma, message in (
        (x[:1], None, r"takes branch of shape \(4, 3, 8\), got \(1, 3, 8\)"),
        (x, x[0, 0, :1], r"takes gamma of shape \(8,\), got \(1,\)"),
    ):
        with pytest.raises(BackendError, match=message):
            ops.layer_norm(x, x[0, 0], x[0, 0], EPS, branch=branch, gamma=gamma, backend="triton")
    with pytest.raises(BackendError, match=r"takes weight and bias of shape \(8,\)"):
        ops.layer_norm(x, x[0, 0, :4], x[0, 0], EPS, backend="triton")
    with FakeTensorMode():
        half = torch.empty(2, 3, 8, device="cuda", dtype=torch.bfloat16)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")  # without a device
            with pytest.raises(BackendError, match="but autocast asks for fp32"):
                ops.layer_norm(half, half[0, 0], half[0, 0], EPS, branch=half, backend="triton")
        wide = torch.empty(2, 8193, device="cuda")
        with pytest.raises(BackendError, match="hidden size up to 8192, got 8193"):
            ops.layer_norm(wide, wide[0], wide[0], EPS, backend="triton")
        x = torch.empty(2, 3, 8, device="cuda")
        scale = torch.ones(2, device="cuda", requires_grad=True)
        with pytest.raises(BackendError, match="no gradient for drop_scale"):
            ops.layer_norm(x, x[0, 0], x[0, 0], EPS, branch=x, drop_scale=scale, backend="triton")
