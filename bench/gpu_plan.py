"""What ``make gpu`` runs, in order: kernels that are new to a GPU, the questions of speed, all tests, the rest."""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench import records
from dinov2_fast import extension
from dinov2_fast.ops import dispatch

ROOT = Path(__file__).parents[1]
EVERY_MODEL = "B,L,S,g"  # in the order of what they decide
PIXELS = ("224", "518", "1036")
TRAINABLE = "eager,triton"  # all that training and memory know but torch.compile
UNCOMPILED = "eager,triton,engine,engine-triton,engine-cuda,engine-mixed,engine-triton-sdpa"
MIXED = f"{UNCOMPILED},single,grouped,padded,list"  # ways to run pictures of many sizes
COMPILED = f"{UNCOMPILED},compile"
TUNED = f"{COMPILED},max-autotune"
FP8 = "engine-triton,engine-cuda,engine-mixed,engine-cublas"
OUR_GRAPHS = "engine-graphs,engine-triton-graphs,engine-cuda-graphs,engine-mixed-graphs"
GRAPHS = f"graphs,{OUR_GRAPHS},eager,triton,engine"
OTHERS = "eager,triton,engine,engine-triton"  # where speed is not the question
BOTH = "all,cls"
SMALL_TESTS = "triton and (nan and stay or packed_gradients)"  # a few of every op
LARGE_TESTS = "to_the_31"  # tensors of many GB: one at a time
ON_THE_CPU = "tile_goes_by_shape"  # compiles csrc with g++
TOOLKIT = "/usr/local/cuda/bin"
# Minutes to compile every peer at one output, once for each setting, and to time them.
COMPILING = {"B": 0.9, "L": 1.5, "S": 0.9, "g": 2.8}
TUNING = {"B": 2.0, "L": 3.5, "S": 2.0, "g": 6.0}
# How many times the expected minutes a step may take: a kernel that hangs must not take all that is left.
TEST_LIMIT, BENCH_LIMIT = 2.0, 2.5
TEST_SECONDS = 60  # of one test


@dataclass(frozen=True)
class Step:
    """One process.

    Args:
        name: also of its log.
        arguments: of Python; with them it is the same step.
        minutes: expected, on an H200.
        limit: minutes it may take whatever is left.
        prefix: what comes before Python: variables of the environment, another program.
        told: which options it is given besides, of "results", "commit" and "junit-xml".
        settings: of a benchmark, by the names of its options.
        task: whose rows it writes.
        skip: why it cannot run here.
        shown: whether what it printed is of interest even if it succeeds.
    """

    name: str
    arguments: tuple[str, ...]
    minutes: float
    limit: float = float("inf")
    prefix: tuple[str, ...] = ()
    told: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    task: str | None = None
    skip: str | None = None
    shown: bool = False

    @property
    def key(self) -> str:
        return shlex.join(self.arguments)


def plan(options: argparse.Namespace) -> list[Step]:
    """All steps, the ones that tell most for their time first.

    What has never run comes before what is to be compared: the kernels of csrc by their tests and under
    compute-sanitizer, a profile, and the four ops that decide which backends a model mixes. Then each question that the
    project asks of speed, once, without what compiles; torch.compile where it is most often asked; all other tests; and
    the rest. Rows that are compared must be measured in turn, so a later step runs the earlier ones' modes again.
    """
    peers = ("--reference-path", str(options.reference_path.resolve())) if options.reference_path else ()
    has_extension = bool(options.extension) or extension.FILE.is_file()
    if options.quick:
        return list(_quick(peers))
    rest = (_uncompiled(peers), _compiled(peers), _other_precisions(peers), _tuned(peers))
    return list(itertools.chain(_unproven(has_extension), _questions(peers), _tests(), *rest))


def _quick(peers: tuple[str, ...]) -> Iterator[Step]:
    few = {"models": "S,B", "sizes": "224"}
    yield pytest_step("quick-tests", 0.6, op_tests(), SMALL_TESTS)
    yield bench("quick-roofline", 0.3, "roofline", **few, batches="256", precisions="bf16")
    once = {"precisions": "bf16", "modes": "eager,engine,engine-triton,engine-mixed,triton"}
    yield bench("quick-throughput", 0.6, "model", peers, task="throughput", **few, **once, seconds="2")
    yield bench("quick-latency", 0.5, "model", peers, task="latency", **few, **once, batches="1", seconds="1")


