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
from bench.modes import backend_context, build_engine, forward_run, is_engine
from bench.peers import OURS, TIMM, Peer
from bench.records import Row, grouped
from bench.tasks import Task, Variant


class ForwardTask(Task):
    """Tasks throughput, latency and host: a batch of random images."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._x = self.scenario.images(self.device)
        self._checked_images = [0, -1] if len(self._x) > 1 else [0]  # images whose outputs are checked

    def our_results(self, model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"the outputs": OURS.result(model, self._x[self._checked_images].to(dtype), self.scenario.output)}

    def checked_run(self, peer: Peer, mode: str) -> tuple[Run, Row]:
        scenario = self.scenario
        model = self.models.ours if is_engine(mode) else self.models.get(peer, self._x.dtype)
        run = forward_run(peer, model, self._x, scenario.output, scenario.precision, mode, self.best_backends)
        outputs = peer.to_tensor[scenario.output](run())[self._checked_images]
        return run, self.accuracy.check(peer, {"the outputs": outputs})

    def floor_seconds(self, rates: roofline.Rates) -> float | None:
        scenario, in_e4m3 = self.scenario, self.scenario.precision == "fp8"
        if scenario.task == "host":
            return None
        where = scenario.config, scenario.resolution, scenario.batch, scenario.output
        return roofline.forward_work(*where, scenario.dtype.itemsize, in_e4m3).seconds(rates, in_e4m3)

    def add_ratios(self, rows: dict[Variant, Row], times: dict[Variant, list[float]]) -> None:
        """In task host: the median ratio of the time to timm's time in the same round."""
        timm = times.get((TIMM, "eager"))
        for variant, timings in times.items() if timm and self.scenario.task == "host" else ():
            rows[variant]["versions"] |= {"of_timm": statistics.median(map(truediv, timings, timm))}


class MixedTask(Task):
    """Images of many sizes. The engine takes a list of images, our model a list of batches, one for each size.

    A peer runs these batches one after the other. The time includes building the batches.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        ends = map(int, str(self.scenario.resolution).split("-"))
        generator = torch.Generator(self.device).manual_seed(0)
        self._images = [
            torch.randn((3, side, side), device=self.device, generator=generator).to(self.scenario.dtype)
            for side in side_lengths(self.scenario.batch, *ends)
        ]

    def our_results(self, model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"the outputs": torch.cat([OURS.result(model, x[None].to(dtype), "cls") for x in self._images])}

    def checked_run(self, peer: Peer, mode: str) -> tuple[Run, Row]:
        forward, context = self._forward(peer, mode), backend_context(mode, self.best_backends)

        def run() -> Tensor:
            with context():
                return forward()

        return run, self.accuracy.check(peer, {"the outputs": run()})

    def _forward(self, peer: Peer, mode: str) -> Callable[[], Tensor]:
        """A function that returns the class tokens (images, hidden)."""
        if is_engine(mode):
            engine = build_engine(self.models.ours, self._images, "cls", self.scenario.precision, mode)
            return lambda: torch.cat(engine.cls_tokens(self._images))
        model = self.models.get(peer, self.scenario.dtype)

        def run(batches: list[Tensor]) -> list[Tensor]:
            if peer is not OURS:
                return [peer.result(model, x, "cls") for x in batches]
            return [features["x_norm_clstoken"] for features in model.forward_features(batches, [None] * len(batches))]

        return lambda: run_by_size(run, self._images)


def run_by_size(run: Callable[[list[Tensor]], list[Tensor]], images: list[Tensor]) -> Tensor:
    """Runs a batch of each size. Returns the rows of the results in the order of the images."""
    groups = grouped(range(len(images)), lambda i: images[i].shape).values()
    results = torch.cat(run([torch.stack([images[i] for i in group]) for group in groups]))
    order = torch.tensor([i for group in groups for i in group], device=results.device)
    return results[order.argsort()]


def side_lengths(count: int, smallest: int, largest: int) -> list[int]:
    """Random multiples of 14, the same in every run, among them `smallest` and `largest`."""
    generator = random.Random(0)
    sides = [smallest, largest, *generator.choices(range(smallest, largest + 1, 14), k=count - 2)]
    generator.shuffle(sides)
    return sides
