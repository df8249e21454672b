"""Forward passes of whole models: tasks throughput, latency, host, and mixed for images of many sizes."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from operator import truediv
from typing import Any

import torch
from torch import Tensor, nn

from bench import roofline
from bench.harness import Run
from bench.modes import engine, is_engine, prepare, surroundings
from bench.peers import OURS, TIMM, Peer
from bench.tasks import Entrant, Judge, Row, Task


class Forward(Task):
    """Tasks throughput, latency and host: a batch of random images."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._x = self.setting.images(self.device)
        self._judged = [0, -1] if len(self._x) > 1 else [0]  # images whose outputs are checked
        self._judge = Judge(self.setting, self.models, self._outputs)

    def _outputs(self, model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"the outputs": OURS.result(model, self._x[self._judged].to(dtype), self.setting.output)}

    def ready(self, peer: Peer, mode: str) -> tuple[Run, Row]:
        setting = self.setting
        model = self.models.ours if is_engine(mode) else self.models.get(peer, self._x.dtype)
        run = prepare(peer, model, self._x, setting.output, setting.precision, mode, self.best)
        outputs = peer.take[setting.output](run())[self._judged]
        return run, self._judge.verdict(peer, {"the outputs": outputs})

    def floor(self, rates: roofline.Rates) -> float | None:
        setting, in_e4m3 = self.setting, self.setting.precision == "fp8"
        if setting.task == "host":
            return None
        where = setting.config, setting.resolution, setting.batch, setting.output
        return roofline.work(*where, setting.dtype.itemsize, in_e4m3).seconds(rates, in_e4m3)

    def compare(self, rows: dict[Entrant, Row], times: dict[Entrant, list[float]]) -> None:
        """In task host: the median of the time over timm's in the same round."""
        timm = times.get((TIMM, "eager"))
        for entrant, taken in times.items() if timm and self.setting.task == "host" else ():
            rows[entrant]["versions"] |= {"of_timm": statistics.median(map(truediv, taken, timm))}


class Mixed(Task):
    """Images of many sizes: our model and engine take them as a list, a peer runs a batch of each size.

    The time includes making the batches.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        ends = map(int, str(self.setting.resolution).split("-"))
        generator = torch.Generator(self.device).manual_seed(0)
        self._images = [
            torch.randn((3, side, side), device=self.device, generator=generator).to(self.setting.dtype)
            for side in sides(self.setting.batch, *ends)
        ]
        self._judge = Judge(self.setting, self.models, self._outputs)

    def _outputs(self, model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"the outputs": torch.cat([OURS.result(model, x[None].to(dtype), "cls") for x in self._images])}

    def ready(self, peer: Peer, mode: str) -> tuple[Run, Row]:
        forward, context = self._forward(peer, mode), surroundings(mode, self.best)

        def run() -> Tensor:
            with context():
                return forward()

        return run, self._judge.verdict(peer, {"the outputs": run()})

    def _forward(self, peer: Peer, mode: str) -> Callable[[], Tensor]:
        """Gives the class tokens (images, hidden)."""
        if is_engine(mode):
            made = engine(self.models.ours, self._images, "cls", self.setting.precision, mode)
            return lambda: torch.cat(made.cls_tokens(self._images))
        model = self.models.get(peer, self.setting.dtype)

        def run(batches: list[Tensor]) -> list[Tensor]:
            if peer is not OURS:
                return [peer.result(model, x, "cls") for x in batches]
            return [features["x_norm_clstoken"] for features in model.forward_features(batches, [None] * len(batches))]

        return lambda: by_size(run, self._images)


def by_size(run: Callable[[list[Tensor]], list[Tensor]], images: list[Tensor]) -> Tensor:
    """Runs a batch of each size; gives the results' rows in the order of the images."""
    places: dict[Any, list[int]] = {}
    for i, x in enumerate(images):
        places.setdefault(x.shape, []).append(i)
    found = torch.cat(run([torch.stack([images[i] for i in same]) for same in places.values()]))
    order = torch.tensor([i for same in places.values() for i in same], device=found.device)
    return found[order.argsort()]


def sides(count: int, smallest: int, largest: int) -> list[int]:
    """Random multiples of 14, the same in every run; both ends are among them."""
    draw = random.Random(0)
    drawn = [smallest, largest, *draw.choices(range(smallest, largest + 1, 14), k=count - 2)]
    draw.shuffle(drawn)
    return drawn
