"""All tests and benchmarks that need a GPU, in one call of nine minutes: ``make gpu``.

It runs this checkout with the Python that calls it: it installs nothing, downloads nothing, and changes no setting of
the device. The steps of :data:`PLAN` run one after the other, each in a process of its own. Results go to the folder
bench/results/<device>/ (or another, by --results) and into the archive <device>.tar.gz beside it:

- <task>.jsonl: the rows of the benchmarks; best.json: the fastest backend of each op;
- steps.jsonl: a line for each step that ran; logs/<step>.log: what it printed.

After a step that crashes the next one runs. A step that hangs is stopped. A step that lost the device starts again,
without what lost it. The next call for the same commit goes on: it leaves out steps that are done, and runs those that
failed after all others. --dry-run prints the plan on any machine, --tiny runs all of it on a CPU.

Exit status: 0 if all is done; 1 if a step failed or a result was refused; 2 if nothing could run; 3 if steps are left
for another call.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import records
from bench.peers import OURS
from dinov2_fast import extension, ops

ROOT = Path(__file__).parents[1]
EPILOG = """\
The CUDA extension must be where `make build` leaves it; EXTENSION names one that was built elsewhere, and
EXTENSION=none does without. On a machine that keeps nothing after a call but the files of one folder:

    make gpu PYTHON=python3 COMMIT=<sha>; cp bench/results/*.tar.gz <folder>

The archive is written even if tests fail or time runs out, so the exit status must not stop the copy; give the call a
minute more than the budget. What git ignores, such as the extension, may have to be sent by name. Before the next call
unpack the archive, `tar -xzf <device>.tar.gz -C bench/results`, and name the same commit.
"""
BUDGET = 8.7  # minutes
RESERVE = 10.0  # seconds of it for stopping the last step and writing the archive
GRACE = 8.0  # seconds between asking a step to stop and killing it
WORTH = 0.5  # share of a step's minutes that must be left to start it
LIMIT = 1.5  # a step that takes this many times its minutes hangs
LOG_BYTES = 1 << 19  # kept of a log
STATES = {0: "done", None: "cut off", records.AGAIN: "cut off"}  # by exit status; all others mean failed


class Step(NamedTuple):
    """One process."""

    name: str
    minutes: float  # expected, on an H200
    decides: str  # what its outcome decides
    command: str  # arguments of ``python -m``; Job.words fills in the {names}
    beside: bool = False  # starts together with the step before
    always: bool = False  # runs in each call, since a new machine has an empty cache
    needed: bool = False  # if it fails, nothing else runs


FIRST = "-m gpu_first tests/ops/test_on_gpu.py tests/ops/test_linear_cuda.py tests/ops/test_attention_cuda.py"
LARGE = "tests/ops/test_on_gpu.py tests/ops/test_attention_cuda.py"
OTHERS = "-m 'not aot and not slow and not gpu_first and not gpu_large' {tests}"
TEST = "pytest -v -p no:cacheprovider -W default --max-worker-restart=200"
# What an engine launches, in an order in which the kernel that may hang comes last.
FORMS = "activation,layer_norm.plain,linear,attention_pool,attention.batch"
OPS = f"--ops {FORMS} --modes forward"
MODEL = "bench.model {record} --implementations dinov2_fast,timm --precisions bf16"
SPEED = MODEL + ",fp8 --seconds 3 --modes eager,compile,engine,engine-best,engine-best-graphs --task throughput"
LATENCY = (
    MODEL + " --seconds 2 --modes graphs,engine-graphs,engine-best-graphs --task latency --batches 1 --outputs cls"
)
TRAIN = MODEL + " --seconds 3 --modes eager,triton --task training --sizes 224"
MIXED = MODEL + " --seconds 3 --modes eager,engine,engine-best --task mixed --sizes 224,518"
MEMORY = MODEL + " --modes eager,triton --task memory --sizes 224 --outputs training"

# The first call gets as far as `training`, a second one goes on. Minutes are predictions: see bench/results/NOTES.md.
#
# All models of one size share a process. A process takes some 10 s to start, so one for each model would cost 50 s of
# every call. A hang would cost some 300 s: LIMIT times the step, and the models after it. But by then each kernel has
# run 50 times in `tests`, and at these sizes in `ops`. One hang in 30 calls, a cautious guess, costs 10 s a call.
PLAN = [
    Step("smoke", 0.2, "do the extension and Triton run here", "bench.gpu --smoke {smoke}", always=True, needed=True),
    Step("warm", 0.4, "nothing: compiles the kernels of the steps below", "bench.warm kernels {warm}", always=True),
    Step("tests", 1.0, "which kernels are right: races, graphs, e4m3", f"{TEST} -n {{workers}} {FIRST}"),
    Step("peers", 1.0, "nothing: compiles timm", "bench.warm peers {warm}", beside=True, always=True),
    Step("ops", 1.25, "which backend of each op wins", f"bench.ops {{record}} --models B,g --sizes 224,518 {OPS}"),
    Step("model-224", 2.58, "the headline, class token", f"{SPEED} --models B,S,L,g --sizes 224 --outputs cls"),
    Step("model-518", 2.08, "the headline, dense features", f"{SPEED} --models B,L,S --sizes 518 --outputs all"),
    Step("latency", 0.58, "one image, graphs on both sides", f"{LATENCY} --models S,B --sizes 224"),
    Step("training", 0.42, "do our kernels train faster", f"{TRAIN} --models B"),
    Step("model-1036", 0.8, "attention of 5477 tokens", f"{SPEED} --models B --sizes 1036 --outputs all"),
    Step("mixed", 0.6, "does one sequence of many sizes win", f"{MIXED} --models B"),
    Step("training-L", 0.6, "the same for L", f"{TRAIN} --models L"),
    Step("memory", 1.2, "what training takes", f"{MEMORY} --models B,L"),
    Step("extraction", 1.8, "do images come fast enough", "bench.extraction {record} --models S"),
    Step("tests-large", 1.0, "more than 2^31 elements", f"{TEST} -m gpu_large {LARGE}"),
    Step("tests-others", 8.0, "all else that uses the GPU", f"{TEST} -n {{workers}} {OTHERS}"),
]

# What --tiny puts in place of the values of options, so that the same steps run on a CPU.
SMALL = {"models": "tiny", "precisions": "fp32", "batches": "2", "seconds": "0.1"}
SMALLER = {"224": "28", "518": "56", "1036": "84"}  # pixels


def tiny(words: list[str]) -> list[str]:
    """A step's command for a CPU: tiny models and images in fp32, no CUDA graphs; tests are collected but not run."""
    if words[0] == "pytest":
        return [*words, "--collect-only", "-qq", "-n", "0"]
    small = list(words)
    for i, (option, value) in enumerate(itertools.pairwise(words), 1):
        if option == "--sizes":
            small[i] = ",".join(SMALLER[size] for size in value.split(","))
        elif option == "--modes" and words[0] == "bench.model":
            modes = (mode.removesuffix("-graphs").replace("graphs", "eager") for mode in value.split(","))
            small[i] = ",".join(dict.fromkeys(mode for mode in modes if mode != "triton"))
        elif option.startswith("--"):
            small[i] = SMALL.get(option[2:], value)
    return small


@dataclass(frozen=True)
class Job:
    """What all steps of a call share."""

    folder: Path  # for this device's results
    commit: str
    budget: float = BUDGET  # minutes
    tiny: bool = False
    extension: bool = True  # whether it must be there
    running: set[subprocess.Popen[bytes]] = field(default_factory=set)

    @property
    def kept(self) -> Path:
        return self.folder / "steps.jsonl"

    def log(self, step: Step) -> Path:
        return self.folder / "logs" / f"{step.name}.log"

    def words(self, step: Step, coming: Sequence[Step] = ()) -> list[str]:
        """The arguments of ``python -m``; `coming` are the steps that this call will run."""
        device = f"--device {'cpu' if self.tiny else 'cuda'}"
        folder = shlex.quote(str(self.folder.parent))
        words = shlex.split(
            step.command.format(
                record=f"{device} --write --resume --results {folder} --commit {self.commit}",
                smoke=device if self.extension else f"{device} --extension none",
                warm=f"{device} --steps {','.join(other.name for other in coming)}",
                workers=min(6, os.cpu_count() or 1),
                tests=" ".join(gpu_tests()),
            )
        )
        return tiny(words) if self.tiny else words

    def states(self) -> dict[tuple[str, str], str]:
        """How each step of this commit last ended, by name and command."""
        lines = [line for line in records.read(self.kept) if line["commit"] == self.commit]
        return {(line["step"], line["command"]): line["state"] for line in lines}

    def rows(self) -> list[records.Row]:
        """The rows of all benchmarks for this commit."""
        files = [path for path in sorted(self.folder.glob("*.jsonl")) if path != self.kept]
        return [row for path in files for row in records.read(path) if row["commit"] == self.commit]


class Outcome(NamedTuple):
    """`state`: done, failed, cut off, left out, or done before."""

    step: Step
    state: str
    seconds: float = 0.0
    note: str = ""

    def __str__(self) -> str:
        return f"{self.step.name:14} {self.state:11} {self.seconds:5.0f} s  {self.note}".rstrip()


def gpu_tests() -> list[str]:
    """The files of tests that run on the device of tests/helpers/devices.py."""
    files = sorted((ROOT / "tests").glob("**/test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if "tests.helpers.devices import" in path.read_text()]


