"""`make gpu`: its plan, what is compiled ahead of time, and steps that hang, crash, or lose the device."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_plan, gpu_steps, harness, modes, records, warm
from bench.gpu_plan import PLAN, PLANS, PRETRAINING, ROOT, GpuRun, Step
from bench.peers import OURS, load_ours
from dinov2_fast.ops.dispatch import use_backend
from tests.helpers.aot import compiling

COMMIT = "c0ffee"
STEP = {step.name: step for step in PLAN}
on_cpu_and_gpu = pytest.mark.parametrize("tiny", [False, True], ids=["gpu", "tiny"])


def test_the_headlines_are_in_the_first_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--dry-run", "--budget", "8.7", "--commit", COMMIT, "--results", str(tmp_path)]) == 0
    listed, _, left_out = capsys.readouterr().out.partition("\nleft out: ")
    rows = dict(re.findall(r"^(\S+) +[\d.]+ +([\d.]+)", listed, re.MULTILINE))
    assert [*rows] == [step.name for step in PLAN[: len(rows)]], "in the order of the plan"
    assert {"smoke", "warm", "tests", "peers", "ops", "model-224", "model-518", "latency", "training"} <= rows.keys()
    assert max(map(float, rows.values())) <= 8.7 - gpu_plan.RESERVE_SECONDS / 60
    for name in ("model-224", "model-518"):
        arguments = dict(zip(STEP[name].command.split(), STEP[name].command.split()[1:], strict=False))
        assert arguments["--precisions"] == "bf16,fp8"
        assert {"eager", "compile", "engine", "engine-best", "engine-best-graphs"} == {*arguments["--modes"].split(",")}
    assert not set(rows) & set(re.findall(r"[\w-]+(?= \()", left_out))
    assert "tests-others" in left_out


@on_cpu_and_gpu
def test_the_command_of_every_step_is_valid(tiny: bool, tmp_path: Path) -> None:
    gpu_run = GpuRun(tmp_path / "device", COMMIT, tiny=tiny)
    for step in itertools.chain(*PLANS.values()):
        module, *arguments = gpu_run.command(step, PLAN)
        if module.startswith("bench.") and module not in ("bench.gpu", "bench.warm"):
            options = import_module(module)._parse(arguments)
            assert (options.device, options.write, options.resume) == ("cpu" if tiny else "cuda", True, True), step.name
            assert (options.commit, options.results) == (COMMIT, tmp_path)
            assert not tiny or {config.name for config in options.models} == {"tiny"}
            assert not tiny or not [
                mode for mode in getattr(options, "modes", ()) if "graphs" in mode or mode == "triton"
            ]
        elif module == "pytest":
            assert all((ROOT / argument).is_file() for argument in arguments if argument.startswith("tests/"))
            assert ("--collect-only" in arguments) == tiny


def test_pretraining_runs_when_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dry-run", "--commit", COMMIT, "--results", str(tmp_path)]
    assert gpu.main(arguments) == 0
    assert "bench.pretraining" not in capsys.readouterr().out
    assert gpu.main([*arguments, "--task", "pretraining", "--reference-path", "a b"]) == 0
    listed, _, left_out = capsys.readouterr().out.partition("\nleft out: ")
    assert re.findall(r"^(\S+) +[\d.]+ +[\d.]+ ", listed, re.MULTILINE) == [step.name for step in PRETRAINING]
    assert left_out == "nothing\n", "it fits into one call"
    assert listed.count("--reference-path 'a b'") == len(PRETRAINING) - 1


def test_the_first_gpu_tests_cover_races_graphs_and_large_products() -> None:
    """The mark selects races, graphs and large products of what the engine runs."""
    arguments = GpuRun(Path(), COMMIT).command(STEP["tests"])
    command = [sys.executable, "-m", *arguments, "--collect-only", "-qq", "-n", "0"]
    collected = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in ("linear.gelu", "linear.residual e4m3", "attention", "layer_norm.plain e4m3", "attention_pool"):
        assert f"device_is_busy[{name}-False-triton]" in collected
        assert f"replayed_on_new_data[{name}-False-triton]" in collected
    assert "-True-" not in collected, "training comes later"
    tests = re.findall(r"::(test_\w+)", collected)
    assert {"test_large_products_obey_the_rule", "test_e4m3_saturates_and_keeps_nan"} < {*tests}
    assert 40 < len(tests) < 120


def test_every_engine_and_compiled_peer_of_the_plan_is_compiled_ahead() -> None:
    gpu_run = GpuRun(Path(), COMMIT)
    commands = [gpu_run.command(STEP[name]) for name in ("tests", "ops", "model-224", "model-518", "latency")]
    kernels = {str(job) for job in warm.kernel_jobs(commands, "cuda")}
    wanted = [*(("224, 256, cls", model) for model in "SBLg"), *(("518, 64, all", model) for model in "SBL")]
    for setting, model in wanted:
        for precision in ("bf16", "fp8"):
            assert f"compile_engine({harness.MODELS[model].name}, {setting}, {precision})" in kernels
    assert {"compile_engine(dinov2_vits14, 224, 1, cls, bf16)", "compile_test_case(linear.gelu e4m3)"} < kernels
    assert "compile_op(dinov2_vitg14, 518, attention.batch, cuda)" in kernels
    peers = [str(job) for job in warm.peer_jobs(commands, "cuda")]
    assert sorted(peers) == sorted(f"compile_peer({harness.MODELS[m].name}, {s}, bf16, cuda)" for s, m in wanted)


def _whole_engine(precision: str, backends: str) -> int:
    """Launches what bench.model does of an engine of full depth, calibrated in fp8. Returns the number of launches."""
    model = load_ours(harness.TINY, torch.device("cpu"))
    x = torch.randn(2, 3, 28, 28).to(modes.DTYPES[precision])
    engine = modes.build_engine(model, x, "cls", precision, "engine-best")
    with use_backend(backends):
        engine.folded = warm.fold_model(model, engine.plan, warm.CUDA).eval()
    with torch.inference_mode(), compiling(90) as reports, use_backend(backends), warm.RunKernels():
        engine.folded._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda"))
        OURS.call["cls"](engine, torch.empty(x.shape, dtype=x.dtype, device="cuda"))
    return len(reports)


@pytest.mark.aot
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_an_engine_launches_nothing_that_was_not_compiled(precision: str, tmp_path: Path) -> None:
    """Each engine has a process of its own, which finds in Triton's cache what the other has compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
            few = pool.submit(warm.compile_engine, "tiny", 28, 2, "cls", precision).result()
            known = {*tmp_path.rglob("*.cubin")}
            many = sum(pool.submit(_whole_engine, precision, backends).result() for backends in warm.ENGINE_BACKENDS)
    assert many > few >= len(known) > 5
    assert {*tmp_path.rglob("*.cubin")} == known


