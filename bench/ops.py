"""Speed of each op, all implementations side by side: ``python -m bench.ops --ops layer_norm --models S --sizes 224``.

Results are first compared with plain PyTorch in a wider dtype. An implementation that breaks the rule of
bench/harness.py is refused. Then all run in turn, each time with a cold L2 cache, and a row has the median. The floor
is the time to move the bytes that an op must move at the speed of a copy, or to compute its matrix products at the
speed of a large one, whichever is longer. Both speeds are measured in the same run. On a CPU none of our kernels run.

An implementation of attention or of a linear may leave the conversion to e4m3, or SwiGLU, to the op activation. It then
runs with the backend of activation that was the fastest so far at this resolution.

With ``--write``, ``best.json`` beside the rows names the fastest backend of each form of an op at each resolution.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

from bench import harness, records, roofline
from bench.harness import Run, obeys_rule, speed, time_implementations
from bench.records import Recorder, Row
from bench.roofline import Rates
from bench.workloads import E4M3, MODES, WORKLOADS, Shape, Workload, interleave_swiglu
from dinov2_fast.ops import dispatch
from dinov2_fast.ops.dispatch import use_backend
from dinov2_fast.ops.implementation import Implementation, first_tensor, tensors_of

TASK = "ops"
BEST = "best.json"
# Tokens in a batch, which has at least two images. On a GPU even the shortest op, a norm of 384 channels, then moves
# 100 MB, in some 25 us on an H200. The gaps between events and kernels are small compared with that.
BATCH_TOKENS = {"cpu": 512, "cuda": 65536}
PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16"}
TIMING_SECONDS = {"cpu": 0.1, "cuda": 0.2}  # of timing in each case
# Operations of a backward, as a multiple of those of its forward: attention has five products for two, prototype_loss
# 2.4 times as much.
BACKWARD_FLOPS = 2.5


@dataclass(frozen=True)
class Case:
    """A workload at a shape, forward or backward, with its arguments and expected results."""

    workload: Workload
    shape: Shape
    mode: str

    def __str__(self) -> str:
        return f"{self.workload.label} {self.mode}: {self.shape}"

    @property
    def row_keys(self) -> Row:
        """The keys of a row that say what it measures."""
        shape = self.shape
        place = {"task": TASK, "model": shape.config.name, "resolution": shape.resolution, "batch": shape.batch}
        return place | {"output": self.workload.label, "precision": PRECISION[shape.dtype], "mode": self.mode}

    @cached_property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments of the op. In mode backward all floating-point tensors require a gradient."""
        backward = self.mode == "backward"
        arguments = self.workload.arguments(self.shape)
        return tree_map_only(Tensor, lambda x: x.requires_grad_(backward) if x.is_floating_point() else x, arguments)

    @cached_property
    def expected(self) -> tuple[list[Tensor], list[Tensor]]:
        """The results of plain PyTorch in a wider dtype and in the dtype of the shape."""
        function = self.torch_function
        return self.make_run(function, widened(self.arguments, self.shape.dtype))(), self.make_run(function)()

    @property
    def torch_function(self) -> Callable[..., Any]:
        return next(each.function for each in self.workload.implementations() if each.backend == "torch")

    def checked_run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Run, float]:
        """The run of an implementation and its largest error. AssertionError if it breaks the rule."""
        run = self.make_run(function, arguments)
        return run, max(obeys_rule(*each) for each in zip(run(), *self.expected, strict=True))

    def make_run(self, function: Callable[..., Any], arguments: tuple[Any, ...] | None = None) -> Run:
        """A run of the op as in inference, on a copy of the argument that it changes; or of its backward only."""
        own = list(self.arguments if arguments is None else arguments)
        if self.mode == "backward":
            outputs, inputs, incoming = _run_forward(function, own)
            return lambda: list(torch.autograd.grad(outputs, inputs, incoming, retain_graph=True))
        if (changed := self.workload.changes) is not None:
            own[changed] = own[changed].clone()

        def run() -> list[Tensor]:
            with torch.inference_mode():
                results = function(*own)
            return list(tensors_of([results if changed is None else own[changed]]))

        return run

    def arguments_for(self, implementation: Implementation) -> tuple[tuple[Any, ...], str | None]:
        """The arguments in the order of features that it takes, and why it cannot run on them, or None."""
        reason = implementation.refusal(self.arguments)
        if reason is not None and (self.workload.op, self.workload.form) == ("linear", "swiglu"):
            arguments = interleave_swiglu(self.arguments)
            return arguments, implementation.refusal(arguments)
        return self.arguments, reason

    def candidates(self) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
        """The implementations that can run, by name, and the arguments of each."""
        for implementation in self.workload.implementations():
            arguments, reason = self.arguments_for(implementation)
            if reason is None:
                yield implementation.backend, implementation.function, arguments
            elif first_tensor(self.arguments).device.type != "cpu":  # on a CPU no kernel ever runs
                print(f"  {implementation.backend:14} not run: {reason}")

    def work(self) -> tuple[int, float]:
        """The bytes that must be moved and the operations of matrix products."""
        flops = self.workload.flops(self.shape)
        if self.mode == "forward":
            return self.workload.moved(self.arguments, self.expected[1]), flops
        outputs, inputs, incoming = _run_forward(self.torch_function, self.arguments)
        outgoing = torch.autograd.grad(outputs, inputs, incoming)
        saved = tensors_of([self.arguments[place] for place in self.workload.saved or ()])
        # By address: a gradient that is passed on unchanged counts once.
        sizes = {x.data_ptr(): x.nbytes for x in [*incoming, *outgoing, *saved]}
        return sum(sizes.values()), BACKWARD_FLOPS * flops

    def floor_seconds(self, rates: Rates) -> float:
        """The time of the bytes or of the matrix products, whichever is longer."""
        moved, flops = self.work()
        in_e4m3 = any(x.dtype == E4M3 for x in tensors_of(self.arguments))
        return max(moved / rates.copy, flops / ((in_e4m3 and rates.e4m3) or rates.product))


