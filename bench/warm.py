"""Compiles what the steps of ``make gpu`` will run, in all cores at once, so that no step waits for a compiler.

    python -m bench.warm kernels --steps ops,model-224    # Triton's, ahead of time: the GPU is not touched
    python -m bench.warm peers --steps model-224          # Inductor's: timm's compiled forward pass runs once

Triton and Inductor cache by content. A process that launches the same kernels with the same TRITON_CACHE_DIR, or
compiles the same model with the same TORCHINDUCTOR_CACHE_DIR, finds them.

Kernels are compiled by running the engine and the ops on fake tensors (tests/aot.py), for sm_90, with Triton's
implementation of each op: what ``engine-best`` will take is not known yet, and its launches are among these.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import gpu, harness, model, modes, ops
from bench.peers import OURS
from dinov2_fast import optimize_for_inference
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.ops.dispatch import use_backend

ARCH = 90
CUDA = torch.device("cuda")
DEPTH = 2  # of a model that stands for its own: all blocks launch the same, but for the last one's class token


class Task(NamedTuple):
    """What one process does: a function of this module, and its arguments."""

    run: Callable[..., int]
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.run.__name__}({', '.join(map(str, self.arguments))})"


def forward_settings(words: list[str]) -> Iterator[tuple[Any, list[str]]]:
    """Of a command of bench.model, each setting of a plain forward pass, as strings and numbers, and its modes."""
    options = model._parse(words)
    if options.task in ("throughput", "latency"):
        for config in options.models:
            for setting in model.settings(options, config):
                where = config.name, setting.resolution, setting.batch, setting.output, setting.precision
                yield where, options.modes


# Kernels


def kernels(commands: list[list[str]], device: str) -> Iterator[Task]:
    """Those of the engines, of bench.ops and of the tests that a GPU runs first; the longest tasks first."""
    for module, *words in commands:
        for where, names in forward_settings(words) if module == "bench.model" else ():
            if any(map(modes.is_engine, names)):
                yield Task(engine, where)
    for module, *words in commands:
        if module == "bench.ops":
            options = ops._parse(words)
            for config, size, op in product(options.models, options.sizes, options.ops):
                yield Task(cases, (config.name, size, op, device))
        elif module == "pytest" and "gpu_first" in words:
            from tests import test_on_gpu

            yield from (Task(tested, (name,)) for name in test_on_gpu.FIRST)


def engine(name: str, resolution: int, batch: int, output: str, precision: str) -> int:
    """The launches of one call of the engine. It is folded on the CPU, and then its tensors become fake ones."""
    sizes = harness.MODELS[name].constructor_arguments() | {"depth": DEPTH}
    options = {"outputs": output, "cuda_graphs": False, "follow_weights": False, "allow_slow": True}
    made = optimize_for_inference(DinoVisionTransformer(**sizes).eval(), precision, **options)

    def call() -> None:
        made.folded._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=CUDA))
        size = (batch, 3, resolution, resolution)
        OURS.call[output](made, torch.empty(size, dtype=modes.DTYPES[precision], device=CUDA))

    return launches(call)


def cases(name: str, resolution: int, op: str, device: str) -> int:
    """Those of an op in bench.ops, forward, at the sizes of a backbone."""
    words = ["--device", device, "--models", name, "--sizes", str(resolution), "--ops", op, "--modes", "forward"]
    options = ops._parse(words)

    def call() -> None:
        for case in ops.cases(options, CUDA, torch.bfloat16):
            for backend, function in case.candidates():
                if backend == "triton":
                    case.run(function)()

    return launches(call)


def tested(name: str) -> int:
    """Those of a case of tests/test_on_gpu.py."""
    from tests import test_on_gpu

    return launches(lambda: test_on_gpu.CASES[name][0](*test_on_gpu.CASES[name][1]()))


class RunKernels(TorchDispatchMode):
    """Inside, an op of ours on fake tensors runs its launcher, where torch would only ask for the result's shape."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "dinov2_fast":
            return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def launches(call: Callable[[], Any]) -> int:
    """Compiles all that `call` launches, with Triton wherever there is a kernel of it; gives how many launches."""
    from tests.aot import compiling

    with torch.inference_mode(), compiling(ARCH) as reports, contextlib.ExitStack() as stack:
        if has_driver():
            stack.enter_context(building_launchers())
        stack.enter_context(use_backend("triton"))
        stack.enter_context(RunKernels())
        call()
    return len(reports)


def has_driver() -> bool:
    from triton.backends.nvidia.driver import libcuda_dirs

    try:
        return bool(libcuda_dirs())
    except (AssertionError, OSError, subprocess.SubprocessError):
        return False


@contextlib.contextmanager
def building_launchers() -> Iterator[None]:
    """Has the C compiler build what starts each kernel, too: half a second each. It needs the driver's library."""
    from triton.backends.nvidia.driver import CudaLauncher
    from triton.runtime.jit import JITFunction

    compile_only = JITFunction.run

    def build(kernel: Any, *args: Any, **options: Any) -> Any:
        compiled = compile_only(kernel, *args, **options)
        CudaLauncher(compiled.src, compiled.metadata)
        return compiled

    with mock.patch.object(JITFunction, "run", build):
        yield


# Peers


def peers(commands: list[list[str]], device: str) -> Iterator[Task]:
    for module, *words in commands:
        for where, names in forward_settings(words) if module == "bench.model" else ():
            if "compile" in names and where[-1] != "fp8":
                yield Task(peer, (*where, device))


def peer(name: str, resolution: int, batch: int, output: str, precision: str, device: str) -> int:
    """Runs timm's compiled forward pass by bench.model itself.

    Inductor's key holds pickled arguments, and with them names of modules: in a process that was started in another way
    it is another key.
    """
    where = {"models": name, "sizes": resolution, "batches": batch, "outputs": output, "precisions": precision}
    options = where | {"device": device, "implementations": "timm", "modes": "compile", "seconds": 0}
    words = [word for option, value in options.items() for word in (f"--{option}", str(value))]
    subprocess.run([sys.executable, "-m", "bench.model", *words], check=True)
    return 1


# The command


def hide_gpu() -> None:
    """Fake tensors would make a context on a GPU that they find, in each process."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def run(tasks: list[Task], workers: int, prepare: Callable[[], None] | None) -> int:
    """Each in a process that was not forked, which neither CUDA nor fake tensors would survive; the exit status."""
    failed = 0
    workers = max(1, min(workers, len(tasks)))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=prepare) as pool:
        running = {pool.submit(task.run, *task.arguments): task for task in tasks}
        for future in as_completed(running):
            error = future.exception()
            failed += error is not None
            print(f"{running[future]}: {future.result() if error is None else repr(error)}")
    print(f"{len(tasks)} tasks in {workers} processes, {failed} failed")
    return int(failed > 0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.warm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["kernels", "peers"])
    parser.add_argument("--steps", required=True, help="of bench.gpu, with commas between them")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"], help="cpu: the sizes of bench.gpu --tiny")
    options = parser.parse_args(arguments)
    job = gpu.Job(Path(), "none", gpu.BUDGET, tiny=options.device == "cpu")
    commands = [job.words(step) for step in gpu.PLAN if step.name in options.steps.split(",")]
    cores = os.cpu_count() or 1
    if options.what == "kernels":
        return run(list(dict.fromkeys(kernels(commands, options.device))), max(2, cores), hide_gpu)
    return run(list(dict.fromkeys(peers(commands, options.device))), max(2, cores // 2), None)


if __name__ == "__main__":
    sys.exit(main())
