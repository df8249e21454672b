"""What a device can reach, and the floor that sets under every forward pass: ``python -m bench.roofline --models S,B``.

It measures ceilings: a large matrix product, the products of each backbone at their very sizes (through torch, so
cuBLAS on an NVIDIA GPU), attention with each backend that torch has for it, and a copy. From them :func:`floor` adds up
a time for a backbone, size, batch and output, one part after the other, nothing overlapping:

- matrix products: the floating-point operations of each, at the rate measured for that product alone, without bias,
  activation or residual. What a product reads and writes itself is in that rate.
- attention: at the best rate measured for that batch, number of heads and tokens.
- elementwise bytes at the speed of the copy. In a layer with everything fused that usual kernels can fuse, two layer
  norms read the residual stream and write an operand, and two epilogues read the residual: 6 transfers of the stream
  (5 in fp8, where an operand takes half the bytes). Activation, bias and LayerScale move nothing of their own. The
  embedding, the last norm and what a single token moves are not counted.

In fp8 the patch embedding and attention are those of bf16, and e4m3 products are summed precisely (no fast
accumulation). Output "cls" is the class token only: the last layer needs no keys and values of its own. The scores of
one query q are y·(W_k^T q) for the normed stream y, and its result is W_v applied to their weighted sum of y, so the
stream is read once and every product has one row for each picture.

The products of that pooling (2 operations for each head and byte) hide behind the read, also in the floor. A share of
the floor above 1 is possible: a kernel may be better than the one whose rate was measured, or avoid more bytes.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import harness, records
from bench.harness import ROUNDS, in_turn, quantiles, worst_error
from bench.ops import PRECISION, SECONDS, Run, Speeds
from bench.records import Recorder
from bench.workloads import E4M3, PATCH, Shape
from dinov2_fast.configs import BACKBONES, BackboneConfig
from dinov2_fast.ops._linear_peers import linear_onednn

TASK = "roofline"
WARM_UP = 3  # runs before timing: libraries choose and build their kernels then
OUTPUTS = ("all", "cls")
SKINNY_LAYERS = {"all": 0, "cls": 1}  # layers of which only the class token's row is computed
POSITIONS = (518 // PATCH) ** 2 + 1  # of the table of position embeddings
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}  # of the residual stream
OPERAND_BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}  # of an element that a layer's product reads
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
    """The time of a forward pass, as the docstring of this module adds it up.

    Args:
        config: the backbone.
        resolution: pixels along a side of the square pictures.
        batch: pictures.
        output: "all" tokens, or the "cls" token only.
        ceilings: of :func:`ceilings_of`; the precision is theirs.

    Raises:
        ValueError: `ceilings` lack a rate for these sizes.
    """
    try:
        products = sum(
            p.count * p.flops / ceilings.products[p.sizes] for p in products_of(config, resolution, batch, output)
        )
        rate = ceilings.attention[attention_sizes(config, resolution, batch)]
    except KeyError as error:
        raise ValueError(
            f"No rate was measured in {ceilings.precision} for the sizes {error} of {config.name}, {resolution} px, "
            f"batch {batch}: python -m bench.roofline measures it."
        ) from None
    return Floor(
        products,
        attention_flops(config, resolution, batch, output) / rate,
        elementwise_bytes(config, resolution, batch, output, ceilings.precision) / ceilings.copy,
    )


def products_of(config: BackboneConfig, resolution: int, batch: int, output: str) -> Iterator[Product]:
    """All matrix products of a forward pass but those inside attention."""
    shape = _shape(config, resolution, batch)
    hidden, ffn, fc1 = shape.hidden, shape.ffn, shape.ffn * (1 + shape.swiglu)
    rows, skinny = batch * shape.tokens, SKINNY_LAYERS[output]
    layers = config.depth - skinny
    yield Product("patch embedding", batch * (resolution // PATCH) ** 2, 3 * PATCH**2, hidden, 1)
    yield Product("qkv", rows, hidden, 3 * hidden, layers)
    yield Product("proj", rows, hidden, hidden, layers)
    yield Product("fc1", rows, hidden, fc1, layers)
    yield Product("fc2", rows, ffn, hidden, layers)
    if skinny:
        # q, W_k^T q, W_v times the weighted sum, proj: the middle two head by head, with as many operations.
        yield Product("cls qkv and proj", batch, hidden, hidden, 4 * skinny)
        yield Product("cls fc1", batch, hidden, fc1, skinny)
        yield Product("cls fc2", batch, ffn, hidden, skinny)


def product_flops(config: BackboneConfig, resolution: int, batch: int, output: str) -> float:
    return sum(product.count * product.flops for product in products_of(config, resolution, batch, output))


def attention_flops(config: BackboneConfig, resolution: int, batch: int, output: str) -> float:
    """Of its two products, queries with keys and weights with values, in the layers that have attention of all rows."""
    tokens = _shape(config, resolution, batch).tokens
    return 4.0 * batch * tokens**2 * config.embed_dim * (config.depth - SKINNY_LAYERS[output])


def elementwise_bytes(config: BackboneConfig, resolution: int, batch: int, output: str, precision: str) -> float:
    """What must be moved beside the products and attention; the docstring of this module says what that is."""
    elements = batch * _shape(config, resolution, batch).tokens * config.embed_dim  # of the residual stream
    stream = DTYPES[precision].itemsize
    layer = 2 * (stream + OPERAND_BYTES[precision]) + 2 * stream  # two layer norms, two epilogues
    skinny = SKINNY_LAYERS[output]
    return elements * ((config.depth - skinny) * layer + skinny * stream)


def parameters(config: BackboneConfig) -> int:
    """Number of parameters, the mask token included."""
    matrices = list(products_of(config, PATCH, 1, "all"))
    weights_and_biases = sum(p.count * (p.in_features + 1) * p.out_features for p in matrices)
    tokens = 2 + config.num_register_tokens + POSITIONS  # class token, mask token
    norms_and_scales = 2 + 6 * config.depth  # weight and bias of each norm; two LayerScales a layer
    return weights_and_biases + (tokens + norms_and_scales) * config.embed_dim


def attention_sizes(config: BackboneConfig, resolution: int, batch: int) -> tuple[int, int, int, int]:
    """Batch, heads, tokens, head_dim."""
    return batch, config.num_heads, _shape(config, resolution, batch).tokens, config.embed_dim // config.num_heads


def _shape(config: BackboneConfig, resolution: int, batch: int) -> Shape:
    return Shape(config, resolution, batch, torch.device("cpu"), torch.float32)


def ceilings_of(rows: Iterable[dict[str, Any]], precision: str) -> Ceilings:
    """The best rates among rows of this task, for :func:`floor` in "fp32", "bf16" or "fp8".

    Raises:
        ValueError: there is no row of a copy.
    """
    copy, products, attention = 0.0, {}, {}
    for row in rows:
        rate = (row["value"] or 0.0) * UNITS.get(row["unit"], 0)
        if row["task"] != TASK or not rate:
            continue
        if row["output"] == "copy":
            copy = max(copy, rate)
        elif row["model"] is None or row["precision"] != _precision_of(row["output"], precision):
            continue
        elif row["output"] == "attention":
            sizes = attention_sizes(BACKBONES[row["model"]], row["resolution"], row["batch"])
            attention[sizes] = max(rate, attention.get(sizes, 0))
        else:
            every = products_of(BACKBONES[row["model"]], row["resolution"], row["batch"], "cls")
            key = next(product.sizes for product in every if product.place == row["output"])
            products[key] = max(rate, products.get(key, 0))
    if not copy:
        raise ValueError("No copy was measured on this device: python -m bench.roofline does.")
    return Ceilings(precision, copy, products, attention)


def _precision_of(place: str, precision: str) -> str:
    """Of a part of a model; what e4m3 does not serve stays in bf16."""
    return "bf16" if precision == "fp8" and place in ("patch embedding", "attention") else precision


def measure_device(device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Rows of a copy and of a large product, in e4m3 too where the device has it: medians of repeated medians."""
    measured = [Speeds.measured(device, dtype) for _ in range(ROUNDS)]
    rows = [_row("copy", None, "GB/s", [speeds.copy for speeds in measured])]
    rows.append(_row("large product", PRECISION[dtype], "TFLOP/s", [speeds.product for speeds in measured]))
    e4m3 = [speeds.e4m3 for speeds in measured if speeds.e4m3]
    return [*rows, _row("large product", "fp8", "TFLOP/s", e4m3)] if e4m3 else rows


