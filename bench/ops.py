"""Speed of each op, all implementations side by side: ``python -m bench.ops --ops layer_norm --models S --sizes 224``.

Results are first checked against plain PyTorch in a wider dtype; an implementation that breaks the rule of
bench/harness.py is refused. Then all run in turn, each time with a cold L2 cache; a row has the median. The floor is
the time to move the bytes that an op must move at the speed of a copy, or to compute its matrix products at the speed
of a large one, whichever is longer; both speeds are measured in the same run. On a CPU no kernel of ours runs.

An implementation of attention or of a linear may leave the step to e4m3, or SwiGLU, to the op activation: there the
backend of activation runs that was the fastest at this resolution before.

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
from bench.harness import Run, contest, obeys_rule, quantiles
from bench.records import Recorder, Row
from bench.roofline import Rates
from bench.workloads import E4M3, MODES, WORKLOADS, Shape, Workload, in_turn
from dinov2_fast.ops import dispatch
from dinov2_fast.ops.dispatch import use_backend
from dinov2_fast.ops.implementation import Implementation, first_tensor, tensors_of

TASK = "ops"
BEST = "best.json"
# Tokens in a batch, which has two images at least. On a GPU they are so many that the shortest op, a norm of 384
# channels, moves 100 MB in some 25 us on an H200: the gaps between events and kernels are small beside that.
BATCH_TOKENS = {"cpu": 512, "cuda": 65536}
PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16"}
SECONDS = {"cpu": 0.1, "cuda": 0.2}  # of timing in each case
BACKWARD_FLOPS = 2.5  # times the forward ones. Only attention has a backward with products: five, where forward has two


@dataclass(frozen=True)
class Case:
    """A workload at a shape, forward or backward, and the results that are expected."""

    workload: Workload
    shape: Shape
    mode: str

    def __str__(self) -> str:
        return f"{self.workload.label} {self.mode}: {self.shape}"

    @property
    def row(self) -> Row:
        """The keys that say what a row measures."""
        shape = self.shape
        place = {"task": TASK, "model": shape.config.name, "resolution": shape.resolution, "batch": shape.batch}
        return place | {"output": self.workload.label, "precision": PRECISION[shape.dtype], "mode": self.mode}

    @cached_property
    def arguments(self) -> tuple[Any, ...]:
        """Those of the op; in mode backward all floating-point ones require a gradient."""
        wanted = self.mode == "backward"
        made = self.workload.arguments(self.shape)
        return tree_map_only(Tensor, lambda x: x.requires_grad_(wanted) if x.is_floating_point() else x, made)

    @cached_property
    def expected(self) -> tuple[list[Tensor], list[Tensor]]:
        """The results of plain PyTorch in a wider dtype, and in the dtype of the shape."""
        function = self.torch_function
        return self.run(function, widened(self.arguments, self.shape.dtype))(), self.run(function)()

    @property
    def torch_function(self) -> Callable[..., Any]:
        return next(each.function for each in self.workload.implementations() if each.backend == "torch")

    def checked(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Run, float]:
        """The run to time of an implementation, and its error; AssertionError if it breaks the rule."""
        run = self.run(function, arguments)
        return run, max(obeys_rule(*each) for each in zip(run(), *self.expected, strict=True))

    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...] | None = None) -> Run:
        """Runs an op as inference does, on a copy of the argument that it changes; or only its backward."""
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
        """Those that it takes, which give the same results, and why it cannot run on them, or None."""
        reason = implementation.refusal(self.arguments)
        if reason is not None and (self.workload.op, self.workload.form) == ("linear", "swiglu"):
            arguments = in_turn(self.arguments)
            return arguments, implementation.refusal(arguments)
        return self.arguments, reason

    def candidates(self) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
        """The implementations that can run, by name, and the arguments of each."""
        for implementation in self.workload.implementations():
            arguments, reason = self.arguments_for(implementation)
            if reason is None:
                yield implementation.backend, implementation.function, arguments
            elif first_tensor(self.arguments).device.type != "cpu":  # where no kernel runs anyway
                print(f"  {implementation.backend:14} not run: {reason}")

    def work(self) -> tuple[int, float]:
        """Bytes that must be moved and flops of matrix products."""
        flops = self.workload.flops(self.shape)
        if self.mode == "forward":
            return self.workload.moved(self.arguments, self.expected[1]), flops
        outputs, inputs, incoming = _run_forward(self.torch_function, self.arguments)
        outgoing = torch.autograd.grad(outputs, inputs, incoming)
        saved = tensors_of([self.arguments[place] for place in self.workload.saved or ()])
        each = {x.data_ptr(): x.nbytes for x in [*incoming, *outgoing, *saved]}  # a gradient passed on counts once
        return sum(each.values()), BACKWARD_FLOPS * flops

    def floor(self, rates: Rates) -> float:
        """The seconds of the bytes or of the matrix products, whichever is longer."""
        moved, flops = self.work()
        in_e4m3 = any(x.dtype == E4M3 for x in tensors_of(self.arguments))
        return max(moved / rates.copy, flops / ((in_e4m3 and rates.e4m3) or rates.product))


def _run_forward(function: Callable[..., Any], arguments: Sequence[Any]) -> tuple[list[Tensor], ...]:
    """Outputs with their graph, inputs that require a gradient, and gradients of the outputs, the same in any dtype."""
    outputs = list(tensors_of([function(*arguments)]))
    generator = torch.Generator(outputs[0].device).manual_seed(0)
    noise = [torch.randn(y.shape, device=y.device, generator=generator).to(torch.bfloat16) for y in outputs]
    inputs = [tensor for tensor in tensors_of(arguments) if tensor.requires_grad]
    return outputs, inputs, [x.to(y.dtype) for x, y in zip(noise, outputs, strict=True)]


def widened(arguments: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments with tensors of `dtype`, and `dtype` itself, in fp32; in fp64 if `dtype` is fp32.

    An op on e4m3 values computes in fp32 in any case: its fp32 arguments stay.
    """
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    if wide == torch.float64 and any(x.dtype == E4M3 for x in tensors_of(arguments)):
        return arguments

    def widen(x: Any) -> Any:
        if isinstance(x, Tensor) and x.dtype == dtype:
            return x.detach().to(wide).requires_grad_(x.requires_grad)
        return wide if x is dtype else x

    return tree_map(widen, arguments)


