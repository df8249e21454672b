"""The properties of arguments on which a choice depends."""

from __future__ import annotations

import torch

from dinov2_fast.ops import implementation


def test_tensors_in_lists_count() -> None:
    inner = torch.zeros(1, device="meta", requires_grad=True)
    assert implementation.first_tensor(([inner], 1)).device.type == "meta"
    assert implementation.records_gradient(([inner.detach(), inner],))
    assert not implementation.records_gradient(([inner.detach()], None, 2.0))
