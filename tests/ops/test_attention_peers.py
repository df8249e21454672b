"""The op attention on other libraries: torch's varlen_attn and xformers."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dinov2_fast import ops
from dinov2_fast.ops import _attention_peers
from dinov2_fast.ops.dispatch import BackendError
from tests import reference
from tests.helpers.attention_cases import (
    each_sequence,
    exact_gradient,
    plain_attention,
    quantized,
    random_qkv,
)
from tests.helpers.devices import (
    fakes_cuda,
    gradients,
    on_gpu,
)


@fakes_cuda
def test_refusals_of_peers_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="needs a cuda tensor, got one on cpu"):
        ops.attention(random_qkv(1, 9).cpu(), backend="xformers")
    with pytest.raises(
        BackendError,
        match=r"probabilities has no backend .xformers. for torch.float32. It has: torch, triton",
    ):
        ops.attention_probabilities(random_qkv(1, 9), backend="xformers")
    with FakeTensorMode():
        qkv = torch.empty(2, 1, 3, 2, 64, device="cuda", dtype=torch.float16)
        packed = torch.empty(9, 3, 2, 64, device="cuda", dtype=torch.float16)
        with pytest.raises(BackendError, match=r"has no dropout, got dropout_p = 0\.5"):
            ops.attention(packed, seq_lens=(4, 5), dropout_p=0.5, backend="varlen_attn")
        with pytest.raises(BackendError, match=r"takes fp16 and bf16, got torch\.float32"):
            ops.attention(packed.float(), seq_lens=(4, 5), backend="varlen_attn")
        with pytest.raises(BackendError, match="takes a head_dim up to 256, got 320"):
            ops.attention(packed.repeat(1, 1, 1, 5), seq_lens=(4, 5), backend="varlen_attn")
        monkeypatch.setattr(_attention_peers, "_XFORMERS_IS_INSTALLED", True)
        with pytest.raises(BackendError, match=r"takes fp16, bf16 and fp32, got torch\.float64"):
            ops.attention(qkv.double(), backend="xformers")
        with pytest.raises(BackendError, match="takes a head_dim that is a multiple of 8, got 12"):
            ops.attention(qkv[..., :12], backend="xformers")
        monkeypatch.setenv("XFORMERS_DISABLED", "1")
        with pytest.raises(BackendError, match="switched off by XFORMERS_DISABLED"):
            ops.attention(qkv, backend="xformers")
        monkeypatch.setattr(_attention_peers, "_XFORMERS_IS_INSTALLED", False)
        with pytest.raises(BackendError, match="xformers, which is not installed"):
            ops.attention(packed, seq_lens=(4, 5), backend="xformers")


def test_results_of_other_libraries_are_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries are replaced by functions that return the queries."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda q, *_: q)
    peer = SimpleNamespace(memory_efficient_attention=lambda q, k, v, **_: q)
    monkeypatch.setitem(sys.modules, "xformers.ops", peer)
    monkeypatch.setattr(_attention_peers, "_block_diagonal_mask", lambda *_: None)
    qkv = torch.randn(2, 9, 3, 2, 64).half()
    for y, queries in (
        (_attention_peers.varlen_attn(qkv[0], (4, 5), 0.0, 0.01), qkv[0, :, 0]),
        (_attention_peers.xformers_attention(qkv[0], (4, 5), 0.0, 0.01), qkv[0, :, 0]),
        (_attention_peers.xformers_attention(qkv, None, 0.0, 0.01), qkv[:, :, 0]),
    ):
        assert torch.equal(y.float(), quantized(queries.float(), 0.01).float())
    assert torch.equal(_attention_peers.varlen_attn(qkv[0], (4, 5), 0.0, None), qkv[0, :, 0])


@on_gpu
@pytest.mark.parametrize("backend", ["varlen_attn", "xformers"])
def test_peers_obey_the_rule(backend: str) -> None:
    if backend == "xformers":
        pytest.importorskip("xformers.ops")
    qkv = random_qkv(2, 257, dtype=torch.bfloat16)
    if backend != "varlen_attn":
        out = ops.attention(qkv, backend=backend)
        assert out.is_contiguous()
        reference.assert_obeys_rule(out, reference.attention(qkv), plain_attention(qkv))
        gradient, exact = gradients(lambda x: ops.attention(x, backend=backend), [qkv])[0], reference.attention
        reference.assert_obeys_rule(gradient, exact_gradient(exact, qkv), gradients(plain_attention, [qkv])[0])
    packed, seq_lens = qkv.flatten(0, 1), (200, 57, 257)
    out = ops.attention(packed, seq_lens=seq_lens, backend=backend)
    ref, plain = (each_sequence(f, packed, seq_lens) for f in (reference.attention, plain_attention))
    reference.assert_obeys_rule(out, ref, plain)
