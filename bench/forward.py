"""Forward passes of whole models: tasks throughput, latency and host, and mixed for images of many sizes."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from operator import truediv
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import roofline
from bench.harness import Run
from bench.modes import DTYPES, WAYS, engine, is_engine, prepare, surroundings
from bench.peers import OURS, TIMM, Peer
from bench.tasks import Entrant, Judge, Row, Task


class Forward(Task):
    """Tasks throughput, latency and host: a batch of random images."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._x = self.setting.images(self.device)
        self._judged = [0, -1] if len(self._x) > 1 else [0]  # images whose outputs are looked at
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
        """Of task host: the time over timm's in the same round."""
        timm = times.get((TIMM, "eager"))
        for entrant, taken in times.items() if timm and self.setting.task == "host" else ():
            rows[entrant]["versions"] |= {"of_timm": statistics.median(map(truediv, taken, timm))}


class Mixed(Task):
    """Images of many sizes: ours takes the list, a peer runs one after another, groups of one size, or padded images.

    Of padded images no error is given: none of the models knows what is padding, so these are other class tokens.
    Making batches counts as time.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        ends = map(int, str(self.setting.resolution).split("-"))
        generator, dtype = torch.Generator(self.device).manual_seed(0), DTYPES[self.setting.precision]
        self._images = [
            torch.randn((3, side, side), device=self.device, generator=generator).to(dtype)
            for side in sides(self.setting.batch, *ends)
        ]
        self._judge = Judge(self.setting, self.models, self._outputs)

    def _outputs(self, model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"the outputs": single(OURS, model, [x.to(dtype) for x in self._images])}

    def ready(self, peer: Peer, mode: str) -> tuple[Run, Row]:
        forward = self._forward(peer, mode)
        context = surroundings(self.setting.precision, mode, self.device, self.best)

        def run() -> Tensor:
            with context():
                return forward()

        tokens = run()
        if mode == "padded":
            assert tokens.shape == (len(self._images), self.setting.config.embed_dim), f"there are {len(tokens)} tokens"
            assert tokens.isfinite().all(), "a class token is not finite"
            return run, {"versions": {"outputs": "of padded images: not compared, since they are not the same"}}
        return run, self._judge.verdict(peer, {"the outputs": tokens})

    def _forward(self, peer: Peer, mode: str) -> Callable[[], Tensor]:
        if is_engine(mode):
            made = engine(self.models.ours, self._images, "cls", self.setting.precision, mode)
            return lambda: torch.cat(made.cls_tokens(self._images))
        model, way = self.models.get(peer, DTYPES[self.setting.precision]), IN_WAY.get(mode, listed)
        return lambda: way(peer, model, self._images)


def single(peer: Peer, model: nn.Module, images: list[Tensor]) -> Tensor:
    """The class tokens (images, hidden), like those of the others below."""
    return torch.cat([peer.result(model, x[None], "cls") for x in images])


def grouped(peer: Peer, model: nn.Module, images: list[Tensor]) -> Tensor:
    places = groups(images)
    return in_order(places, [peer.result(model, torch.stack([images[i] for i in same]), "cls") for same in places])


def padded(peer: Peer, model: nn.Module, images: list[Tensor]) -> Tensor:
    height, width = (max(x.shape[side] for x in images) for side in (1, 2))
    batch = torch.stack([F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in images])
    return peer.result(model, batch, "cls")


def listed(peer: Peer, model: nn.Module, images: list[Tensor]) -> Tensor:
    """The list forward of our model, which takes batches of one size."""
    places = groups(images)
    batches = [torch.stack([images[i] for i in same]) for same in places]
    features = model.forward_features(batches, [None] * len(batches))
    return in_order(places, [of_one_size["x_norm_clstoken"] for of_one_size in features])


IN_WAY = dict(zip(WAYS, (single, grouped, padded), strict=True))


def groups(images: list[Tensor]) -> list[list[int]]:
    """The places in the list of the images of each size."""
    places: dict[Any, list[int]] = {}
    for i, x in enumerate(images):
        places.setdefault(x.shape, []).append(i)
    return list(places.values())


def in_order(places: list[list[int]], found: list[Tensor]) -> Tensor:
    """The rows of all groups, each at its place in the list."""
    order = torch.tensor([i for same in places for i in same], device=found[0].device)
    return torch.cat(found)[order.argsort()]


def sides(count: int, smallest: int, largest: int) -> list[int]:
    """Multiples of 14 by a seed, both ends among them."""
    draw = random.Random(0)
    drawn = [smallest, largest, *draw.choices(range(smallest, largest + 1, 14), k=count - 2)]
    draw.shuffle(drawn)
    return drawn
