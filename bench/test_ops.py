"""Each op with each of its implementations under pytest-benchmark, to see on one machine what a change does to it.

``make bench-ops OPTIONS="-k layer_norm --benchmark-save=before"``, and later ``OPTIONS="-k layer_norm
--benchmark-compare"``. Times include Python's share, with a warm cache; published times come from bench.ops. As there,
what breaks the rule is not timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.ops import Case
from bench.workloads import WORKLOADS, Shape
from dinov2_fast.configs import BACKBONES
from dinov2_fast.ops.implementation import Implementation

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}[DEVICE.type]
BATCH = {"cpu": 2, "cuda": 64}[DEVICE.type]
PIXELS = {"cpu": 56, "cuda": 224}[DEVICE.type]


def cases() -> Iterator[Any]:
    for workload in WORKLOADS:
        config = BACKBONES["dinov2_vitg14" if workload.of_swiglu else "dinov2_vits14"]
        shape = Shape(config, PIXELS, BATCH, DEVICE, DTYPE)
        for mode in workload.modes:
            for implementation in workload.implementations():
                if implementation.is_for(DEVICE):
                    name = f"{workload.label}-{mode}-{implementation.backend}".replace(" ", "-")
                    yield pytest.param(Case(workload, shape, mode), implementation, id=name)


@pytest.mark.benchmark(warmup=True, warmup_iterations=3, min_rounds=5, max_time=0.1)
@pytest.mark.parametrize(("case", "implementation"), list(cases()))
def test_op(benchmark: Any, case: Case, implementation: Implementation) -> None:
    torch.manual_seed(0)
    case = replace(case)  # so that its tensors are freed when this test ends
    arguments, reason = case.arguments_for(implementation)
    if reason:
        pytest.skip(reason)
    run, _ = case.checked(implementation.function, arguments)

    def until_done() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.workload.label} {case.mode}"
    benchmark(until_done)
