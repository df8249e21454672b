"""What one block of a model runs, beside what it would take at the least: ``python -m bench.trace --models S``.

Of a forward pass it lists the kernels of the middle block, on a CPU its ops, in order: the median time over some passes
and the share of the block; and for each part of a block the floor, as bench.roofline adds it up for whole passes from
what it measured on this device. Where the floor is 0 stands what a fused block does not run at all. A profiler slows
the host down, so that on a CPU small ops look larger than they are.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

import dinov2_fast
from bench import options as shared
from bench import records, roofline
from bench.model import Models, Setting
from bench.modes import BACKENDS, DTYPES, ENGINES, engine, goes_with, runner
from bench.peers import OURS, OUTPUTS, Peer, peers
from bench.timing import Run
from dinov2_fast.configs import BackboneConfig
from dinov2_fast.ops.dispatch import BackendError

MARK = "bench.trace"
WARM_UP = 3
MODES = ("eager", *BACKENDS, *(name for name in ENGINES if not name.endswith("graphs")))  # nothing is seen of a graph
SMALL = 0.005  # lines below this share of the block are left out


class Line(NamedTuple):
    """A kernel or op of a block."""

    part: str
    name: str
    seconds: float


def trace(run: Run, model: nn.Module, config: BackboneConfig, repeats: int, gpu: bool) -> list[Line]:
    """The lines of the middle block of `model`, of any implementation, which `run` runs.

    Raises:
        ValueError: not all passes ran the same kernels.
    """
    for _ in range(WARM_UP):
        run()
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) == config.depth)
    block = next(lists)[config.depth // 2]
    method = "update_" if hasattr(block, "update_") else "forward"  # the engine's, any module's
    plain = getattr(type(block), method)

    def marked(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with record_function(MARK if self is block else "other"):
            return plain(self, *args, **kwargs)

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with (
        mock.patch.object(type(block), method, marked),
        profile(activities=kinds, record_shapes=True, acc_events=True) as seen,
    ):
        for _ in range(repeats):
            run()
    passes = [list(_lines(event, config, gpu)) for event in seen.events() if event.name == MARK and event.cpu_children]
    return medians(passes)


def medians(passes: list[list[Line]]) -> list[Line]:
    """The lines of a pass, each with the median of its times.

    Raises:
        ValueError: not all passes ran the same kernels.
    """
    counts = [len(lines) for lines in passes]
    if len(set(counts)) > 1:
        raise ValueError(
            f"The passes ran {', '.join(map(str, counts))} kernels in the middle block, and times of different kernels "
            "have no median: take one pass, --repeats 1."
        )
    each = zip(*passes, strict=True)
    return [same[0]._replace(seconds=statistics.median(line.seconds for line in same)) for same in each]


def _lines(block: Any, config: BackboneConfig, gpu: bool) -> Iterator[Line]:
    attended = False
    for op in block.cpu_children:
        part = part_of(op.name, op.input_shapes or [], config, attended)
        attended |= part == "attention"
        for name, microseconds in _kernels(op) if gpu else [(op.name, op.cpu_time_total)]:
            yield Line(part, name, microseconds / 1e6)


def _kernels(op: Any) -> Iterator[tuple[str, float]]:
    yield from ((kernel.name, kernel.duration) for kernel in op.kernels)
    yield from (kernel for child in op.cpu_children for kernel in _kernels(child))


def part_of(name: str, shapes: list[Any], config: BackboneConfig, attended: bool) -> str:
    """The part of a block that an op is, from its name and its inputs' shapes; `attended`: attention was before it."""
    if "attention" in name:
        return "attention"
    if "norm" in name:
        return "norm2" if attended else "norm1"
    products = {p.place: p for p in roofline.products_of(config, 14, 1, "all")}
    weights = [{p.in_features, p.out_features} for p in products.values()]
    weight = next((shape for shape in shapes if len(shape) == 2 and set(shape) in weights), None)
    if weight is None or not any(word in name for word in ("linear", "mm", "matmul")):
        return "other"
    if not attended:
        return "qkv"
    if set(weight) == {config.embed_dim}:
        return "proj"
    others = [shape for shape in shapes if len(shape) > 1 and shape is not weight]
    return "fc2" if any(shape[-1] == products["fc2"].in_features for shape in others) else "fc1"