# Running

Group = list[Step]  # steps that start together


def ordered(steps: list[Step], job: Job) -> tuple[list[Group], list[Step]]:
    """The steps to run, with those that failed in an earlier call last, and the steps that are done."""
    before = job.states()
    state = {step.name: before.get((step.name, step.command)) for step in steps}
    done = [step for step in steps if state[step.name] == "done" and not step.always]
    last = {step.name for step in steps if state[step.name] == "failed" and not step.always}
    groups: list[Group] = []
    for step in sorted((step for step in steps if step not in done), key=lambda step: step.name in last):
        if step.beside and groups:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups, done


def minutes(group: Group) -> float:
    return max(step.minutes for step in group)


def within(groups: list[Group], left: float) -> list[Step]:
    """The steps that run in `left` seconds if each takes as long as predicted."""
    steps: list[Step] = []
    for group in groups:
        if left >= WORTH * 60 * minutes(group):
            steps += group
            left -= min(left, 60 * minutes(group))
    return steps


def run(steps: list[Step], job: Job) -> list[Outcome]:
    """Runs the steps that are not done, within the budget; keeps a line and a log of each."""
    end = time.monotonic() + 60 * job.budget - RESERVE
    groups, done = ordered(steps, job)
    outcomes = [Outcome(step, "done before") for step in done]
    for i, group in enumerate(groups):
        left = end - time.monotonic()
        coming = within(groups[i:], left)
        stopped = any(outcome.step.needed and outcome.state == "failed" for outcome in outcomes)
        if stopped or group[0] not in coming:
            outcomes += [Outcome(step, "left out") for step in group]
            continue
        names = " and ".join(step.name for step in group)
        print(f"{names}: {minutes(group):g} minutes, {left / 60:.1f} left", flush=True)
        with ThreadPoolExecutor(len(group)) as pool:
            futures = [pool.submit(execute, step, job, coming, left) for step in group]
            try:
                ended = [future.result() for future in futures]
            except KeyboardInterrupt:
                while not all(future.done() for future in futures):  # one may only now start its process
                    for process in list(job.running):
                        stop(process)
                    time.sleep(0.1)
                raise
        print(*ended, sep="\n")
        outcomes += ended
    return outcomes


