"""Whole models side by side in one process: throughput of batches, latency of small ones, the host's share of a call.

All get the same weights and the same random pictures. Before anything is timed, the first and the last picture's
outputs are held to the rule of the tests: the error, against our model in a wider dtype, is at most twice that of our
model on plain PyTorch in the same precision (each time resampling positions as that peer does). What breaks the rule is
refused; what cannot run is a row that says why. In fp8, which only our engine has, each token's cosine with that of our
model in fp32 counts instead. Then all run in turn, A B C A B C, and the medians count.

Throughput counts pictures per second of calls that follow each other without waiting; latency is the time of one call
until its result is there, in milliseconds. Each is also given as a share of the floor that bench.roofline sets. Task
`host` is the latency of a model so small that only its Python takes time, on one thread; `of_timm`, among a row's
versions, is the median of that time over timm's in the same round.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import truediv
from typing import Any

import torch
from torch import Tensor, nn

import dinov2_fast
from bench import harness, records, roofline
from bench.harness import Run, contest, quantiles, worst_error
from bench.modes import DTYPES, ENGINES, MODES, compiling, contexts, goes_with, modes_of, prepare, why_missing
from bench.peers import ACCELERATED, NAMES, OURS, OUTPUTS, TIMM, Peer, chosen, peers
from bench.records import Recorder, best, ratio
from dinov2_fast.configs import BackboneConfig
from dinov2_fast.ops.dispatch import use_backend

TASKS = ("throughput", "latency", "host")
HOST = ["eager", "engine", "accelerated-timm", "engine-timm"]
SAMPLE = {"cpu": 0.0, "cuda": 0.02}  # seconds of calls that one time of throughput is taken of, at least
PRECISIONS = {"cpu": ["fp32"], "cuda": ["bf16", "autocast-bf16", "fp32"]}
MODES_OF_TASK = {
    ("throughput", "cpu"): ["eager", "engine"],
    ("throughput", "cuda"): [
        *("eager", "triton", "engine", "engine-triton", "engine-triton-sdpa", "engine-cuda", "engine-mixed"),
        *("engine-cublas", "compile", "max-autotune"),
    ],
    ("latency", "cpu"): ["eager", "engine"],
    ("latency", "cuda"): [
        *("eager", "triton", "graphs", "engine", "engine-graphs", "engine-triton-graphs", "engine-cuda-graphs"),
        *("engine-mixed-graphs", "engine-cublas-graphs", "compile", "reduce-overhead", "max-autotune"),
    ],
    ("host", "cpu"): HOST,
    ("host", "cuda"): HOST,
}
COSINE = 0.98  # in fp8, at least, of each token of the outputs with that in fp32


@dataclass(frozen=True)
class Setting:
    """What is asked of all alike."""

    task: str
    config: BackboneConfig
    resolution: int | str  # pixels of each side, or such as "224-518" for pictures of many sizes
    batch: int
    output: str
    precision: str

    def pictures(self, device: torch.device) -> Tensor:
        generator = torch.Generator(device).manual_seed(0)
        size = (self.batch, 3, self.resolution, self.resolution)
        return torch.randn(size, device=device, generator=generator).to(DTYPES[self.precision])

    def row(self, peer: Peer, mode: str) -> dict[str, Any]:
        """The keys that say what a row is about."""
        return {
            "task": self.task,
            "model": self.config.name,
            "resolution": self.resolution,
            "batch": self.batch,
            "output": self.output,
            "precision": self.precision,
            "implementation": peer.name,
            "mode": peer.mode(mode),
        }

    def __str__(self) -> str:
        output = "all tokens" if self.output == "all" else "class token"
        return f"{harness.title(self.config)} {self.resolution} px, batch {self.batch}, {output}, {self.precision}"


class Models:
    """A backbone in every implementation, made when it is first asked for, in one dtype at a time.

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


class Judge:
    """Knows what the outputs must be, on the first and the last picture."""

    def __init__(self, setting: Setting, models: Models, x: Tensor) -> None:
        self._setting = setting
        self._models = models
        self._rows = [0, -1] if len(x) > 1 else [0]
        self._x = x[self._rows]
        self._known: dict[str, tuple[Tensor, Tensor]] = {}

    def verdict(self, peer: Peer, result: Any) -> dict[str, Any]:
        """What a row says about the outputs.

        Raises:
            ValueError: they are not the model's.
        """
        result = peer.take[self._setting.output](result)[self._rows]
        return judged(self._setting.precision, result, *self._expectation(peer))

    def _expectation(self, peer: Peer) -> tuple[Tensor, Tensor]:
        dialect = peer.dialect(self._models.config)
        if dialect not in self._known:
            self._known[dialect] = expected(self._setting.precision, self._models, dialect, self._outputs)
        return self._known[dialect]

    def _outputs(self, model: nn.Module, dtype: torch.dtype) -> Tensor:
        return OURS.result(model, self._x.to(dtype), self._setting.output)


