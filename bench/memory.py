"""Memory side by side: the peak of a forward pass and of a training step, and the largest batch within a budget.

The peak is the most that torch has allocated on the device at any moment of a run, in MiB: weights, pictures, outputs
and all between; in training also gradients, both moments of AdamW and the gradient that is given for the tokens. It is
taken of a run that another one went before, with no other model on the device. On a GPU that is torch's own count,
cuBLAS' workspace included, without the CUDA context and what the allocator keeps in reserve. On a CPU every allocation
and release that torch's profiler sees is added up; what libraries take for themselves is not seen.

Output "training" is a step of bench.training, stochastic depth included; "all" and "cls" are those of bench.model, and
are compared in the same way: what computes something else is refused. The gradients are compared in bench.training.

The largest batch is the row without a batch, with an output such as "all within 16 GiB": so many pictures were measured
to fit, and one more (above 100, one percent more) not to, or to be more than the device has. The budget is for the peak
as it is counted here.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile

import dinov2_fast
from bench import harness, records
from bench.model import PRECISIONS, Judge, Models, Setting
from bench.modes import BACKENDS, COMPILED, DTYPES, compiling, modes_of, prepare, why_missing
from bench.peers import OUTPUTS, Peer, peers
from bench.records import Recorder
from bench.training import MODES, Step, build, incoming
from dinov2_fast.configs import BackboneConfig

TASK = "memory"
KINDS = (*OUTPUTS, "training")
BACKBONES = {"cpu": "S", "cuda": "SBLg"}
BATCH = {"cpu": 2, "cuda": 64}
BUDGET = {"cpu": 0.5, "cuda": 16.0}  # GiB
FEWER = 8  # times fewer pictures are tried next to a first batch, and until some fit
GROWTH = 4  # times a batch that fits: no larger one is tried next, as few pictures tell little of many
MIB, GIB = 2**20, 2**30


class Meter:
    """Counts what torch allocates on a device, above what it had allocated when the meter was made.

    On a CPU it knows only of what happens within :meth:`peak`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._allocated = 0
        gc.unfreeze()
        gc.collect()
        gc.freeze()  # the collections after each run, of which there are many, look at what is new only
        if device.type == "cuda":
            torch._C._cuda_clearCublasWorkspaces()  # so that each implementation pays for its own
            torch.cuda.empty_cache()
            self._before = torch.cuda.memory_allocated(device)

    def peak(self, work: Callable[[], Any]) -> int:
        """Runs `work`; gives the bytes at the worst moment of it. Leaves no garbage to the next."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            work()
            torch.cuda.synchronize(self._device)
            peak = torch.cuda.max_memory_allocated(self._device) - self._before
            gc.collect()
            return peak
        with profile(profile_memory=True) as profiler:
            work()
            gc.collect()
        events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        peak = self._allocated + max(itertools.accumulate(changes, initial=0))
        self._allocated += sum(changes)
        return peak


class Entrant:
    """One implementation, alone on the device.

    Args:
        setting: its output is one of KINDS.
        ours: our model in fp32, on the CPU.
    """

    def __init__(self, peer: Peer, mode: str, setting: Setting, ours: nn.Module, device: torch.device) -> None:
        self.setting = setting
        self._peer, self._mode, self._device = peer, mode, device
        self._is_warm = False
        self._meter = Meter(device)
        self._meter.peak(lambda: self._build(ours))

    def _build(self, ours: nn.Module) -> None:
        setting = self.setting
        if setting.output == "training":
            self._model = build(self._peer, setting.config, ours, setting.precision, self._device)
            self._step = Step(self._peer, self._model, setting.precision, self._mode, self._device)
        else:
            made = self._peer.build(setting.config, ours, 0.0)
            self._model = made.to(self._device, DTYPES[setting.precision]).eval()

    def peak(self, batch: int) -> float:
        """Bytes with a batch; infinite if the device has not as many."""
        setting = dataclasses.replace(self.setting, batch=batch)
        try:
            # A GPU's libraries plan for each batch anew.
            if not self._is_warm or self._device.type == "cuda" or self._mode in COMPILED:
                self._meter.peak(lambda: self._run(setting))
                self._is_warm = True
            return self._meter.peak(lambda: self._run(setting))
        except torch.OutOfMemoryError:
            self._model.zero_grad()  # what a step that broke off has left
            return math.inf

    def _run(self, setting: Setting) -> None:
        x = setting.pictures(self._device)
        if setting.output == "training":
            self._step(x, incoming(setting, self._device))
        else:
            self._forward(setting, x)

    @torch.inference_mode()
    def _forward(self, setting: Setting, x: Tensor) -> Any:
        return prepare(self._peer, self._model, x, setting.output, setting.precision, self._mode)()

    def first_and_last(self) -> Tensor:
        """The output for two pictures of the batch, on the CPU."""
        result = self._forward(self.setting, self.setting.pictures(self._device))
        return self._peer.take[self.setting.output](result)[[0, -1]].cpu()


def largest_batch(peak: Callable[[int], float], budget: float, known: dict[int, float]) -> int:
    """The number of pictures that fit, while one more, above 100 one percent more, do not; 0 if one does not fit.

    A peak is nearly a straight line over the batch, so each guess is where the line through the two nearest reaches the
    budget.

    Args:
        peak: bytes of a batch.
        budget: bytes.
        known: peaks that are known already; those measured are added.
    """
    # One picture only as a last resort: stochastic depth has nothing to choose from there, which Inductor (torch 2.11)
    # does not compile.
    smallest = min(known)
    while smallest > 1 and (len(known) == 1 or known[smallest] > budget):
        smallest = max(1, smallest // FEWER)
        known[smallest] = peak(smallest)
    if known[smallest] > budget:
        return 0
    while True:
        fits = max(batch for batch, size in known.items() if size <= budget)
        over = min((batch for batch, size in known.items() if size > budget and batch > fits), default=math.inf)
        step = max(1, fits // 100)
        if over - fits <= step:
            return fits
        guess = max(_where_it_reaches(budget, known), fits + step)
        if guess >= over < math.inf:
            guess = (fits + over) // 2
        batch = int(min(guess, GROWTH * fits))
        known[batch] = peak(batch)


def _where_it_reaches(budget: float, known: dict[int, float]) -> float:
    """The batch at which the line through the two peaks nearest to the budget reaches it."""
    finite = sorted((abs(budget - size), batch) for batch, size in known.items() if size < math.inf)
    if len(finite) < 2:
        return math.inf
    (_, one), (_, other) = finite[:2]
    slope = (known[one] - known[other]) / (one - other)
    return one + (budget - known[one]) // slope if slope > 0 else math.inf


def measure(
    setting: Setting, entrants: Iterable[tuple[Peer, str]], ours: nn.Module, device: torch.device, budget: float | None
) -> list[dict[str, Any]]:
    """A row of the peak for each implementation and mode; with a budget, in GiB, another of the largest batch.

    Args:
        ours: our model in fp32, on the CPU.
    """
    pairs: dict[tuple[Peer, str], list[dict[str, Any]]] = {}
    samples: dict[tuple[Peer, str], Tensor] = {}
    for peer, mode in entrants:
        rows = pairs[peer, mode] = rows_of(setting, peer, mode, budget)
        if reason := why_missing(peer, mode):
            _set(rows, records.missing(reason))
            continue
        try:
            with compiling():
                found, sample = _values(Entrant(peer, mode, setting, ours, device), budget)
            for row, value in zip(rows, found, strict=True):
                row |= value
            if sample is not None:
                samples[peer, mode] = sample
        except Exception as exception:  # what stops one must not stop the others
            records.stop(rows, exception, device)
    _compare(setting, ours, device, samples, pairs)
    return [row for rows in pairs.values() for row in rows]


def rows_of(setting: Setting, peer: Peer, mode: str, budget: float | None) -> list[dict[str, Any]]:
    """The keys that say what the rows are about."""
    row = setting.row(peer, mode)
    if budget is None:
        return [row]
    return [row, row | {"batch": None, "output": f"{setting.output} within {budget:g} GiB"}]


def _values(entrant: Entrant, budget: float | None) -> tuple[list[dict[str, Any]], Tensor | None]:
    """The measured keys of the rows, and the output for two pictures where there is one to compare."""
    batch, output = entrant.setting.batch, entrant.setting.output
    known = {batch: entrant.peak(batch)}
    if known[batch] == math.inf:
        values, sample = [records.not_measured("out of memory")], None
    else:
        values = [{"value": known[batch] / MIB, "unit": "MiB"}]
        sample = entrant.first_and_last() if output in OUTPUTS else None
    if budget is None:
        return values, sample
    largest = largest_batch(entrant.peak, budget * GIB, known)
    if not largest:
        return [*values, records.not_measured("out of memory: not even one picture fits")], sample
    return [*values, {"value": largest, "unit": "images"}], sample


def _set(rows: list[dict[str, Any]], values: dict[str, Any]) -> None:
    for row in rows:
        row |= values


def _compare(
    setting: Setting,
    ours: nn.Module,
    device: torch.device,
    samples: dict[tuple[Peer, str], Tensor],
    pairs: dict[tuple[Peer, str], list[dict[str, Any]]],
) -> None:
    """Refuses what computed something else, now that no implementation is on the device any more."""
    if not samples:
        return
    judge = Judge(setting, Models(setting.config, copy.deepcopy(ours).to(device)), setting.pictures(device))
    for (peer, mode), sample in samples.items():
        taken = dataclasses.replace(peer, take={setting.output: lambda result: result})
        try:
            with torch.inference_mode():
                _set(pairs[peer, mode], judge.verdict(taken, sample.to(device)))
        except ValueError as error:
            _set(pairs[peer, mode], records.stopped(error))


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    recorder = Recorder(TASK, options)
    print(recorder)
    everyone = peers(options.reference_path)
    installed = [peer for peer in everyone if not peer.missing]
    entrants = [(peer, mode) for peer in everyone for mode in modes_of(peer, options.modes, installed)]
    with recorder.until_lost():
        for config in options.models:
            ours = None
            for setting in settings(options, config):
                budget = options.budget if setting.output in options.largest else None
                there = [(peer, mode) for peer, mode in entrants if not why_missing(peer, mode)]
                wanted = [row for entrant in there for row in rows_of(setting, *entrant, budget)]
                if all(recorder.has(**row) for row in wanted):
                    continue
                ours = ours or dinov2_fast.load(config.name, weights="random:0")
                going = [entrant for entrant in entrants if not _lost(recorder, setting, *entrant, budget)]
                rows = measure(setting, going, ours, recorder.device, budget)
                recorder.keep(rows)
                show(setting, rows)
    return recorder.finish()


def _lost(recorder: Recorder, setting: Setting, peer: Peer, mode: str, budget: float | None) -> bool:
    """Whether the device was lost in one of its rows."""
    return any(recorder.lost_in(**row) for row in rows_of(setting, peer, mode, budget))


def settings(options: argparse.Namespace, config: BackboneConfig) -> Iterator[Setting]:
    for precision, resolution, batch in itertools.product(options.precisions, options.sizes, options.batches):
        for output in options.outputs:
            yield Setting(TASK, config, resolution, batch, output, precision)


def show(setting: Setting, rows: list[dict[str, Any]]) -> None:
    """Prints what was measured of a setting."""
    title = f"{harness.title(setting.config)} {setting.resolution} px, {setting.precision}"
    for row in rows:
        batch = f"batch {row['batch']}" if row["batch"] else "largest batch"
        value = f"– {records.reason(row)}" if row["value"] is None else f"{row['value']:.5g} {row['unit']}"
        print(f"{title}, {row['output']}, {batch}: {row['implementation']} {row['mode']}: {value}")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = harness.parser("memory", __doc__)
    harness.add_models(parser)
    parser.add_argument("--sizes", type=harness.pixels, default=[224], help="pixels (default: 224)")
    parser.add_argument("--batches", type=harness.numbers, help="pictures of the peak (default: 64, on a CPU 2)")
    parser.add_argument("--outputs", type=harness.some_of(KINDS), default=list(KINDS), help=",".join(KINDS))
    parser.add_argument(
        "--largest",
        type=harness.some_of(KINDS),
        help="outputs whose largest batch is looked for (default: all; on a CPU training, the others take minutes)",
    )
    parser.add_argument("--budget", type=_gib, help="GiB that the largest batch may take (default: 16, on a CPU 0.5)")
    parser.add_argument("--precisions", type=harness.some_of(PRECISIONS["cuda"]), help=",".join(PRECISIONS["cuda"]))
    parser.add_argument("--modes", type=harness.some_of(MODES["cuda"]), help="default: eager, on a GPU also triton")
    harness.add_peers(parser)
    options = parser.parse_args(arguments)
    on = options.device
    options.models = options.models or [harness.MODELS[letter] for letter in BACKBONES[on]]
    options.batches = options.batches or [BATCH[on]]
    options.largest = options.largest or (["training"] if on == "cpu" else options.outputs)
    options.budget = options.budget or BUDGET[on]
    options.precisions = options.precisions or PRECISIONS[on]
    options.modes = options.modes or (["eager"] if on == "cpu" else ["eager", *BACKENDS])
    return options


def _gib(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: a positive number of GiB is wanted")
    return value


if __name__ == "__main__":
    sys.exit(main())