@pytest.mark.slow
def test_a_step_finds_the_peer_compiled_ahead(tmp_path: Path) -> None:
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    gpu_run = GpuRun(tmp_path / "cpu", COMMIT, tiny=True)
    step, known = gpu_run.command(STEP["model-224"]), set()
    for arguments in (["bench.warm", "peers", "--device", "cpu", "--steps", "model-224"], step):
        subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=os.environ | cache, check=True)
        known = known or {*(tmp_path / "inductor" / "fxgraph").rglob("*")}
    rows = records.read(tmp_path / "cpu" / "throughput.jsonl")
    assert [row["value"] is not None for row in rows if row["mode"] == "compile"] == [True]
    assert {*(tmp_path / "inductor" / "fxgraph").rglob("*")} == known != set()


def _step(name: str, program: str, seconds: float = 10.0, **rest: bool) -> Step:
    """A step that runs this Python program. ``python -m`` needs a module, so a helper module executes it."""
    return Step(
        name, seconds / 60, "", shlex.join(["code_of_a_step", program.replace("{", "{{").replace("}", "}}")]), **rest
    )


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "code_of_a_step.py").write_text("import sys; exec(sys.argv[1])")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


def _run(steps: list[Step], tmp_path: Path, seconds: float = 60.0) -> dict[str, gpu_steps.Outcome]:
    gpu_run = GpuRun(tmp_path / "device", COMMIT, (seconds + gpu_plan.RESERVE_SECONDS) / 60)
    gpu_run.folder.mkdir(exist_ok=True)
    return {outcome.step.name: outcome for outcome in gpu_steps.run_steps(steps, gpu_run)}


