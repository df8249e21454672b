"""The op linear on cuBLAS. A CPU runs its floating-point forms through the same functions of torch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dinov2_fast import ops
from dinov2_fast.ops import _linear_peers, linear
from dinov2_fast.ops.linear import interleave
from tests import reference
from tests.helpers.devices import (
    fakes_cuda,
)
from tests.helpers.linear_cases import (
    E4M3,
    exact_linear,
    plain_linear,
    random_fp8_operands,
    random_operands,
    random_stream,
    run_fp8,
)

FORMS = ["none", "gelu", "swiglu", "residual"]

each_form = pytest.mark.parametrize("form", FORMS)


@pytest.mark.parametrize("rows", [1, 33])
def test_cublas_forms_obey_the_rule(rows: int) -> None:
    x, weight, bias = (t.cpu() for t in random_operands(rows, 48, 40, torch.bfloat16))
    y = _linear_peers.linear_cublas(x.view(1, rows, 40), weight, bias, "gelu")
    assert y.shape == (1, rows, 48)
    reference.assert_obeys_rule(y[0], exact_linear("gelu", x, weight, bias), plain_linear("gelu", x, weight, bias))
    y = linear(x, weight, bias, epilogue="swiglu", backend="cublas")
    in_turn = x, interleave(weight), interleave(bias)
    reference.assert_obeys_rule(y, exact_linear("swiglu", *in_turn), plain_linear("swiglu", *in_turn))
    residual = random_stream(x, weight)
    exact = residual.double() + reference.linear(x, weight, None)
    plain = residual + F.linear(x, weight)
    assert linear(x, weight, None, epilogue="residual", residual=residual, backend="cublas") is residual
    reference.assert_obeys_rule(residual, exact, plain)


def test_row_scales_are_made_once_and_never_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_linear_peers, "_ROW_SCALES", {})
    cpu = torch.device("cpu")
    first = _linear_peers._row_scales(5, 0.25, cpu)
    assert (first.shape, first.stride(), first.tolist()) == ((5, 1), (1, 1), [[0.25]] * 5)
    assert _linear_peers._row_scales(8, 0.25, cpu).data_ptr() == first.data_ptr()
    assert _linear_peers._row_scales(1, 0.5, cpu).tolist() == [[0.5]]
    assert _linear_peers._row_scales(9, 0.25, cpu).tolist() == [[0.25]] * 9
    assert [len(kept) for kept in _linear_peers._ROW_SCALES[0.25, cpu]] == [8, 16]


@fakes_cuda
def test_row_scales_made_while_a_graph_is_captured_are_not_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture must not wait for the device, and the tensor is filled only when the graph is replayed."""
    monkeypatch.setattr(_linear_peers, "_ROW_SCALES", {})
    monkeypatch.setattr(_linear_peers, "is_fake_mode_active", lambda: False)
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    waited = []
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: waited.append(_kept()))
    )

    def _kept() -> int:
        return sum(map(len, _linear_peers._ROW_SCALES.values()))

    cuda = torch.device("cuda", 0)
    with FakeTensorMode():
        assert _linear_peers._row_scales(5, 0.25, cuda).shape == (5, 1)
        assert (_kept(), waited) == (0, [])
        capturing[0] = False
        _linear_peers._row_scales(5, 0.25, cuda)
        assert (_kept(), waited) == (1, [0])  # cached after it is filled
        capturing[0] = True
        assert _linear_peers._row_scales(8, 0.25, cuda).shape == (8, 1)
        assert _kept() == 1


@pytest.mark.parametrize("form", ["gelu", "swiglu"])
def test_cublas_in_e4m3_leaves_the_activation_to_its_op(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS' product is replaced by one that computes in fp32 and returns bf16."""

    def scaled_mm(x: Tensor, weight: Tensor, scale: Tensor, _: Any, columns: Tensor, *rest: Any, **options: Any):
        assert options["use_fast_accum"]
        z = (x.float() * scale) @ (weight.float() * columns) + options["bias"].float()
        return z.to(options["output_dtype"])

    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    operands, matrices = random_fp8_operands((33, 32, 48))
    x, scale, weight, weight_scale, bias = (t.cpu() if isinstance(t, Tensor) else t for t in operands)
    args = x, weight, bias, form, None, scale, weight_scale, E4M3, 1 / 300, False
    asked = []
    monkeypatch.setattr(
        _linear_peers, "activation", lambda z, kind, **rest: asked.append(z) or ops.activation(z, kind, **rest)
    )
    y = _linear_peers.linear_cublas_e4m3(*args)
    assert asked[0].dtype == torch.bfloat16
    exact = exact_linear(
        form, matrices[0], *(map(interleave, (matrices[1], bias)) if form == "swiglu" else (matrices[1], bias))
    )
    steps = reference.e4m3_steps(y, (exact * 300).clamp(-448, 448).to(E4M3).cpu())
    assert steps.max() <= 1
    assert (steps > 0).double().mean() < 0.1  # the product was rounded to bf16


@fakes_cuda
@pytest.mark.parametrize("form", FORMS)
def test_cublas_forms_in_fp8_have_the_shapes_of_the_others(form: str) -> None:
    with FakeTensorMode():
        x, weight = (torch.empty(n, 64, device="cuda").to(E4M3) for n in (10, 48))
        operands = (x.view(2, 5, 64), 0.5, weight, torch.empty(48, device="cuda"), None)
        y, expected = (run_fp8(form, backend, operands, torch.bfloat16) for backend in ("cublas", "torch"))
        assert (y.shape, y.dtype, y.stride()) == (expected.shape, expected.dtype, expected.stride())