def judged(precision: str, result: Tensor, wide: Tensor, usual: Tensor) -> dict[str, Any]:
    """What a row says about outputs, beside those of :func:`expected`.

    Raises:
        ValueError: they are not the model's.
    """
    if precision != "fp8":
        return {"outputs_max_error": worst_error([result.to(usual.dtype)], [wide], [usual])}
    result = result.float()
    cosine = torch.cosine_similarity(result, wide, dim=-1).min().item()
    if not cosine >= COSINE:  # NaN is none
        raise ValueError(f"the cosine of a token with that in fp32 is {cosine:.4f}, below {COSINE}")
    error = ((result - wide).abs().max() / wide.abs().max()).item()
    return {"outputs_max_error": error, "versions": {"cosine": cosine}}


def expected(
    precision: str, models: Models, dialect: str, run: Callable[[nn.Module, torch.dtype], Tensor]
) -> tuple[Tensor, Tensor]:
    """Outputs of our model in a wider dtype, and in this precision, both on plain PyTorch.

    Args:
        run: the outputs of a model for pictures of a dtype.
    """
    wide = torch.float64 if precision == "fp32" else torch.float32
    model = models.ours if wide == torch.float32 else copy.deepcopy(models.ours).double()
    same = models.get(OURS, DTYPES[precision])
    with use_backend("torch"), exact_fp32(), resampling(model, dialect):
        reference = run(model, wide)
    with use_backend("torch"), contexts(precision, "eager", models.device)(), resampling(same, dialect):
        return reference, run(same, DTYPES[precision])


@contextmanager
def resampling(model: nn.Module, dialect: str) -> Iterator[None]:
    """Our model with another way of resampling positions."""
    before, model.position_dialect = model.position_dialect, dialect
    try:
        yield
    finally:
        model.position_dialect = before


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Convolutions in fp32, which a GPU computes in TF32 by default."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # without `enabled` there is no cuDNN inside
        yield