def execute(step: Step, job: Job, coming: list[Step], left: float) -> Outcome:
    """Runs a step for at most `left` seconds, which cuts it off, and at most its own limit, which is a failure."""
    begin, limit, log = time.monotonic(), LIMIT * 60 * step.minutes, job.log(step)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", *job.words(step, coming)]
    status: int | None = records.AGAIN
    while status == records.AGAIN and (rest := begin + min(left, limit) - time.monotonic()) > 0:
        status = launch(command, log, rest, job.running)
    took, state, note = time.monotonic() - begin, STATES.get(status, "failed"), last_line(log)
    if status is None and limit < left:
        state, note = "failed", f"stopped at its limit of {limit:.0f} s: {note}"
    line = {"step": step.name, "command": step.command, "commit": job.commit, "state": state}
    line |= {"seconds": round(took, 1), "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat()}
    with job.kept.open("a") as file:
        file.write(json.dumps(line) + "\n")
    log.write_bytes(without_middle(log.read_bytes()))
    return Outcome(step, state, took, note)


def launch(command: list[str], log: Path, seconds: float, running: set[subprocess.Popen[bytes]]) -> int | None:
    """Runs a process in a group of its own; gives its exit status, or None if it took longer and was stopped."""
    with log.open("ab") as output:
        output.write(f"$ {shlex.join(command)}\n".encode())
        output.flush()
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True, **streams)
    running.add(process)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        stop(process)
        running.discard(process)


