"""For tests of the inference engine: CUDA graphs without a GPU, and a count of the blocks that run for all tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dinov2_fast import optimize_for_inference
from dinov2_fast.inference.block import FoldedBlock
from dinov2_fast.inference.cuda_graphs import Graphs


class FakeGraphs:
    """Graphs on the CPU, as careless with their memory as real ones; it notes what happens."""

    class Graph:
        def __init__(self, fake: FakeGraphs, run: Callable[[], Any]) -> None:
            self._fake, self._run, self.output = fake, run, run()
            self._autocast = torch.is_autocast_enabled("cpu")  # what a graph launches was cast, or not, at its capture
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

    def serves(self, device: torch.device) -> bool:
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
    engine._graphs = Graphs(mode, fake)
    return engine, fake


def blocks_in_full(engine: Any, call: Any) -> int:
    """How many blocks run for all tokens in a call."""
    ran = []
    with pytest.MonkeyPatch.context() as patch:
        update_ = FoldedBlock.update_
        patch.setattr(FoldedBlock, "update_", lambda *args: ran.append(1) or update_(*args))
        call(engine)
    return len(ran)