def _run_forward(function: Callable[..., Any], arguments: Sequence[Any]) -> tuple[list[Tensor], ...]:
    """Outputs with their graph, inputs that have a gradient, and gradients of the outputs.

    The gradients have the same values in any dtype.
    """
    outputs = list(tensors_of([function(*arguments)]))
    generator = torch.Generator(outputs[0].device).manual_seed(0)
    noise = [torch.randn(y.shape, device=y.device, generator=generator).to(torch.bfloat16) for y in outputs]
    incoming = [x.to(y.dtype) for x, y in zip(noise, outputs, strict=True)]
    inputs = [tensor for tensor in tensors_of(arguments) if tensor.requires_grad]
    gradients = torch.autograd.grad(outputs, inputs, incoming, retain_graph=True, allow_unused=True)
    return outputs, [x for x, gradient in zip(inputs, gradients, strict=True) if gradient is not None], incoming


def widened(arguments: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments with fp32 in place of `dtype`, in tensors and as an argument; fp64 if `dtype` is fp32.

    An op on e4m3 values always computes in fp32, so its fp32 arguments stay.
    """
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    if wide == torch.float64 and any(x.dtype == E4M3 for x in tensors_of(arguments)):
        return arguments

    def widen(x: Any) -> Any:
        if isinstance(x, Tensor) and x.dtype == dtype:
            return x.detach().to(wide).requires_grad_(x.requires_grad)
        return wide if x is dtype else x

    return tree_map(widen, arguments)


def measure_case(case: Case, rates: Rates, without: Collection[str] = ()) -> list[Row]:
    """A row for each implementation except `without`. The row of one that breaks the rule or fails has no value."""
    print(case)
    candidates = {name: rest for name, *rest in case.candidates() if name not in without}
    rows = {name: case.row_keys | {"implementation": name} for name in candidates}

    def make_run(name: str) -> Run:
        run, rows[name]["outputs_max_error"] = case.checked_run(*candidates[name])
        return run

    device = case.shape.device
    times = time_implementations(rows, make_run, device, TIMING_SECONDS[device.type], flush=True)
    floor = case.floor_seconds(rates) if times else 0.0
    torch_median = statistics.median(times.get("torch", [math.nan]))
    for name, row in rows.items():
        if name not in times:
            print(f"  {name:14} {records.reason(row)}")
            continue
        median = statistics.median(times[name])
        row |= speed(times[name], "us") | {"floor_share": floor / median}
        of_torch = f"{torch_median / median:.2f}x torch"
        print(f"  {name:14} {row['value']:9.1f} us, {row['floor_share']:4.0%} of the floor, {of_torch}")
    return list(rows.values())


def fastest_backends(rows: Iterable[Row], commit: str | None) -> dict[str, Any]:
    """The fastest backend of each form at each resolution, forward, from the rows of a commit.

    A form has a row for each place in each model. Backends are compared by the geometric mean of their times over the
    rows that all of them have. A backend that was refused or failed anywhere is left out. The package's own order
    decides a tie.
    """
    times: dict[tuple[str, str], dict[str, dict[Any, float | None]]] = {}
    for row in rows:
        if row["commit"] == commit and row["mode"] == "forward":
            backends = times.setdefault((str(row["resolution"]), row["output"].partition(" (")[0]), {})
            place = row["model"], row["batch"], row["precision"], row["output"]
            backends.setdefault(row["implementation"], {})[place] = row["value"]
    forms: dict[str, dict[str, str]] = {}
    for (resolution, form), backends in times.items():
        measured = {name: values for name, values in backends.items() if None not in values.values()}
        if shared := set.intersection(*map(set, measured.values())) if measured else set():
            means = {name: math.fsum(math.log(values[place]) for place in shared) for name, values in measured.items()}
            forms.setdefault(resolution, {})[form] = min(means, key=means.__getitem__)
    return {"commit": commit, "forms": forms}


def with_activation(case: Case, fastest: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
    """Runs the op activation inside other ops with its fastest backend, from :func:`fastest_backends`."""
    forms, suffix = fastest["forms"].get(str(case.shape.resolution), {}), " e4m3" if case.workload.e4m3 else ""
    names = [f"activation.{form}" for form in dispatch.all_ops()["activation"].sample_inputs]
    setting = ",".join(f"{name}={forms[name + suffix]}" for name in names if name + suffix in forms)
    return use_backend(setting) if setting else contextlib.nullcontext()


def op_cases(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The cases of each op or form, model and size, in this order; backward where there is one."""
    for wanted, config, resolution in itertools.product(options.ops, options.models, options.sizes):
        shape = Shape(config, resolution, 1, device, dtype)
        shape = replace(shape, batch=max(2, BATCH_TOKENS[device.type] // shape.tokens))
        for workload in WORKLOADS:
            if workload.applies(shape) and wanted in (workload.op, f"{workload.op}.{workload.form}"):
                yield from (Case(workload, shape, mode) for mode in workload.modes if mode in options.modes)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    recorder = Recorder(TASK, options)
    device = recorder.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rates = roofline.measure_rates(device, dtype)
    recorder.common["versions"] |= rates.as_versions
    print(f"{recorder}, {PRECISION[dtype]}, {rates}")
    with recorder.stop_when_lost():
        for case in op_cases(options, device, dtype):
            if not recorder.has(**case.row_keys, implementation="torch"):  # that row is not kept if the device is lost
                lost = [row["implementation"] for row in recorder.lost_in(**case.row_keys)]
                # best.json is written before each case, in case the next one hangs.
                with with_activation(case, update_best(recorder)):
                    recorder.keep(measure_case(case, rates, lost))
    update_best(recorder)
    return recorder.finish()


def update_best(recorder: Recorder) -> dict[str, Any]:
    """The fastest backends so far. Writes them into best.json if the rows are written."""
    fastest = fastest_backends(recorder.measured, recorder.common["commit"])
    if recorder.writes and recorder.path.is_file():
        recorder.path.with_name(BEST).write_text(json.dumps(fastest, indent=1) + "\n")
    return fastest


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    names = sorted(dispatch.all_ops())
    forms = [f"{workload.op}.{workload.form}" for workload in WORKLOADS]
    parser = harness.make_parser("ops", __doc__)
    ops_help = f"some of {','.join(names)}, or forms such as attention.batch"
    parser.add_argument("--ops", type=harness.list_of([*names, *forms]), default=names, help=ops_help)
    parser.add_argument("--sizes", type=harness.image_sizes, help="pixels, such as 224,518")
    parser.add_argument("--modes", type=harness.list_of(MODES), default=MODES, help=f"default: {','.join(MODES)}")
    return harness.parse_options(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
