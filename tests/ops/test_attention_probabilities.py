"""The attention weights of some queries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinov2_fast import ops
from tests import reference
from tests.helpers.attention_cases import (
    each_dtype,
    exact_gradient,
    random_qkv,
)
from tests.helpers.devices import (
    each_backend,
    gradients,
    poisoned_memory,
    random,
    runs_triton,
)

ROWS = [slice(None), slice(0, 1), slice(2, 5), slice(-3, None), slice(1, 70, 3)]


@pytest.mark.parametrize("rows", ROWS, ids=str)
@each_dtype
@each_backend
def test_probabilities_obey_the_rule(backend: str, dtype: torch.dtype, rows: slice) -> None:
    qkv = random_qkv(2, 75, dtype=dtype)

    def weights(x: Tensor, backend: str) -> Tensor:
        return ops.attention_probabilities(x, rows, backend=backend)

    with poisoned_memory():
        p = weights(qkv, backend)
        ours = gradients(lambda x: weights(x, backend), [qkv])[0]
    assert p.is_contiguous()
    reference.assert_obeys_rule(p, reference.attention_probabilities(qkv)[:, :, rows], weights(qkv, "torch"))
    exact = exact_gradient(lambda x: reference.attention_probabilities(x)[:, :, rows], qkv)
    plain = gradients(lambda x: weights(x, "torch"), [qkv])[0]
    for ours_, exact_, plain_ in zip(*(x.unbind(2)[:2] for x in (ours, exact, plain)), strict=True):
        reference.assert_obeys_rule(ours_, exact_, plain_)
    assert (ours[:, :, 2] == 0).all()


@runs_triton
def test_probabilities_of_any_length_are_one_graph() -> None:
    def rest(qkv: Tensor) -> Tensor:
        return ops.attention_probabilities(qkv, slice(1, None), backend="triton")

    compiled = torch.compile(rest, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seq_len in (7, 9, 12):
            qkv = random(2, seq_len, 3, 2, 32)
            torch.testing.assert_close(compiled(qkv), rest(qkv), atol=1e-5, rtol=0)