@torch.inference_mode()
@compiling()
def measure(
    setting: Setting, entrants: Iterable[tuple[Peer, str]], models: Models, seconds: float, known: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row for each implementation and mode, measured in turn for about `seconds` in all.

    Args:
        known: rows of bench.roofline, for the floor.
    """
    x = setting.pictures(models.device)
    rows = rows_of(setting, entrants)
    judge = Judge(setting, models, x)

    def ready(entrant: tuple[Peer, str]) -> Run:
        peer, mode = entrant
        model = models.ours if mode in ENGINES else models.get(peer, x.dtype)
        run = prepare(peer, model, x, setting.output, setting.precision, mode)
        rows[entrant] |= judge.verdict(peer, run())
        return run

    sample = SAMPLE[x.device.type] if setting.task == "throughput" else 0.0
    floor = _floor(setting, known)
    every = contest(rows, ready, x.device, seconds, sample)
    timm = every.get((TIMM, "eager")) if setting.task == "host" else None
    for entrant, times in every.items():
        rows[entrant] |= values(setting, times, floor)
        if timm:
            rows[entrant]["versions"] = {"of_timm": statistics.median(map(truediv, times, timm))}
    return list(rows.values())


def rows_of(setting: Setting, entrants: Iterable[tuple[Peer, str]]) -> dict[tuple[Peer, str], dict[str, Any]]:
    """A row for each implementation and mode: what it is about, and why it is missing if it is."""
    rows = {(peer, mode): setting.row(peer, mode) for peer, mode in entrants}
    for (peer, mode), row in rows.items():
        if reason := why_missing(peer, mode):
            row |= records.missing(reason)
    return rows


def left(recorder: Recorder, setting: Setting, entrants: Iterable[tuple[Peer, str]]) -> list[tuple[Peer, str]]:
    """Those to measure: none if all rows are there that can be, and never what the device was lost in."""
    every = list(entrants)
    if all(why_missing(peer, mode) or recorder.has(**setting.row(peer, mode)) for peer, mode in every):
        return []
    return [(peer, mode) for peer, mode in every if not recorder.lost_in(**setting.row(peer, mode))]


def values(setting: Setting, times: list[float], floor: float | None) -> dict[str, Any]:
    """The measured keys of a row, from seconds."""
    fast, median, slow = quantiles(times)
    share = {"floor_share": floor and floor / median}
    if setting.task in ("latency", "host"):
        return {"value": 1e3 * median, "p20": 1e3 * fast, "p80": 1e3 * slow, "unit": "ms"} | share
    batch = setting.batch
    return {"value": batch / median, "p20": batch / slow, "p80": batch / fast, "unit": "images/s"} | share


def _floor(setting: Setting, known: list[dict[str, Any]]) -> float | None:
    """Seconds, or None where bench.roofline has not measured what it takes."""
    precision = setting.precision.removeprefix("autocast-")
    try:
        ceilings = roofline.ceilings_of(known, precision)
        return roofline.floor(setting.config, setting.resolution, setting.batch, setting.output, ceilings).seconds
    except ValueError:
        return None


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if options.task == "host":
        torch.set_num_threads(1)
    recorder = Recorder(options.task, options)
    print(recorder)
    known = recorder.known(roofline.TASK)
    everyone = chosen(peers(options.reference_path), options.implementations)
    installed = [peer for peer in everyone if not peer.missing]
    entrants = [(peer, mode) for peer in everyone for mode in modes_of(peer, options.modes, installed)]
    if OURS in everyone:
        entrants += [(ACCELERATED[mode], mode) for mode in options.modes if mode in ACCELERATED]
    with recorder.until_lost():
        for config in options.models:
            models = None
            for setting in settings(options, config):
                going = [e for e in entrants if goes_with(e[1], setting.precision, setting.output, recorder.device)]
                if taking_part := left(recorder, setting, going):
                    models = models or load_models(config, recorder.device)
                    rows = measure(setting, taking_part, models, options.seconds, known)
                    recorder.keep(rows)
                    show(str(setting), rows)
    summary(recorder.rows)
    return recorder.finish()


def load_models(config: BackboneConfig, device: torch.device) -> Models:
    if config is not harness.TINY:
        return Models(config, dinov2_fast.load(config.name, weights="random:0", device=device))
    torch.manual_seed(0)
    return Models(config, dinov2_fast.DinoVisionTransformer(**config.constructor_arguments()).to(device).eval())


def settings(options: argparse.Namespace, config: BackboneConfig) -> Iterator[Setting]:
    for precision, resolution in itertools.product(options.precisions, options.sizes):
        batches = options.batches or harness.batches(options.task, options.device, resolution)
        for batch, output in itertools.product(batches, options.outputs):
            yield Setting(options.task, config, resolution, batch, output, precision)


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Prints what was measured together, and ours over each of the others in the same mode and at its best."""
    print(title)
    ours = best(row for row in rows if row["implementation"] == OURS.name)
    for row in rows:
        name = f"  {row['implementation']:12} {row['mode']:20}"
        if row["value"] is None:
            print(f"{name} {'–':>10}  {records.reason(row)}")
            continue
        of = "of the time on the device" if row["task"] == "extraction" else "of the floor"
        share = f", {row['floor_share']:.0%} {of}" if row["floor_share"] else ""
        times = "" if ours is None or row is ours else f"  ours {ratio(ours, row):.3f}x"
        of_timm = (row.get("versions") or {}).get("of_timm")
        times += f"  {of_timm:.3f} times timm's time" if of_timm else ""
        print(f"{name} {row['value']:10.3f} {row['unit']} ({row['p20']:.3f} to {row['p80']:.3f}){share}{times}")


def summary(rows: list[dict[str, Any]]) -> None:
    """Prints ours over the best peer in all settings."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("model", "resolution", "batch", "output", "precision"))
        groups.setdefault(key, []).append(row)
    ratios = []
    for group in groups.values():
        ours = best(row for row in group if row["implementation"] == OURS.name)
        peer = best(row for row in group if row["implementation"] != OURS.name)
        if ours and peer:
            ratios.append(ratio(ours, peer))
    if ratios:
        mean = statistics.geometric_mean(ratios)
        print(f"ours over the best peer: geometric mean {mean:.3f}, worst {min(ratios):.3f}, of {len(ratios)}")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = harness.parser("model", __doc__)
    parser.add_argument("--task", default="throughput", choices=TASKS)
    harness.add_models(parser)
    parser.add_argument("--sizes", type=harness.pixels, help="pixels (default: 224,518, for throughput on a GPU 1036)")
    parser.add_argument("--batches", type=harness.numbers, help="pictures (default: large for throughput, else 1,4,16)")
    parser.add_argument("--outputs", type=harness.some_of(OUTPUTS), default=list(OUTPUTS), help="all,cls")
    parser.add_argument("--precisions", type=harness.some_of(list(DTYPES)), help=",".join(DTYPES))
    parser.add_argument("--modes", type=harness.some_of(MODES), help=",".join(MODES))
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each row's peers together")
    harness.add_peers(parser, NAMES)
    options = parser.parse_args(arguments)
    on = options.device
    host = options.task == "host"
    options.models = options.models or ([harness.TINY] if host else harness.models(on))
    options.sizes = options.sizes or harness.sizes(options.task, on)
    options.precisions = options.precisions or (["fp32"] if host else PRECISIONS[on])
    options.modes = options.modes or MODES_OF_TASK[options.task, on]
    return options


if __name__ == "__main__":
    sys.exit(main())
