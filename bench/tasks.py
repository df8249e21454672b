"""What the tasks of bench.model share: scenarios, models, the check of results, and the measuring."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bench import harness, records, roofline
from bench.harness import Run, obeys_rule, speed, time_implementations
from bench.modes import DTYPES, compile_scope, reason_missing, uses_best_backends
from bench.peers import OURS, Peer
from bench.records import Recorder, Row
from dinov2_fast.configs import BackboneConfig
from dinov2_fast.ops.dispatch import use_backend

MIN_TIMING_SECONDS = {"cpu": 0.0, "cuda": 0.02}  # of one timing, in calls that do not wait; latency and host: one call
# A peer's errors may be this many times what the rule allows ours: it only has to compute the same model.
# OpenVINO in fp32 has three times the error of torch.
PEER_TOLERANCE = 5
MIN_COSINE = 0.98  # of a token in fp8 with the same token in fp32

Variant = tuple[Peer, str]  # an implementation and its mode


@dataclass(frozen=True)
class Scenario:
    """What all implementations are asked to compute."""

    task: str
    config: BackboneConfig
    resolution: int | str  # pixels of each side; for images of many sizes such as "224-518"
    batch: int
    output: str
    precision: str

    def images(self, device: torch.device) -> Tensor:
        """Random images (batch, 3, height, width), the same in every run."""
        generator = torch.Generator(device).manual_seed(0)
        size = (self.batch, 3, self.resolution, self.resolution)
        return torch.randn(size, device=device, generator=generator).to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the images and, in the floor, of the residual stream: bf16 in fp8."""
        return DTYPES[self.precision]

    def row_keys(self, peer: Peer, mode: str) -> Row:
        """The keys of a row that say what it measures."""
        keys = {key: getattr(self, key) for key in ("task", "resolution", "batch", "output", "precision")}
        return keys | {"model": self.config.name, "implementation": peer.name, "mode": mode}

    def __str__(self) -> str:
        output = {"all": "all tokens", "cls": "class token"}.get(self.output, self.output)
        title = harness.model_title(self.config)
        return f"{title} {self.resolution} px, batch {self.batch}, {output}, {self.precision}"


class Models:
    """A backbone in every implementation, from our model in fp32 on the device.

    Models are built at the first request and kept for one dtype at a time.
    """

    def __init__(self, config: BackboneConfig, ours: nn.Module) -> None:
        self.config, self.ours = config, ours
        self.device = next(ours.parameters()).device
        self._built: dict[tuple[Peer, torch.dtype], nn.Module] = {}

    def get(self, peer: Peer, dtype: torch.dtype) -> nn.Module:
        self._built = {key: model for key, model in self._built.items() if key[1] == dtype}
        if (peer, dtype) not in self._built:
            model = peer.build(self.config, self.ours, 0.0)
            self._built[peer, dtype] = model.to(self.device, dtype).eval()
        return self._built[peer, dtype]


@contextmanager
def interpolating(model: nn.Module, position_interpolation: str) -> Iterator[None]:
    """Changes how our model resamples position embeddings."""
    before, model.position_interpolation = model.position_interpolation, position_interpolation
    try:
        yield
    finally:
        model.position_interpolation = before