def measure(case: Case, rates: Rates, without: Collection[str] = ()) -> list[Row]:
    """A row for each implementation except `without`; one that breaks the rule or fails has no value."""
    print(case)
    candidates = {name: rest for name, *rest in case.candidates() if name not in without}
    rows = {name: case.row | {"implementation": name} for name in candidates}

    def ready(name: str) -> Run:
        run, rows[name]["outputs_max_error"] = case.checked(*candidates[name])
        return run

    device = case.shape.device
    times = contest(rows, ready, device, SECONDS[device.type], flush=True)
    least = case.floor(rates) if times else 0.0
    usual = statistics.median(times.get("torch", [math.nan]))
    for name, row in rows.items():
        if name not in times:
            print(f"  {name:14} {records.reason(row)}")
            continue
        fast, median, slow = quantiles(times[name])
        share = least / median
        row |= {"value": 1e6 * median, "unit": "us", "p20": 1e6 * fast, "p80": 1e6 * slow, "floor_share": share}
        print(f"  {name:14} {1e6 * median:9.1f} us, {share:4.0%} of the floor, {usual / median:.2f}x torch")
    return list(rows.values())


def best(rows: Iterable[Row], commit: str | None) -> dict[str, Any]:
    """The fastest backend, forward, of each form at each resolution, from the rows of a commit.

    A form has several rows: its places in each model. Backends are compared by the geometric mean of their times over
    the rows that all of them have. One that was refused or failed anywhere is left out. A tie is decided by the
    package's own order.
    """
    times: dict[tuple[str, str], dict[str, dict[Any, float | None]]] = {}
    for row in rows:
        if row["commit"] == commit and row["mode"] == "forward":
            backends = times.setdefault((str(row["resolution"]), row["output"].partition(" (")[0]), {})
            where = row["model"], row["batch"], row["precision"], row["output"]
            backends.setdefault(row["implementation"], {})[where] = row["value"]
    forms: dict[str, dict[str, str]] = {}
    for (resolution, form), backends in times.items():
        measured = {name: values for name, values in backends.items() if None not in values.values()}
        if shared := set.intersection(*map(set, measured.values())) if measured else set():
            means = {name: math.fsum(math.log(values[where]) for where in shared) for name, values in measured.items()}
            forms.setdefault(resolution, {})[form] = min(means, key=means.__getitem__)
    return {"commit": commit, "forms": forms}


def with_activation(case: Case, found: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
    """Runs the op activation inside other ops by its fastest backend in `found`, which :func:`best` gives."""
    forms, ending = found["forms"].get(str(case.shape.resolution), {}), " e4m3" if case.workload.e4m3 else ""
    names = [f"activation.{form}" for form in dispatch.all_ops()["activation"].sample_inputs]
    setting = ",".join(f"{name}={forms[name + ending]}" for name in names if name + ending in forms)
    return use_backend(setting) if setting else contextlib.nullcontext()


def cases(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """All workloads of some ops or forms, in this order, at each size, forward and, if there is one, backward."""
    for wanted, config, resolution in itertools.product(options.ops, options.models, options.sizes):
        shape = Shape(config, resolution, 1, device, dtype)
        shape = replace(shape, batch=max(2, BATCH_TOKENS[device.type] // shape.tokens))
        for workload in WORKLOADS:
            if workload.applies(shape) and wanted in (workload.op, f"{workload.op}.{workload.form}"):
                yield from (Case(workload, shape, mode) for mode in workload.modes if mode in options.modes)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    recorder = Recorder(TASK, options)
    device, commit = recorder.device, recorder.common["commit"]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rates = roofline.measured(device, dtype)
    recorder.common["versions"] |= rates.row
    print(f"{recorder}, {PRECISION[dtype]}, {rates}")
    with recorder.until_lost():
        for case in cases(options, device, dtype):
            if not recorder.has(**case.row, implementation="torch"):  # which is not kept if another lost the device
                lost = [there["implementation"] for there in recorder.lost_in(**case.row)]
                with with_activation(case, best(recorder.measured, commit)):
                    recorder.keep(measure(case, rates, lost))
                write_best(recorder)  # each time: what hangs later loses nothing
    write_best(recorder)
    return recorder.finish()


def write_best(recorder: Recorder) -> None:
    if recorder.writes and recorder.path.is_file():
        chosen = best(records.read(recorder.path), recorder.common["commit"])
        recorder.path.with_name(BEST).write_text(json.dumps(chosen, indent=1) + "\n")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    names = sorted(dispatch.all_ops())
    forms = [f"{workload.op}.{workload.form}" for workload in WORKLOADS]
    parser = harness.parser("ops", __doc__)
    what = f"some of {','.join(names)}, or forms such as attention.batch"
    parser.add_argument("--ops", type=harness.some_of([*names, *forms]), default=names, help=what)
    parser.add_argument("--sizes", type=harness.pixels, help="pixels, such as 224,518")
    parser.add_argument("--modes", type=harness.some_of(MODES), default=MODES, help=f"default: {','.join(MODES)}")
    return harness.parse(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