def floors(config: BackboneConfig, resolution: int, batch: int, ceilings: roofline.Ceilings) -> dict[str, float]:
    """Seconds of each part of a block, as :func:`bench.roofline.floor` counts them and with its errors."""
    whole = roofline.floor(config, resolution, batch, "all", ceilings)
    products = roofline.products_of(config, resolution, batch, "all")
    parts = {p.place: p.flops / ceilings.products[p.sizes] for p in products if p.place != "patch embedding"}
    stream, operand = roofline.DTYPES[ceilings.precision].itemsize, roofline.OPERAND_BYTES[ceilings.precision]
    byte = whole.elementwise / config.depth / (2 * (stream + operand) + 2 * stream)  # of every element of the stream
    parts |= {"norm1": byte * (stream + operand), "norm2": byte * (stream + operand)}
    parts |= {part: parts[part] + byte * stream for part in ("proj", "fc2")}
    return parts | {"attention": whole.attention / config.depth}


def show(title: str, lines: list[Line], least: dict[str, float]) -> None:
    """Prints a table in microseconds; the floor of a part, and its share of the part, are with its first line."""
    times = {part: 1e6 * sum(line.seconds for line in lines if line.part == part) for part, _, _ in lines}
    total, shown = sum(times.values()), set()
    print(f"{title}: {total:.1f} us" + (f", floor {1e6 * sum(least.values()):.1f} us" if least else ""))
    for part, name, seconds in lines:
        if 1e6 * seconds < SMALL * total:
            continue
        floor = 1e6 * least.get(part, 0.0)
        beside = f"{floor:10.1f} {floor / times[part]:6.0%}" if least and part not in shown else ""
        shown.add(part)
        print(f"  {part:10} {1e6 * seconds:10.1f} {1e6 * seconds / total:6.1%} {beside:18} {name[:80]}")


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    device = torch.device(options.device)
    known = records.read(options.results / records.device_folder(device) / f"{roofline.TASK}.jsonl")
    status = 0
    chosen = [peer for peer in peers() if peer.name in options.implementations and not peer.missing]
    for config, size, batch in itertools.product(options.models, options.sizes, options.batches):
        models = Models(config, dinov2_fast.load(config.name, weights="random:0", device=device))
        setting = Setting("trace", config, size, batch, options.output, options.precision)
        x = setting.pictures(device)
        try:
            least = floors(config, size, batch, roofline.ceilings_of(known, options.precision))
        except ValueError as error:
            print(f"no floors: {error}")
            least = {}
        for peer, mode in itertools.product(chosen, options.modes):
            if (peer is not OURS and mode != "eager") or not goes_with(mode, options.precision, options.output, device):
                continue
            title = f"{peer.name} {mode}, middle block of {setting}"
            try:
                lines = _lines_of(setting, models, x, peer, mode, options.repeats)
            except (BackendError, ValueError) as error:  # what one mode cannot run must not stop the others
                print(f"{title}: {error}")
                status = 1
                continue
            show(title, lines, least)
    return status


def _lines_of(setting: Setting, models: Models, x: Tensor, peer: Peer, mode: str, repeats: int) -> list[Line]:
    if mode in ENGINES:
        model = engine(models.ours, x, setting.output, setting.precision, graphs=False)
    else:
        model = models.get(peer, x.dtype)
    run = runner(peer, model, x, setting.output, setting.precision, mode)
    return trace(run, model, setting.config, repeats, x.is_cuda)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.trace", description=__doc__.partition("\n")[0])
    names = [peer.name for peer in (OURS, *peers()[1:3])]
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--implementations", type=shared.some_of(names), default=[OURS.name], help=",".join(names))
    parser.add_argument("--modes", type=shared.some_of(MODES), default=["eager", "engine"], help=",".join(MODES))
    shared.add_models(parser)
    parser.add_argument("--sizes", type=shared.pixels, default=[224], help="pixels (default: 224)")
    parser.add_argument("--batches", type=shared.numbers, help="pictures (default: those of throughput)")
    parser.add_argument("--output", default="all", choices=OUTPUTS)
    parser.add_argument("--precision", choices=[name for name in DTYPES if "autocast" not in name])
    parser.add_argument("--repeats", type=int, default=10, help="passes (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="where bench.roofline wrote its rates")
    options = parser.parse_args(arguments)
    options.models = options.models or shared.models(options.device)
    options.batches = options.batches or shared.batches("throughput", options.device, options.sizes[0])
    options.precision = options.precision or ("bf16" if options.device == "cuda" else "fp32")
    return options


if __name__ == "__main__":
    sys.exit(main())