def _unproven(has_extension: bool) -> Iterator[Step]:
    yield Step("smoke", ("-m", "bench.gpu", "--smoke"), 0.2, limit=1.0, shown=True)
    files = ["tests/test_linear_cuda.py", "tests/test_on_gpu.py"]
    yield pytest_step("tests-kernels", 3.0, files, f"not {LARGE_TESTS} and not {ON_THE_CPU}")
    linear = "(every_form or fp8_operands or surroundings) and (70 or 130 or surroundings)"
    yield sanitizer("linear", "memcheck", 0.7, ["tests/test_linear_cuda.py"], linear, 80 / 60, has_extension)
    modes = ("--models", "L", "--modes", "eager,engine-triton,engine-cuda")
    yield Step("trace-L", ("-m", "bench.trace", "--device", "cuda", *modes), 0.6, limit=1.5, told=("results",))
    for word, minutes in (("linear", 0.5), ("layer_norm", 0.5), ("attention", 0.6), ("activation", 0.3)):
        yield ops("224", minutes, compiled=False, models="B,L", ops=word)


def _questions(peers: tuple[str, ...]) -> Iterator[Step]:
    # The floor first: a row's share of it is worked out when the row is measured.
    yield roofline("224", EVERY_MODEL, 1.5, batches="256,64,1")  # of throughput, training and latency
    for models, minutes in (("B,L", 1.2), ("S,g", 1.4)):
        yield throughput(peers, "224", models, "bf16", UNCOMPILED, "cls", minutes)
    yield throughput(peers, "224", "B,L,g", "fp8", FP8, "cls", 1.2)
    yield latency(peers, "224", "S,B", GRAPHS, 0.8, batches="1", outputs="cls")
    yield roofline("518", "B,L,S", 0.5, batches="64")
    yield throughput(peers, "518", "B,L,S", "bf16", UNCOMPILED, "all", 1.2)
    yield throughput(peers, "518", "B,L", "fp8", FP8, "all", 0.7)
    yield mixed(peers, "B,L", "bf16", MIXED, 1.0)
    for model in "BLS":
        yield throughput(peers, "224", model, "bf16", COMPILED, "cls", COMPILING[model])
    yield training(peers, "B,L", "bf16", TRAINABLE, 0.8)
    yield roofline("1036", "B,L", 0.4, batches="16")
    yield throughput(peers, "1036", "B,L", "bf16", UNCOMPILED, "all", 0.8)
    yield bench("extraction-S", 1.8, "extraction", peers, models="S", pictures="16384")
    yield training(peers, "B", "bf16", f"{TRAINABLE},compile", 1.3)
    yield training(peers, "L", "bf16", f"{TRAINABLE},compile", 2.2)
    yield throughput(peers, "224", "g", "bf16", COMPILED, "cls", COMPILING["g"])


def _tests() -> Iterator[Step]:
    others = f"not {LARGE_TESTS} and not {ON_THE_CPU}"
    yield sanitizer("triton", "memcheck", 1.0, op_tests(), SMALL_TESTS, limit=1.5)
    yield pytest_step("tests-ops", 5.5, op_tests(), others)
    yield pytest_step("tests-model", 2.5, model_tests(), others)
    yield pytest_step("tests-large", 1.0, [*op_tests(), "tests/test_on_gpu.py"], LARGE_TESTS, alone=True)


def _uncompiled(peers: tuple[str, ...]) -> Iterator[Step]:
    yield roofline(",".join(PIXELS), EVERY_MODEL, 3.0)
    for size, output, minutes in (("224", "all", 2.0), ("518", BOTH, 3.0), ("1036", BOTH, 4.0)):
        yield throughput(peers, size, EVERY_MODEL, "bf16", UNCOMPILED, output, minutes)
        yield throughput(peers, size, EVERY_MODEL, "fp8", FP8, BOTH, minutes)
    for size in PIXELS[:2]:
        yield latency(peers, size, EVERY_MODEL, GRAPHS, 4.0)
    yield mixed(peers, EVERY_MODEL, "bf16", MIXED, 1.5)
    yield mixed(peers, EVERY_MODEL, "fp8", FP8, 1.0)
    for size in PIXELS:
        yield ops(size, 5.0, compiled=False, models=EVERY_MODEL)
    yield bench("memory", 4.0, "memory", peers, models=EVERY_MODEL, precisions="bf16", modes=TRAINABLE)
    yield bench("extraction-L", 3.0, "extraction", peers, models="L")


