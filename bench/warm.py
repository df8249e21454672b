"""Compiles what the steps of ``make gpu`` will run, on all cores at once, so that no step waits for a compiler.

    python -m bench.warm kernels --steps ops,model-224    # Triton's kernels, without touching the GPU
    python -m bench.warm peers --steps model-224          # Inductor's, by running timm's compiled forward pass

Triton and Inductor cache by content: a process finds compiled code if it launches the same kernels with the same
TRITON_CACHE_DIR, or compiles the same model with the same TORCHINDUCTOR_CACHE_DIR.

Kernels are compiled for sm_90 by running the engine and the ops on fake tensors (tests/helpers/aot.py), with Triton's
implementation of each op. The backends of ``engine-best`` are not known yet, but all that it may launch is compiled: an
engine runs a second time with the linears of cuBLAS, which leave biases to the norms.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import harness, model, modes, ops
from bench.gpu_plan import PLAN, GpuRun
from bench.peers import OURS
from dinov2_fast import optimize_for_inference
from dinov2_fast.inference.fold_model import fold_model
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.ops.dispatch import use_backend

ARCH = 90
CUDA = torch.device("cuda")
DEPTH = 3  # blocks: all launch the same kernels, except the first (no biases) and, with output cls, the last
ENGINE_BACKENDS = ("triton", "triton,linear=cublas")  # two, since the layout of the weights depends on the backends


class CompileJob(NamedTuple):
    """The work of one process: a function of this module and its arguments."""

    run: Callable[..., int]
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.run.__name__}({', '.join(map(str, self.arguments))})"


def forward_scenarios(commands: list[list[str]]) -> Iterator[tuple[Any, list[str]]]:
    """The scenarios of forward passes in commands of bench.model, as strings and numbers, and their modes."""
    for options in (model._parse(arguments) for module, *arguments in commands if module == "bench.model"):
        if options.task in ("throughput", "latency"):
            for config in options.models:
                for scenario in model.scenarios(options, config):
                    where = config.name, scenario.resolution, scenario.batch, scenario.output, scenario.precision
                    yield where, options.modes


def kernel_jobs(commands: list[list[str]], device: str) -> Iterator[CompileJob]:
    """Jobs for the engines, bench.ops and the tests marked gpu_first. The longest come first."""
    for where, names in forward_scenarios(commands):
        if any(map(modes.is_engine, names)):
            yield CompileJob(compile_engine, where)
    for module, *arguments in commands:
        if module == "bench.ops":
            options = ops._parse(arguments)
            for config, size, op in product(options.models, options.sizes, options.ops):
                yield CompileJob(compile_op, (config.name, size, op, device))
        elif module == "pytest" and "gpu_first" in arguments:
            from tests.ops import test_on_gpu

            yield from (CompileJob(compile_test_case, (name,)) for name in test_on_gpu.FIRST)


def compile_engine(name: str, resolution: int, batch: int, output: str, precision: str) -> int:
    """Compiles what calls of the engine launch. The engine is folded on the CPU before its tensors become fake."""
    sizes = harness.MODELS[name].constructor_arguments() | {"depth": DEPTH}
    options = {"outputs": output, "cuda_graphs": False, "follow_weights": False, "allow_slow": True}
    engine = optimize_for_inference(DinoVisionTransformer(**sizes).eval(), precision, **options)

    def call() -> None:
        engine.folded._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=CUDA))
        size = (batch, 3, resolution, resolution)
        OURS.call[output](engine, torch.empty(size, dtype=modes.DTYPES[precision], device=CUDA))

    count = 0
    for backends in ENGINE_BACKENDS:
        with use_backend(backends):
            engine.folded = fold_model(engine._model, engine.plan, CUDA).eval()
        count += compile_launches(call, backends)
    return count


def compile_op(name: str, resolution: int, op: str, device: str) -> int:
    """Compiles what bench.ops launches of an op, forward, at the sizes of a backbone."""
    arguments = ["--device", device, "--models", name, "--sizes", str(resolution), "--ops", op, "--modes", "forward"]
    options = ops._parse(arguments)

    def call() -> None:
        for case in ops.op_cases(options, CUDA, torch.bfloat16):
            for backend, function, inputs in case.candidates():
                if backend == "triton":
                    case.make_run(function, inputs)()

    return compile_launches(call)


def compile_test_case(name: str) -> int:
    """Compiles what a case of tests/ops/test_on_gpu.py launches."""
    from tests.ops import test_on_gpu

    return compile_launches(lambda: test_on_gpu.CASES[name][0](*test_on_gpu.CASES[name][1]()))


class RunKernels(TorchDispatchMode):
    """Our ops run their launchers on fake tensors, where torch would only compute the shape of the result."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "dinov2_fast":
            return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def compile_launches(call: Callable[[], Any], backends: str = "triton") -> int:
    """Compiles all that `call` launches with Triton. Returns the number of launches."""
    from tests.helpers.aot import compiling

    with torch.inference_mode(), compiling(ARCH) as reports, building_launchers(), use_backend(backends), RunKernels():
        call()
    return len(reports)


