"""`make gpu`: the plan and its order, the budget, what the next run goes on with, and what is left behind."""

from __future__ import annotations

import importlib
import itertools
import json
import random
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import compare, gpu, gpu_plan, records, trace
from bench.gpu import Job, Outcome
from bench.gpu_plan import Step
from dinov2_fast import extension
from dinov2_fast.ops import dispatch

ROOT = Path(gpu.__file__).parents[1]
COMMIT = "c0ffee"


class Fake:
    """A machine whose steps take the time and end as the test says, and as expected otherwise."""

    folder = "fake-gpu"

    def __init__(self, minutes: dict[str, float] | None = None, status: dict[str, int] | None = None) -> None:
        self.minutes, self.status = minutes or {}, status or {}
        self.ran: list[str] = []
        self.commands: list[list[str]] = []
        self.during: Callable[[Path], None] = lambda log: log.write_text("hello\n")
        self.clock = 1000.0

    def now(self) -> float:
        return self.clock

    def run(self, step: Step, command: list[str], log: Path, seconds: float) -> int | None:
        self.ran.append(step.name)
        self.commands.append(command)
        self.during(log)
        needed = 60 * self.minutes.get(step.name, step.minutes)
        self.clock += min(needed, seconds)
        return self.status.get(step.name, 0) if needed <= seconds else None


def _plan(*arguments: str) -> list[Step]:
    return gpu_plan.plan(gpu._parse(["--commit", COMMIT, *arguments]))


def _steps(*names: str, minutes: float = 1.0) -> list[Step]:
    return [Step(name, ("-m", "bench.model", name), minutes) for name in names]


def _job(tmp_path: Path, budget: float = 100.0, commit: str = COMMIT) -> Job:
    return Job(tmp_path / Fake.folder, commit, budget)


def _run(steps: list[Step], machine: Fake, job: Job) -> dict[str, str]:
    """The states of the steps, in the order in which they were come to."""
    return {outcome.step.name: outcome.state for outcome in gpu.run(steps, machine, job, say=lambda text: None)}


def _options(step: Step) -> dict[str, str]:
    return dict(itertools.pairwise(step.arguments))


def _row(**keys: Any) -> dict[str, Any]:
    return dict.fromkeys(records.KEYS) | {"task": "throughput", "commit": COMMIT, "versions": {}} | keys


# The plan


