"""For tests of the inference engine: calls and heads, CUDA graphs without a GPU, and a count of blocks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dinov2_fast import optimize_for_inference
from dinov2_fast.inference.block import FoldedBlock
from dinov2_fast.inference.cuda_graphs import GraphCache

SIZE = (2, 3, 42, 56)  # of the images of `CALLS`

# A call of a model `m` for images and masks.
CALLS: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "forward": lambda m, x, mask: m(x),
    "forward, masks": lambda m, x, mask: m(x, masks=mask),
    "is_training": lambda m, x, mask: m(x, is_training=True),
    "is_training, masks": lambda m, x, mask: m(x, mask, is_training=True),
    "forward_features": lambda m, x, mask: m.forward_features(x),
    "intermediate": lambda m, x, mask: m.get_intermediate_layers(x, 2),
    "intermediate, chosen": lambda m, x, mask: m.get_intermediate_layers(x, [0, 2], return_class_token=True),
    "attention maps": lambda m, x, mask: m.attention_maps(x, [2, 0], heads=[1]),
    "queries, keys, values": lambda m, x, mask: m.qkv_features(x, reshape=True),
    "intermediate, maps": lambda m, x, mask: m.get_intermediate_layers(x, n=(1,), reshape=True, norm=False),
}


class Head(nn.Module):
    """A head that computes any function of the CLS token."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, x: Tensor) -> Tensor:
        return self._function(x)


# Heads that make the host wait for the device.
WAITING_HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "item": lambda x: x * x.sum().item(),
    "condition": lambda x: x if (x > 0).all() else -x,
    "nonzero": lambda x: x + x.nonzero().shape[0],
    "unique": lambda x: x + x.unique().shape[0],
    "mask": lambda x: x + x[x > 0].sum(),
    "masked_select": lambda x: x + x.masked_select(x > 0).sum(),
    "set by a mask": lambda x: x.index_put((x > 0,), x.sum()[None]),
    "equal": lambda x: x + torch.equal(x, -x),
    "allclose": lambda x: x + torch.allclose(x, -x),
    "inverse": lambda x: x @ torch.linalg.inv(torch.eye(x.shape[-1], device=x.device)),
    "new numbers": lambda x: x + torch.tensor([1.0], device=x.device),
}


def random_images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*(shape or SIZE)).to(dtype)


class FakeGraphs:
    """Stands in for CUDA graphs on the CPU: a replay overwrites earlier outputs. `happened` lists the calls."""

    class Graph:
        def __init__(self, fake: FakeGraphs, run: Callable[[], Any]) -> None:
            self._fake, self._run, self.output = fake, run, run()
            self._autocast = torch.is_autocast_enabled("cpu")  # a replay casts as the capture did
            self._own = [leaf for leaf in pytree.tree_leaves(self.output) if isinstance(leaf, Tensor)]

        def replay(self) -> None:
            self._fake.happened.append("replay")
            with torch.autocast("cpu", torch.bfloat16, enabled=self._autocast):
                new = [leaf.clone() for leaf in pytree.tree_leaves(self._run()) if isinstance(leaf, Tensor)]
            for own, leaf in zip(self._own, new, strict=True):
                own.copy_(leaf)
            time.sleep(self._fake.pause)

        def pool(self) -> Any:
            return self._fake.pools[self]

    def __init__(self) -> None:
        self.happened: list[str] = []
        self.pools: dict[Any, Any] = {}
        self.pause = 0.0
        self.failure: Exception | None = None

    def count(self, what: str) -> int:
        return self.happened.count(what)

    def supports(self, device: torch.device) -> bool:
        return True

    def capture(self, run: Callable[[], Any], device: torch.device, pool: Any) -> tuple[Any, Any, Any]:
        self.happened.append("capture")
        run()
        if self.failure is not None:
            raise self.failure
        graph = FakeGraphs.Graph(self, run)
        self.pools[graph] = pool or object()
        return graph, graph.output, None

    def __getattr__(self, name: str) -> Any:
        if name not in ("begin", "end", "wait", "forget"):
            raise AttributeError(name)
        return lambda *_: self.happened.append(name)


def with_graphs(model: Any, mode: bool | str = True, **kwargs: Any) -> tuple[Any, FakeGraphs]:
    engine, fake = optimize_for_inference(model, "fp32", cuda_graphs=False, **kwargs), FakeGraphs()
    engine._graphs = GraphCache(mode, fake)
    return engine, fake


def blocks_in_full(engine: Any, call: Any) -> int:
    """The number of blocks that a call runs for all tokens."""
    ran = []
    with pytest.MonkeyPatch.context() as patch:
        update_ = FoldedBlock.update_
        patch.setattr(FoldedBlock, "update_", lambda *args: ran.append(1) or update_(*args))
        call(engine)
    return len(ran)