def _compiled(peers: tuple[str, ...]) -> Iterator[Step]:
    for size, output, count in (("224", "all", 1), ("518", BOTH, 2), ("1036", BOTH, 2)):
        for model, minutes in COMPILING.items():
            yield throughput(peers, size, model, "bf16", COMPILED, output, count * minutes)
    for size in PIXELS[:2]:
        for model, minutes in COMPILING.items():
            yield latency(peers, size, model, f"{GRAPHS},reduce-overhead", 2 * minutes, batches="1")
    yield training(peers, "S,B,L", "bf16", f"{TRAINABLE},compile", 1.5)  # what is left of it: S
    for size in PIXELS:
        yield ops(size, 6.0, compiled=True, models=EVERY_MODEL)


def _other_precisions(peers: tuple[str, ...]) -> Iterator[Step]:
    yield training(peers, "S,B,L", "autocast-bf16", f"{TRAINABLE},compile", 5.0)
    for size in PIXELS:
        yield throughput(peers, size, EVERY_MODEL, "autocast-bf16", TRAINABLE, BOTH, 3.0)
    yield roofline(",".join(PIXELS), EVERY_MODEL, 2.5, precisions="fp32")
    for size, minutes in zip(PIXELS, (3.0, 5.0, 12.0), strict=True):
        yield throughput(peers, size, EVERY_MODEL, "fp32", OTHERS, BOTH, minutes)
    yield training(peers, "S,B,L", "fp32", TRAINABLE, 3.0)
    others = {"precisions": "autocast-bf16,fp32", "modes": TRAINABLE}
    yield bench("memory-others", 8.0, "memory", peers, models=EVERY_MODEL, **others)


def _tuned(peers: tuple[str, ...]) -> Iterator[Step]:
    for size in PIXELS:
        for model, minutes in TUNING.items():
            yield throughput(peers, size, model, "bf16", TUNED, BOTH, 2 * minutes)
    for size in PIXELS[:2]:
        for model, minutes in TUNING.items():
            yield latency(peers, size, model, f"{GRAPHS},compile,reduce-overhead,max-autotune", 6 * minutes)


def roofline(size: str, models: str, minutes: float, precisions: str = "bf16,fp8", **settings: str) -> Step:
    known = {"bf16,fp8": "", ",".join(PIXELS): "every-size"}
    name = _name("roofline", known.get(size, size), known.get(precisions, precisions), models=models)
    return bench(name, minutes, "roofline", models=models, sizes=size, precisions=precisions, **settings)


def throughput(
    peers: tuple[str, ...], size: str, models: str, precision: str, modes: str, outputs: str, minutes: float
) -> Step:
    name = _name("throughput", size, precision, modes, outputs, models)
    settings = {"models": models, "sizes": size, "outputs": outputs, "precisions": precision, "modes": modes}
    return bench(name, minutes, "model", peers, task="throughput", **settings, seconds="5")


def latency(
    peers: tuple[str, ...],
    size: str,
    models: str,
    modes: str,
    minutes: float,
    batches: str = "1,4,16",
    outputs: str = BOTH,
) -> Step:
    settings = {"models": models, "sizes": size, "batches": batches, "outputs": outputs}
    name = _name("latency", size, "bf16", modes, outputs, models)
    return bench(name, minutes, "model", peers, task="latency", **settings, precisions="bf16", modes=modes, seconds="2")


def mixed(peers: tuple[str, ...], models: str, precision: str, modes: str, minutes: float) -> Step:
    settings = {"models": models, "precisions": precision, "modes": modes, "seconds": "5"}
    return bench(_name("mixed", "", precision, models=models), minutes, "mixed", peers, **settings)


def training(peers: tuple[str, ...], models: str, precision: str, modes: str, minutes: float) -> Step:
    name = _name("training", "224", precision, modes, models=models)
    settings = {"models": models, "sizes": "224", "precisions": precision, "modes": modes, "seconds": "5"}
    return bench(name, minutes, "training", peers, **settings)


