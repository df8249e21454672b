"""What a device can reach, and the floor that sets under every forward pass: ``python -m bench.roofline --models S,B``.

It measures a copy, a large matrix product, the products of each backbone at their very sizes, and attention with each
backend that torch has for it. :func:`floor` adds up from these, one part after the other, nothing overlapping:

- matrix products, each at its own rate, without bias, activation or residual. What a product itself reads and writes is
  in that rate. e4m3 products are summed precisely (no fast accumulation).
- attention, at the best rate for that batch, number of heads and tokens. In fp8 it and the patch embedding are in bf16.
- elementwise bytes, at the speed of the copy. In a layer with everything fused that usual kernels can fuse, two layer
  norms read the residual stream and write an operand, and two epilogues read the residual: 6 transfers of the stream
  (5 in fp8, where an operand takes half the bytes). Activation, bias and LayerScale move nothing of their own. The
  embedding, the last norm and what a single token moves are not counted.

Output "cls" is the class token only: the last layer needs no keys and values of its own. The scores of one query q are
y·(W_k^T q) for the normed stream y, and its result is W_v applied to their weighted sum of y, so the stream is read
once, and every product has one row for each image. The products of that pooling hide behind the read.

A share of the floor above 1 is possible: a kernel may be better than the one that was measured, or avoid more bytes.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import harness, records
from bench.harness import ROUNDS, Run, contest, in_turn, quantiles, worst_error
from bench.records import Recorder
from bench.workloads import E4M3, PATCH, Shape, attention_flops
from dinov2_fast.configs import BackboneConfig
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.ops._linear_peers import linear_onednn

TASK = "roofline"
TASKS = ("throughput", "latency", "training")  # that are given as shares of a floor
SECONDS = {"cpu": 0.1, "cuda": 0.2}  # for all that is timed in turn
COPY = {"cpu": 128 << 20, "cuda": 4 << 30}  # bytes
LARGE = {"cpu": 1024, "cuda": 8192}  # rows and columns of the large product
SKINNY_LAYERS = {"all": 0, "cls": 1}  # by output: layers of which only the class token's row is computed
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}  # of the residual stream
PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16"}
OPERAND_BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}  # of an element that a layer's product reads
NEVER_FP8 = ("patch embedding", "attention")
# torch's math backend on a GPU writes all scores: it is never the fastest there, and the largest need too much memory.
ATTENTION_BACKENDS = {
    "cpu": (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
    "cuda": (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION),
}
UNITS = {"TFLOP/s": 1e12, "GB/s": 1e9}


class Product(NamedTuple):
    """A matrix product, (rows, in_features) times (in_features, out_features), done `count` times a forward pass."""

    place: str
    rows: int
    in_features: int
    out_features: int
    count: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.rows, self.in_features, self.out_features

    @property
    def flops(self) -> float:
        """Of one."""
        return 2.0 * self.rows * self.in_features * self.out_features


class Ceilings(NamedTuple):
    """Rates that were measured: a copy's bytes per second, floating-point operations per second of the rest."""

    precision: str
    copy: float
    products: Mapping[tuple[int, int, int], float]  # by Product.sizes
    attention: Mapping[tuple[int, int, int, int], float]  # by attention_sizes


class Floor(NamedTuple):
    """Seconds of a forward pass of a batch, in parts."""

    products: float
    attention: float
    elementwise: float

    @property
    def seconds(self) -> float:
        return sum(self)


def floor(config: BackboneConfig, resolution: int, batch: int, output: str, ceilings: Ceilings) -> Floor:
    """The time of a forward pass, as the docstring of this module adds it up; `output` is "all" tokens or "cls".

    Raises:
        ValueError: `ceilings` lack a rate for these sizes.
    """
    sizes = attention_sizes(config, resolution, batch)
    flops = attention_flops(Shape(config, resolution, batch)) * (config.depth - SKINNY_LAYERS[output])
    moved = elementwise_bytes(config, resolution, batch, output, ceilings.precision)
    products = products_of(config, resolution, batch, output)
    try:
        seconds = sum(product.count * product.flops / ceilings.products[product.sizes] for product in products)
        return Floor(seconds, flops / ceilings.attention[sizes], moved / ceilings.copy)
    except KeyError:
        where = f"{config.name}, {resolution} px, batch {batch}, {ceilings.precision}"
        raise ValueError(f"A rate of {where} was not measured: python -m bench.roofline does.") from None


