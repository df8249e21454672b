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

from bench import compare, gpu, gpu_plan, records
from bench.gpu import Job, Outcome
from bench.gpu_plan import Step
from dinov2_fast import backends

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


def test_what_tells_most_comes_first() -> None:
    names = [step.name for step in _plan()]
    first = [next(i for i, name in enumerate(names) if name.startswith(start)) for start in (
        "tests-", "sanitizer", "roofline-224", "throughput-224-bf16", "throughput-518-bf16", "throughput-1036-bf16",
        "latency-", "training", "ops-", "throughput-224-bf16-compile", "memory", "extraction",
    )]  # fmt: skip
    assert first == sorted(first)
    assert not any(name.startswith("tests") for name in names[names.index("sanitizer") :])
    compiling = [i for i, step in enumerate(_plan()) if "compile" in step.settings.get("modes", "")]
    assert min(compiling) > names.index("ops-1036")
    tuning = [i for i, step in enumerate(_plan()) if "max-autotune" in step.settings.get("modes", "")]
    assert tuning == list(range(tuning[0], len(names)))
    for size in gpu_plan.PIXELS:
        places = [names.index(f"throughput-{size}-{precision}") for precision in ("bf16", "autocast-bf16", "fp32")]
        assert places == sorted(places)
    assert names.index("roofline-fp32") < names.index("throughput-224-fp32")
    assert len(set(names)) == len(names)


def test_what_is_compared_is_measured_in_turn() -> None:
    """A step that adds a mode runs the modes of earlier steps for the same setting again."""
    seen: dict[tuple[str, ...], set[str]] = {}
    for step in _plan():
        asked = step.settings
        if "modes" in asked:
            batches = asked.get("batches", "").split(",")
            for model, batch in itertools.product(asked["models"].split(","), batches):
                setting = (str(step.task), asked.get("sizes", "224"), asked["precisions"], model, batch)
                modes = set(asked["modes"].split(","))
                assert seen.setdefault(setting, set()) <= modes, step.name
                seen[setting] = modes
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
        task = getattr(module, "TASK", None) or options.task
        assert task == step.task
    assert {step.task for step in steps} >= {"roofline", "throughput", "latency"}


def test_every_op_and_the_model_are_tested_once() -> None:
    tests = [step for step in _plan() if step.name.startswith("tests-") and step.name != "tests-large"]
    files = [argument for step in tests for argument in step.arguments if argument.startswith("tests/")]
    assert len(set(files)) == len(files)
    assert {f"tests/test_{word}.py" for word in backends.words()} < set(files)
    assert {"tests/test_on_gpu.py", "tests/test_kernels_in_the_model.py"} < set(files)
    for file in files:
        assert (ROOT / file).is_file()
    for step in tests:
        assert _options(step)["-k"] == f"not {gpu_plan.LARGE_TESTS}"
        assert "-m" in step.arguments
        assert "not aot" in step.arguments


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


def test_the_sanitizer_sees_every_tensor_and_says_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_plan.shutil, "which", lambda name: None)
    assert gpu_plan.sanitizer().skip == "compute-sanitizer is not on PATH"
    monkeypatch.setattr(gpu_plan.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(gpu_plan.os, "sched_getaffinity", lambda process: set(range(16)))
    monkeypatch.setattr(records, "version", lambda package: "1.0")
    step = gpu_plan.sanitizer()
    assert (step.skip, step.limit) == (None, 1.5)
    assert step.prefix[0] == "PYTORCH_NO_CUDA_MEMORY_CACHING=1"
    assert any(argument.startswith("--error-exitcode=") for argument in step.prefix)
    assert "-n" not in step.arguments


def test_tests_run_in_parallel_where_that_is_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_plan.os, "sched_getaffinity", lambda process: set(range(16)))
    monkeypatch.setattr(records, "version", lambda package: "1.0")
    assert _options(gpu_plan.pytest_step("a", 1.0, [], "x"))["-n"] == "8"
    assert "-n" not in gpu_plan.pytest_step("a", 1.0, [], "x", alone=True).arguments
    assert "-n" not in next(step for step in _plan() if step.name == "tests-large").arguments
    monkeypatch.setattr(records, "version", lambda package: None if package == "pytest-xdist" else "1.0")
    assert "-n" not in gpu_plan.pytest_step("a", 1.0, [], "x").arguments
    monkeypatch.setattr(records, "version", lambda package: None)
    assert gpu_plan.pytest_step("a", 1.0, [], "x").skip == "pytest is not installed"


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


def test_a_step_has_a_limit_of_its_own(tmp_path: Path) -> None:
    machine = Fake(minutes={"slow": 5})
    begin = machine.now()
    assert _run([Step("slow", ("x",), 1.0, limit=1.5)], machine, _job(tmp_path)) == {"slow": "cut off"}
    assert machine.now() - begin == 90