@pytest.fixture
def _complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that lacks nothing: 16 cores, every package, the sanitizer and the extension."""
    monkeypatch.setattr(gpu_plan.shutil, "which", lambda name, path=None: f"/usr/bin/{name}")
    monkeypatch.setattr(gpu_plan.os, "sched_getaffinity", lambda process: set(range(16)))
    monkeypatch.setattr(records, "version", lambda package: "1.0")
    monkeypatch.setattr(gpu_plan.extension, "FILE", Path(__file__))


def test_what_tells_most_comes_first() -> None:
    names = [step.name for step in _plan()]
    wanted = [
        *("smoke", "tests-kernels", "sanitizer-linear-memcheck", "trace-L", "ops-224-linear", "roofline-224"),
        *("throughput-224-bf16-cls-BL", "throughput-224-fp8-cls-BLg", "latency-224-bf16-cls-SB"),
        *("throughput-518-bf16-all-BLS", "throughput-518-fp8-all-BL", "mixed-bf16-BL"),
        "throughput-224-bf16-cls-compile-B",
        *("training-224-bf16-BL", "throughput-1036-bf16-all-BL", "extraction-S", "training-224-bf16-compile-L"),
        *("sanitizer-triton-memcheck", "tests-ops", "tests-model", "tests-large", "memory", "throughput-224-fp32"),
    ]
    assert [name for name in names if name in wanted] == wanted
    assert len(set(names)) == len(names)
    tuning = [i for i, step in enumerate(_plan()) if "max-autotune" in step.settings.get("modes", "")]
    assert tuning == list(range(tuning[0], len(names)))
    for step in _plan():
        if step.task in ("throughput", "latency", "training") and step.settings["precisions"] != "fp32":
            sizes = step.settings["sizes"]
            assert any(name.startswith(f"roofline-{sizes}") for name in names[: names.index(step.name)]), "no floor"


def _asked(step: Step) -> set[tuple[str, ...]]:
    """The settings that a benchmark of models measures: task, size, precision, output, model."""
    asked = {"outputs": "all,cls"} | step.settings
    each = (asked.get(name, "").split(",") for name in ("sizes", "precisions", "outputs", "models"))
    return {(str(step.task), *setting) for setting in itertools.product(*each)} if step.task else set()


@pytest.mark.usefixtures("_complete")
def test_three_calls_of_nine_minutes_answer_every_question(tmp_path: Path) -> None:
    """If each step takes as long as expected."""
    steps, reached = _plan(), []
    for _ in range(3):
        machine = gpu.DryRun("h")
        outcomes = gpu.run(steps, machine, Job(tmp_path, COMMIT, 9.0), say=lambda text: None)
        assert machine.now() <= 9 * 60 - gpu.RESERVE
        reached.append({outcome.step.name for outcome in outcomes if outcome.state in ("done", "done before")})
    first = {step.name for step in steps[: [step.name for step in steps].index("roofline-224")]}
    assert reached[0] >= first
    unproven = {"smoke", "tests-kernels", "sanitizer-linear-memcheck", "trace-L", "ops-224-linear", "ops-224-attention"}
    assert unproven < first
    measured = set().union(*(_asked(step) for step in steps if step.name in reached[2]))
    assert measured >= {("throughput", "224", "bf16", "cls", model) for model in "SBLg"}
    assert measured >= {("throughput", "224", "fp8", "cls", model) for model in "BLg"}
    assert measured >= {("throughput", "518", precision, "all", "L") for precision in ("bf16", "fp8")}
    assert measured >= {("throughput", "1036", "bf16", "all", "L")}
    assert measured >= {("latency", "224", "bf16", "cls", model) for model in "SB"}
    assert measured >= {("training", "224", "bf16", "all", model) for model in "BL"}
    compiled = {f"throughput-224-bf16-cls-compile-{model}" for model in "SBL"}
    assert reached[2] >= {"mixed-bf16-BL", "extraction-S"} | compiled


def test_what_is_compared_is_measured_in_turn() -> None:
    """A step that adds a mode runs the modes of earlier steps for the same setting again."""
    seen: dict[tuple[str, ...], set[str]] = {}
    for step in _plan():
        if "modes" in step.settings:
            modes = set(step.settings["modes"].split(","))
            for asked, batch in itertools.product(_asked(step), step.settings.get("batches", "").split(",")):
                assert seen.setdefault((*asked, batch), set()) <= modes, step.name
                seen[(*asked, batch)] = modes
    assert {"throughput", "latency", "training"} <= {setting[0] for setting in seen}


@pytest.mark.parametrize("arguments", [(), ("--quick",), ("--reference-path", str(ROOT))], ids=str)
def test_every_benchmark_takes_its_options(arguments: tuple[str, ...], tmp_path: Path) -> None:
    steps = [step for step in _plan(*arguments) if step.task]
    for step in steps:
        command = _job(tmp_path).command(step)
        begin = command.index("-m")
        module = importlib.import_module(command[begin + 1])
        options = module._parse(command[begin + 2 :])
        assert (options.device, options.write, options.resume, options.commit) == ("cuda", True, True, COMMIT)
        assert options.results == tmp_path
        assert step.limit == gpu_plan.BENCH_LIMIT * step.minutes
        task = getattr(module, "TASK", None) or options.task
        assert task == step.task
    assert {step.task for step in steps} >= {"roofline", "throughput", "latency"}


def test_other_programs_take_their_options(tmp_path: Path) -> None:
    (step,) = (step for step in _plan() if "bench.trace" in step.arguments)
    command = _job(tmp_path).command(step)
    options = trace._parse(command[command.index("-m") + 2 :])
    assert (options.device, options.results) == ("cuda", tmp_path)
    (step,) = (step for step in _plan() if step.name == "smoke")
    command = _job(tmp_path).command(step)
    assert gpu._parse(command[command.index("-m") + 2 :]).smoke


def test_every_op_and_the_model_are_tested(tmp_path: Path) -> None:
    tests = {step.name: step for step in _plan() if step.name.startswith("tests-")}
    files = {name: {word for word in step.arguments if word.startswith("tests/")} for name, step in tests.items()}
    assert list(tests) == ["tests-kernels", "tests-ops", "tests-model", "tests-large"]
    ops = {f"tests/test_{word}.py" for word in dispatch.names()}
    assert files["tests-ops"] == ops
    assert files["tests-kernels"] == {"tests/test_linear_cuda.py", "tests/test_on_gpu.py"}
    assert "tests/test_kernels_in_the_model.py" in files["tests-model"]
    alone = [files[name] for name in ("tests-kernels", "tests-ops", "tests-model")]
    assert sum(map(len, alone)) == len(set().union(*alone)), "one is run twice"
    for file in set().union(*files.values()):
        assert (ROOT / file).is_file()
    selected = {name: _options(step)["-k"] for name, step in tests.items()}
    assert selected.pop("tests-large") == gpu_plan.LARGE_TESTS
    assert all(f"not {gpu_plan.LARGE_TESTS}" in words for words in selected.values())
    for step in tests.values():
        assert f"--junit-xml={tmp_path}/{Fake.folder}/logs/{step.name}.xml" in _job(tmp_path).command(step), "to count"
        assert "not aot and not slow" in step.arguments
        assert _options(step)["-W"] == "default"


def test_what_is_selected_is_there() -> None:
    """A word of a selection that no test has would select nothing, silently."""
    kernels = (ROOT / "tests/test_linear_cuda.py").read_text()
    assert all(f"def test_{name}" in kernels for name in ("every_form", "fp8_operands", "the_surroundings", "the_tile"))
    assert gpu_plan.ON_THE_CPU in kernels


def test_every_test_that_needs_a_gpu_is_planned() -> None:
    planned = {argument for step in _plan() for argument in step.arguments if argument.startswith("tests/")}
    needing = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"(^@|=\s*)(pytest\.mark\.gpu|on_gpu)\b", path.read_text(), re.MULTILINE)
    }
    assert {"tests/test_attention.py", "tests/test_cuda_graphs.py", "tests/test_extract.py"} < needing
    assert needing <= planned


def test_the_few_tests_are_of_every_op() -> None:
    for file in gpu_plan.op_tests():
        names = [line for line in (ROOT / file).read_text().splitlines() if line.startswith("def test_")]
        assert any("nan" in name and "stay" in name for name in names), file
    assert "nan and stay" in gpu_plan.SMALL_TESTS
    assert gpu_plan.LARGE_TESTS in (ROOT / "tests/test_on_gpu.py").read_text()


def test_kernels_are_compiled_not_interpreted(tmp_path: Path) -> None:
    for step in _plan():
        command = _job(tmp_path).command(step)
        assert command[:5] == ["env", "-u", "TRITON_INTERPRET", "-u", "DINOV2_FAST_BACKEND"]
        assert sys.executable in command
    run = subprocess.run(
        [*gpu.CLEAN, sys.executable, "-c", "import os; print(os.environ.get('TRITON_INTERPRET'))"],
        env={"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == "None\n"


@pytest.mark.usefixtures("_complete")
def test_the_sanitizer_sees_every_tensor_and_the_process_of_the_tests_alone() -> None:
    steps = {step.name: step for step in _plan() if step.name.startswith("sanitizer-")}
    assert {name: step.limit for name, step in steps.items()} == {
        "sanitizer-linear-memcheck": 80 / 60,
        "sanitizer-triton-memcheck": 1.5,
    }
    for step in steps.values():
        assert step.skip is None
        assert step.prefix[:2] == ("PYTORCH_NO_CUDA_MEMORY_CACHING=1", "/usr/bin/compute-sanitizer")
        assert {"--tool=memcheck", "--error-exitcode=9", "--target-processes=application-only"} < set(step.prefix)
        assert "-n" not in step.arguments


@pytest.mark.usefixtures("_complete")
def test_the_sanitizer_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_plan.extension, "FILE", tmp_path / "none")
    skipped = {step.name: step.skip for step in _plan() if step.skip}
    assert skipped == {"sanitizer-linear-memcheck": "the CUDA extension is not in place"}
    built = tmp_path / "fast.abi3.so"
    built.touch()
    assert not any(step.skip for step in _plan("--extension", str(built))), "it is put in place before the first step"
    monkeypatch.setattr(gpu_plan.shutil, "which", lambda name, path=None: None)
    (step,) = (step for step in _plan() if step.name == "sanitizer-triton-memcheck")
    assert step.skip == "compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin"
    monkeypatch.setattr(gpu_plan.shutil, "which", lambda name, path=None: path and f"{path}/{name}")
    (step,) = (step for step in _plan() if step.name == "sanitizer-triton-memcheck")
    assert step.prefix[1] == "/usr/local/cuda/bin/compute-sanitizer"


@pytest.mark.usefixtures("_complete")
def test_tests_run_in_parallel_where_that_is_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _options(gpu_plan.pytest_step("a", 1.0, [], "x"))["-n"] == "8"
    assert "-n" not in gpu_plan.pytest_step("a", 1.0, [], "x", alone=True).arguments
    assert "-n" not in next(step for step in _plan() if step.name == "tests-large").arguments
    monkeypatch.setattr(records, "version", lambda package: None if package == "pytest-xdist" else "1.0")
    assert "-n" not in gpu_plan.pytest_step("a", 1.0, [], "x").arguments
    monkeypatch.setattr(records, "version", lambda package: None)
    assert gpu_plan.pytest_step("a", 1.0, [], "x").skip == "pytest is not installed"


@pytest.mark.usefixtures("_complete")
def test_a_test_that_hangs_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    step = gpu_plan.pytest_step("a", 1.5, [], "x")
    assert step.limit == 1.5 * gpu_plan.TEST_LIMIT < float("inf")
    assert {f"--timeout={gpu_plan.TEST_SECONDS}", "--timeout-method=thread"} < set(step.arguments)
    monkeypatch.setattr(records, "version", lambda package: None if package == "pytest-timeout" else "1.0")
    assert not any("timeout" in argument for argument in gpu_plan.pytest_step("a", 1.0, [], "x").arguments)


def test_every_step_has_a_limit() -> None:
    for step in [*_plan(), *_plan("--quick")]:
        assert step.minutes < step.limit <= max(1.0, 3 * step.minutes), step.name


def test_quick_is_small() -> None:
    steps = _plan("--quick")
    options = gpu._parse(["--quick", "--commit", COMMIT])
    assert sum(step.minutes for step in steps) + gpu.RESERVE / 60 <= options.budget < 3
    for step in steps:
        if step.task:
            assert (step.settings["models"], step.settings["sizes"]) == ("S,B", "224")
        assert not {"compile", "max-autotune", "reduce-overhead"} & {*step.settings.get("modes", "").split(",")}
    assert {step.task for step in steps} == {None, "roofline", "throughput", "latency"}


# Running it


def test_the_budget_is_kept_and_what_does_not_fit_is_left_out(tmp_path: Path) -> None:
    steps = [*_steps("a", "b"), *_steps("long", minutes=9), *_steps("c"), *_steps("d", minutes=1)]
    machine = Fake(minutes={"b": 0.5})
    begin = machine.now()
    # 2.5 minutes are left before "long", which would take 9; c takes one, and d is given what is left
    states = _run(steps, machine, _job(tmp_path, budget=4.0 + gpu.RESERVE / 60 - 0.4))
    assert states == {"a": "done", "b": "done", "long": "left out", "c": "done", "d": "done"}
    assert machine.ran == ["a", "b", "c", "d"]
    machine = Fake(minutes={"a": 9})
    begin = machine.now()
    states = _run(_steps("a", "b"), machine, _job(tmp_path / "again", budget=4.0))
    assert states == {"a": "cut off", "b": "left out"}
    assert machine.now() - begin == 60 * 4.0 - gpu.RESERVE


def test_a_step_has_a_limit_of_its_own_and_one_that_reaches_it_has_failed(tmp_path: Path) -> None:
    steps = [Step("hangs", ("x",), 1.0, limit=1.5), *_steps("good", "late")]
    machine = Fake(minutes={"hangs": 500})
    begin = machine.now()
    outcomes = gpu.run(steps, machine, _job(tmp_path, budget=2.5 + gpu.RESERVE / 60), say=lambda text: None)
    assert [outcome.state for outcome in outcomes] == ["failed", "done", "left out"]
    assert outcomes[0].note == "stopped at its limit of 90 s"
    assert machine.now() - begin == 90 + 60
    assert [line["returncode"] for line in records.read(_job(tmp_path).folder / "steps.jsonl")] == [gpu.STOPPED, 0]
    machine = Fake(minutes={"hangs": 500})
    _run(steps, machine, _job(tmp_path))
    assert machine.ran == ["late", "hangs"], "what hangs must not come first for ever"


def test_a_limit_that_is_not_reached_is_no_failure(tmp_path: Path) -> None:
    """The budget ends it before."""
    machine = Fake(minutes={"slow": 500})
    steps = [Step("slow", ("x",), 1.0, limit=1.5)]
    assert _run(steps, machine, _job(tmp_path, budget=1.2 + gpu.RESERVE / 60)) == {"slow": "cut off"}
    assert machine.clock == pytest.approx(1000 + 72)


def test_a_benchmark_that_lost_the_device_goes_on_in_a_new_process(tmp_path: Path) -> None:
    class Losing(Fake):
        def run(self, step: Step, command: list[str], log: Path, seconds: float) -> int | None:
            return super().run(step, command, log, seconds) or (records.AGAIN if self.ran.count("a") < 3 else 0)

    machine = Losing()
    assert _run(_steps("a", "b"), machine, _job(tmp_path)) == {"a": "done", "b": "done"}
    assert machine.ran == ["a", "a", "a", "b"]
    machine = Losing()
    assert _run(_steps("a", "b"), machine, _job(tmp_path / "short", budget=2 + gpu.RESERVE / 60))["a"] == "cut off"
    assert machine.ran == ["a", "a"]


def test_a_third_of_the_time_is_enough_to_begin(tmp_path: Path) -> None:
    reserve = gpu.RESERVE / 60
    for index, (left, state) in enumerate([(1.1, "cut off"), (0.9, "left out")]):
        states = _run(_steps("a", minutes=3), Fake(), _job(tmp_path / str(index), budget=left + reserve))
        assert states == {"a": state}


def test_the_next_run_goes_on_where_this_one_stopped(tmp_path: Path) -> None:
    steps = _steps("broken", "good", "slow", "late", "later")
    machine = Fake(minutes={"slow": 9.0}, status={"broken": 1})
    states = _run(steps, machine, _job(tmp_path, budget=4.0))
    assert states == {"broken": "failed", "good": "done", "slow": "cut off", "late": "left out", "later": "left out"}

    machine = Fake()
    states = _run(steps, machine, _job(tmp_path))
    assert machine.ran == ["slow", "late", "later", "broken"], "what was cut off in its place, what failed last"
    assert states["good"] == "done before"
    machine = Fake()
    assert set(_run(steps, machine, _job(tmp_path)).values()) == {"done before"}
    assert machine.ran == []


def test_another_commit_and_other_arguments_are_run_anew(tmp_path: Path) -> None:
    _run(_steps("a", "b"), Fake(), _job(tmp_path))
    machine = Fake()
    _run(_steps("a", "b"), machine, _job(tmp_path, commit="beef"))
    assert machine.ran == ["a", "b"]
    changed = [Step("a", ("-m", "bench.model", "--models", "g"), 1.0), *_steps("b")]
    machine = Fake()
    _run(changed, machine, _job(tmp_path))
    assert machine.ran == ["a"]


def test_a_line_for_each_step_with_the_tests_it_counted(tmp_path: Path) -> None:
    def during(log: Path) -> None:
        suite = '<testsuite tests="9" failures="2" errors="1" skipped="4"/>'
        log.with_suffix(".xml").write_text(f"<testsuites>{suite}</testsuites>")

    machine, job = Fake(status={"a": 1}), _job(tmp_path)
    machine.during = during
    (outcome,) = gpu.run(_steps("a"), machine, job, say=lambda text: None)
    assert outcome.note == "2 passed, 3 failed, 4 skipped"
    (line,) = records.read(job.folder / "steps.jsonl")
    wanted = {"step": "a", "commit": COMMIT, "returncode": 1, "seconds": 60.0, "passed": 2, "failed": 3, "skipped": 4}
    assert line | wanted == line
    machine.during = lambda log: log.with_suffix(".xml").write_text("<testsuites><test")  # it was killed meanwhile
    machine.minutes = {"a": 1000}
    gpu.run(_steps("a"), machine, job, say=lambda text: None)
    line = records.read(job.folder / "steps.jsonl")[-1]
    assert (line["returncode"], line["passed"]) == (None, None)


def test_an_interruption_ends_the_run_and_is_no_success(tmp_path: Path) -> None:
    def during(log: Path) -> None:
        if log.stem == "b":
            raise KeyboardInterrupt

    machine, job = Fake(), _job(tmp_path)
    machine.during = during
    assert _run(_steps("a", "b", "c"), machine, job) == {"a": "done", "b": "cut off", "c": "left out"}
    machine = Fake()
    _run(_steps("a", "b", "c"), machine, job)
    assert machine.ran == ["b", "c"]


def test_the_end_of_a_failed_log_is_shown_and_a_long_one_loses_its_middle(tmp_path: Path) -> None:
    machine, said = Fake(status={"a": 1}), []
    machine.during = lambda log: log.write_bytes(b"begin\n" + b"x" * (gpu.LOG_BYTES + 5) + b"\nthe reason\n")
    gpu.run(_steps("a"), machine, _job(tmp_path), say=said.append)
    assert "  | the reason" in said[-1]
    machine, shown = Fake(), [Step("smoke", ("x",), 1.0, shown=True)]
    machine.during = lambda log: log.write_text("loaded\n")
    gpu.run(shown, machine, _job(tmp_path), say=said.append)
    assert said[-1] == "  | loaded", "what matters is shown of a step that succeeds, too"
    log = _job(tmp_path).log(_steps("a")[0]).read_bytes()
    assert log.startswith(b"begin\n")
    assert log.endswith(b"the reason\n")
    assert b"bytes left out" in log
    assert len(log) < gpu.LOG_BYTES + 100


# This machine


@pytest.fixture
def this(monkeypatch: pytest.MonkeyPatch) -> gpu.Gpu:
    monkeypatch.setattr(records, "device_folder", lambda device: Fake.folder)
    return gpu.Gpu()


def test_a_step_is_stopped_with_everything_it_started(
    this: gpu.Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    parent = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid, flush=True)"
    )
    command = [sys.executable, "-c", f"{parent}; p.wait()"]
    log = tmp_path / "a.log"
    begin = time.monotonic()
    assert this.run(_steps("a")[0], command, log, 2.0) is None
    assert time.monotonic() - begin < 20
    _, *printed = log.read_text().splitlines()
    number = next(line for line in printed if line.isdecimal())
    assert "up" in printed
    stat = Path("/proc", number, "stat")
    for _ in range(50):
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("a process of the step is still there")


def test_pytest_is_counted_and_its_status_is_kept(this: gpu.Gpu, tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pytest.skip('why')\n"
    )
    arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", str(tmp_path / "test_some.py"))
    steps = [Step("some", arguments, 1.0, told=("junit-xml",))]
    (outcome,) = gpu.run(steps, this, _job(tmp_path), say=lambda text: None)
    assert (outcome.state, outcome.note) == ("failed", "1 passed, 1 failed, 1 skipped")
    assert "1 failed" in _job(tmp_path).log(outcome.step).read_text()
    assert not list(_job(tmp_path).folder.rglob("*.xml"))


def test_no_gpu_is_said_with_what_works_without(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--commit", COMMIT]) == 2
    assert "There is no GPU that torch can use here. DRY_RUN=1" in capsys.readouterr().err


def test_an_extension_is_put_into_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--commit", COMMIT, "--extension", str(tmp_path / "none.abi3.so")])
    assert "none.abi3.so does not exist" in capsys.readouterr().err
    built = tmp_path / "fast.abi3.so"
    built.write_bytes(b"code")
    (tmp_path / "dinov2_fast").mkdir()
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "plan", lambda options: [])
    monkeypatch.setattr(gpu, "Gpu", Fake)
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu.main(["--commit", COMMIT, "--extension", str(built), "--results", str(tmp_path)]) == 0
    there = tmp_path / "dinov2_fast" / "_cuda.abi3.so"
    assert there.read_bytes() == b"code"
    for same in (there, tmp_path / "dinov2_fast" / ".." / "dinov2_fast" / there.name):
        assert gpu.main(["--commit", COMMIT, "--extension", str(same), "--results", str(tmp_path)]) == 0
    assert there.read_bytes() == b"code"


@pytest.mark.parametrize(
    ("there", "reason", "status"), [(True, None, 0), (True, "undefined symbol: x", 1), (False, "not built", 0)]
)
def test_the_first_step_says_whether_the_extension_loads(
    there: bool, reason: str | None, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    file = tmp_path / "_cuda.abi3.so"
    if there:
        file.touch()
    monkeypatch.setattr(gpu.extension, "FILE", file)
    monkeypatch.setattr(gpu.extension, "load", lambda: extension.Extension(file, reason))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert gpu.main(["--smoke"]) == status
    printed = capsys.readouterr().out
    assert "a GPU, torch" in printed
    assert f"CUDA extension: {f'not available ({reason})' if reason else f'loaded {file}'}" in printed
    assert ("are skipped" in printed) == bool(reason)


def test_the_help_says_how_to_use_a_machine_that_forgets(capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        gpu.main(["--help"])
    printed = capsys.readouterr().out
    assert "cp bench/results/*.tar.gz" in printed
    assert "tar -xzf <device>.tar.gz -C bench/results" in printed


def test_without_git_the_commit_must_be_given(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def no_git() -> str:
        raise FileNotFoundError("git")

    monkeypatch.setattr(records, "_commit", no_git)
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--dry-run"])
    assert "COMMIT=<sha>" in capsys.readouterr().err


def test_make_passes_everything_on() -> None:
    given = ["RESULTS=r", "COMMIT=c", "BUDGET=3", "EXTENSION=e.so", "REFERENCE=f", "QUICK=1", "DRY_RUN=1"]
    make = ["env", "-u", "MAKEFLAGS", "make", "--no-print-directory", "-n", "gpu", "PYTHON=python7"]
    plain, whole = (
        subprocess.run([*make, *variables], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for variables in ([], given)
    )
    assert plain.replace("\\\n", "").split() == ["python7", "-m", "bench.gpu"]
    wanted = "-m bench.gpu --results 'r' --commit 'c' --budget '3' --extension 'e.so' --reference-path 'f'"
    assert whole.replace("\\\n", "").split() == ["python7", *wanted.split(), "--quick", "--dry-run"]


# The dry run


@pytest.fixture
def _untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a GPU nor a process may be asked for."""

    def forbidden(*_: Any, **__: Any) -> Any:
        pytest.fail("a dry run touches nothing")

    for name in ("is_available", "get_device_name", "init"):
        monkeypatch.setattr(torch.cuda, name, forbidden)
    monkeypatch.setattr(subprocess, "Popen", forbidden)


