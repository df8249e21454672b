"""What ``make gpu`` runs, in order: the tests on the GPU, some of them under compute-sanitizer, then the benchmarks."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench import records
from dinov2_fast import backends, ops  # noqa: F401  ops registers the ops

ROOT = Path(__file__).parents[1]
EVERY_MODEL = "S,B,L,g"
PIXELS = ("224", "518", "1036")
TRAINABLE = "eager,triton"  # all that training and memory know but torch.compile
UNCOMPILED = "eager,engine,engine-triton,triton"
COMPILED = f"{UNCOMPILED},compile"
TUNED = f"{COMPILED},max-autotune"
GRAPHS = "eager,triton,engine,engine-graphs,engine-triton-graphs,graphs"
TRAINED = "autocast-bf16,bf16"
SMALL_TESTS = "triton and (nan and stay or packed_gradients or wider_bias)"  # a few of every op
LARGE_TESTS = "to_the_31"  # tensors of many GB: one at a time
# Minutes to compile every peer at both outputs, once for each setting, and to time them.
COMPILING = {"S": 2.0, "B": 2.0, "L": 3.5, "g": 6.0}
TUNING = {"S": 4.0, "B": 4.0, "L": 7.0, "g": 12.0}


@dataclass(frozen=True)
class Step:
    """One process.

    Args:
        name: also of its log.
        arguments: of Python; with them it is the same step.
        minutes: expected, on an H200.
        limit: minutes it may take whatever is left.
        prefix: what comes before Python: variables of the environment, another program.
        settings: of a benchmark, by the names of its options.
        task: whose rows it writes.
        skip: why it cannot run here.
    """

    name: str
    arguments: tuple[str, ...]
    minutes: float
    limit: float = float("inf")
    prefix: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    task: str | None = None
    skip: str | None = None

    @property
    def key(self) -> str:
        return shlex.join(self.arguments)


def plan(options: argparse.Namespace) -> list[Step]:
    """All steps, the ones that tell most for their time first.

    Throughput, latency, training and the ops run first without what compiles, in bf16. Then come torch.compile, other
    precisions, and max-autotune. Rows that are compared must be measured in turn, so a later step runs the earlier
    ones' modes again.
    """
    peers = ("--reference-path", str(options.reference_path.resolve())) if options.reference_path else ()
    if options.quick:
        return list(_quick(peers))
    return [*_tests(), *_uncompiled(peers), *_compiled(peers), *_other_precisions(peers), *_tuned(peers)]


def _quick(peers: tuple[str, ...]) -> Iterator[Step]:
    few = {"models": "S,B", "sizes": "224"}
    yield pytest_step("quick-tests", 0.6, op_tests(), SMALL_TESTS)
    yield bench("quick-roofline", 0.3, "roofline", **few, batches="256", precisions="bf16")
    once = {"precisions": "bf16", "modes": UNCOMPILED}
    yield bench("quick-throughput", 0.6, "model", peers, task="throughput", **few, **once, seconds="2")
    yield bench("quick-latency", 0.5, "model", peers, task="latency", **few, **once, batches="1", seconds="1")


def _tests() -> Iterator[Step]:
    for word in backends.words():
        minutes = {"linear": 1.0, "attention": 1.2}.get(word, 0.4)
        yield pytest_step(f"tests-{word}", minutes, [f"tests/test_{word}.py"], f"not {LARGE_TESTS}")
    yield pytest_step("tests-on-gpu", 0.7, ["tests/test_on_gpu.py"], f"not {LARGE_TESTS}")
    yield pytest_step("tests-model", 1.0, model_tests(), f"not {LARGE_TESTS}")
    yield pytest_step("tests-large", 0.7, [*op_tests(), "tests/test_on_gpu.py"], LARGE_TESTS, alone=True)
    yield sanitizer()


def _uncompiled(peers: tuple[str, ...]) -> Iterator[Step]:
    for size in PIXELS:
        yield bench(f"roofline-{size}", 1.0, "roofline", models=EVERY_MODEL, sizes=size, precisions="bf16,fp8")
    for size, minutes in zip(PIXELS, (1.5, 1.5, 2.5), strict=True):
        yield throughput(peers, size, EVERY_MODEL, "bf16", UNCOMPILED, minutes)
    for size in PIXELS[:2]:
        yield latency(peers, size, EVERY_MODEL, GRAPHS, 2.0)
    yield training(peers, TRAINED, TRAINABLE, 2.0)
    for size in PIXELS:
        yield bench(f"ops-{size}", 1.0, "ops", models=EVERY_MODEL, sizes=size, compile=None)


def _compiled(peers: tuple[str, ...]) -> Iterator[Step]:
    for size in PIXELS:
        for model, minutes in COMPILING.items():
            yield throughput(peers, size, model, "bf16", COMPILED, minutes)
    yield bench("memory", 3.0, "memory", peers, models=EVERY_MODEL, precisions="bf16", modes=TRAINABLE)
    yield bench("extraction", 4.0, "extraction", peers, models="S,L")
    for size in PIXELS[:2]:
        for model, minutes in COMPILING.items():
            yield latency(peers, size, model, f"{GRAPHS},reduce-overhead", minutes, "1")
    yield training(peers, TRAINED, f"{TRAINABLE},compile", 8.0)
    for size in PIXELS:
        yield bench(f"ops-{size}-compile", 6.0, "ops", models=EVERY_MODEL, sizes=size)


def _other_precisions(peers: tuple[str, ...]) -> Iterator[Step]:
    for size in PIXELS:
        yield throughput(peers, size, EVERY_MODEL, "autocast-bf16", TRAINABLE, 2.0)
    yield bench("roofline-fp32", 2.5, "roofline", models=EVERY_MODEL, precisions="fp32")
    for size, minutes in zip(PIXELS, (2.5, 5.0, 12.0), strict=True):
        yield throughput(peers, size, EVERY_MODEL, "fp32", UNCOMPILED, minutes)
    yield training(peers, "fp32", TRAINABLE, 3.0)
    others = {"precisions": "autocast-bf16,fp32", "modes": TRAINABLE}
    yield bench("memory-others", 6.0, "memory", peers, models=EVERY_MODEL, **others)


def _tuned(peers: tuple[str, ...]) -> Iterator[Step]:
    for size in PIXELS:
        for model, minutes in TUNING.items():
            yield throughput(peers, size, model, "bf16", TUNED, minutes)
    for size in PIXELS[:2]:
        for model, minutes in TUNING.items():
            yield latency(peers, size, model, f"{GRAPHS},compile,reduce-overhead,max-autotune", 3 * minutes)


def throughput(peers: tuple[str, ...], size: str, models: str, precision: str, modes: str, minutes: float) -> Step:
    name = _name("throughput", size, precision, modes, models)
    settings = {"models": models, "sizes": size, "precisions": precision, "modes": modes, "seconds": "5"}
    return bench(name, minutes, "model", peers, task="throughput", **settings)


def latency(
    peers: tuple[str, ...], size: str, models: str, modes: str, minutes: float, batches: str = "1,4,16"
) -> Step:
    settings = {"models": models, "sizes": size, "batches": batches, "precisions": "bf16", "modes": modes}
    name = _name("latency", size, "bf16", modes, models)
    return bench(name, minutes, "model", peers, task="latency", **settings, seconds="2")


def training(peers: tuple[str, ...], precisions: str, modes: str, minutes: float) -> Step:
    name = _name("training", "224", precisions.rpartition(",")[2], modes, EVERY_MODEL)
    settings = {"models": "S,B,L", "sizes": "224", "precisions": precisions, "modes": modes, "seconds": "5"}
    return bench(name, minutes, "training", peers, **settings)


def _name(task: str, size: str, precision: str, modes: str, models: str) -> str:
    """Such as throughput-224-bf16, or throughput-224-bf16-compile-S."""
    last = modes.rpartition(",")[2]
    special = "" if last in ("triton", "graphs") else f"-{last}"
    return f"{task}-{size}-{precision}{special}" + ("" if models == EVERY_MODEL else f"-{models}")


def bench(name: str, minutes: float, module: str, peers: tuple[str, ...] = (), **settings: str | None) -> Step:
    """A benchmark with its options; one that is None is an option to leave out."""
    given = {option: value for option, value in settings.items() if value is not None}
    arguments = [text for option, value in given.items() for text in (f"--{option}", value)]
    arguments += [f"--no-{option}" for option, value in settings.items() if value is None]
    whole = ("-m", f"bench.{module}", "--device", "cuda", *arguments, *peers, "--write", "--resume")
    return Step(name, whole, minutes, settings=given, task=given.get("task", module))


def pytest_step(name: str, minutes: float, files: list[str], selected: str, *, alone: bool = False) -> Step:
    """Tests on the GPU; those `alone` run one after another."""
    workers = min(8, len(os.sched_getaffinity(0)) // 2)
    parallel = not alone and workers > 1 and records.version("pytest-xdist")
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=10", "-m", "not aot", "-k", selected]
    arguments += ["-n", str(workers)] if parallel else []
    missing = None if records.version("pytest") else "pytest is not installed"
    return Step(name, (*arguments, *files), minutes, skip=missing)


def sanitizer() -> Step:
    """Small tests of every op under compute-sanitizer, with an allocator that shows it each tensor's end."""
    tool = "compute-sanitizer"
    program = (tool, "--tool=memcheck", "--error-exitcode=9", "--target-processes=all", "--print-limit=20")
    step = pytest_step("sanitizer", 1.5, op_tests(), SMALL_TESTS, alone=True)
    missing = step.skip or (None if shutil.which(tool) else f"{tool} is not on PATH")
    prefix = ("PYTORCH_NO_CUDA_MEMORY_CACHING=1", *program)
    return Step(step.name, step.arguments, step.minutes, limit=1.5, prefix=prefix, skip=missing)


def op_tests() -> list[str]:
    return [f"tests/test_{word}.py" for word in backends.words()]


def model_tests() -> list[str]:
    """The other tests that run on the GPU where there is one: those that ask tests/devices.py for the device."""
    others = {"tests/test_on_gpu.py", *op_tests()}
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "tests.devices import" in path.read_text()]
    return [name for path in files if (name := path.relative_to(ROOT).as_posix()) not in others]