def environment() -> dict[str, str]:
    """The environment of all steps: compiled kernels, no forced backend, and shared caches.

    Without TRITON_CACHE_DIR, Inductor would give Triton in its process another cache than the one that `warm` fills.
    """
    cache = Path(tempfile.gettempdir()) / "dinov2_fast-gpu"
    shared = {"TRITON_CACHE_DIR": str(cache / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
    kept = {name: os.environ[name] for name in os.environ if name not in ("TRITON_INTERPRET", "DINOV2_FAST_BACKEND")}
    return shared | kept | {"PYTHONUNBUFFERED": "1"}


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a step and all processes that it started: by an interrupt first, so that pytest reports what it knows."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGINT)
            process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip("= ") for line in log.read_text(errors="replace").splitlines()]
    return next(line for line in reversed(lines) if line and not line.startswith("wrote "))[:100]


def without_middle(data: bytes, longest: int = LOG_BYTES) -> bytes:
    """A log without its middle if it is longer."""
    half = longest // 2
    return data if len(data) <= longest else data[:half] + b"\n[... left out ...]\n" + data[-half:]


# Results


def pack(folder: Path) -> Path:
    """Writes <folder>.tar.gz: rows, best.json, steps.jsonl, logs."""
    archive = folder.with_name(f"{folder.name}.tar.gz")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    return archive


def headlines(rows: list[records.Row]) -> Iterator[str]:
    """For each setting of models our best row over a peer's best; ours in fp8 over a peer's in bf16."""
    groups: dict[tuple[Any, ...], list[records.Row]] = {}
    for row in rows:
        if row["task"] != "ops":
            key = tuple(row[name] for name in ("task", "model", "resolution", "output", "batch"))
            groups.setdefault(key, []).append(row)
    for key, group in groups.items():
        peer = records.best(row for row in group if row["implementation"] != OURS.name)
        own = [row for row in group if row["implementation"] == OURS.name]
        for precision in dict.fromkeys(row["precision"] for row in own):
            if (ours := records.best(row for row in own if row["precision"] == precision)) and peer:
                values = f"{ours['value']:.4g} {ours['unit']} {ours['mode']}; {peer['value']:.4g} {peer['mode']}"
                yield f"{' '.join(map(str, key))} {precision}: {records.ratio(ours, peer):.3f} ({values})"


def summary(outcomes: list[Outcome], job: Job) -> int:
    """Prints the headlines and the states of steps; gives the exit status."""
    rows = job.rows()
    refused = [row for row in rows if (records.reason(row) or "").startswith(("refused", "failed"))]
    print("", *headlines(rows), sep="\n")
    for state in ("done before", "failed", "cut off", "left out"):
        if names := [outcome.step.name for outcome in outcomes if outcome.state == state]:
            print(f"{state}: {', '.join(names)}")
    if refused:
        print(f"{len(refused)} rows of this commit were refused or failed: see their {records.NOT_MEASURED}")
    states = {outcome.state for outcome in outcomes}
    return 1 if "failed" in states or refused else 3 if states & {"left out", "cut off"} else 0


def dry_run(steps: list[Step], job: Job) -> None:
    """Prints the steps that a call runs if each takes as long as predicted: minutes, sum, what it decides."""
    groups, done = ordered(steps, job)
    coming, total = within(groups, 60 * job.budget - RESERVE), 0.0
    print(f"The plan for commit {job.commit} and {job.budget:g} minutes. Nothing is run.\n")
    print(f"{'step':14} minutes    sum  decides")
    for group in (group for group in groups if group[0] in coming):
        total += minutes(group)
        for step in group:
            print(f"{step.name:14} {step.minutes:7.2f} {total:6.2f}  {step.decides}{' (beside)' * step.beside}")
            print(f"{'':16}python -m {shlex.join(job.words(step, coming))}")
    left_out = [step for group in groups for step in group if step not in coming]
    for title, names in (("done before", done), ("left out", left_out)):
        print(f"\n{title}: {', '.join(f'{step.name} ({step.minutes:g})' for step in names) or 'nothing'}")


# The command


def smoke(device: str, with_extension: bool) -> int:
    """Prints what runs here. Without Triton or the CUDA extension it raises: such a call would tell little."""
    packages = ", ".join(f"{name} {records.version(name)}" for name in ("torch", "triton", "timm", "pytest-xdist"))
    print(f"{records.device_folder(torch.device(device))}, Python {sys.version.split()[0]}, {packages}")
    print(f"CUDA extension: {extension.availability()}")
    sizes = ((257, 384), (1536, 384), (1536,))
    for backend in ("triton", *["cuda"] * with_extension) if device == "cuda" else ():
        ops.linear(*(torch.randn(size, device=device).bfloat16() for size in sizes), epilogue="gelu", backend=backend)
        torch.cuda.synchronize()
        print(f"{backend} runs")
    return 0


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    with_extension = options.extension != "none"
    if options.smoke:
        return smoke(options.device, with_extension)
    if not (options.tiny or options.dry_run or torch.cuda.is_available()):
        print("There is no GPU that torch can use here: DRY_RUN=1 shows the plan, TINY=1 runs it.", file=sys.stderr)
        return 2
    name = "nvidia-h200" if options.dry_run else records.device_folder(torch.device("cpu" if options.tiny else "cuda"))
    folder = options.results.resolve() / name
    job = Job(folder, options.commit, options.budget, options.tiny, with_extension)
    if options.dry_run:
        dry_run(PLAN, job)
        return 0
    place = ROOT / "dinov2_fast" / extension.FILE.name
    if options.extension and with_extension and not (place.is_file() and place.samefile(options.extension)):
        shutil.copy(options.extension, place)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the step is stopped and the archive written
    print(f"{name}, commit {job.commit}, {job.budget:g} minutes, {len(PLAN)} steps")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        status = summary(run(PLAN, job), job)
    finally:
        print(pack(folder))
    return status


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    described = {"description": __doc__, "epilog": EPILOG, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", **described)
    parser.add_argument("--results", type=Path, help="default: bench/results; with --tiny build/gpu-tiny")
    parser.add_argument("--commit", help="what is measured (default: the commit that git names)")
    parser.add_argument("--budget", type=float, default=BUDGET, help="minutes in all (default: %(default)s)")
    parser.add_argument("--extension", help="a built CUDA extension, to put into the package; none to do without")
    parser.add_argument("--tiny", action="store_true", help="all steps on the CPU, with tiny models")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, on any machine")
    parser.add_argument("--smoke", action="store_true", help="the first step: say what runs here")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"], help="of --smoke")
    options = parser.parse_args(arguments)
    options.results = options.results or (ROOT / "build" / "gpu-tiny" if options.tiny else records.RESULTS)
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # no git
        options.commit = options.commit or records.head()
    if not options.commit and not options.smoke:
        parser.error("git names no commit here: say what is measured, COMMIT=<sha> (--commit)")
    if options.extension not in (None, "none") and not Path(options.extension).is_file():
        parser.error(f"EXTENSION (--extension): {options.extension} does not exist; it must be a built extension")
    return options


if __name__ == "__main__":
    sys.exit(main())
