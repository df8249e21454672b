"""Speed of each op, all implementations side by side: ``python -m bench.ops --ops layer_norm --models S --sizes 224``.

An implementation's result is first held to the rule of the tests, against plain PyTorch in a wider dtype; one that
breaks it is refused. Then they run in turn, each time on a cold L2 cache, and the medians count. The floor is the time
that the bytes an op must move take at the speed of a copy, or its matrix products at the speed of a large one,
whichever is longer; both speeds are measured in the same run. Beside the package's own implementations runs
``torch.compile`` of the torch one. On a CPU neither that nor any kernel runs.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import harness, records
from bench.harness import in_turn, quantiles, worst_error
from bench.records import Recorder
from bench.workloads import E4M3, WORKLOADS, Shape, Workload
from dinov2_fast.ops import dispatch
from dinov2_fast.ops.dispatch import first_tensor, tensors_of

TASK = "ops"
# In a batch, of two pictures at least. On a GPU so many that the shortest op, a norm of 384 channels, moves 100 MB:
# some 25 us on an H200, against which the gaps between an event and a kernel are small.
BATCH_TOKENS = {"cpu": 512, "cuda": 65536}
SECONDS = {"cpu": 0.1, "cuda": 0.2}  # for all implementations of a row
COPY = {"cpu": 128 << 20, "cuda": 4 << 30}  # bytes of the copy that sets the floor
PRODUCT = {"cpu": 1024, "cuda": 8192}  # rows and columns of the matrices that set it
PRECISION = {torch.bfloat16: "bf16", torch.float32: "fp32"}
BACKWARD_FLOPS = 2.5  # of attention, the only product that is trained: five instead of two

Run = Callable[[], list[Tensor]]


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    recorder = Recorder(TASK, options)
    device = recorder.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    speeds = Speeds.measured(device, dtype)
    recorder.common["versions"] |= {f"{name}_per_s": rate for name, rate in asdict(speeds).items()}
    print(f"{recorder}, {PRECISION[dtype]}, {speeds}")
    if device.type == "cpu":
        print("On a CPU no kernel and no torch.compile runs.")
    # Rows without torch.compile were measured without it; those without torch are what the device was lost in.
    wanted = ["torch", *(["torch.compile"] if options.compile and device.type != "cpu" else [])]
    with recorder.until_lost():
        for workload, shape, backward in cases(options, device, dtype):
            row = row_of(workload, shape, backward)
            if not all(recorder.has(**row, implementation=name) for name in wanted):
                lost = [there["implementation"] for there in recorder.lost_in(**row)]
                recorder.keep(measure(workload, shape, backward, speeds, options.compile, lost))
    return recorder.finish()


def cases(
    options: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Workload, Shape, bool]]:
    """Every workload that is asked for, at each size, forward and where it has one backward."""
    for config, resolution in itertools.product(options.models, options.sizes):
        shape = Shape(config, resolution, 1, device, dtype)
        shape = shape.with_batch(max(2, BATCH_TOKENS[device.type] // shape.tokens))
        for workload in WORKLOADS:
            if workload.applies(shape) and workload.op in options.ops:
                for backward in (False,) if workload.saved is None else (False, True):
                    yield workload, shape, backward


def row_of(workload: Workload, shape: Shape, backward: bool) -> dict[str, Any]:
    """The keys that say what a row is about."""
    return {
        "task": TASK,
        "model": shape.config.name,
        "resolution": shape.resolution,
        "batch": shape.batch,
        "output": workload.label,
        "precision": PRECISION[shape.dtype],
        "mode": "backward" if backward else "forward",
    }


def measure(
    workload: Workload,
    shape: Shape,
    backward: bool,
    speeds: Speeds,
    compiled: bool = True,
    without: Collection[str] = (),
) -> list[dict[str, Any]]:
    """A row for each implementation but those `without`; those that break the rule or fail have no value."""
    arguments = recorded(workload.arguments(shape), backward)
    prepare = partial(prepared, workload, backward=backward)
    torch_function = torch_function_of(workload)
    reference = prepare(torch_function, widened(arguments, shape.dtype))()
    usual = prepare(torch_function, arguments)()
    print(f"{workload.label}{' backward' if backward else ''}: {shape}")
    runs: dict[str, Run] = {}
    rows: dict[str, dict[str, Any]] = {}

    def stop(name: str, exception: Exception) -> None:
        records.stop([rows[name]], exception, shape.device)
        print(f"  {name:14} {records.reason(rows[name])}")

    for name, function in candidates(workload, arguments, compiled and shape.device.type != "cpu"):
        if name in without:
            continue
        rows[name] = row_of(workload, shape, backward) | {"implementation": name}
        try:
            run = prepare(function, arguments)
            rows[name]["outputs_max_error"] = worst_error(run(), reference, usual)
            runs[name] = run
        except Exception as exception:  # what stops one implementation must not stop the others
            stop(name, exception)
    moved, flops = work(workload, shape, arguments, backward)
    floor = speeds.floor(moved, flops, arguments)
    times = in_turn(runs, shape.device, SECONDS[shape.device.type], flush=True, stop=stop) if runs else {}
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        fastest, median, slowest = quantiles(values)
        achieved = f"{moved / median / 1e9:5.3g} GB/s" if floor.by_bytes else f"{flops / median / 1e12:5.3g} TFLOP/s"
        ratios = ", ".join(f"{medians[other] / median:.2f}x {other}" for other in medians if other != name)
        print(f"  {name:14} {1e6 * median:9.1f} us {achieved}, {floor.seconds / median:4.0%} of the floor  {ratios}")
        measured = {"value": 1e6 * median, "unit": "us", "p20": 1e6 * fastest, "p80": 1e6 * slowest}
        rows[name] |= measured | {"floor_share": floor.seconds / median}
    return list(rows.values())


def torch_function_of(workload: Workload) -> Callable[..., Any]:
    return next(each.function for each in workload.implementations() if each.backend == "torch")


def candidates(
    workload: Workload, arguments: tuple[Any, ...], compiled: bool
) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The implementations that run on these arguments, by name."""
    on_cpu = first_tensor(arguments).device.type == "cpu"
    for implementation in workload.implementations():
        reason = implementation.reason_against(arguments)
        if reason is None:
            yield implementation.backend, implementation.function
        elif not on_cpu:  # where no kernel runs
            print(f"  {implementation.backend:14} not run: {reason}")
    if compiled:
        torch._dynamo.reset()  # each shape is compiled for itself, none falls back to eager at a limit
        yield "torch.compile", torch.compile(torch_function_of(workload), dynamic=False, fullgraph=True)