def _appends(path: Path, text: str = "x") -> str:
    return f"open({str(path)!r}, 'a').write({text!r})"


def _is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_step_that_hangs_is_stopped_with_its_child_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_steps, "GRACE_SECONDS", 0.5)
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(100)"
    pid = tmp_path / "pid"
    starts = f"p = subprocess.Popen([sys.executable, '-c', {child!r}])"
    hangs = f"import subprocess, sys; {starts}; open({str(pid)!r}, 'w').write(str(p.pid)); p.wait()"
    outcomes = _run([_step("hangs", hangs, 2.0), _step("next", _appends(tmp_path / "next"))], tmp_path)
    assert [outcome.state for outcome in outcomes.values()] == ["failed", "done"]
    assert "stopped at its limit of 3 s" in outcomes["hangs"].note
    assert not _is_running(int(pid.read_text()))


def test_a_crash_does_not_stop_other_steps_and_failed_steps_come_last(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    crashes = _step("crashes", f"import os; {_appends(ran, 'c')}; os.abort()")
    steps = [crashes, _step("fine", _appends(ran, "f"))]
    assert [outcome.state for outcome in _run(steps, tmp_path).values()] == ["failed", "done"]
    assert ran.read_text() == "cf"
    steps += [_step("new", _appends(ran, "n"))]
    outcomes = _run(steps, tmp_path)
    assert {name: outcome.state for name, outcome in outcomes.items()} == {
        "fine": "done before",
        "new": "done",
        "crashes": "failed",
    }
    assert ran.read_text() == "cfnc"


def test_a_failed_step_of_every_call_keeps_its_place(tmp_path: Path) -> None:
    gpu_run = GpuRun(tmp_path, COMMIT)
    steps = [_step("warm", "", every_call=True), _step("fails", ""), _step("new", "")]
    lines = [{"step": step.name, "command": step.command, "commit": COMMIT, "state": "failed"} for step in steps[:2]]
    gpu_run.steps_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    groups, done = gpu_plan.order_steps(steps, gpu_run)
    assert ([step.name for group in groups for step in group], done) == (["warm", "new", "fails"], [])


def test_a_step_that_lost_the_device_starts_again(tmp_path: Path) -> None:
    tries = tmp_path / "tries"
    program = f"import sys; {_appends(tries)}; len(open({str(tries)!r}).read()) < 3 and sys.exit({records.EXIT_RETRY})"
    assert _run([_step("loses", program)], tmp_path)["loses"].state == "done"
    assert tries.read_text() == "xxx"


def test_the_next_call_runs_what_the_budget_cut_off_or_left_out(tmp_path: Path) -> None:
    done, again = tmp_path / "done", tmp_path / "again"
    slow = f"import os, time; os.path.exists({str(again)!r}) or time.sleep(100)"
    steps = [_step("first", _appends(done)), _step("slow", slow, 12.0), _step("long", "pass", 100.0)]
    outcomes = _run(steps, tmp_path, seconds=8.0)
    assert [outcome.state for outcome in outcomes.values()] == ["done", "cut off", "left out"]
    again.touch()
    outcomes = _run([*steps[:1], _step("always", _appends(done), every_call=True), *steps[1:]], tmp_path, seconds=100.0)
    assert {name: outcome.state for name, outcome in outcomes.items()} == {
        **dict.fromkeys(("first", "always", "slow", "long"), "done"),
        "first": "done before",
    }
    _run([_step("always", _appends(done), every_call=True)], tmp_path)
    assert done.read_text() == "xxx"


def test_steps_that_start_together_and_a_required_step_that_fails(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    meets = "import os, time\nopen({!r}, 'w')\nwhile not os.path.exists({!r}): time.sleep(0.05)"
    steps = [
        _step("a", meets.format(str(here), str(there))),
        _step("b", meets.format(str(there), str(here)), with_previous=True),
        _step("fails", "raise SystemExit(1)", required=True),
        _step("after", "pass"),
    ]
    assert [outcome.state for outcome in _run(steps, tmp_path).values()] == ["done", "done", "failed", "left out"]


def test_the_archive_is_written_even_if_the_call_is_interrupted(tmp_path: Path) -> None:
    plan = "gpu_plan.PLAN[:] = [gpu_plan.Step('sleeps', 1.0, '', 'code_of_a_step \\'import time; time.sleep(60)\\'')]"
    call = f"gpu.main(['--tiny', '--results', {str(tmp_path)!r}, '--commit', {COMMIT!r}])"
    program = f"from bench import gpu, gpu_plan; {plan}; {call}"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=os.environ)
    log = tmp_path / "cpu" / "logs" / "sleeps.log"
    while not log.is_file() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) != 0
    with tarfile.open(tmp_path / "cpu.tar.gz") as archive:
        assert {"cpu/logs/sleeps.log", "cpu/steps.jsonl"} <= {*archive.getnames()}