def measure(
    config: BackboneConfig,
    resolution: int,
    batch: int,
    precision: str,
    device: torch.device,
    without: Collection[tuple[str, str]] = (),
) -> list[dict[str, Any]]:
    """Rows of what a backbone runs in a precision; for "fp8" only what is not measured for "bf16".

    Args:
        without: outputs and implementations to leave out.
    """
    place = {"model": config.name, "resolution": resolution, "batch": batch}
    rows = []
    for product in products_of(config, resolution, batch, "cls"):
        if _precision_of(product.place, precision) == precision and (product.place, "torch") not in without:
            rows += _product_rows(product, precision, device, place)
    if _precision_of("attention", precision) == precision:
        shape = Shape(config, resolution, batch, device, DTYPES[precision])
        left_out = [name for output, name in without if output == "attention"]
        runs, errors = attention_runs(shape, left_out)
        flops = attention_flops(config, resolution, batch, "all") / config.depth
        for name, times in _warm_times(runs, device).items():
            rates = [flops / seconds for seconds in times]
            row = _row("attention", precision, "TFLOP/s", rates, **place)
            rows.append(row | {"implementation": name, "outputs_max_error": errors[name]})
    return rows


def _product_rows(
    product: Product, precision: str, device: torch.device, place: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for each library, or one that says why a product cannot be measured, for which there is no floor then."""
    try:
        times = _warm_times(product_runs(product, precision, device), device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # such as e4m3 products of few rows, which not every cuBLAS takes
        row = _about(product.place, precision, **place)
        records.stop([row], error, device)
        return [row]
    return [
        _row(product.place, precision, "TFLOP/s", [product.flops / seconds for seconds in taken], **place)
        | {"implementation": name}
        for name, taken in times.items()
    ]


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
        return {"torch": lambda: [torch._scaled_mm(x8, weight8.T, one, one, out_dtype=DTYPES[precision])]}
    runs: dict[str, Run] = {"torch": lambda: [x @ weight.T]}
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        runs["onednn"] = lambda: [linear_onednn(x, weight, None)]
    return runs


def attention_runs(shape: Shape, without: Collection[str] = ()) -> tuple[dict[str, Run], dict[str, float]]:
    """torch's attention with each backend that takes these inputs, and the largest relative error of each.

    A backend is left out, and named, if it refuses, or if the result for the first picture breaks the rule of the tests
    (:func:`bench.ops.worst_error`) against the formula in a wider dtype.

    Raises:
        records.DeviceLost: a backend took the device with it.
    """
    # (batch, tokens, 3, heads, head_dim) -> three views (batch, heads, tokens, head_dim), as in the model
    q, k, v = shape.qkv(shape.batch, shape.tokens).permute(2, 0, 3, 1, 4).unbind()
    wide = torch.float64 if shape.dtype == torch.float32 else torch.float32
    usual = _attention(q[:1], k[:1], v[:1])
    reference = _attention(q[:1].to(wide), k[:1].to(wide), v[:1].to(wide))
    runs: dict[str, Run] = {}
    errors: dict[str, float] = {}
    for backend in ATTENTION_BACKENDS[shape.device.type]:
        name = backend.name.lower()
        if name in without:
            continue

        def run(backend: SDPBackend = backend) -> list[Tensor]:
            with sdpa_kernel(backend):
                return [F.scaled_dot_product_attention(q, k, v)]

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's reasons, many of them
                (result,) = run()
            errors[name] = worst_error([result[:1]], [reference], [usual])
            runs[name] = run
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AssertionError) as error:  # torch: no such kernel; the rule: a wrong result
            place = {"model": shape.config.name, "resolution": shape.resolution, "batch": shape.batch}
            row = _about("attention", PRECISION[shape.dtype], **place) | {"implementation": name}
            records.stop([row], error, shape.device)
            print(f"  attention: {name} left out: {str(error).splitlines()[0]}")
    return runs, errors


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


def _warm_times(runs: dict[str, Run], device: torch.device) -> dict[str, list[float]]:
    for run in runs.values():
        for _ in range(WARM_UP):
            run()
    return in_turn(runs, device, SECONDS[device.type], flush=True) if runs else {}


def _row(output: str, precision: str | None, unit: str, rates: list[float], **place: Any) -> dict[str, Any]:
    p20, median, p80 = (rate / UNITS[unit] for rate in quantiles(rates))
    return _about(output, precision, **place) | {"value": median, "unit": unit, "p20": p20, "p80": p80}


def _about(output: str, precision: str | None, **place: Any) -> dict[str, Any]:
    """What a row is about, with nothing measured yet."""
    return {
        "task": TASK,
        "model": None,
        "resolution": None,
        "batch": None,
        "output": output,
        "precision": precision,
        "implementation": "torch",
        "mode": "eager",
        "value": None,
        "unit": None,
        "p20": None,
        "p80": None,
        "floor_share": None,
        "outputs_max_error": None,
    } | place


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    recorder = Recorder(TASK, options)
    device = recorder.device
    print(recorder)
    before = recorder.known(TASK) if options.resume else []

    def keep(rows: list[dict[str, Any]]) -> None:
        recorder.keep(rows)
        _print_rows(rows)

    for dtype in dict.fromkeys(DTYPES[precision] for precision in options.precisions):
        if not recorder.has(output="large product", precision=PRECISION[dtype]):
            keep(measure_device(device, dtype))
    if "fp8" in options.precisions and not any(row["precision"] == "fp8" for row in [*before, *recorder.rows]):
        options.precisions.remove("fp8")
        print("Left out: fp8, which this device has no products for.")
    with recorder.until_lost():
        for config, resolution, batch in cases(options):
            _print_counts(config, resolution, batch)
            for precision in options.precisions:
                place = {"model": config.name, "resolution": resolution, "batch": batch, "precision": precision}
                lost = {(row["output"], row["implementation"]) for row in recorder.lost_in(**place)}
                if lost or not recorder.has(**place):
                    keep(measure(config, resolution, batch, precision, device, lost))
            for precision in options.precisions:
                _print_floors(config, resolution, batch, ceilings_of([*before, *recorder.rows], precision))
    recorder.finish()
    return int(recorder.lost)


def cases(options: argparse.Namespace) -> Iterator[tuple[BackboneConfig, int, int]]:
    """Every backbone, size and batch that is asked for."""
    for config, resolution in itertools.product(options.models, options.sizes):
        for batch in options.batches or _batches(options.device, resolution):
            yield config, resolution, batch


def _batches(device: str, resolution: int) -> list[int]:
    """Those of throughput, latency and training."""
    return list(dict.fromkeys(batch for task in harness.BATCHES for batch in harness.batches(task, device, resolution)))


def _print_counts(config: BackboneConfig, resolution: int, batch: int) -> None:
    flops = [f(config, resolution, 1, "all") / 1e9 for f in (product_flops, attention_flops)]
    print(
        f"{config.name}, {parameters(config) / 1e6:.2f} M parameters, {resolution} px, batch {batch}, for each "
        f"picture {flops[0]:.4g} GFLOP of products, {flops[1]:.4g} of attention"
    )


def _print_rows(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        name = " ".join(filter(None, (row["output"], row["precision"])))
        if row["value"] is None:
            print(f"  {name:24} – {records.reason(row)}")
            continue
        spread = f"{row['p20']:.4g} to {row['p80']:.4g}"
        print(f"  {name:24} {row['value']:8.4g} {row['unit']} ({spread})  {row['implementation']}")


def _print_floors(config: BackboneConfig, resolution: int, batch: int, ceilings: Ceilings) -> None:
    for output in OUTPUTS:
        try:
            time = floor(config, resolution, batch, output, ceilings)
        except ValueError as error:  # every backend of attention was left out
            print(f"  no floor: {error}")
            continue
        parts = ", ".join(f"{name} {part / time.seconds:.0%}" for name, part in time._asdict().items())
        print(
            f"  floor {ceilings.precision}, {output:3}: {1e3 * time.seconds:.4g} ms, "
            f"{batch / time.seconds:.4g} images/s ({parts})"
        )


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = harness.parser("roofline", __doc__)
    harness.add_models(parser)
    parser.add_argument("--sizes", type=harness.pixels, help="pixels (default: 224,518,1036, on a CPU 224,518)")
    parser.add_argument("--batches", type=harness.numbers, help="pictures (default: those of bench.model)")
    parser.add_argument("--precisions", type=harness.some_of(list(DTYPES)), help="default: bf16,fp8, on a CPU fp32")
    options = parser.parse_args(arguments)
    on_cpu = options.device == "cpu"
    options.models = options.models or harness.models(options.device)
    options.sizes = options.sizes or harness.sizes("throughput", options.device)
    options.precisions = options.precisions or (["fp32"] if on_cpu else ["bf16", "fp8"])
    if on_cpu and options.precisions != ["fp32"]:
        parser.error(f"--precisions: {','.join(options.precisions)}: only fp32 on a CPU")
    if "fp8" in options.precisions and "bf16" not in options.precisions:
        parser.error("--precisions: fp8 needs bf16 beside it, for the patch embedding and attention")
    return options


if __name__ == "__main__":
    sys.exit(main())
