"""Steps of pretraining side by side: ``python -m bench.pretraining --reference-path FOLDER``.

A step takes the images of a batch to new weights: teacher, targets, student, losses, backward, clipping, AdamW, and the
moving average of the teacher. All implementations have the same weights, images, masks, learning rate and stochastic
depth, and run in turn, A B C B C A. A row has the median of the images per second; `peak_mib` in its `versions` is the
most memory that torch allocated in a step, weights and moments included, with the implementation alone on the device
(bench/memory.py).

- dinov2_fast: `Trainer.do_step`, as the command runs it. It begins with uint8 crops on the device, so it also applies
  the colours (`colours_ms` in its `versions`) and draws the masks; the others begin with finished crops, fp32 on the
  device, and with masks, which their loaders make;
- reference: facebookresearch/dinov2 (bench/pretraining_reference.py; `note` in a row says what is replaced);
- plain-timm: timm's ViT, two forward passes, dense losses (bench/pretraining_plain.py).

Before the timing, each implementation does a step without stochastic depth. Its four losses, and the norms of the
gradients of the backbone and of each head, may differ from those of ours on plain PyTorch by TOLERANCE, relative to
ours; with larger differences it is refused. timm resamples positions with antialiasing, so it is compared with our step
that does so too. `outputs_max_error` is the largest of the relative differences.

Rows of the model "loader" say how many images a core prepares in a second (bench/pretraining_loader.py).
"""

from __future__ import annotations

import itertools
import math
import sys
import tempfile
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from bench import extraction, harness, modes, records
from bench.harness import Run
from bench.memory import MIB, AllocationMeter
from bench.pretraining_batch import RECIPES, Batch, make_batch, parse_crops, pretraining_config, with_own_crops
from bench.pretraining_loader import IMAGES as LOADER_IMAGES
from bench.pretraining_loader import measure_loaders, of_images
from bench.pretraining_plain import MISSING, PlainStep
from bench.pretraining_reference import REPLACED, XFORMERS_REPLACED, ReferenceStep, has_xformers, imported
from bench.records import Recorder, Row
from bench.tasks import Scenario, print_rows
from dinov2_fast.configs import BACKBONES
from dinov2_fast.pretraining.batches import CropBatch
from dinov2_fast.pretraining.colours import apply_colours
from dinov2_fast.pretraining.config import PretrainingConfig
from dinov2_fast.pretraining.parallel import World, start_processes
from dinov2_fast.pretraining.start import make_networks
from dinov2_fast.pretraining.trainer import Trainer

OURS, REFERENCE, PLAIN = "dinov2_fast", "reference", "plain-timm"
MEASURES = ("steps", "loader")
CHECKED = ("dino_global", "dino_local", "ibot", "koleo")  # and all norms of gradients
# KoLeo differs most in bf16: at the beginning images are alike, and it is the logarithm of small distances.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
CPU_MODEL = replace(BACKBONES["dinov2_vits14"], name="192x6", embed_dim=192, depth=6, num_heads=3)
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "models": [CPU_MODEL],
        "crops": "98+4x42",
        "recipes": "tiny-4096,vitl16_short",
        "precisions": "fp32",
        "modes": "eager",
    },
    "cuda": {
        "models": "S,B,L",
        "crops": "224+8x98",
        "recipes": "vitl16_short,vitl14",
        "precisions": "bf16",
        "modes": "eager,triton",
    },
}
BATCHES = {"cpu": 32, "cuda": 64}
BATCH_OF_S = 128  # on a GPU

Variant = tuple[str, str]  # an implementation and its mode


class OurStep:
    """Steps of ours on a batch. A call does one and returns its metrics."""

    def __init__(self, config: PretrainingConfig, crops: CropBatch, world: World, mode: str) -> None:
        with tempfile.TemporaryDirectory() as folder:  # there is no checkpoint in it
            self._trainer = Trainer(Path(folder), None, config, world)
        self._crops, self._context, self.student = crops, modes.backend_context(mode), self._trainer.method.student

    def __call__(self) -> dict[str, float]:
        self._trainer.step = 0  # the same masks and rates in every call
        with self._context():
            return self._trainer.do_step(self._crops)


