"""The op attention by oneDNN's products, which a CPU with AVX-512 uses for long sequences in fp32."""

from __future__ import annotations

import importlib

import pytest
import torch

from dinov2_fast import ops
from dinov2_fast.torch_private import onednn_linear
from tests import reference

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a torch with oneDNN")
op = importlib.import_module("dinov2_fast.ops.attention")  # `ops.attention` is the function


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each product of oneDNN."""
    seen: list[int] = []
    monkeypatch.setattr(op, "onednn_linear", lambda x, *rest: seen.append(len(x)) or onednn_linear(x, *rest))
    return seen


@pytest.mark.parametrize("mean", [0.0, 1.0])
@pytest.mark.parametrize("seq_len", [384, 1370])
def test_outputs_obey_the_rule(seq_len: int, mean: float, products: list[int]) -> None:
    """Also where the values have a mean, whose sum in order would be too coarse."""
    qkv = torch.randn(2, seq_len, 3, 2, 64)
    qkv[:, :, 2] += mean
    with torch.no_grad():
        found = ops.attention(qkv, backend="onednn")
    assert products == [seq_len] * 8
    assert found.is_contiguous()
    reference.assert_obeys_rule(found, reference.attention(qkv), ops.attention(qkv, backend="torch"))


def test_the_scores_are_written_in_parts(products: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "ONEDNN_SCORES", 1000 * 400)
    qkv = torch.randn(1, 1000, 3, 1, 64)
    with torch.no_grad():
        found = ops.attention(qkv, backend="onednn")
    assert products == [400, 400, 400, 400, 200, 200]
    torch.testing.assert_close(found, ops.attention(qkv, backend="torch"))


def test_what_is_torch_s(products: list[int]) -> None:
    """Short sequences, other dtypes, and whatever is recorded, traced, or dropped."""
    qkv = torch.randn(1, 400, 3, 1, 64)
    ops.attention(qkv.requires_grad_(), backend="onednn").sum().backward()
    assert qkv.grad is not None
    with torch.no_grad():
        ops.attention(qkv[:, :300], backend="onednn")
        ops.attention(qkv.bfloat16(), backend="onednn")
        ops.attention(qkv, backend="onednn", dropout_p=0.5)
        torch.jit.trace(lambda x: ops.attention(x, backend="onednn"), qkv, check_trace=False)
        with torch.autocast("cpu", torch.bfloat16):
            assert ops.attention(qkv, backend="onednn").dtype == torch.bfloat16
    assert not products


def test_no_derivative_of_forward_mode_is_lost(products: list[int]) -> None:
    """torch's attention has none, and says so."""
    qkv = torch.randn(1, 400, 3, 1, 64)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(lambda x: ops.attention(x, backend="onednn"), (qkv,), (qkv,))
    assert not products
