"""The op attention on oneDNN, the default for fp32 on a CPU with AVX-512."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinov2_fast import ops
from dinov2_fast.ops import _attention_peers
from dinov2_fast.torch_private import FakeTensorMode
from tests import reference

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a torch with oneDNN")


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Records the sizes of the queries in each call that oneDNN computes."""
    seen: list[tuple[int, ...]] = []
    right = _attention_peers._fused

    def recorded(*layouts, threads):
        attention = right(*layouts, threads=threads)
        if attention is not None:
            seen.append(tuple(layouts[0][0]))
        return attention

    monkeypatch.setattr(_attention_peers, "_fused", recorded)
    return seen


def _attention(qkv: Tensor, **options) -> Tensor:
    return ops.attention(qkv, backend="onednn", **options)


@pytest.mark.parametrize("mean", [0.0, 1.0])
@pytest.mark.parametrize(("seq_len", "heads", "head_dim"), [(182, 2, 32), (257, 3, 64), (530, 1, 64), (1370, 2, 64)])
def test_outputs_obey_the_rule(seq_len: int, heads: int, head_dim: int, mean: float, fused) -> None:
    """Also if the values have a mean, with which oneDNN's own sums are too inaccurate."""
    qkv = torch.randn(2, seq_len, 3, heads, head_dim)
    qkv[:, :, 2] += mean
    for grad_enabled in (True, False):
        with torch.set_grad_enabled(grad_enabled):
            found = _attention(qkv)
    assert fused == 2 * [(2, heads, seq_len, head_dim)]
    assert found.is_contiguous()
    reference.assert_obeys_rule(found, reference.attention(qkv), ops.attention(qkv, backend="torch"))


@pytest.mark.parametrize(
    ("most", "parts"),
    [(6 * 300**2, [(2, 3, 300, 64), (1, 3, 300, 64)]), (2 * 300**2, 3 * [(1, 2, 300, 64), (1, 1, 300, 64)])],
)
def test_many_scores_are_computed_in_parts(most: int, parts: object, fused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_attention_peers, "ONEDNN_MAX_SCORES", most)
    qkv = torch.randn(3, 300, 3, 3, 64)
    found = _attention(qkv)
    assert fused == parts
    torch.testing.assert_close(found, ops.attention(qkv, backend="torch"))


def test_a_part_of_a_larger_tensor_is_read_in_place(fused) -> None:
    whole = torch.randn(2, 300, 4, 2, 64)
    found = _attention(whole[:, :, 1:])
    assert len(fused) == 1
    torch.testing.assert_close(found, ops.attention(whole[:, :, 1:].contiguous(), backend="torch"))


def test_another_number_of_threads_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(_attention_peers, "fused_by_onednn", lambda *_: made.append(torch.get_num_threads()))
    qkv, before = torch.randn(1, 301, 3, 1, 64), torch.get_num_threads()
    _attention_peers._fused.cache_clear()
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        found = _attention(qkv)
    torch.set_num_threads(before)
    _attention_peers._fused.cache_clear()
    assert made == [1, 2]
    assert torch.equal(found, ops.attention(qkv, backend="torch")), "where oneDNN has none"


@pytest.mark.filterwarnings("ignore:There is a performance drop", "error::torch.jit.TracerWarning")
def test_what_onednn_does_not_support_is_left_to_torch(fused) -> None:
    """Few scores, other dtypes, gradients, traces, tensor subclasses, modes and dropout."""
    qkv = torch.randn(1, 400, 3, 1, 64)
    leaf = qkv.clone().requires_grad_()
    _attention(leaf).sum().backward()
    assert leaf.grad is not None
    _attention(qkv[:, :200])
    _attention(qkv.bfloat16())
    _attention(qkv, dropout_p=0.5)
    torch.jit.trace(_attention, qkv, check_trace=False)
    assert torch.func.vmap(_attention)(qkv[None]).shape == (1, 1, 400, 1, 64)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _attention(qkv)
    with torch.autocast("cpu", torch.bfloat16):
        assert _attention(qkv).dtype == torch.bfloat16
    assert not fused


def test_no_derivative_of_forward_mode_is_lost(fused) -> None:
    """torch's attention raises an error, because it has none."""
    qkv = torch.randn(1, 400, 3, 1, 64)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(_attention, (qkv,), (qkv,))
    assert not fused