def test_a_third_of_the_time_is_enough_to_begin(tmp_path: Path) -> None:
    reserve = gpu.RESERVE / 60
    for index, (left, state) in enumerate([(1.1, "cut off"), (0.9, "left out")]):
        states = _run(_steps("a", minutes=3), Fake(), _job(tmp_path / str(index), budget=left + reserve))
        assert states == {"a": state}


def test_the_next_run_goes_on_where_this_one_stopped(tmp_path: Path) -> None:
    steps = _steps("broken", "slow", "good", "late", "later")
    machine = Fake(minutes={"slow": 2.0}, status={"broken": 1})
    limited = [Step(s.name, s.arguments, s.minutes, limit=1.5) if s.name == "slow" else s for s in steps]
    states = _run(limited, machine, _job(tmp_path, budget=4.0))
    assert states == {"broken": "failed", "slow": "cut off", "good": "done", "late": "left out", "later": "left out"}

    machine = Fake(minutes={"slow": 0.5})
    states = _run(limited, machine, _job(tmp_path))
    assert machine.ran == ["late", "later", "broken", "slow"], "not tried first, then what failed or was cut off"
    assert states["good"] == "done before"
    machine = Fake()
    assert set(_run(limited, machine, _job(tmp_path)).values()) == {"done before"}
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
    assert machine.ran == ["c", "b"]


def test_the_end_of_a_failed_log_is_shown_and_a_long_one_loses_its_middle(tmp_path: Path) -> None:
    machine, said = Fake(status={"a": 1}), []
    machine.during = lambda log: log.write_bytes(b"begin\n" + b"x" * (gpu.LOG_BYTES + 5) + b"\nthe reason\n")
    gpu.run(_steps("a"), machine, _job(tmp_path), say=said.append)
    assert "  | the reason" in said[-1]
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
    (outcome,) = gpu.run([Step("some", arguments, 1.0)], this, _job(tmp_path), say=lambda text: None)
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
    assert (tmp_path / "dinov2_fast" / "_cuda.abi3.so").read_bytes() == b"code"


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
    rows = [_row(model="dinov2_vits14", resolution=224, precision="bf16", mode=mode) for mode in ("eager", "graphs")]
    records.write(folder / "throughput.jsonl", rows)
    steps = [step for step in _plan() if step.name in ("tests-linear", "tests-residual")]
    lines = [
        {"step": step.name, "arguments": step.key, "commit": COMMIT, "returncode": status}
        for step, status in zip(steps, (0, 1), strict=True)
    ]
    (folder / "steps.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    assert gpu.main(["--dry-run", "--commit", COMMIT, "--results", str(tmp_path), "--budget", "12"]) == 0
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    printed = capsys.readouterr().out
    assert "tests-linear: about 1 minutes, done before" in printed
    assert printed.index("tests-attention:") < printed.index("sanitizer:") < printed.index("throughput-518-bf16:")
    assert printed.rindex("tests-residual:") > printed.index("latency-518-bf16-max-autotune-g:"), "it failed: last"
    assert "throughput-224-bf16: about 1.5 minutes, would run (1 rows are there)" in printed
    assert "python -m bench.model --device cuda --task throughput --models S,B,L,g --sizes 224" in printed
    would_run = printed.count(", would run") + printed.count(", would be cut off")
    *_, counted, left_out = printed.splitlines()
    assert counted.startswith(f"{would_run} of {len(_plan())} steps would run, in ")
    assert left_out.startswith("Left out under the budget: ")
    assert "throughput-1036-fp32" in left_out
    assert "throughput-224-bf16," not in left_out


# What is left behind


def test_the_summary_comes_last_and_says_what_was_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    values = {"dinov2_fast": 300.0, "timm": 200.0, "transformers": 250.0}
    folder = tmp_path / Fake.folder
    common = {"model": "dinov2_vits14", "resolution": 224, "batch": 256, "output": "all", "precision": "bf16"}
    rows = [_row(**common, implementation=name, mode="eager", value=value) for name, value in values.items()]
    rows.append(_row(**common, implementation="dinov2_fast", mode="triton", value=None))
    rows += [row | {"value": 9e9, "commit": "old"} for row in rows]
    records.write(folder / "throughput.jsonl", rows)
    options = gpu._parse(["--results", str(tmp_path), "--commit", COMMIT, "--budget", "2.5"])
    steps = _steps("a", "b", "c", "d")
    assert gpu.carry_out(steps, Fake(), options) == 3
    printed = capsys.readouterr().out
    assert f"{'300.0 eager':>20} {'250.0 transformers eager':>34}  1.200" in printed
    assert "9000000000" not in printed
    assert "left out (2, about 2 minutes): c, d\n" in printed
    assert printed.splitlines()[-1] == f"{folder} and {Fake.folder}.tar.gz"
    with tarfile.open(tmp_path / f"{Fake.folder}.tar.gz") as tar:
        names = [name.removeprefix(f"{Fake.folder}/") for name in tar.getnames()]
    assert sorted(names) == ["logs/a.log", "logs/b.log", "steps.jsonl", "throughput.jsonl"]


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