class Entrants:
    """The steps of all implementations in one scenario, with equal weights.

    `reference` is its module `dinov2.train.train`, None if it does not run.
    """

    def __init__(self, config: PretrainingConfig, batch: Batch, world: World, reference: ModuleType | None) -> None:
        self.config, self.batch, self._world, self._reference = config, batch, world, reference
        self._expected: dict[str, dict[str, float]] = {}  # by the way to resample positions

    def build(self, variant: Variant) -> Any:
        """A new step with crops of its own, so that they count as its memory."""
        name, mode = variant
        if name == OURS:
            return OurStep(self.config, with_own_crops(self.batch.crops), self._world, mode)
        batch = with_own_crops(self.batch)
        weights = make_networks(self.config, None)[0].state_dict()
        if name == PLAIN:
            return PlainStep(self.config, weights, batch)
        assert self._reference is not None
        return ReferenceStep(self._reference, self.config, weights, batch)

    def checked(self, variant: Variant) -> tuple[Run, Row]:
        """A step to time, and its largest difference from ours as keys of a row. AssertionError if it is too large."""
        step = self.build(variant)
        expected = self.expected("antialias" if variant[0] == PLAIN else "offset")
        return step, check(without_stochastic_depth(step), expected, TOLERANCE[self.config.run.precision])

    def expected(self, position_interpolation: Literal["antialias", "offset"]) -> dict[str, float]:
        """What our step on plain PyTorch computes."""
        if position_interpolation not in self._expected:
            model = replace(self.config.model, position_interpolation=position_interpolation)
            step = OurStep(replace(self.config, model=model), self.batch.crops, self._world, "torch")
            self._expected[position_interpolation] = without_stochastic_depth(step)
        return self._expected[position_interpolation]


def without_stochastic_depth(step: Any) -> dict[str, float]:
    """The metrics of a step in which no image is dropped."""
    step.student.eval()
    try:
        found: dict[str, float] = step()
        return found
    finally:
        step.student.train()


def check(found: dict[str, float], expected: dict[str, float], allowed: float) -> Row:
    """The largest relative difference from what is expected, as keys of a row. AssertionError if it is too large."""
    names = [name for name in expected if name in CHECKED or name.startswith("gradient_norm/")]
    differences = {name: abs(found[name] - expected[name]) / (abs(expected[name]) or 1.0) for name in names}
    worst = max(differences, key=lambda name: (math.isnan(differences[name]), differences[name]))
    if not differences[worst] <= allowed:
        values = f"{found[worst]:.6g}, ours is {expected[worst]:.6g}"
        raise AssertionError(f"{worst} is {values}: they differ by {differences[worst]:.1e}, more than {allowed:g}")
    return {"outputs_max_error": differences[worst]}


def measure_memory(rows: dict[Variant, Row], entrants: Entrants) -> None:
    """Adds to the rows how much memory each implementation takes alone."""
    device = entrants.batch.device
    for variant, row in rows.items():
        if not records.reason(row):
            try:
                row["versions"] |= {"peak_mib": peak(partial(entrants.build, variant), device) / MIB}
            except Exception as exception:  # the failure of one must not stop the others
                records.record_failure(row, exception, device)


def measure_speed(rows: dict[Variant, Row], entrants: Entrants, seconds: float) -> None:
    """Adds to the rows how fast the implementations are. They run in turn for about `seconds` in all."""
    device, config = entrants.batch.device, entrants.config
    last: dict[Variant, dict[str, float]] = {}

    def make_run(variant: Variant) -> Run:
        step, errors = entrants.checked(variant)
        rows[variant] |= errors

        def run() -> None:
            last[variant] = step()

        return run

    for variant, times in harness.time_implementations(rows, make_run, device, seconds).items():
        if not all(map(math.isfinite, last[variant].values())):
            rows[variant] |= records.not_measured("refused: after the steps a loss is not finite")
            continue
        rows[variant] |= harness.speed(times, "images/s", config.run.batch_size)
        if variant[0] == OURS:
            colours = harness.warm_up(partial(colour, entrants.batch, config), device)
            rows[variant]["versions"] |= {"colours_ms": 1e3 * colours}


def colour(batch: Batch, config: PretrainingConfig) -> list[Tensor]:
    """Applies the colours of a step."""
    crops, dtype = batch.crops, modes.DTYPES[config.run.precision]
    pairs = (crops.global_crops, crops.global_colours), (crops.local_crops, crops.local_colours)
    return [apply_colours(images, colours, dtype) for images, colours in pairs]


def peak(build: Callable[[], Run], device: torch.device) -> int:
    """The most bytes that are allocated in the second step."""
    meter, steps = AllocationMeter(device), list[Run]()
    meter.peak(lambda: steps.append(build()))
    meter.peak(steps[0])
    return meter.peak(steps[0])


def scenario_rows(scenario: Scenario, options: Namespace, why_no_reference: str | None) -> dict[Variant, Row]:
    """A row for each implementation that says what it measures, or why it cannot be measured."""
    note = REPLACED + ("" if has_xformers(torch.device(options.device)) else XFORMERS_REPLACED)
    missing = {REFERENCE: why_no_reference, PLAIN: MISSING}
    scenario_keys = {key: getattr(scenario, key) for key in ("resolution", "batch", "output", "precision")}
    rows: dict[Variant, Row] = {}
    for name in options.implementations:
        for mode in options.modes if name == OURS else ["eager"]:
            row = scenario_keys | {"model": scenario.config.name, "implementation": name, "mode": mode}
            row["versions"] = {"note": note} if name == REFERENCE else {}
            rows[name, mode] = row | (records.missing(reason) if (reason := missing.get(name)) else {})
    return rows


