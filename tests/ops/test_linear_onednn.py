"""The op linear on oneDNN."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_fast import optimize_for_inference
from dinov2_fast.ops import _backends, _linear_peers, linear
from dinov2_fast.ops.dispatch import BackendError, use_backend
from tests import reference
from tests.helpers.small_models import small

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a torch with oneDNN")
FORMS = ["none", "gelu", "swiglu", "residual"]


@pytest.fixture
def _small_products_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets oneDNN compute small products as well."""
    monkeypatch.setattr(_linear_peers, "ONEDNN_MIN_PRODUCTS", 1)


def _run(form: str, backend: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if form == "residual":
        generator = torch.Generator().manual_seed(1)
        residual = torch.randn(*x.shape[:-1], weight.shape[0], generator=generator).to(x.dtype)
        return linear(x, weight, bias, epilogue=form, residual=residual, backend=backend)
    return linear(x, weight, bias, epilogue=form, backend=backend)


@pytest.mark.usefixtures("_small_products_too")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, 33), (0,), (17,), (257,)], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_outputs_obey_the_rule(form: str, shape: tuple[int, ...], has_bias: bool) -> None:
    x, weight = torch.randn(*shape, 72), torch.randn(96, 72) / 72**0.5
    bias = torch.randn(96) if has_bias else None
    wide = None if bias is None else bias.double()
    exact = _run(form, "torch", x.double(), weight.double(), wide)
    if form == "residual":
        residual = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
        exact = residual.double() + F.linear(x.double(), weight.double(), wide)
    found, plain = (_run(form, backend, x, weight, bias) for backend in ("onednn", "torch"))
    assert found.shape == plain.shape
    reference.assert_obeys_rule(found, exact, plain)


@pytest.mark.parametrize("in_features", [768, 1536, 3072])
@pytest.mark.parametrize("form", FORMS)
def test_long_sums_obey_the_rule(form: str, in_features: int) -> None:
    x, weight, bias = torch.randn(257, in_features), torch.randn(384, in_features) / in_features**0.5, torch.randn(384)
    exact = _run(form, "torch", x.double(), weight.double(), bias.double())
    if form == "residual":
        residual = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
        exact = residual.double() + F.linear(x.double(), weight.double(), bias.double())
    found, plain = (_run(form, backend, x, weight, bias) for backend in ("onednn", "torch"))
    reference.assert_obeys_rule(found, exact, plain)


@pytest.mark.usefixtures("_small_products_too")
@pytest.mark.parametrize("form", FORMS)
def test_a_packed_weight_gives_the_same_for_any_number_of_rows(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "HAS_AVX512", True)
    x, weight, bias = torch.randn(257, 800), torch.randn(96, 800) / 800**0.5, torch.randn(96)
    packed = weight.clone()
    _linear_peers.allow_prepacking(packed)
    for rows in (257, 3, 64):
        expected, found = (_run(form, "onednn", x[:rows], each, bias) for each in (weight, packed))
        torch.testing.assert_close(found, expected)
    assert [part.is_mkldnn for part in _linear_peers._parts(packed)] == [True, True]
    assert not any(part.is_mkldnn for part in _linear_peers._parts(weight))


@pytest.mark.usefixtures("_small_products_too")
def test_strided_operands_are_multiplied_correctly() -> None:
    x, weight = torch.randn(72, 33).T, torch.randn(72, 96).T
    torch.testing.assert_close(linear(x, weight, None, backend="onednn"), x @ weight.T)


@pytest.mark.parametrize(("rows", "calls"), [(63, 0), (64, 1)])
def test_small_products_are_left_to_torch(rows: int, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of less than 2^19 multiplications, even if oneDNN is named."""
    product, seen = _linear_peers.onednn_linear, []
    monkeypatch.setattr(_linear_peers, "onednn_linear", lambda *args: seen.append(1) or product(*args))
    x, weight = torch.randn(rows, 64), torch.randn(128, 64)
    torch.testing.assert_close(linear(x, weight, None, backend="onednn"), x @ weight.T)
    assert len(seen) == calls


def test_refusals_say_why() -> None:
    x, weight = torch.randn(2, 8), torch.randn(4, 8)
    with pytest.raises(BackendError, match=r"takes fp32 and bf16, got torch\.float64"):
        linear(x.double(), weight.double(), None, backend="onednn")
    with pytest.raises(BackendError, match="takes x and weight of one dtype"):
        linear(x, weight.bfloat16(), None, backend="onednn")
    with torch.autocast("cpu"), pytest.raises(BackendError, match="does not follow autocast"):
        linear(x, weight, None, epilogue="residual", residual=torch.zeros(2, 4), backend="onednn")


@pytest.mark.usefixtures("_small_products_too")
def test_an_engine_on_onednn_equals_the_model_also_compiled() -> None:
    torch._dynamo.reset()
    model, x = small(num_register_tokens=2), torch.randn(2, 3, 42, 56)
    engine = optimize_for_inference(model, "fp32")
    with use_backend("onednn", strict=True):
        chosen = {row.form: row.backend for row in engine.backends() if row.op == "linear"}
        assert chosen == dict.fromkeys(("none", "gelu", "residual"), "onednn")
        found = engine(x)
        compiled = torch.compile(engine, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, model(x).detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(compiled, found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("place", [0, 1, 2], ids=["x", "weight", "bias"])
def test_derivatives_of_forward_mode_are_left_to_torch(place: int) -> None:
    operands = [torch.randn(10, 72), torch.randn(96, 72), torch.randn(96)]

    def run(backend: str | None, moving: Tensor) -> Tensor:
        return linear(*operands[:place], moving, *operands[place + 1 :], backend=backend)

    moving = operands[place]
    with torch.no_grad(), pytest.raises(BackendError, match="has no forward-mode derivative"):
        torch.func.jvp(lambda x: run("onednn", x), (moving,), (moving,))
    with torch.no_grad(), use_backend("linear=onednn"):
        _, tangent = torch.func.jvp(lambda x: run(None, x), (moving,), (moving,))
    expected = run("torch", moving) - run("torch", torch.zeros_like(moving))
    torch.testing.assert_close(tangent, expected)