def products_of(config: BackboneConfig, resolution: int, batch: int, output: str) -> Iterator[Product]:
    """All matrix products of a forward pass but those inside attention."""
    shape, skinny = Shape(config, resolution, batch), SKINNY_LAYERS[output]
    yield Product("patch embedding", batch * (resolution // PATCH) ** 2, 3 * PATCH**2, shape.hidden, 1)
    for place, features in shape.features.items():
        yield Product(place, batch * shape.tokens, *features, config.depth - skinny)
    if skinny:
        # q, W_k^T q, W_v times the weighted sum, proj: the middle two head by head, with as many operations.
        yield Product("cls qkv and proj", batch, *shape.features["proj"], 4 * skinny)
        yield Product("cls fc1", batch, *shape.features["fc1"], skinny)
        yield Product("cls fc2", batch, *shape.features["fc2"], skinny)


def elementwise_bytes(config: BackboneConfig, resolution: int, batch: int, output: str, precision: str) -> float:
    """What must be moved beside the products and attention; the docstring of this module says what that is."""
    elements = batch * Shape(config, resolution, batch).tokens * config.embed_dim  # of the residual stream
    stream, skinny = DTYPES[precision].itemsize, SKINNY_LAYERS[output]
    layer = 2 * (stream + OPERAND_BYTES[precision]) + 2 * stream  # two layer norms, two epilogues
    return elements * ((config.depth - skinny) * layer + skinny * stream)


def parameters(config: BackboneConfig) -> int:
    """Number of parameters, the mask token included."""
    with torch.device("meta"):
        return sum(p.numel() for p in DinoVisionTransformer(**config.constructor_arguments()).parameters())


def attention_sizes(config: BackboneConfig, resolution: int, batch: int) -> tuple[int, int, int, int]:
    """Batch, heads, tokens, head_dim."""
    return batch, config.num_heads, Shape(config, resolution, batch).tokens, config.embed_dim // config.num_heads


def ceilings_of(rows: Iterable[dict[str, Any]], precision: str) -> Ceilings:
    """The best rates among rows of this task, for :func:`floor` in "fp32", "bf16" or "fp8".

    Raises:
        ValueError: there is no row of a copy.
    """
    copy, products, attention = 0.0, {}, {}
    for row in rows:
        if row["task"] != TASK or not row["value"]:
            continue
        output, rate = row["output"], row["value"] * UNITS[row["unit"]]
        if output == "copy":
            copy = max(copy, rate)
        elif row["model"] and row["precision"] == _measured_in(output, precision):
            sizes = harness.MODELS[row["model"]], row["resolution"], row["batch"]
            if output == "attention":
                rates, key = attention, attention_sizes(*sizes)
            else:
                rates, key = products, next(p.sizes for p in products_of(*sizes, "cls") if p.place == output)
            rates[key] = max(rate, rates.get(key, 0.0))
    if not copy:
        raise ValueError("No copy was measured on this device: python -m bench.roofline does.")
    return Ceilings(precision, copy, products, attention)


def _measured_in(output: str, precision: str) -> str:
    return "bf16" if precision == "fp8" and output in NEVER_FP8 else precision


class Speeds(NamedTuple):
    """Bytes per second of a copy, flops per second of a large product, and of one in e4m3 where the device has it."""

    copy: float
    product: float
    e4m3: float | None = None

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype) -> Speeds:
        return cls(*(row["value"] * UNITS[row["unit"]] for row in measure_device(device, dtype)))


def measure_device(device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Rows of a copy and of a large product, in e4m3 too where the device has it."""
    source, size = torch.empty(COPY[device.type], dtype=torch.uint8, device=device), LARGE[device.type]
    target, product = torch.empty_like(source), Product("large product", size, size, size, 1)
    has_e4m3 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    precisions = [PRECISION[dtype], "fp8"] if has_e4m3 else [PRECISION[dtype]]
    runs: dict[str, Run] = {"copy": lambda: target.copy_(source)}
    runs |= {precision: product_runs(product, precision, device)["torch"] for precision in precisions}
    for run in runs.values():
        run()
    times = in_turn(runs, device, ROUNDS * SECONDS[device.type], flush=True)
    rows = [_row("copy", None) | _rates("GB/s", 2.0 * source.nbytes, times["copy"])]
    return rows + [_row(product.place, each) | _rates("TFLOP/s", product.flops, times[each]) for each in precisions]


def measure(shape: Shape, precision: str, without: Collection[tuple[str, str]] = ()) -> list[dict[str, Any]]:
    """Rows of what a backbone runs in a precision; for "fp8" only what is not measured for "bf16".

    Outputs and implementations in `without` are left out.
    """
    place = {"model": shape.config.name, "resolution": shape.resolution, "batch": shape.batch}
    qkv = shape.qkv(shape.batch, shape.tokens)
    parts = {key: part for key, *part in _parts(shape, qkv, precision) if key not in without}
    rows = {key: _row(key[0], precision, implementation=key[1], **place) for key in parts}
    expected = cache(partial(_attention_expected, qkv[:1]))

    def ready(key: tuple[str, str]) -> Run:
        _, run = parts[key]
        if key[0] == "attention":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's reasons why a backend does not run, many of them
                rows[key]["outputs_max_error"] = worst_error([run()[:1]], *expected())
        return run

    for output in dict.fromkeys(key[0] for key in parts):  # one by one, so that a small product is timed many times
        mine = {key: row for key, row in rows.items() if key[0] == output}
        for key, times in contest(mine, ready, shape.device, SECONDS[shape.device.type], flush=True).items():
            rows[key] |= _rates("TFLOP/s", parts[key][0], times)
    return list(rows.values())


def _parts(shape: Shape, qkv: Tensor, precision: str) -> Iterator[tuple[tuple[str, str], float, Run]]:
    """Of each row the output and the implementation, the operations, and what is timed."""
    for product in products_of(shape.config, shape.resolution, shape.batch, "cls"):
        if _measured_in(product.place, precision) == precision:
            for library, run in product_runs(product, precision, shape.device).items():
                yield (product.place, library), product.flops, run
    if _measured_in("attention", precision) == precision:
        for backend in ATTENTION_BACKENDS[shape.device.type]:
            yield ("attention", backend.name.lower()), attention_flops(shape), partial(_attention, qkv, backend)


def product_runs(product: Product, precision: str, device: torch.device) -> dict[str, Run]:
    """Runs one product on random operands, with each library that there is for it: on a CPU oneDNN beside torch's own.

    Rows are padded to a multiple of 8 elements, which fast kernels of 16-bit operands ask for: the 588 values of a
    patch to 592. The padding counts as time, not as work.
    """
    in_features = -(-product.in_features // 8) * 8
    sizes = ((product.rows, in_features), (product.out_features, in_features))
    x, weight = (torch.randn(size, device=device, dtype=DTYPES[precision]) for size in sizes)
    if precision == "fp8":
        one, x8, weight8 = torch.ones((), device=device), x.to(E4M3), weight.to(E4M3)
        return {"torch": lambda: torch._scaled_mm(x8, weight8.T, one, one, out_dtype=DTYPES[precision])}
    runs: dict[str, Run] = {"torch": lambda: x @ weight.T}
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        runs["onednn"] = lambda: linear_onednn(x, weight, None)
    return runs


def _attention(qkv: Tensor, backend: SDPBackend) -> Tensor:
    # (batch, tokens, 3, heads, head_dim) -> three views (batch, heads, tokens, head_dim), as in the model
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind())


def _attention_expected(qkv: Tensor) -> list[list[Tensor]]:
    """By the formula, in a wider dtype and in that of qkv."""
    expected = []
    for dtype in (torch.float64 if qkv.dtype == torch.float32 else torch.float32, qkv.dtype):
        q, k, v = qkv.to(dtype).permute(2, 0, 3, 1, 4).unbind()
        expected.append([(q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v])
    return expected


def _row(output: str, precision: str | None, implementation: str = "torch", **place: Any) -> dict[str, Any]:
    """What a row is about, with nothing measured yet."""
    about = {"task": TASK, "model": None, "resolution": None, "batch": None, "output": output, "precision": precision}
    return about | {"implementation": implementation, "mode": "eager", "value": None} | place


def _rates(unit: str, work: float, times: list[float]) -> dict[str, Any]:
    p20, median, p80 = quantiles([work / seconds / UNITS[unit] for seconds in times])
    return {"value": median, "unit": unit, "p20": p20, "p80": p80}


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    recorder = Recorder(TASK, options)
    print(recorder)
    before = recorder.known(TASK) if options.resume else []
    with recorder.until_lost():
        for dtype in dict.fromkeys(DTYPES[precision] for precision in options.precisions):
            if not recorder.has(output="large product", precision=PRECISION[dtype]):
                _keep(recorder, measure_device(recorder.device, dtype))
        for config, resolution, batch in cases(options):
            print(f"{config.name}, {parameters(config) / 1e6:.2f} M parameters, {resolution} px, batch {batch}")
            for precision in options.precisions:
                shape = Shape(config, resolution, batch, recorder.device, DTYPES[precision])
                place = {"model": config.name, "resolution": resolution, "batch": batch, "precision": precision}
                lost = {(row["output"], row["implementation"]) for row in recorder.lost_in(**place)}
                if not recorder.has(**place, unit="TFLOP/s"):  # what the device was lost in has no unit
                    _keep(recorder, measure(shape, precision, lost))
            for precision in options.precisions:
                _print_floors(config, resolution, batch, ceilings_of([*before, *recorder.rows], precision))
    recorder.finish()  # a product that a device refuses is no failure: there is no floor then, and the row says why
    return records.AGAIN if recorder.lost else 0


def cases(options: argparse.Namespace) -> Iterator[tuple[BackboneConfig, int, int]]:
    for config, resolution in itertools.product(options.models, options.sizes):
        of_tasks = (batch for task in TASKS for batch in harness.batches(task, options.device, resolution))
        for batch in options.batches or dict.fromkeys(of_tasks):
            yield config, resolution, batch


def _keep(recorder: Recorder, rows: list[dict[str, Any]]) -> None:
    recorder.keep(rows)
    for row in rows:
        name = " ".join(filter(None, (row["output"], row["precision"], row["implementation"])))
        rate = f"{row['value']:8.4g} {row['unit']} ({row['p20']:.4g} to {row['p80']:.4g})" if row["value"] else ""
        print(f"  {name:30} {rate or records.reason(row)}")


def _print_floors(config: BackboneConfig, resolution: int, batch: int, ceilings: Ceilings) -> None:
    for output in SKINNY_LAYERS:
        try:
            time = floor(config, resolution, batch, output, ceilings)
        except ValueError as error:  # such as that every backend of attention was refused
            print(f"  no floor: {error}")
            continue
        parts = ", ".join(f"{name} {part / time.seconds:.0%}" for name, part in time._asdict().items())
        speed = f"{1e3 * time.seconds:.4g} ms, {batch / time.seconds:.4g} images/s"
        print(f"  floor {ceilings.precision}, {output:3}: {speed} ({parts})")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = harness.parser("roofline", __doc__)
    harness.add_models(parser)
    parser.add_argument("--sizes", type=harness.pixels, help="pixels (default: 224,518,1036, on a CPU 224,518)")
    parser.add_argument("--batches", type=harness.numbers, help="images (default: those of bench.model)")
    parser.add_argument("--precisions", type=harness.some_of(list(DTYPES)), help="default: bf16,fp8, on a CPU fp32")
    options = parser.parse_args(arguments)
    options.models = options.models or harness.models(options.device)
    options.sizes = options.sizes or harness.sizes("throughput", options.device)
    options.precisions = options.precisions or (["fp32"] if options.device == "cpu" else ["bf16", "fp8"])
    return options


if __name__ == "__main__":
    sys.exit(main())
