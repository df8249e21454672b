"""What a device can reach, and the floor that sets under every forward pass: ``python -m bench.roofline --models S,B``.

It measures a copy, a large matrix product, the products of each backbone at their very sizes, and attention with each
backend that torch has for it. :func:`floor` adds the best of these rates up.

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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import harness, records
from bench.harness import Run, contest, quantiles, worst_error
from bench.records import Row
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
    """Rates that were measured: bytes per second of a copy, flops per second of the rest."""

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
    """The time that the parts of a forward pass take one after the other, nothing overlapping.

    - Matrix products, each at its own rate, without bias, activation or residual. What a product itself reads and
      writes is in that rate. e4m3 products are summed precisely (no fast accumulation).
    - Attention, at the best rate for these sizes. In fp8 it and the patch embedding are in bf16.
    - Elementwise bytes, at the speed of the copy.

    Args:
        output: "all" tokens or "cls".

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
    """What must be moved beside products and attention, with everything fused that usual kernels can fuse.

    Two layer norms of a layer read the residual stream and write an operand, and two epilogues read the residual: 6
    transfers of the stream (5 in fp8, where an operand takes half the bytes). Activation, bias and LayerScale move
    nothing of their own. The embedding, the last norm and what a single token moves are not counted.
    """
    elements = batch * Shape(config, resolution, batch).tokens * config.embed_dim  # of the residual stream
    stream, skinny = DTYPES[precision].itemsize, SKINNY_LAYERS[output]
    layer = 2 * (stream + OPERAND_BYTES[precision]) + 2 * stream
    return elements * ((config.depth - skinny) * layer + skinny * stream)


def parameters(config: BackboneConfig) -> int:
    """Number of parameters, the mask token included."""
    with torch.device("meta"):
        return sum(p.numel() for p in DinoVisionTransformer(**config.constructor_arguments()).parameters())


def attention_sizes(config: BackboneConfig, resolution: int, batch: int) -> tuple[int, int, int, int]:
    """Batch, heads, tokens, head_dim."""
    return batch, config.num_heads, Shape(config, resolution, batch).tokens, config.embed_dim // config.num_heads


def ceilings_of(rows: Iterable[Row], precision: str) -> Ceilings:
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


class Part(NamedTuple):
    """What a row is about, the bytes or operations that are timed, and what makes its run."""

    row: Row
    work: float
    ready: Callable[[], Run]


def measure(parts: Iterable[Part], device: torch.device) -> list[Row]:
    """The rows with their rates, one output after the other, so that a small product is timed many times."""
    done: list[Row] = []
    for output, group in itertools.groupby(parts, key=lambda part: part.row["output"]):
        of = {part.ready: part for part in group}
        rows, unit = {ready: part.row for ready, part in of.items()}, "GB/s" if output == "copy" else "TFLOP/s"
        times = contest(rows, lambda ready: ready(), device, SECONDS[device.type], flush=True)
        for ready, taken in times.items():
            p20, median, p80 = quantiles([of[ready].work / seconds / UNITS[unit] for seconds in taken])
            rows[ready] |= {"value": median, "unit": unit, "p20": p20, "p80": p80}
        done += rows.values()
    return done


def device_parts(device: torch.device, dtype: torch.dtype) -> Iterator[Part]:
    """A copy and a large product, the latter in e4m3 too where the device has it."""
    yield Part(_row("copy", None), 2.0 * COPY[device.type], partial(_copy, device))
    large = Product("large product", *[LARGE[device.type]] * 3, 1)
    has_e4m3 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    for precision in (PRECISION[dtype], "fp8") if has_e4m3 else (PRECISION[dtype],):
        yield Part(_row(large.place, precision), large.flops, partial(_product, large, precision, device, "torch"))


def parts_of(shape: Shape, precision: str) -> Iterator[Part]:
    """What a backbone runs in a precision; for "fp8" only what is not measured for "bf16"."""
    device = shape.device
    place = {"model": shape.config.name, "resolution": shape.resolution, "batch": shape.batch}
    onednn = device.type == "cpu" and precision != "fp8" and torch.backends.mkldnn.is_available()
    for product in products_of(shape.config, shape.resolution, shape.batch, "cls"):
        if _measured_in(product.place, precision) == precision:
            for library in ("torch", "onednn") if onednn else ("torch",):
                row = _row(product.place, precision, library, **place)
                yield Part(row, product.flops, partial(_product, product, precision, device, library))
    if _measured_in("attention", precision) == precision:
        for backend in ATTENTION_BACKENDS[device.type]:
            row = _row("attention", precision, backend.name.lower(), **place)
            yield Part(row, attention_flops(shape), partial(_attention, shape, backend, row))


