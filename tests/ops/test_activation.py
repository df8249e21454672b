"""The op activation: GELU and SwiGLU."""

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
each_kernel = pytest.mark.parametrize("backend", BACKENDS[1:])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_kind = pytest.mark.parametrize("kind", ["gelu", "swiglu"])


def _plain(kind: str, x: Tensor) -> Tensor:
    if kind == "gelu":
        return F.gelu(x)
    gate, value = x.tensor_split(2, dim=-1)
    return F.silu(gate) * value


def _op(kind: str, backend: str):
    return lambda x: ops.activation(x, kind, backend=backend)


@pytest.mark.parametrize("shape", [(0, 384), (1, 2), (257, 1536), (3, 5, 2062)], ids=str)
@each_dtype
@each_kind
@each_backend
def test_forward_obeys_the_rule(backend: str, kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = random(*shape, dtype=dtype, scale=3)
    with poisoned_memory():
        y = _op(kind, backend)(x)
    reference.assert_obeys_rule(y, getattr(reference, kind)(x), _plain(kind, x))


@each_dtype
@each_kind
@each_backend
def test_a_small_row_among_large_ones_obeys_the_rule_by_itself(backend: str, kind: str, dtype: torch.dtype) -> None:
    x = random(7, 512, dtype=dtype, scale=3)
    x[3] /= 1000
    y, exact, plain = _op(kind, backend)(x), getattr(reference, kind)(x), _plain(kind, x)
    for row in range(7):
        reference.assert_obeys_rule(y[row], exact[row], plain[row])


@each_dtype
@each_kind
@each_backend
def test_gradients_obey_the_rule(backend: str, kind: str, dtype: torch.dtype) -> None:
    inputs = [random(37, 2, 1038, dtype=dtype, scale=2)]  # no tile divides the columns
    with poisoned_memory():
        (ours,) = gradients(_op(kind, backend), inputs)
    (plain,) = gradients(_op(kind, "torch"), inputs)
    (exact,) = gradients(_op(kind, "torch"), [inputs[0].double()])
    reference.assert_obeys_rule(ours, exact, plain)


@each_backend
def test_gelu_is_the_exact_one(backend: str) -> None:
    x = torch.linspace(-8, 8, 4000, dtype=torch.float64, device=DEVICE)
    assert (ops.activation(x, "gelu", backend=backend) - reference.gelu(x)).abs().max() < 1e-15
    assert (F.gelu(x, approximate="tanh") - reference.gelu(x)).abs().max() > 1e-4  # far above the bound before
    single = ops.activation(x.float(), "gelu", backend=backend).double()
    assert (single - reference.gelu(x.float())).abs().max() < 1e-6


@each_kernel
def test_the_polynomial_is_as_near_as_it_says_for_every_bf16_number(backend: str) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(DEVICE)
    every = every[every.isfinite()].view(-1, 64)
    y, exact = ops.activation(every, "gelu", backend=backend).double(), reference.gelu(every)
    spacing = exact.abs().bfloat16().double() * 2.0**-7  # at least one unit in the last place
    assert ((y - exact).abs() <= 3.2e-6 + spacing).all()
    assert y.isfinite().all()


@each_backend
def test_swiglu_gates_with_the_first_half(backend: str) -> None:
    x = torch.tensor([[-30.0, 30.0, 2.0, 3.0]], dtype=torch.float64, device=DEVICE)
    expected = torch.tensor([[0.0, 90.0]], dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(ops.activation(x, "swiglu", backend=backend), expected, atol=1e-10, rtol=0)


@each_kind
@each_backend
def test_gradients_equal_finite_differences_in_fp64(backend: str, kind: str) -> None:
    x = torch.randn(3, 8, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(_op(kind, backend), (x,))


def test_gelu_may_overwrite_its_input() -> None:
    x = torch.randn(9, 64)
    expected = ops.activation(x, "gelu")
    assert not torch.equal(x, expected)
    out = ops.activation(x, "gelu", overwrite=True)
    assert out.data_ptr() == x.data_ptr()
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)


@each_kernel
def test_a_kernel_leaves_its_input_alone(backend: str) -> None:
    x = random(9, 64)
    before = x.clone()
    y = ops.activation(x, "gelu", overwrite=True, backend=backend)
    assert torch.equal(y, ops.activation(x, "gelu", backend=backend))
    assert torch.equal(x, before)


STRIDES = {
    "transposed": lambda x: x.transpose(0, 1),
    "strided": lambda x: x[:, ::2],
    "expanded": lambda x: x[:1].expand(4, -1, -1),
    "columns": lambda x: x[..., ::2],
    "slice": lambda x: x[..., 1:33],
}


@pytest.mark.parametrize("make", STRIDES.values(), ids=STRIDES)
@each_kind
@each_backend
def test_strided_input_gives_what_a_copy_gives(backend: str, kind: str, make) -> None:
    x = make(random(6, 4, 64))
    op = _op(kind, backend)
    # torch takes another code path for strided input, which differs by single roundings
    torch.testing.assert_close(op(x), op(x.contiguous()), atol=2e-6, rtol=0)
    if backend != "torch":
        inputs = x.detach().contiguous().requires_grad_()
        y = op(inputs)
        dy = random(2, *y.shape)[1].transpose(0, 1).contiguous().transpose(0, 1)
        strided, copied = (torch.autograd.grad(y, inputs, g, retain_graph=True)[0] for g in (dy, dy.contiguous()))
        assert torch.equal(strided, copied)


@pytest.mark.sanitize
@each_dtype
@each_kind
@each_backend
def test_nan_stays_and_huge_values_do_not_overflow(backend: str, kind: str, dtype: torch.dtype) -> None:
    extreme = torch.tensor([[float("nan"), 6e4, -6e4, 0.0] + [1.0] * 12], dtype=dtype, device=DEVICE)
    op = _op(kind, backend)
    assert op(extreme).isnan().sum() == 1
    assert not op(extreme).isinf().any()
    (gradient,) = gradients(op, [extreme])
    assert gradient.isnan().sum() == (1 if kind == "gelu" else 2)


@each_dtype
@pytest.mark.parametrize("kind", ["gelu", "swiglu", "identity"])
@each_backend
def test_e4m3_values_are_one_step_from_the_formula(backend: str, kind: str, dtype: torch.dtype) -> None:
    x, scale = random(33, 766, dtype=dtype, scale=3), 1 / 64
    with poisoned_memory():
        y = ops.activation(x, kind, scale=scale, backend=backend)
    exact = ((x.double() if kind == "identity" else getattr(reference, kind)(x)) / scale).clamp(-448, 448)
    steps = reference.e4m3_steps(y, exact.to(torch.float8_e4m3fn))
    assert steps.max() <= 1
    assert (steps > 0).double().mean() < 0.01
    assert y.float().max() == 448
    with pytest.raises(BackendError, match="inference only"):
        ops.activation(x.requires_grad_(), kind, scale=scale, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_kind
@each_backend
def test_autocast_gives_the_dtype_torch_gives(backend: str, kind: str, dtype: torch.dtype) -> None:
    x = random(3, 16, dtype=dtype)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert _op(kind, backend)(x).dtype == _plain(kind, x).dtype


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
@each_kind
@each_kernel
def test_registered_ops_pass_opcheck(backend: str, kind: str, requires_grad: bool, strided: bool) -> None:
    x = random(3, 5, 64).transpose(0, 1) if strided else random(5, 3, 64)
    opcheck(torch.ops.dinov2_fast.activation.default, (x.requires_grad_(requires_grad), kind, None))
    if not requires_grad:
        opcheck(torch.ops.dinov2_fast.activation.default, (x, kind, 0.1))
        dy = x[..., :32] if kind == "swiglu" else x
        opcheck(torch.ops.dinov2_fast.activation_backward.default, (dy, x, kind))


@each_kind
@each_kernel
def test_compiled_as_one_graph_with_gradients(backend: str, kind: str) -> None:
    op = _op(kind, backend)
    x = random(5, 64)
    compiled = torch.compile(lambda x: op(x * 2), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, [x]), gradients(lambda x: op(x * 2), [x]))
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), op(x * 2))


def test_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="activation has no form 'relu', only gelu, swiglu, identity"):
        ops.activation(random(4), "relu")


def test_the_identity_needs_a_scale() -> None:
    with pytest.raises(ValueError, match="give it the scale of the e4m3 values"):
        ops.activation(random(4), "identity")


@runs_triton
def test_refusals_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"takes fp16, bf16, fp32 and fp64, got torch\.int32"):
        ops.activation(random(4).int(), "gelu", backend="triton")
    with pytest.raises(BackendError, match="takes two halves of equal size"):
        ops.activation(random(4, 3), "swiglu", backend="triton")
    monkeypatch.setattr("dinov2_fast.ops._backends.capability", lambda device: (8, 0))
    with FakeTensorMode(), pytest.raises(BackendError, match="needs a device with e4m3, sm_89 or newer, got sm_80"):
        ops.activation(torch.empty(4, device="cuda"), "gelu", scale=1.0, backend="triton")
