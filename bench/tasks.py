"""What the tasks of bench.model share: settings, models, the check of results, and the measuring."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bench import harness, records, roofline
from bench.harness import Run, contest, obeys_rule, quantiles
from bench.modes import DTYPES, compiling, is_best, why_missing
from bench.peers import OURS, Peer
from dinov2_fast.configs import BackboneConfig
from dinov2_fast.ops.dispatch import use_backend

SAMPLE = {"cpu": 0.0, "cuda": 0.02}  # least seconds of one timing of throughput, in calls that do not wait
# A peer may err this many times as much as the rule allows ours: it only has to compute the same model.
# OpenVINO in fp32 errs three times as much as torch.
SLACK_OF_PEERS = 5
COSINE = 0.98  # least cosine of a token in fp8 with the same token in fp32

Entrant = tuple[Peer, str]  # an implementation and its mode
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What all implementations are asked for."""

    task: str
    config: BackboneConfig
    resolution: int | str  # pixels of each side; for images of many sizes such as "224-518"
    batch: int
    output: str
    precision: str

    def images(self, device: torch.device) -> Tensor:
        generator = torch.Generator(device).manual_seed(0)
        size = (self.batch, 3, self.resolution, self.resolution)
        return torch.randn(size, device=device, generator=generator).to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of images and products and, in the floor, of the residual stream."""
        return DTYPES[self.precision]

    def row(self, peer: Peer, mode: str) -> Row:
        """The keys that say what a row is about."""
        return {
            "task": self.task,
            "model": self.config.name,
            "resolution": self.resolution,
            "batch": self.batch,
            "output": self.output,
            "precision": self.precision,
            "implementation": peer.name,
            "mode": mode,
        }

    def __str__(self) -> str:
        output = {"all": "all tokens", "cls": "class token"}.get(self.output, self.output)
        return f"{harness.title(self.config)} {self.resolution} px, batch {self.batch}, {output}, {self.precision}"


class Models:
    """A backbone in every implementation, made at the first request and kept for one dtype at a time.

    Args:
        ours: our model in fp32, on the device.
    """

    def __init__(self, config: BackboneConfig, ours: nn.Module) -> None:
        self.config, self.ours = config, ours
        self.device = next(ours.parameters()).device
        self._made: dict[tuple[Peer, torch.dtype], nn.Module] = {}

    def get(self, peer: Peer, dtype: torch.dtype) -> nn.Module:
        self._made = {key: model for key, model in self._made.items() if key[1] == dtype}
        if (peer, dtype) not in self._made:
            made = peer.build(self.config, self.ours, 0.0)
            self._made[peer, dtype] = made.to(self.device, dtype).eval()
        return self._made[peer, dtype]


@contextmanager
def resampling(model: nn.Module, position_interpolation: str) -> Iterator[None]:
    """Has our model resample position embeddings in another way."""
    before, model.position_interpolation = model.position_interpolation, position_interpolation
    try:
        yield
    finally:
        model.position_interpolation = before


class Judge:
    """Checks results against those of our model on plain PyTorch, in a wider dtype and in that of the setting.

    Args:
        results: runs a model in a dtype; gives its results by name.
    """

    def __init__(
        self, setting: Setting, models: Models, results: Callable[[nn.Module, torch.dtype], dict[str, Tensor]]
    ) -> None:
        self._setting, self._models, self._results = setting, models, results
        self._known: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def verdict(self, peer: Peer, found: dict[str, Tensor]) -> Row:
        """The errors of results, as keys of a row.

        Raises:
            AssertionError: an error is too large.
        """
        wide, usual = self.expected(peer)
        if self._setting.precision == "fp8":
            return _judged_by_cosine(found["the outputs"].float(), wide["the outputs"])
        worst, slack = 0.0, 1 if peer.name == OURS.name else SLACK_OF_PEERS
        for name, result in found.items():
            allowed = (wide[name] + slack * (usual[name] - wide[name])).to(usual[name].dtype)
            try:
                worst = max(worst, obeys_rule(result.to(allowed.dtype), wide[name], allowed))
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
        return {"outputs_max_error": worst}

    def expected(self, peer: Peer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Our model's results in a wider dtype and in the setting's, with positions resampled as the peer does."""
        position_interpolation = peer.position_interpolation(self._setting.config)
        if position_interpolation not in self._known:
            self._known[position_interpolation] = self._results_in(position_interpolation)
        return self._known[position_interpolation]

    def _results_in(self, position_interpolation: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        dtype = self._setting.dtype
        exact, same = self._models.ours, self._models.get(OURS, dtype)
        if dtype == torch.float32:
            exact = copy.deepcopy(exact).double()
        wide = next(exact.parameters()).dtype
        # cuDNN would compute convolutions of fp32 in TF32; without `enabled` this context would switch cuDNN off.
        exactly = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with use_backend("torch"), exactly, resampling(exact, position_interpolation):
            reference = self._results(exact, wide)
        with use_backend("torch"), resampling(same, position_interpolation):
            return reference, self._results(same, dtype)


def _judged_by_cosine(result: Tensor, wide: Tensor) -> Row:
    cosine = torch.cosine_similarity(result, wide, dim=-1).min().item()
    assert cosine >= COSINE, f"the cosine of a token with that in fp32 is {cosine:.4f}, below {COSINE}"
    error = ((result - wide).abs().max() / wide.abs().max()).item()
    return {"outputs_max_error": error, "versions": {"cosine": cosine}}


class Task:
    """Measures implementations in one setting.

    Args:
        best: the backends of mode engine-best.
    """

    in_inference_mode: ClassVar[bool] = True

    def __init__(self, setting: Setting, models: Models, best: str | None = None) -> None:
        self.setting, self.models, self.best = setting, models, best
        self.device = models.device

    def ready(self, peer: Peer, mode: str) -> tuple[Run, Row]:
        """A run to time, and the errors of its results as keys of a row.

        Raises:
            AssertionError: the results are wrong.
        """
        raise NotImplementedError

    def floor(self, rates: roofline.Rates) -> float | None:
        """The least seconds that a run can take; None if there is no bound."""
        return None

    def measure(self, entrants: Iterable[Entrant], seconds: float) -> list[Row]:
        """A row for each entrant, timed in turn for about `seconds` in all."""
        rows, rates = self.rows(entrants), self.rates()

        def ready(entrant: Entrant) -> Run:
            run, about = self.ready(*entrant)
            rows[entrant] |= about
            if self.best and is_best(entrant[1]):
                rows[entrant]["versions"] = (about.get("versions") or {}) | {"backends": self.best}
            return run

        sample = SAMPLE[self.device.type] if self.setting.task not in ("latency", "host") else 0.0
        with torch.inference_mode(self.in_inference_mode), compiling():
            times = contest(rows, ready, self.device, seconds, sample)
        for entrant, taken in times.items():
            versions = rows[entrant].get("versions") or {}
            rows[entrant] |= {"versions": versions | rates.row} | self.values(entrant, taken)
        self.compare(rows, times)
        return list(rows.values())

    def rates(self) -> roofline.Rates:
        """The device's speed in the dtype of the products."""
        return roofline.measured(self.device, self.setting.dtype)

    def rows(self, entrants: Iterable[Entrant]) -> dict[Entrant, Row]:
        """A row for each entrant: what it measures, or why it cannot."""
        rows = {(peer, mode): self.setting.row(peer, mode) for peer, mode in entrants}
        for (peer, mode), row in rows.items():
            if reason := why_missing(peer, mode, self.best):
                row |= records.missing(reason)
        return rows

    def values(self, entrant: Entrant, times: list[float]) -> Row:
        """The measured keys of a row, from timings in seconds."""
        fast, median, slow = quantiles(times)
        least = self.floor(self.rates())
        share = {"floor_share": least and least / median}
        if self.setting.task in ("latency", "host"):
            return {"value": 1e3 * median, "p20": 1e3 * fast, "p80": 1e3 * slow, "unit": "ms"} | share
        batch = self.setting.batch
        return {"value": batch / median, "p20": batch / slow, "p80": batch / fast, "unit": "images/s"} | share

    def compare(self, rows: dict[Entrant, Row], times: dict[Entrant, list[float]]) -> None:
        """Adds to the rows what follows from the timings of several entrants."""
