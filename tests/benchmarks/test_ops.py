"""Each op with each of its implementations under pytest-benchmark, to see on one machine what a change does to it.

``python -m pytest tests/benchmarks --benchmark-only -k layer_norm --benchmark-save=NAME``, and later
``--benchmark-compare``. A time counts until the device is done, Python's share and a warm cache included: what is
published comes from bench.ops. As there, a result that breaks the rule of the tests is not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from bench import ops
from bench.harness import worst_error
from bench.workloads import WORKLOADS, Shape, Workload
from dinov2_fast.configs import BACKBONES
from tests.devices import DEVICE

pytest.importorskip("pytest_benchmark")

DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}[DEVICE]
BATCH = {"cpu": 2, "cuda": 64}[DEVICE]
PIXELS = {"cpu": 56, "cuda": 224}[DEVICE]


def cases() -> Iterator[Any]:
    """On a CPU only torch's implementations run."""
    for workload in WORKLOADS:
        for implementation in workload.implementations():
            if DEVICE == "cuda" or implementation.backend == "torch":
                for mode in ("forward",) if workload.saved is None else ("forward", "backward"):
                    name = f"{workload.label}-{mode}-{implementation.backend}".replace(" ", "-")
                    yield pytest.param(workload, mode == "backward", implementation, id=name)


def synchronised(run: Callable[[], Any]) -> Callable[[], None]:
    """Runs and waits until the device is done."""

    def call() -> None:
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return call


@pytest.mark.benchmark(warmup=True, warmup_iterations=3, min_rounds=5, max_time=0.1)
@pytest.mark.parametrize(("workload", "backward", "implementation"), list(cases()))
def test_op(benchmark: Any, workload: Workload, backward: bool, implementation: Any) -> None:
    config = BACKBONES["dinov2_vitg14" if workload.of_swiglu else "dinov2_vits14"]
    shape = Shape(config, PIXELS, BATCH, torch.device(DEVICE), DTYPE)
    arguments = ops.recorded(workload.arguments(shape), backward)
    if reason := implementation.reason_against(arguments):
        pytest.skip(reason)
    prepare = partial(ops.prepared, workload, backward=backward)
    torch_function = ops.torch_function_of(workload)
    reference = prepare(torch_function, ops.widened(arguments, DTYPE))()
    usual = prepare(torch_function, arguments)()
    run = prepare(implementation.function, arguments)
    worst_error(run(), reference, usual)
    benchmark.group = f"{workload.label} {'backward' if backward else 'forward'}"
    benchmark(synchronised(run))