@pytest.mark.usefixtures("_untouched")
def test_a_dry_run_shows_the_plan_and_writes_nothing(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "nvidia-h200"
    common = {"model": "dinov2_vitb14", "resolution": 224, "precision": "bf16"}
    measured = [("eager", "cls"), ("graphs", "cls"), ("eager", "all")]
    rows = [_row(**common, mode=mode, output=output) for mode, output in measured]
    records.write(folder / "throughput.jsonl", rows)
    steps = [step for step in _plan() if step.name in ("tests-kernels", "trace-L")]
    lines = [
        {"step": step.name, "arguments": step.key, "commit": COMMIT, "returncode": status}
        for step, status in zip(steps, (0, 1), strict=True)
    ]
    (folder / "steps.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    assert gpu.main(["--dry-run", "--commit", COMMIT, "--results", str(tmp_path), "--budget", "12"]) == 0
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    printed = capsys.readouterr().out
    assert "tests-kernels: about 3 minutes, done before" in printed
    assert printed.index("smoke:") < printed.index("ops-224-linear:") < printed.index("throughput-518-bf16:")
    assert printed.rindex("trace-L:") > printed.index("latency-518-bf16-max-autotune-g:"), "it failed: last"
    assert "throughput-224-bf16-cls-BL: about 1.2 minutes, would run (1 rows are there)" in printed
    assert "python -m bench.model --device cuda --task throughput --models B,L --sizes 224 --outputs cls" in printed
    would_run = printed.count(", would run") + printed.count(", would be cut off")
    *_, counted, left_out = printed.splitlines()
    assert counted.startswith(f"{would_run} of {len(_plan())} steps would run, in ")
    assert left_out.startswith("Left out under the budget: ")
    assert "throughput-1036-fp32" in left_out
    assert "throughput-224-bf16-cls-BL," not in left_out


# What is left behind


def test_the_summary_comes_last_and_says_what_was_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    values = {"dinov2_fast": 300.0, "timm": 200.0, "transformers": 250.0}
    folder = tmp_path / Fake.folder
    common = {"model": "dinov2_vits14", "resolution": 224, "batch": 256, "output": "all", "unit": "images/s"}
    rows = [_row(**common, implementation=i, precision="bf16", mode="eager", value=v) for i, v in values.items()]
    rows.append(_row(**common, implementation="dinov2_fast", precision="bf16", mode="triton", value=None))
    rows.append(_row(**common, implementation="dinov2_fast", precision="fp8", mode="engine-cuda", value=500.0))
    rows.append(_row(**common, implementation="timm", precision="autocast-bf16", mode="eager", value=499.0))
    rows += [row | {"value": 9e9, "commit": "old"} for row in rows]
    records.write(folder / "throughput.jsonl", rows)
    once = common | {"task": "latency", "batch": 1, "precision": "bf16", "unit": "ms"}
    for name, value in {"dinov2_fast": 2.0, "timm": 3.0}.items():
        records.write(folder / "latency.jsonl", [_row(**once, implementation=name, mode="graphs", value=value)])
    options = gpu._parse(["--results", str(tmp_path), "--commit", COMMIT, "--budget", "2.5"])
    steps = _steps("a", "b", "c", "d")
    assert gpu.carry_out(steps, Fake(), options) == 3
    printed = capsys.readouterr().out
    lines = {tuple(line.split()) for line in printed.splitlines()}
    start, peer = ("throughput", "dinov2_vits14", "224", "px,", "all,", "256,"), ("250.0/s", "transformers", "eager")
    assert (*start, "bf16", "300.0/s", "eager", *peer, "1.200") in lines
    assert (*start, "fp8", "500.0/s", "engine-cuda", *peer, "2.000") in lines, "beside the best peer in bf16"
    latency = ("latency", *start[1:5], "1,", "bf16", "2.000", "ms", "graphs", "3.000", "ms", "timm", "graphs", "1.500")
    assert latency in lines, "less is more"
    assert "9000000000" not in printed
    assert "left out (2, about 2 minutes): c, d\n" in printed
    assert printed.splitlines()[-1] == f"{folder} and {Fake.folder}.tar.gz"
    with tarfile.open(tmp_path / f"{Fake.folder}.tar.gz") as tar:
        names = [name.removeprefix(f"{Fake.folder}/") for name in tar.getnames()]
    assert sorted(names) == ["latency.jsonl", "logs/a.log", "logs/b.log", "steps.jsonl", "throughput.jsonl"]


@pytest.mark.parametrize(
    ("states", "status"),
    [
        ([("done", ""), ("done before", ""), ("skipped", "no such tool")], 0),
        ([("done", ""), ("failed", ""), ("left out", "")], 1),
        ([("done", ""), ("cut off", "")], 3),
        ([("done", ""), ("left out", "")], 3),
        ([("left out", "cut off before")], 3),
        ([("left out", "failed before")], 1),
    ],
    ids=str,
)
def test_the_exit_status(states: list[tuple[str, str]], status: int, tmp_path: Path) -> None:
    outcomes = [Outcome(step, state, note=note) for step, (state, note) in zip(_steps(*"abc"), states, strict=False)]
    assert gpu.summary(outcomes, _job(tmp_path)) == status


@pytest.mark.parametrize(("reason", "status"), [("refused: off", 1), ("timm is not installed", 0)])
def test_a_refused_row_is_no_success_even_when_it_is_there_already(reason: str, status: int, tmp_path: Path) -> None:
    job = _job(tmp_path)
    records.write(job.folder / "training.jsonl", [_row(task="training") | records.not_measured(reason)])
    assert gpu.summary([Outcome(_steps("a")[0], "done before")], job) == status


def test_the_archive_stays_below_its_limit_and_says_what_it_cost(tmp_path: Path) -> None:
    folder = tmp_path / "fake-gpu"
    (folder / "logs").mkdir(parents=True)
    noise = random.Random(0)
    for name in ("a", "b"):
        (folder / "logs" / f"{name}.log").write_bytes(b"begin" + noise.randbytes(100_000) + b"end")
    (folder / "steps.jsonl").write_bytes(b"{}\n")
    (folder / "plot.png").write_bytes(noise.randbytes(9_000))
    (folder / "throughput.jsonl").write_bytes(noise.randbytes(2_000))
    archive = tmp_path / "fake-gpu.tar.gz"

    def packed(limit: int) -> tuple[list[str], dict[str, bytes]]:
        said = gpu.pack(folder, limit)
        assert archive.stat().st_size < limit
        with tarfile.open(archive) as tar:
            return said, {member.name: tar.extractfile(member).read() for member in tar.getmembers()}

    said, files = packed(1 << 20)
    assert said == []
    assert len(files["fake-gpu/logs/a.log"]) == 100_008
    said, files = packed(50_000)
    assert said == ["logs were cut to 16384 bytes each"]
    assert files["fake-gpu/logs/b.log"].startswith(b"begin")
    assert files["fake-gpu/logs/b.log"].endswith(b"end")
    assert len(files["fake-gpu/throughput.jsonl"]) == 2_000
    said, files = packed(8_000)
    assert said == ["logs were cut to 1024 bytes each", "plot.png was left out"]
    assert "fake-gpu/throughput.jsonl" in files


def test_a_machine_that_forgets_goes_on_from_the_archive(tmp_path: Path) -> None:
    steps = _steps("a", "b", "c")
    there, next_call = tmp_path / "there", tmp_path / "next"
    gpu.run(steps, Fake(), Job(there / Fake.folder, COMMIT, 2.0 + gpu.RESERVE / 60), say=lambda text: None)
    row = _row(model="dinov2_vits14", value=1.0)
    records.write(there / Fake.folder / "throughput.jsonl", [row])
    assert gpu.pack(there / Fake.folder) == []
    with tarfile.open(there / f"{Fake.folder}.tar.gz") as tar:
        tar.extractall(next_call, filter="data")
    machine, job = Fake(), Job(next_call / Fake.folder, COMMIT, 9.0)
    assert _run(steps, machine, job) == {"a": "done before", "b": "done before", "c": "done"}
    assert job.rows() == [row]
    assert (next_call / Fake.folder / "logs" / "a.log").is_file()


def test_the_report_is_made_of_bench_results_only_and_may_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    machine, job = Fake(status={"report": 1}), _job(tmp_path)
    (job.folder / "logs").mkdir(parents=True)
    gpu.report(machine, job)
    assert machine.ran == []
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    gpu.report(machine, job)
    assert machine.commands == [[sys.executable, "-m", "bench.report"]]
    assert "bench.report did not succeed" in capsys.readouterr().out


def test_what_ran_is_not_compared_as_a_result(tmp_path: Path) -> None:
    job = _job(tmp_path)
    _run(_steps("a"), Fake(), job)
    row = _row(model="dinov2_vits14", value=1.0, unit="images/s", date="2026-01-01")
    records.write(job.folder / "throughput.jsonl", [row])
    assert list(compare.load(str(job.folder)).values()) == [row]
