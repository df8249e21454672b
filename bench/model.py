"""Whole models side by side in one process: ``python -m bench.model --task throughput --models S --sizes 224``.

All have the same weights and the same random images. Before the timing the outputs of the first and the last image (in
training all tokens and some gradients) are checked against our model in a wider dtype, with positions resampled as each
peer does. Our errors may be two (norm) and three times (largest) those of our model on plain PyTorch in the same
precision, a peer's five times as much again. An implementation with larger errors is refused; one that cannot run has a
row that says why. In fp8, which only our engine has, each token's cosine with our model in fp32 is checked instead.
Then all run in turn, A B C A B C; a row has the median.

- throughput: images per second of calls that follow each other without waiting;
- latency: milliseconds from a call to its result;
- host: the latency, on one thread, of a model so small that only its Python takes time; `of_timm` in a row's `versions`
  is the median of its ratio to timm's time in the same round;
- mixed: images per second of --batches images of many sizes; --sizes are the smallest and the largest;
- training: images per second of steps with AdamW and stochastic depth (bench/training.py);
- memory: peak MiB of a forward pass or a training step (bench/memory.py).

Throughput, latency and training are also given as a share of their floor (bench/roofline.py).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from bench import harness, modes, records
from bench.forward import Forward, Mixed
from bench.memory import Memory
from bench.modes import DTYPES, best_backends, why_missing
from bench.peers import ACCELERATED, NAMES, OURS, OUTPUTS, TIMM, TRANSFORMERS, Peer, load_ours, peers
from bench.records import Recorder, best, ratio
from bench.runtimes import ONNXRUNTIME, OPENVINO
from bench.tasks import Entrant, Models, Row, Setting
from bench.training import Training
from dinov2_fast.configs import BackboneConfig

TASKS = {
    "throughput": Forward,
    "latency": Forward,
    "host": Forward,
    "mixed": Mixed,
    "training": Training,
    "memory": Memory,
}
HOST = {"models": "tiny", "sizes": "28", "precisions": "fp32", "modes": "eager,engine,accelerated-timm,engine-timm"}
# Of options. On a GPU engine-best needs the best.json that bench.ops writes.
DEFAULTS = {
    ("throughput", "cpu"): {"modes": "eager,freezing,engine"},
    ("throughput", "cuda"): {
        "precisions": "bf16,fp8",
        "modes": "eager,compile,engine,engine-best",
    },
    ("latency", "cpu"): {"modes": "eager,freezing,engine"},
    ("latency", "cuda"): {"sizes": "224,518", "modes": "eager,graphs,compile,engine,engine-graphs,engine-best-graphs"},
    ("host", "cpu"): HOST,
    ("host", "cuda"): HOST,
    ("mixed", "cpu"): {"models": "S", "sizes": "112,224", "modes": "eager,engine"},
    ("mixed", "cuda"): {"sizes": "224,518", "modes": "eager,engine,engine-best"},
    ("training", "cpu"): {"models": "S", "sizes": "224", "modes": "eager"},
    ("training", "cuda"): {"models": "S,B,L", "sizes": "224", "modes": "eager,compile,triton"},
    ("memory", "cpu"): {"models": "S", "sizes": "224", "outputs": "all,training", "modes": "eager"},
    ("memory", "cuda"): {"sizes": "224", "outputs": "all,training", "modes": "eager,triton,engine"},
}
PRECISION = {"cpu": {"precisions": "fp32"}, "cuda": {"precisions": "bf16"}}
OUTPUTS_OF = {"mixed": "cls", "training": "all"}


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if options.task == "host":
        torch.set_num_threads(1)
    recorder = Recorder(options.task, options)
    print(recorder)
    with recorder.until_lost():
        for config in options.models:
            measure(config, options, recorder)
    return recorder.finish()


def measure(config: BackboneConfig, options: argparse.Namespace, recorder: Recorder) -> None:
    """Measures all settings of a backbone, and keeps the rows of each as soon as they are there."""
    models = None
    in_memory = options.task == "memory"  # which wants no other model on the device
    make = partial(Memory, device=recorder.device) if in_memory else TASKS[options.task]
    for setting in settings(options, config):
        chosen = best_backends(recorder.folder, _pixels(setting.resolution), setting.precision)
        entrants = left(recorder, setting, list(entrants_of(options, setting)), chosen)
        if entrants:
            models = models or Models(config, load_ours(config, torch.device("cpu") if in_memory else recorder.device))
            rows = make(setting, models, chosen).measure(entrants, options.seconds)
            recorder.keep(rows)
            show(str(setting), rows)


def settings(options: argparse.Namespace, config: BackboneConfig) -> Iterator[Setting]:
    sizes = ["-".join(map(str, options.sizes))] if options.task == "mixed" else options.sizes
    for precision, resolution in itertools.product(options.precisions, sizes):
        batches = options.batches or harness.batches(options.task, options.device, resolution)
        for batch, output in itertools.product(batches, options.outputs):
            yield Setting(options.task, config, resolution, batch, output, precision)


def _pixels(resolution: int | str) -> int:
    return int(str(resolution).partition("-")[0])


def entrants_of(options: argparse.Namespace, setting: Setting) -> Iterator[Entrant]:
    """Every implementation in every mode that it has in a setting."""
    device = torch.device(options.device)
    everyone = [*peers(options.reference_path), *ACCELERATED.values()]
    if device.type == "cpu" and setting.task in ("throughput", "latency") and setting.precision == "fp32":
        everyone += [ONNXRUNTIME, OPENVINO]
    everyone = [peer for peer in everyone if peer.name in options.implementations]
    for peer, mode in itertools.product(everyone, options.modes):
        if takes_part(setting, peer, mode, everyone, device):
            yield peer, mode


def takes_part(setting: Setting, peer: Peer, mode: str, among: list[Peer], device: torch.device) -> bool:
    """Whether a peer has a mode in this setting, and it is worth its time.

    The graphs that torch.compile gets from all peers are nearly the same, so one peer is compiled: timm's model, which
    has one product for queries, keys and values where transformers has three. In fp8 only the engine runs, and on a GPU
    only with named backends, since its default linears would compute in fp32.
    """
    if mode in ACCELERATED or peer in ACCELERATED.values():
        has_mode = peer is ACCELERATED.get(mode)
    elif mode in modes.COMPILED:
        has_mode = peer is next((each for each in (TIMM, TRANSFORMERS) if each in among and not each.missing), None)
    elif mode == "graphs":
        has_mode = peer is not OURS
    else:
        has_mode = mode == "eager" or peer is OURS
    if setting.task == "mixed":
        has_mode &= mode == "eager" or peer is OURS
    if setting.task == "training" or setting.output == "training":
        has_mode &= mode in ("eager", "compile", *modes.BACKENDS)
    if setting.precision == "fp8":
        has_mode &= modes.is_engine(mode) and (device.type == "cpu" or mode not in ("engine", "engine-graphs"))
    return has_mode


def left(recorder: Recorder, setting: Setting, entrants: list[Entrant], best: str | None) -> list[Entrant]:
    """The entrants to measure: none if all rows are there that can be, and none that the device was lost in."""
    if all(why_missing(peer, mode, best) or recorder.has(**setting.row(peer, mode)) for peer, mode in entrants):
        return []
    return [(peer, mode) for peer, mode in entrants if not recorder.lost_in(**setting.row(peer, mode))]


def show(title: str, rows: list[Row]) -> None:
    """Prints the rows of a setting, and how many times better our best one is than each."""
    print(title)
    ours = best(row for row in rows if row["implementation"] == OURS.name)
    for row in rows:
        name = f"  {row['implementation']:12} {row['mode']:20}"
        if row["value"] is None:
            print(f"{name} {'–':>10}  {records.reason(row)}")
            continue
        of = "of the time on the device" if row["task"] == "extraction" else "of the floor"
        spread = f" ({row['p20']:.3f} to {row['p80']:.3f})" if row.get("p20") else ""
        share = f", {row['floor_share']:.0%} {of}" if row.get("floor_share") else ""
        times = "" if ours is None or row is ours else f"  ours {ratio(ours, row):.3f}x"
        of_timm = (row.get("versions") or {}).get("of_timm")
        times += f"  {of_timm:.3f} times timm's time" if of_timm else ""
        print(f"{name} {row['value']:10.3f} {row['unit']}{spread}{share}{times}")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    names = (*NAMES, ONNXRUNTIME.name, OPENVINO.name)
    parser = harness.parser("model", __doc__)
    parser.add_argument("--task", default="throughput", choices=TASKS)
    parser.add_argument("--sizes", type=harness.pixels, help="pixels, such as 224,518")
    parser.add_argument("--batches", type=harness.numbers, help="images")
    parser.add_argument("--outputs", type=harness.some_of((*OUTPUTS, "training")), help="all,cls; of memory: training")
    parser.add_argument("--precisions", type=harness.some_of(list(DTYPES)), help=",".join(DTYPES))
    parser.add_argument("--modes", type=modes.parse, help="such as eager,compile,engine: see bench/modes.py")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing in each setting")
    parser.add_argument("--implementations", type=harness.some_of(names), default=list(names), help=",".join(names))
    parser.add_argument("--reference-path", type=Path, help="a checkout of facebookresearch/dinov2, as one more peer")
    task = parser.parse_known_args(arguments)[0].task
    outputs = {"outputs": OUTPUTS_OF.get(task, "all,cls")}
    defaults = {on: PRECISION[on] | outputs | DEFAULTS[task, on] for on in PRECISION}
    options = harness.parse(parser, arguments, **defaults)
    if "training" in options.outputs and options.task != "memory":
        parser.error("--outputs: training is an output of task memory; a training step is timed by --task training")
    if options.task == "mixed" and (len(options.sizes) != 2 or options.sizes[0] >= options.sizes[1]):
        parser.error("--sizes: task mixed wants two, the smaller one first, such as 224,518")
    if options.task == "mixed" and 1 in (options.batches or ()):
        parser.error("--batches: task mixed wants at least 2 images, one of each of the two --sizes")
    return options


if __name__ == "__main__":
    sys.exit(main())