def ops(size: str, minutes: float, *, compiled: bool, **settings: str) -> Step:
    """With one op, a step of its own, so that one bad kernel costs one step."""
    name = "-".join(filter(None, ("ops", size, settings.get("ops"), "compile" if compiled else "")))
    return bench(name, minutes, "ops", sizes=size, **settings, **({} if compiled else {"compile": None}))


def _name(task: str, size: str, precision: str, modes: str = "", outputs: str = BOTH, models: str = EVERY_MODEL) -> str:
    """Such as throughput-224-bf16, or throughput-224-bf16-cls-compile-S."""
    last = modes.rpartition(",")[2]
    parts = [task, size, precision, "" if outputs == BOTH else outputs]
    parts += [last if last in ("compile", "reduce-overhead", "max-autotune") else ""]
    return "-".join(filter(None, [*parts, "" if models == EVERY_MODEL else models.replace(",", "")]))


def bench(name: str, minutes: float, module: str, peers: tuple[str, ...] = (), **settings: str | None) -> Step:
    """A benchmark with its options; one that is None is an option to leave out."""
    given = {option: value for option, value in settings.items() if value is not None}
    arguments = [text for option, value in given.items() for text in (f"--{option}", value)]
    arguments += [f"--no-{option}" for option, value in settings.items() if value is None]
    whole = ("-m", f"bench.{module}", "--device", "cuda", *arguments, *peers, "--write", "--resume")
    limit, task = BENCH_LIMIT * minutes, given.get("task", module)
    return Step(name, whole, minutes, limit, told=("results", "commit"), settings=given, task=task)


def pytest_step(name: str, minutes: float, files: list[str], selected: str, *, alone: bool = False) -> Step:
    """Tests on the GPU; those `alone` run one after another.

    Warnings do not fail them: that machine's packages are not those that the project is checked with. A test that takes
    too long ends its process, since nothing else ends a call that waits for the device; pytest-xdist starts another.
    """
    workers = min(8, len(os.sched_getaffinity(0)) // 2)
    parallel = not alone and workers > 1 and records.version("pytest-xdist")
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", "--durations=10"]
    arguments += ["-m", "not aot and not slow", "-k", selected]
    # a kernel that breaks a process ends it, so many may be needed
    arguments += ["-n", str(workers), "--max-worker-restart=200"] if parallel else []
    if records.version("pytest-timeout"):
        arguments += [f"--timeout={TEST_SECONDS}", "--timeout-method=thread"]
    missing = None if records.version("pytest") else "pytest is not installed"
    told = ("junit-xml",)
    return Step(name, (*arguments, *files), minutes, limit=TEST_LIMIT * minutes, told=told, skip=missing)


def sanitizer(
    of: str, tool: str, minutes: float, files: list[str], selected: str, limit: float, possible: bool = True
) -> Step:
    """Tests under a tool of compute-sanitizer, with an allocator that shows it each tensor's end.

    The tests run in one process, and that alone is looked at: not each compiler that Triton starts.
    """
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=TOOLKIT)
    step = pytest_step(f"sanitizer-{of}-{tool}", minutes, files, selected, alone=True)
    missing = step.skip or (None if program else f"compute-sanitizer is neither on PATH nor in {TOOLKIT}")
    missing = missing or (None if possible else "the CUDA extension is not in place")
    options = (f"--tool={tool}", "--error-exitcode=9", "--target-processes=application-only", "--print-limit=20")
    prefix = ("PYTORCH_NO_CUDA_MEMORY_CACHING=1", program or "compute-sanitizer", *options)
    return replace(step, limit=limit, prefix=prefix, skip=missing)


def op_tests() -> list[str]:
    return [f"tests/test_{word}.py" for word in dispatch.names()]


def model_tests() -> list[str]:
    """The other tests that run on the GPU where there is one: those that ask tests/devices.py for the device."""
    others = {"tests/test_on_gpu.py", "tests/test_linear_cuda.py", *op_tests()}
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "tests.devices import" in path.read_text()]
    return [name for path in files if (name := path.relative_to(ROOT).as_posix()) not in others]