def prepared(workload: Workload, function: Callable[..., Any], arguments: tuple[Any, ...], backward: bool) -> Run:
    """What is timed."""
    return gradients(function, arguments) if backward else forward(function, arguments, workload.changes)


def forward(function: Callable[..., Any], arguments: tuple[Any, ...], changes: int | None = None) -> Run:
    """Runs an op as inference does; what it changes is a copy."""
    own = list(arguments)
    if changes is not None:
        own[changes] = own[changes].clone()

    def run() -> list[Tensor]:
        with torch.inference_mode():
            results = function(*own)
            return _tensors(results if changes is None else own[changes])

    return run


def gradients(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Run:
    """Runs the backward of an op that has run forward once."""
    outputs, incoming = run_forward(function, arguments)
    inputs = [tensor for tensor in tensors_of(arguments) if tensor.requires_grad]
    return lambda: list(torch.autograd.grad(outputs, inputs, incoming, retain_graph=True))


def run_forward(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of an op, recorded, and gradients for them: the same numbers in every dtype."""
    outputs = _tensors(function(*arguments))
    device = outputs[0].device
    generator = torch.Generator(device).manual_seed(0)
    noise = [torch.randn(y.shape, device=device, generator=generator).to(torch.bfloat16) for y in outputs]
    return outputs, [x.to(y.dtype) for x, y in zip(noise, outputs, strict=True)]


def _tensors(results: Any) -> list[Tensor]:
    return list(tensors_of([results]))


def recorded(arguments: Any, backward: bool) -> Any:
    """The arguments, with gradients wanted of all floating-point ones if `backward`."""
    return _each_tensor(arguments, lambda x: x.requires_grad_(backward) if x.is_floating_point() else x)


def widened(arguments: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments of `dtype` in fp32, or in fp64 if that is fp32; one that names the dtype names the wider one.

    An op on e4m3 values computes in fp32 whatever it is given: its fp32 arguments stay.
    """
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    if wide == torch.float64 and any(x.dtype == E4M3 for x in tensors_of(arguments)):
        return arguments

    def widen(x: Tensor) -> Tensor:
        return x.detach().to(wide).requires_grad_(x.requires_grad) if x.dtype == dtype else x

    return tuple(wide if isinstance(x, torch.dtype) and x == dtype else x for x in _each_tensor(arguments, widen))


def _each_tensor(arguments: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(arguments, list | tuple):
        return type(arguments)(_each_tensor(argument, change) for argument in arguments)
    return change(arguments) if isinstance(arguments, Tensor) else arguments


def work(workload: Workload, shape: Shape, arguments: tuple[Any, ...], backward: bool) -> tuple[int, float]:
    """Bytes that must be moved and flops of matrix products."""
    function = torch_function_of(workload)
    if not backward:
        results = forward(function, arguments, workload.changes)()
        return workload.moved(arguments, results), workload.flops(shape)
    assert workload.saved is not None
    outputs, incoming = run_forward(function, arguments)
    inputs = [tensor for tensor in tensors_of(arguments) if tensor.requires_grad]
    outgoing = torch.autograd.grad(outputs, inputs, incoming)
    saved = tensors_of([arguments[place] for place in workload.saved])
    each = {x.data_ptr(): x.nbytes for x in [*incoming, *outgoing, *saved]}  # what is passed on costs nothing
    return sum(each.values()), BACKWARD_FLOPS * workload.flops(shape)


@dataclass(frozen=True)
class Floor:
    """The time that no implementation can beat; `by_bytes` says what sets it."""

    seconds: float
    by_bytes: bool


@dataclass(frozen=True)
class Speeds:
    """What this device reaches: bytes per second of a copy, flops per second of a large matrix product.

    `e4m3` is the product of e4m3 matrices, where the device has it.
    """

    copy: float
    product: float
    e4m3: float | None = None

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype) -> Speeds:
        source = torch.empty(COPY[device.type], dtype=torch.uint8, device=device)
        target, size = torch.empty_like(source), PRODUCT[device.type]
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        runs: dict[str, Run] = {"copy": lambda: [target.copy_(source)], "product": lambda: [a @ b.T]}
        if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
            one, a8, b8 = torch.ones((), device=device), a.to(E4M3), b.to(E4M3)
            runs["e4m3"] = lambda: [torch._scaled_mm(a8, b8.T, one, one, out_dtype=dtype)]
        for run in runs.values():
            run()
        work = {"copy": 2 * source.nbytes, "product": 2 * size**3, "e4m3": 2 * size**3}
        times = in_turn(runs, device, SECONDS[device.type], flush=True)
        return cls(**{name: work[name] / statistics.median(values) for name, values in times.items()})

    def floor(self, moved: int, flops: float, arguments: tuple[Any, ...]) -> Floor:
        in_e4m3 = any(x.dtype == E4M3 for x in tensors_of(arguments))
        by_bytes, by_flops = moved / self.copy, flops / ((in_e4m3 and self.e4m3) or self.product)
        return Floor(max(by_bytes, by_flops), by_bytes >= by_flops)

    def __str__(self) -> str:
        products = f"product {self.product / 1e12:.3g} TFLOP/s"
        e4m3 = f", in e4m3 {self.e4m3 / 1e12:.3g} TFLOP/s" if self.e4m3 else ""
        return f"copy {self.copy / 1e9:.3g} GB/s, {products}{e4m3}"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    names = dispatch.names()
    parser = harness.parser("ops", __doc__)
    parser.add_argument("--ops", type=harness.some_of(names), default=names, help=f"some of {','.join(names)}")
    harness.add_models(parser)
    parser.add_argument("--sizes", type=harness.pixels, help="pixels (default: 224,518,1036, on a CPU 224,518)")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile as a peer"
    )
    options = parser.parse_args(arguments)
    options.models = options.models or harness.models(options.device)
    options.sizes = options.sizes or harness.sizes("throughput", options.device)
    return options


if __name__ == "__main__":
    sys.exit(main())
