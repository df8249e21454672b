"""The op attention on sequences of different lengths, packed along one axis."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dinov2_fast import ops
from dinov2_fast.ops import _attention_peers
from tests import reference
from tests.helpers.attention_cases import (
    PACKED_LENGTHS,
    assert_gradient_obeys_the_rule,
    each_dtype,
    each_sequence,
    exact_gradient,
    plain_attention,
    random_qkv,
)
from tests.helpers.devices import (
    DEVICE,
    each_backend,
    gradients,
    poisoned_memory,
    random,
)


@pytest.mark.parametrize("seq_lens", [(5,), PACKED_LENGTHS, (70, 3), (64, 40, 128)], ids=str)
@each_dtype
@each_backend
def test_varlen_obeys_the_rule(backend: str, dtype: torch.dtype, seq_lens: tuple[int, ...]) -> None:
    qkv = random_qkv(1, sum(seq_lens), dtype=dtype)[0]
    with poisoned_memory():
        out = ops.attention(qkv, seq_lens=seq_lens, backend=backend)
        ours = gradients(lambda x: ops.attention(x, seq_lens=seq_lens, backend=backend), [qkv])[0]
    assert out.is_contiguous()
    ref, plain = (each_sequence(f, qkv, seq_lens) for f in (reference.attention, plain_attention))
    reference.assert_obeys_rule(out, ref, plain)
    for one, exact, usual in zip(*(x.split(list(seq_lens)) for x in (out, ref, plain)), strict=True):
        reference.assert_obeys_rule(one, exact, usual)
    exact = exact_gradient(lambda x: each_sequence(reference.attention, x, seq_lens), qkv)
    plain = gradients(lambda x: ops.attention(x, seq_lens=seq_lens, backend="torch"), [qkv])[0]
    assert_gradient_obeys_the_rule(ours, exact, plain)


@each_backend
def test_empty_sequences_and_none_at_all_give_no_rows(backend: str) -> None:
    qkv = random_qkv(1, 7)[0]
    expected = ops.attention(qkv, seq_lens=(7,), backend=backend)
    assert torch.equal(ops.attention(qkv, seq_lens=(0, 7, 0), backend=backend), expected)
    assert ops.attention(qkv[:0], seq_lens=(), backend=backend).shape == (0, 2, 64)


def test_lengths_packed_in_inference_mode_serve_training_later() -> None:
    seq_lens = (2, 11, 3)
    qkv = random_qkv(1, 16)[0]
    with torch.inference_mode():
        offsets = _attention_peers.cu_seqlens(seq_lens, qkv.device)
    assert not offsets.is_inference()
    assert offsets.tolist() == [0, 2, 13, 16]
    assert _attention_peers.cu_seqlens(seq_lens, qkv.device) is offsets  # no second copy to the device


def test_fake_lengths_are_not_cached() -> None:
    with FakeTensorMode():
        _attention_peers.cu_seqlens((4, 12), torch.device(DEVICE))
    assert _attention_peers.cu_seqlens((4, 12), torch.device(DEVICE)).tolist() == [0, 4, 16]


@each_backend
def test_lengths_that_do_not_sum_to_the_tokens_are_an_error(backend: str) -> None:
    for seq_lens in ((4, 8), (4, 4)):
        with pytest.raises(ValueError, match=rf"seq_lens sum to {sum(seq_lens)}, but qkv has 10 tokens"):
            ops.attention(random(10, 3, 2, 64), seq_lens=seq_lens, backend=backend)