class AccuracyCheck:
    """Checks results against those of our model on plain PyTorch, in a wider dtype and in that of the scenario.

    `results` runs a model in a dtype and returns its results by name.
    """

    def __init__(
        self, scenario: Scenario, models: Models, results: Callable[[nn.Module, torch.dtype], dict[str, Tensor]]
    ) -> None:
        self._scenario, self._models, self._results = scenario, models, results
        self._known: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def check(self, peer: Peer, results: dict[str, Tensor]) -> Row:
        """The errors of results, as keys of a row. AssertionError if one is too large."""
        exact, usual = self.expected(peer)
        if self._scenario.precision == "fp8":
            return _check_cosine(results["the outputs"].float(), exact["the outputs"])
        largest, tolerance = 0.0, 1 if peer.name == OURS.name else PEER_TOLERANCE
        for name, result in results.items():
            allowed = (exact[name] + tolerance * (usual[name] - exact[name])).to(usual[name].dtype)
            try:
                largest = max(largest, obeys_rule(result.to(allowed.dtype), exact[name], allowed))
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
        return {"outputs_max_error": largest}

    def expected(self, peer: Peer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Our model's results in a wider dtype and in the scenario's, with positions resampled as the peer does."""
        interpolation, dtype = peer.position_interpolation(self._scenario.config), self._scenario.dtype
        if interpolation in self._known:
            return self._known[interpolation]
        wide_model, same = self._models.ours, self._models.get(OURS, dtype)
        if dtype == torch.float32:
            wide_model = copy.deepcopy(wide_model).double()
        wide = next(wide_model.parameters()).dtype
        # cuDNN would compute convolutions of fp32 in TF32. Without `enabled` this context would switch cuDNN off.
        without_tf32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with use_backend("torch"), without_tf32, interpolating(wide_model, interpolation):
            exact = self._results(wide_model, wide)
        with use_backend("torch"), interpolating(same, interpolation):
            self._known[interpolation] = exact, self._results(same, dtype)
        return self._known[interpolation]


def _check_cosine(result: Tensor, exact: Tensor) -> Row:
    cosine = torch.cosine_similarity(result, exact, dim=-1).min().item()
    assert cosine >= MIN_COSINE, f"the cosine of a token with that in fp32 is {cosine:.4f}, below {MIN_COSINE}"
    error = ((result - exact).abs().max() / exact.abs().max()).item()
    return {"outputs_max_error": error, "versions": {"cosine": cosine}}


class Task:
    """Measures implementations in one scenario. `best_backends` are those of mode engine-best."""

    in_inference_mode: ClassVar[bool] = True

    def __init__(self, scenario: Scenario, models: Models, best_backends: str | None = None) -> None:
        self.scenario, self.models, self.best_backends = scenario, models, best_backends
        self.device = models.device
        self.accuracy = AccuracyCheck(scenario, models, self.our_results)

    def our_results(self, model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        """What :meth:`checked_run` checks, by name, of our model in a dtype."""
        raise NotImplementedError

    def checked_run(self, peer: Peer, mode: str) -> tuple[Run, Row]:
        """A run to time, and the errors of its results as keys of a row. AssertionError if the results are wrong."""
        raise NotImplementedError

    def floor_seconds(self, rates: roofline.Rates) -> float | None:
        """The least seconds that a run can take, or None if there is no bound."""
        return None

    def measure_variants(self, variants: Iterable[Variant], seconds: float) -> list[Row]:
        """A row for each variant. They are timed in turn for about `seconds` in all."""
        rows, rates = self.rows(variants), self.rates()

        def make_run(variant: Variant) -> Run:
            run, errors = self.checked_run(*variant)
            rows[variant] |= errors
            return run

        waits = self.scenario.task in ("latency", "host")
        min_seconds = 0.0 if waits else MIN_TIMING_SECONDS[self.device.type]
        with torch.inference_mode(self.in_inference_mode), compile_scope():
            times = time_implementations(rows, make_run, self.device, seconds, min_seconds)
        for variant, timings in times.items():
            backends = {"backends": self.best_backends} if uses_best_backends(variant[1]) else {}
            versions = rows[variant].get("versions", {}) | backends | rates.as_versions
            rows[variant] |= {"versions": versions} | self.values(variant, timings)
        self.add_ratios(rows, times)
        return list(rows.values())

    def rates(self) -> roofline.Rates:
        """The device's rates in the dtype of the scenario, and in e4m3."""
        return roofline.measure_rates(self.device, self.scenario.dtype)

    def rows(self, variants: Iterable[Variant]) -> dict[Variant, Row]:
        """A row for each variant that says what it measures, or why it cannot be measured."""
        rows = {variant: self.scenario.row_keys(*variant) for variant in variants}
        for variant, row in rows.items():
            if reason := reason_missing(*variant, self.best_backends):
                row |= records.missing(reason)
        return rows

    def values(self, variant: Variant, times: list[float]) -> Row:
        """The measured keys of a row, from timings in seconds."""
        floor = self.floor_seconds(self.rates())
        share = floor and floor / statistics.median(times)
        unit = "ms" if self.scenario.task in ("latency", "host") else "images/s"
        return speed(times, unit, self.scenario.batch) | {"floor_share": share}

    def add_ratios(self, rows: dict[Variant, Row], times: dict[Variant, list[float]]) -> None:
        """Adds to the rows what follows from the timings of several variants."""


def unmeasured(
    recorder: Recorder, scenario: Scenario, variants: list[Variant], best_backends: str | None
) -> list[Variant]:
    """The variants to measure, without those that lost the device. Empty if every row that can be measured exists."""
    rows = {variant: scenario.row_keys(*variant) for variant in variants}
    if all(reason_missing(*variant, best_backends) or recorder.has(**row) for variant, row in rows.items()):
        return []
    return [variant for variant, row in rows.items() if not recorder.lost_in(**row)]


def print_rows(title: str, rows: list[Row]) -> None:
    """Prints the rows of a scenario, and how many times better our best one is than each."""
    print(title)
    ours = records.best_row(row for row in rows if row["implementation"] == OURS.name)
    for row in rows:
        name = f"  {row['implementation']:12} {row['mode']:20}"
        if row["value"] is None:
            print(f"{name} {'–':>10}  {records.reason(row)}")
            continue
        whole = "of the time on the device" if row["task"] == "extraction" else "of the floor"
        spread = f" ({row['p20']:.3f} to {row['p80']:.3f})" if row.get("p20") else ""
        share = f", {row['floor_share']:.0%} {whole}" if row.get("floor_share") else ""
        ratio = "" if ours is None or row is ours else f"  ours {records.row_ratio(ours, row):.3f}x"
        of_timm = (row.get("versions") or {}).get("of_timm")
        ratio += f"  {of_timm:.3f} times timm's time" if of_timm else ""
        print(f"{name} {row['value']:10.3f} {row['unit']}{spread}{share}{ratio}")