def scenarios(options: Namespace) -> Iterator[Scenario]:
    for config, recipe, precision in itertools.product(options.models, options.recipes, options.precisions):
        is_small_on_gpu = options.device == "cuda" and config.embed_dim <= BACKBONES["dinov2_vits14"].embed_dim
        default = BATCH_OF_S if is_small_on_gpu else BATCHES[options.device]
        for batch in options.batches or [default]:
            yield Scenario("pretraining", config, options.crops, batch, recipe, precision)


@contextmanager
def opened_reference(options: Namespace) -> Iterator[tuple[ModuleType | None, str | None]]:
    """The reference's modules, or why they cannot be had."""
    if options.reference_path is None or REFERENCE not in options.implementations:
        yield None, "no --reference-path was given"
        return
    with ExitStack() as stack:
        try:
            module, why = stack.enter_context(imported(options.reference_path, torch.device(options.device))), None
        except ImportError as error:
            module, why = None, f"the reference cannot be imported: {error}"
        yield module, why


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    recorder = Recorder("pretraining", options)
    print(recorder)
    with (
        tempfile.TemporaryDirectory() as folder,
        start_processes(options.device) as world,
        opened_reference(options) as (reference, why),
        recorder.stop_when_lost(),
    ):
        images = cache(partial(extraction.make_images, Path(folder)))
        for scenario in scenarios(options) if "steps" in options.measures else ():
            rows = scenario_rows(scenario, options, why)
            if is_known(recorder, rows):
                continue
            config = pretraining_config(scenario)
            batch = make_batch(config, images(scenario.batch), world.device)
            rows = {variant: row for variant, row in rows.items() if not recorder.lost_in(**identity(row))}
            entrants = Entrants(config, batch, world, reference)
            measure_memory(rows, entrants)
            measure_speed(rows, entrants, options.seconds)
            keep(recorder, title(scenario), list(rows.values()))
        is_measured = recorder.has(model="loader", resolution=options.crops)
        if "loader" in options.measures and not is_measured:
            config = of_images(pretraining_config(next(scenarios(options))), LOADER_IMAGES)
            keep(recorder, "loader", measure_loaders(config, images(LOADER_IMAGES), reference, why))
    return recorder.finish()


def identity(row: Row) -> Row:
    return {key: row[key] for key in records.IDENTITY if key in row}


def is_known(recorder: Recorder, rows: dict[Variant, Row]) -> bool:
    """When resuming: whether every row that can be measured exists."""
    return all(records.is_missing(row) or recorder.has(**identity(row)) for row in rows.values())


def keep(recorder: Recorder, heading: str, rows: list[Row]) -> None:
    recorder.keep(rows)
    print_rows(heading, [{"task": "pretraining"} | row for row in rows])
    for row in rows:
        for name in ("peak_mib", "colours_ms"):
            if value := (row.get("versions") or {}).get(name):
                print(f"  {row['implementation']:12} {row['mode']:20} {value:10.1f} {name}")


def title(scenario: Scenario) -> str:
    where = f"{scenario.config.name}, crops {scenario.resolution} px, batch {scenario.batch}"
    return f"{where}, recipe {scenario.output}, {scenario.precision}"


def _crops(text: str) -> str:
    try:
        parse_crops(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None
    return text


def _parse(arguments: list[str] | None) -> Namespace:
    parser = harness.make_parser("pretraining", __doc__)
    implementations = [OURS, REFERENCE, PLAIN]
    parser.add_argument("--crops", type=_crops, help="global size, number and size of local crops, such as 224+8x98")
    parser.add_argument("--batches", type=harness.positive_integers, help="images of a step, such as 32,64")
    parser.add_argument("--recipes", type=harness.list_of(list(RECIPES)), help=",".join(RECIPES))
    parser.add_argument("--precisions", type=harness.list_of(list(TOLERANCE)), help=",".join(TOLERANCE))
    parser.add_argument("--modes", type=modes.parse_modes, help="of ours: eager, triton")
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing in each scenario (default: %(default)s)")
    parser.add_argument("--reference-path", type=Path, help="a checkout of facebookresearch/dinov2")
    parser.add_argument(
        "--measures", type=harness.list_of(MEASURES), default=list(MEASURES), help=",".join(MEASURES) + " (default)"
    )
    parser.add_argument(
        "--implementations",
        type=harness.list_of(implementations),
        default=implementations,
        help=",".join(implementations),
    )
    return harness.parse_options(parser, arguments, **DEFAULTS)


if __name__ == "__main__":
    sys.exit(main())