def test_steps_run_compiled_kernels_without_a_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("DINOV2_FAST_BACKEND", "torch")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    environment = gpu_steps.step_environment()
    assert not {"TRITON_INTERPRET", "DINOV2_FAST_BACKEND"} & environment.keys()
    assert environment["TRITON_CACHE_DIR"], "otherwise Inductor uses another cache than the warm one"


def test_a_log_keeps_its_ends_and_the_note_is_the_last_line_that_tells_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_steps, "LOG_BYTES", 100)
    outcome = _run([_step("talks", "print('x' * 1000, 'three rows', 'wrote a.jsonl', '', sep=chr(10))")], tmp_path)[
        "talks"
    ]
    assert outcome.note == "three rows"
    log = (tmp_path / "device" / "logs" / "talks.log").read_text()
    assert log.startswith("$ ")
    assert "[... left out ...]" in log
    assert log.endswith("three rows\nwrote a.jsonl\n\n")
    assert len(log) < 150


@pytest.mark.parametrize(
    ("states", "value", "status"),
    [
        (["done", "done before"], 1.0, 0),
        (["done", "left out"], 1.0, 3),
        (["done", "cut off"], 1.0, 3),
        (["failed", "left out"], 1.0, 1),
        (["done"], None, 1),
    ],
)
def test_the_exit_status_says_what_failed_or_is_left(
    states: list[str], value: float | None, status: int, tmp_path: Path
) -> None:
    row = dict.fromkeys(records.KEYS) | {"task": "throughput", "implementation": "timm", "commit": COMMIT}
    row |= {"value": value, "unit": "images/s"} if value else records.not_measured("refused: x")
    gpu_run = GpuRun(tmp_path / "device", COMMIT)
    records.write(gpu_run.folder / "throughput.jsonl", [row, row | {"commit": "another", "value": None}])
    outcomes = [gpu_steps.Outcome(step, state) for step, state in zip(PLAN, states, strict=False)]
    assert gpu.summary(outcomes, gpu_run) == status


def test_without_a_gpu_nothing_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "run_steps", lambda *args: pytest.fail("runs"))
    assert gpu.main(["--commit", COMMIT]) == 2
    assert "torch finds no GPU here" in capsys.readouterr().err


def test_headlines_compare_with_the_best_peer_also_in_fp8() -> None:
    common = dict.fromkeys(records.KEYS) | {"task": "throughput", "model": "b", "resolution": 224, "unit": "images/s"}
    rows = [
        common | {"implementation": name, "mode": mode, "precision": precision, "value": value}
        for name, mode, precision, value in (
            ("timm", "eager", "bf16", 100.0),
            ("timm", "compile", "bf16", 200.0),
            ("dinov2_fast", "engine", "bf16", 240.0),
            ("dinov2_fast", "engine-best", "fp8", 300.0),
            ("dinov2_fast", "triton", "bf16", None),
        )
    ]
    times = {"timm": (5.0, 4.0), "dinov2_fast": (3.0, 2.0)}  # in ms: the smallest are the best
    latency = [
        common | {"task": "latency", "unit": "ms", "precision": "fp32", "implementation": name, "value": value}
        for name, values in times.items()
        for value in values
    ]
    assert [re.search(r"fp32: ([\d.]+)", line)[1] for line in gpu.headlines(latency)] == ["2.000"]
    lines = [*gpu.headlines(rows)]
    assert [re.search(r"(bf16|fp8): ([\d.]+)", line).groups() for line in lines] == [
        ("bf16", "1.200"),
        ("fp8", "1.500"),
    ]
