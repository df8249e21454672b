"""Whole models side by side in one process: ``python -m bench.model --task throughput --models S --sizes 224``.

All implementations have the same weights and the same random images. Before the timing, the outputs of the first and
the last image (in training all tokens and some gradients) are compared with those of our model in a wider dtype, with
positions resampled as each peer does. The errors of ours may be two (norm) and three (largest) times those of our model
on plain PyTorch in the same precision; the errors of a peer may be five times as large as that. An implementation with
larger errors is refused; one that cannot run has a row that says why. In fp8, which only our engine has, the cosine of
each token with our model in fp32 is checked instead. Then all run in turn, A B C B C A, and a row has the median.

- throughput: images per second of calls that follow each other without waiting;
- latency: milliseconds from a call to its result;
- host: the latency, on one thread, of a model so small that Python takes most of the time; `of_timm` in a row's
  `versions` is the median ratio of its time to timm's time in the same round;
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

import torch

from bench import harness, modes
from bench.forward import ForwardTask, MixedTask
from bench.memory import MemoryTask
from bench.modes import DTYPES, read_best_backends
from bench.peers import ACCELERATED_PEERS, OURS, OUTPUTS, PEERS, TIMM, TRANSFORMERS, Peer, load_ours
from bench.records import Recorder
from bench.runtimes import ONNXRUNTIME, OPENVINO
from bench.tasks import Models, Scenario, Variant, print_rows, unmeasured
from bench.training import TrainingTask
from dinov2_fast.configs import BackboneConfig

TASKS = dict.fromkeys(("throughput", "latency", "host"), ForwardTask)
TASKS |= {"mixed": MixedTask, "training": TrainingTask, "memory": MemoryTask}
HOST = {"models": "tiny", "sizes": "28", "precisions": "fp32", "modes": "eager,engine,accelerated-timm,engine-timm"}
# Default options by task and device. On a GPU, engine-best needs the best.json that bench.ops writes.
DEFAULTS = {
    ("throughput", "cpu"): {"modes": "eager,freezing,engine"},
    ("throughput", "cuda"): {"precisions": "bf16,fp8", "modes": "eager,compile,engine,engine-best"},
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
PRECISION_DEFAULTS = {"cpu": {"precisions": "fp32"}, "cuda": {"precisions": "bf16"}}
OUTPUT_DEFAULTS = {"mixed": "cls", "training": "all"}  # of the other tasks all,cls, unless DEFAULTS says otherwise


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if options.task == "host":
        torch.set_num_threads(1)
    recorder = Recorder(options.task, options)
    print(recorder)
    with recorder.stop_when_lost():
        for config in options.models:
            measure_backbone(config, options, recorder)
    return recorder.finish()


def measure_backbone(config: BackboneConfig, options: argparse.Namespace, recorder: Recorder) -> None:
    """Measures all scenarios of a backbone. The rows of each are kept as soon as they are measured."""
    models = None
    on_cpu = options.task == "memory"  # no other model may be on the device there
    make_task = partial(MemoryTask, device=recorder.device) if on_cpu else TASKS[options.task]
    for scenario in scenarios(options, config):
        smallest_size = int(str(scenario.resolution).partition("-")[0])
        best_backends = read_best_backends(recorder.folder, smallest_size, scenario.precision)
        variants = unmeasured(recorder, scenario, list(variants_of(options, scenario)), best_backends)
        if variants:
            models = models or Models(config, load_ours(config, torch.device("cpu") if on_cpu else recorder.device))
            rows = make_task(scenario, models, best_backends).measure_variants(variants, options.seconds)
            recorder.keep(rows)
            print_rows(str(scenario), rows)


def scenarios(options: argparse.Namespace, config: BackboneConfig) -> Iterator[Scenario]:
    sizes = ["-".join(map(str, options.sizes))] if options.task == "mixed" else options.sizes
    for precision, resolution in itertools.product(options.precisions, sizes):
        batches = options.batches or harness.batch_sizes(options.task, options.device, resolution)
        for batch, output in itertools.product(batches, options.outputs):
            yield Scenario(options.task, config, resolution, batch, output, precision)


def variants_of(options: argparse.Namespace, scenario: Scenario) -> Iterator[Variant]:
    """The peers and modes that are measured in a scenario."""
    device = torch.device(options.device)
    chosen = [*PEERS, *ACCELERATED_PEERS.values()]
    if device.type == "cpu" and scenario.task in ("throughput", "latency") and scenario.precision == "fp32":
        chosen += [ONNXRUNTIME, OPENVINO]
    chosen = [peer for peer in chosen if peer.name in options.implementations]
    for peer, mode in itertools.product(chosen, options.modes):
        if runs_mode(scenario, peer, mode, chosen, device):
            yield peer, mode


def runs_mode(scenario: Scenario, peer: Peer, mode: str, chosen: list[Peer], device: torch.device) -> bool:
    """Whether a peer has a mode in this scenario, and measuring it is worth the time.

    torch.compile gets nearly the same graph from all peers, so only one is compiled: timm's model, which has one
    product for queries, keys and values where transformers has three. In fp8 only the engine runs, and on a GPU only
    with named backends, since its default linears would compute in fp32.
    """
    if mode in ACCELERATED_PEERS or peer in ACCELERATED_PEERS.values():
        runs = peer is ACCELERATED_PEERS.get(mode)
    elif mode in modes.COMPILE_MODES:
        runs = peer is next((each for each in (TIMM, TRANSFORMERS) if each in chosen and not each.missing), None)
    elif mode == "graphs":
        runs = peer is not OURS
    else:
        runs = mode == "eager" or peer is OURS
    if scenario.task == "mixed":
        runs &= mode == "eager" or peer is OURS
    if scenario.task == "training" or scenario.output == "training":
        runs &= mode in ("eager", "compile", *modes.BACKENDS)
    if scenario.precision == "fp8":
        runs &= modes.is_engine(mode) and (device.type == "cpu" or mode not in ("engine", "engine-graphs"))
    return runs


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    names = [peer.name for peer in (*PEERS, ONNXRUNTIME, OPENVINO)]
    parser = harness.make_parser("model", __doc__)
    parser.add_argument("--task", default="throughput", choices=TASKS)
    parser.add_argument("--sizes", type=harness.image_sizes, help="pixels, such as 224,518")
    parser.add_argument("--batches", type=harness.positive_integers, help="batch sizes, such as 1,8")
    parser.add_argument("--outputs", type=harness.list_of((*OUTPUTS, "training")), help="all,cls; memory: training")
    parser.add_argument("--precisions", type=harness.list_of(list(DTYPES)), help=",".join(DTYPES))
    parser.add_argument("--modes", type=modes.parse_modes, help="such as eager,compile,engine: see bench/modes.py")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing in each scenario (default: %(default)s)")
    parser.add_argument("--implementations", type=harness.list_of(names), default=names, help=",".join(names))
    task = parser.parse_known_args(arguments)[0].task
    outputs = {"outputs": OUTPUT_DEFAULTS.get(task, "all,cls")}
    defaults = {on: PRECISION_DEFAULTS[on] | outputs | DEFAULTS[task, on] for on in PRECISION_DEFAULTS}
    options = harness.parse_options(parser, arguments, **defaults)
    if "training" in options.outputs and options.task != "memory":
        parser.error("--outputs: training is an output of task memory; --task training times training steps")
    if options.task == "mixed" and (len(options.sizes) != 2 or options.sizes[0] >= options.sizes[1]):
        parser.error("--sizes: task mixed needs two sizes, the smaller one first, such as 224,518")
    if options.task == "mixed" and 1 in (options.batches or ()):
        parser.error("--batches: task mixed needs at least 2 images, one of each of the two --sizes")
    return options


if __name__ == "__main__":
    sys.exit(main())