def _row(output: str, precision: str | None, implementation: str = "torch", **place: Any) -> Row:
    about = {"task": TASK, "model": None, "resolution": None, "batch": None, "output": output, "precision": precision}
    return about | {"implementation": implementation, "mode": "eager"} | place


def _copy(device: torch.device) -> Run:
    source = torch.empty(COPY[device.type], dtype=torch.uint8, device=device)
    return partial(torch.empty_like(source).copy_, source)


def _product(product: Product, precision: str, device: torch.device, library: str) -> Run:
    """One product of random operands.

    Rows are padded to a multiple of 8 elements, which fast kernels of 16-bit operands ask for: the 588 values of a
    patch to 592. The padding counts as time, not as work.
    """
    in_features = -(-product.in_features // 8) * 8
    sizes = ((product.rows, in_features), (product.out_features, in_features))
    x, weight = (torch.randn(size, device=device, dtype=DTYPES[precision]) for size in sizes)
    if precision == "fp8":
        one, x, weight = torch.ones((), device=device), x.to(E4M3), weight.to(E4M3)
        return lambda: torch._scaled_mm(x, weight.T, one, one, out_dtype=DTYPES[precision])
    return (lambda: linear_onednn(x, weight, None)) if library == "onednn" else lambda: x @ weight.T


def _attention(shape: Shape, backend: SDPBackend, row: Row) -> Run:
    """Attention of a batch; of its first image the row learns the error."""
    qkv = shape.qkv(shape.batch, shape.tokens)

    def run() -> Tensor:
        # (batch, tokens, 3, heads, head_dim) -> three views (batch, heads, tokens, head_dim), as in the model
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind())

    def formula(dtype: torch.dtype) -> list[Tensor]:
        q, k, v = qkv[:1].to(dtype).permute(2, 0, 3, 1, 4).unbind()
        return [(q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's reasons why a backend does not run, many of them
        wide = torch.float64 if qkv.dtype == torch.float32 else torch.float32
        row["outputs_max_error"] = worst_error([run()[:1]], formula(wide), formula(qkv.dtype))
    return run


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    recorder = records.Recorder(TASK, options)
    print(recorder)
    before = recorder.known(TASK) if options.resume else []

    def keep(parts: Iterable[Part]) -> None:
        rows = measure((part for part in parts if not recorder.has(**part.row)), recorder.device)
        recorder.keep(rows)
        for row in rows:
            about = (row[key] for key in ("model", "resolution", "batch", "output", "precision", "implementation"))
            rate = f"{row['value']:.4g} {row['unit']}" if row["value"] else records.reason(row)
            print(f"{' '.join(str(each) for each in about if each):60} {rate}")

    with recorder.until_lost():
        for dtype in dict.fromkeys(DTYPES[precision] for precision in options.precisions):
            keep(device_parts(recorder.device, dtype))
        for config, resolution, batch in cases(options):
            for precision in options.precisions:
                keep(parts_of(Shape(config, resolution, batch, recorder.device, DTYPES[precision]), precision))
            for precision, output in itertools.product(options.precisions, SKINNY_LAYERS):
                ceilings = ceilings_of([*before, *recorder.rows], precision)
                with suppress(ValueError):  # where what failed leaves no rate
                    seconds = floor(config, resolution, batch, output, ceilings)
                    print(f"{config.name} {resolution} {batch} {output} {precision}: {seconds}")
    recorder.finish()  # a product that a device refuses is no failure: there is no floor then, and the row says why
    return records.AGAIN if recorder.lost else 0


def cases(options: argparse.Namespace) -> Iterator[tuple[BackboneConfig, int, int]]:
    for config, resolution in itertools.product(options.models, options.sizes):
        of_tasks = (batch for task in TASKS for batch in harness.batches(task, options.device, resolution))
        for batch in options.batches or dict.fromkeys(of_tasks):
            yield config, resolution, batch


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = harness.parser("roofline", __doc__)
    harness.add_backbones(parser)
    parser.add_argument("--batches", type=harness.numbers, help="images (default: those of bench.model)")
    parser.add_argument("--precisions", type=harness.some_of(list(DTYPES)), help="default: bf16,fp8, on a CPU fp32")
    return harness.parse(parser, arguments, cpu={"precisions": "fp32"}, cuda={"precisions": "bf16,fp8"})


if __name__ == "__main__":
    sys.exit(main())