@contextlib.contextmanager
def building_launchers() -> Iterator[None]:
    """Also builds the C code that launches each kernel, half a second each, if there is the driver's library."""
    from triton.backends.nvidia.driver import CudaLauncher, libcuda_dirs
    from triton.runtime.jit import JITFunction

    try:
        libcuda_dirs()
    except (AssertionError, OSError, subprocess.SubprocessError):
        yield
        return
    compile_only = JITFunction.run

    def build(kernel: Any, *args: Any, **options: Any) -> Any:
        compiled = compile_only(kernel, *args, **options)
        CudaLauncher(compiled.src, compiled.metadata)
        return compiled

    with mock.patch.object(JITFunction, "run", build):
        yield


def peer_jobs(commands: list[list[str]], device: str) -> Iterator[CompileJob]:
    for where, names in forward_scenarios(commands):
        if "compile" in names and where[-1] != "fp8":
            yield CompileJob(compile_peer, (*where, device))


def compile_peer(name: str, resolution: int, batch: int, output: str, precision: str, device: str) -> int:
    """Runs timm's compiled forward pass by bench.model itself.

    The key of Inductor's cache includes names of modules, which differ in a process that is started in another way.
    """
    where = {"models": name, "sizes": resolution, "batches": batch, "outputs": output, "precisions": precision}
    options = where | {"device": device, "implementations": "timm", "modes": "compile", "seconds": 0}
    arguments = [part for option, value in options.items() for part in (f"--{option}", str(value))]
    subprocess.run([sys.executable, "-m", "bench.model", *arguments], check=True)
    return 1


def hide_gpu() -> None:
    """Otherwise fake tensors would create a CUDA context in each process."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def run_jobs(all_jobs: Iterable[CompileJob], workers: int, prepare: Callable[[], None] | None) -> int:
    """Runs jobs in spawned processes, since neither CUDA nor fake tensors survive a fork. Returns the exit status."""
    jobs, failed = dict.fromkeys(all_jobs), 0
    workers = max(1, min(workers, len(jobs)))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=prepare) as pool:
        running = {pool.submit(job.run, *job.arguments): job for job in jobs}
        for future in as_completed(running):
            error = future.exception()
            failed += error is not None
            print(f"{running[future]}: {future.result() if error is None else repr(error)}")
    print(f"{len(jobs)} jobs in {workers} processes, {failed} failed")
    return int(failed > 0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.warm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["kernels", "peers"])
    parser.add_argument("--steps", required=True, help="comma-separated steps of bench.gpu")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"], help="cpu: sizes of bench.gpu --tiny")
    options = parser.parse_args(arguments)
    gpu_run = GpuRun(Path(), "none", tiny=options.device == "cpu")
    commands = [gpu_run.command(step) for step in PLAN if step.name in options.steps.split(",")]
    cores = os.cpu_count() or 1
    if options.what == "kernels":
        return run_jobs(kernel_jobs(commands, options.device), max(2, cores), hide_gpu)
    return run_jobs(peer_jobs(commands, options.device), max(2, cores // 2), None)


if __name__ == "__main__":
    sys.exit(main())
