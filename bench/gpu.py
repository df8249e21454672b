"""All that this project asks of a machine with a GPU, by one command: ``make gpu``, which is ``python -m bench.gpu``.

It runs the checkout as it is, with the Python that runs it: nothing is installed, downloaded, or set on the device. The
steps follow one another, each a process of its own: whether the CUDA extension loads, the tests of kernels that are new
to a GPU, some of them under compute-sanitizer, the questions of speed, all other tests, all other benchmarks.
Everything goes to one folder, bench/results/<device>/ or the one in --results, and into one archive beside it,
<device>.tar.gz, below 16 MiB:

- <task>.jsonl: the rows of the benchmarks;
- steps.jsonl: a line for each step that ran;
- logs/<step>.log: what it printed.

A step gets what is left of the budget, and is stopped then; what it has written stays. One that would need more than
three times what is left is left out. A step that takes much longer than expected is stopped, too, and has failed. The
next run for the same commit goes on: what is done is not run again, what was cut off or left out is run in the order of
the plan, what failed comes last. Benchmarks keep each setting as soon as it is measured and leave out what is there.

Exit status: 0 if all is done; 1 if a test or a benchmark failed, or a result was refused; 2 if nothing could run; 3 if
something was left for another run.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from bench import harness, records
from bench.gpu_plan import ROOT, Step, plan
from bench.peers import OURS
from bench.records import best, ratio
from dinov2_fast import extension

EPILOG = """\
The CUDA extension is used if it is in place, as dinov2_fast/_cuda.abi3.so, where `make build` leaves it. EXTENSION
(--extension) puts one there that was built elsewhere. The first step says whether it loads, and if not, why.

On a machine that forgets everything after each call, and from which only a few files can be fetched, leave --results at
its default and take the archive, which holds all rows, steps.jsonl and all logs:

    make gpu PYTHON=python3 COMMIT=<sha> BUDGET=9; cp bench/results/*.tar.gz <folder that is fetched>

It comes even if tests fail or time runs out, so the exit status must not stop the copy; give the call a minute more
than the budget. Before the next call, unpack it into the checkout that is sent there, and name the same commit:

    tar -xzf <device>.tar.gz -C bench/results

So that call goes on from there, and its archive holds the rows of both. What git ignores, the extension and the logs
among it, may have to be sent by name; the logs need not.
"""
BUDGET, QUICK_BUDGET = 8.0, 2.75  # minutes
RESERVE = 30.0  # seconds of the budget kept for stopping the last step, the report and the archive
REPORT = 15.0  # seconds of them for the report
GRACE = 8.0  # seconds between asking a step to stop and killing it
LEAST = 10.0  # seconds with which a step is still begun
WORTH = 1 / 3  # the share of a step's expected time that must be left for it to be begun
LOG_BYTES = 1 << 20  # of a step's log that are kept
ARCHIVE_BYTES = 16 << 20
TAIL = 15  # lines of a failed step's log that are shown
CLEAN = ("env", "-u", "TRITON_INTERPRET", "-u", "DINOV2_FAST_BACKEND", "PYTHONUNBUFFERED=1")  # before every command
NOT_RUN = ("skipped", "left out", "done before")
STOPPED = 124  # the exit status noted for a step that reached its own limit, as timeout(1) has it
COMPARED = ("throughput", "latency", "training", "mixed")  # tasks whose rows are models, ours and others'


@dataclass(frozen=True)
class Job:
    """What all steps share.

    Args:
        folder: for this device's results.
        budget: minutes.
    """

    folder: Path
    commit: str
    budget: float

    def log(self, step: Step) -> Path:
        return self.folder / "logs" / f"{step.name}.log"

    def command(self, step: Step) -> list[str]:
        values = {"results": self.folder.parent, "commit": self.commit, "junit-xml": self.log(step).with_suffix(".xml")}
        told = [f"--{name}={values[name]}" for name in step.told]
        return [*CLEAN, *step.prefix, sys.executable, *step.arguments, *told]

    def lines(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Of steps.jsonl, the last for each step of this commit, by its name and arguments."""
        lines = records.read(self.folder / "steps.jsonl")
        return {(line["step"], line["arguments"]): line for line in lines if line["commit"] == self.commit}

    def rows(self) -> list[dict[str, Any]]:
        """Those of all benchmarks for this commit."""
        files = [path for path in sorted(self.folder.glob("*.jsonl")) if path.name != "steps.jsonl"]
        return [row for path in files for row in records.read(path) if row["commit"] == self.commit]


@dataclass(frozen=True)
class Outcome:
    """`state`: done, failed, cut off, skipped, left out, or done before."""

    step: Step
    state: str
    seconds: float = 0.0
    note: str = ""


class Machine(Protocol):
    """What runs steps: a machine with a GPU, or one that only counts."""

    folder: str

    def now(self) -> float:
        """Seconds of a clock."""

    def run(self, step: Step, command: list[str], log: Path, seconds: float) -> int | None:
        """The exit status, or None if the step took longer than that and was stopped."""


class Gpu:
    """This machine."""

    def __init__(self) -> None:
        self.folder = records.device_folder(torch.device("cuda"))

    def now(self) -> float:
        return time.monotonic()

    def run(self, step: Step, command: list[str], log: Path, seconds: float) -> int | None:
        with log.open("ab") as output:
            output.write(f"$ {shlex.join(command)}\n".encode())
            output.flush()
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                return process.wait(seconds)
            except subprocess.TimeoutExpired:
                return None
            finally:
                _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a step with all processes that it has started, politely at first, so that pytest reports what it knows."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class DryRun:
    """A device that counts what would run: every step takes as long as expected and succeeds."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.ran: list[str] = []
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def run(self, step: Step, command: list[str], log: Path, seconds: float) -> int | None:
        self.ran.append(step.name)
        self._now += min(seconds, 60 * step.minutes)
        return 0 if 60 * step.minutes <= seconds else None


# Running it


def run(steps: list[Step], machine: Machine, job: Job, say: Callable[[str], None] = print) -> list[Outcome]:
    """Runs what is not done within the budget, and keeps a line and a log of each step."""
    end = machine.now() + 60 * job.budget - RESERVE
    (job.folder / "logs").mkdir(parents=True, exist_ok=True)
    known = job.lines()
    state = {step.name: _state(known.get((step.name, step.key))) for step in steps}
    outcomes = []
    interrupted = False
    for step in sorted(steps, key=lambda step: state[step.name] == "failed"):
        left = end - machine.now()
        if step.skip:
            outcome = Outcome(step, "skipped", note=step.skip)
        elif state[step.name] == "done":
            outcome = Outcome(step, "done before")
        elif interrupted or left < max(LEAST, WORTH * 60 * step.minutes):
            outcome = Outcome(step, "left out", note=f"{state[step.name]} before" if state[step.name] else "")
        else:
            say(f"{step.name}: about {step.minutes:g} minutes, {left / 60:.1f} left")
            try:
                outcome = _execute(step, machine, job, left)
                while outcome.state == "cut off" and (left := end - machine.now()) >= LEAST:  # with records.AGAIN
                    outcome = _execute(step, machine, job, left)
            except KeyboardInterrupt:
                interrupted, outcome = True, Outcome(step, "cut off", note="interrupted")
            say(_line(outcome))
            if outcome.state == "failed" or step.shown:
                say(_tail(job.log(step)))
        outcomes.append(outcome)
    return outcomes


def _state(line: dict[str, Any] | None) -> str | None:
    if line is None:
        return None
    return "cut off" if line["returncode"] in (None, records.AGAIN) else "failed" if line["returncode"] else "done"


def _execute(step: Step, machine: Machine, job: Job, left: float) -> Outcome:
    """Runs a step for as long as it may: until what is `left` is over, or until its own limit, which is a failure."""
    begin, log, limit = machine.now(), job.log(step), 60 * step.limit
    returncode: int | None = None
    try:
        returncode = machine.run(step, job.command(step), log, min(left, limit))
        if returncode is None and limit < left:
            returncode = STOPPED
    finally:
        took = machine.now() - begin
        counts = _counts(log.with_suffix(".xml"))
        line = {"step": step.name, "arguments": step.key, "commit": job.commit, "returncode": returncode}
        line |= {"seconds": round(took, 1), "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat()}
        with (job.folder / "steps.jsonl").open("a") as file:
            file.write(json.dumps(line | counts) + "\n")
        if log.is_file():
            log.write_bytes(without_middle(log.read_bytes(), LOG_BYTES))
    notes = [f"stopped at its limit of {limit:.0f} s"] if returncode == STOPPED else []
    notes += [] if counts["passed"] is None else [f"{number} {name}" for name, number in counts.items()]
    return Outcome(step, str(_state(line)), took, ", ".join(notes))


def _counts(xml: Path) -> dict[str, int | None]:
    """How many tests passed, failed and were skipped; null where pytest did not get to say so."""
    try:
        suites = list(ElementTree.parse(xml).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return {"passed": None, "failed": None, "skipped": None}
    finally:
        xml.unlink(missing_ok=True)
    total, failures, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    return {"passed": total - failures - errors - skipped, "failed": failures + errors, "skipped": skipped}


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return "\n".join(f"  | {line}" for line in lines[-TAIL:])


def without_middle(data: bytes, longest: int) -> bytes:
    """The beginning and the end of a log that is longer than that."""
    if len(data) <= longest:
        return data
    half = longest // 2
    return data[:half] + b"\n[... %d bytes left out ...]\n" % (len(data) - 2 * half) + data[len(data) - half :]


# What it leaves


def pack(folder: Path, limit: int = ARCHIVE_BYTES) -> list[str]:
    """Writes <folder>.tar.gz, smaller than `limit` bytes; says what had to be shortened or left out for that.

    Logs lose their middles first, as much as it takes, then whole files are left out, the largest first.
    """
    archive = folder.with_name(f"{folder.name}.tar.gz")
    files = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    logs = [path for path in files if path.parent.name == "logs"]
    said: list[str] = []
    longest = LOG_BYTES
    while _write_archive(archive, folder, files) >= limit and files:
        longest //= 4
        if longest >= 1 << 10 and logs:
            files |= {path: without_middle(files[path], longest) for path in logs}
            said = [f"logs were cut to {longest} bytes each"]
        else:
            largest = max(files, key=lambda path: len(files[path]))
            del files[largest]
            said.append(f"{largest.relative_to(folder)} was left out")
    return said


def _write_archive(archive: Path, folder: Path, files: Mapping[Path, bytes]) -> int:
    with tarfile.open(archive, "w:gz") as tar:
        for path, data in files.items():
            entry = tarfile.TarInfo(f"{folder.name}/{path.relative_to(folder).as_posix()}")
            entry.size, entry.mtime = len(data), int(path.stat().st_mtime)
            tar.addfile(entry, io.BytesIO(data))
    return archive.stat().st_size


def numbers(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """For each task, model, size, output and batch: our fastest in bf16 and in fp8, and the fastest peer in bf16."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["task"] in COMPARED and row["value"] is not None:
            key = tuple(row[name] for name in ("task", "model", "resolution", "output", "batch"))
            groups.setdefault(key, []).append(row)
    if groups:
        yield f"{'':50} {'ours':>30} {'best peer in bf16':>34}  ratio"
    for (task, model, resolution, output, batch), group in groups.items():
        peer = best(row for row in group if row["precision"] == "bf16" and row["implementation"] != OURS.name)
        for precision in ("bf16", "fp8"):
            ours = best(row for row in group if row["precision"] == precision and row["implementation"] == OURS.name)
            if ours or (peer and precision == "bf16"):
                name = f"{task} {model} {resolution} px, {output}, {batch}, {precision}"
                faster = f"{ratio(ours, peer):.3f}" if ours and peer else "–"
                mine = f"{_value(ours)} {ours['mode']}" if ours else "–"
                other = f"{_value(peer)} {peer['implementation']} {peer['mode']}" if peer else "–"
                yield f"{name:50} {mine:>30} {other:>34}  {faster}"


def _value(row: dict[str, Any]) -> str:
    return f"{row['value']:.3f} ms" if row["unit"] == "ms" else f"{row['value']:.1f}/s"


def summary(outcomes: list[Outcome], job: Job) -> int:
    """Prints what happened, the numbers, and what is left; the exit status."""
    rows = job.rows()
    refused = [row for row in rows if (records.reason(row) or "").startswith(("refused", "failed"))]
    of = {state: [o for o in outcomes if o.state == state] for state in (*NOT_RUN, "failed", "cut off")}
    failed = of["failed"] or any(o.note.startswith("failed") for o in of["left out"]) or refused
    print()
    for line in numbers(rows):
        print(line)
    print(f"\n{'step':34} {'state':11} seconds")
    for outcome in outcomes:
        if outcome.state not in ("left out", "done before"):
            print(_line(outcome))
    if of["done before"]:
        print(f"done before: {', '.join(o.step.name for o in of['done before'])}")
    if refused:
        print(f"{len(refused)} rows of this commit were refused or failed: see their {records.NOT_MEASURED}")
    if of["left out"]:
        names = [f"{o.step.name} ({o.note})" if o.note else o.step.name for o in of["left out"]]
        minutes = round(sum(o.step.minutes for o in of["left out"]), 1)
        print(f"left out ({len(names)}, about {minutes:g} minutes): {', '.join(names)}")
    if of["left out"] or of["cut off"]:
        print("The same command goes on from here.")
    return 1 if failed else 3 if of["left out"] or of["cut off"] else 0


def _line(outcome: Outcome) -> str:
    seconds = "" if outcome.state in NOT_RUN else f"{outcome.seconds:.0f}"
    return f"{outcome.step.name:34} {outcome.state:11} {seconds:>7}  {outcome.note}".rstrip()


def report(machine: Machine, job: Job) -> None:
    """Makes README's tables and plots, which show what is in bench/results."""
    if job.folder.parent.resolve() != records.RESULTS.resolve():
        return
    step = Step("report", ("-m", "bench.report"), REPORT / 60)
    if machine.run(step, [sys.executable, *step.arguments], job.log(step), REPORT) != 0:
        print(f"bench.report did not succeed: {job.log(step)}")


# The command


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    steps = plan(options)
    if options.dry_run:
        return dry_run(steps, DryRun(options.dry_run), options)
    if not torch.cuda.is_available():
        print("There is no GPU that torch can use here. DRY_RUN=1 shows the plan without one.", file=sys.stderr)
        return 2
    if options.smoke:
        return smoke()
    if options.extension:
        put_in_place(options.extension)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the step ends, too, and the archive is written
    return carry_out(steps, Gpu(), options)


def smoke() -> int:
    """Says what runs here and whether the CUDA extension loads; 1 if it is in place and does not."""
    triton = records.version("triton")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, triton {triton}")
    print(f"CUDA extension: {extension.describe()}")
    reason = extension.load().reason
    if reason:
        print("The tests of its kernels are skipped, and benchmarks say that the backend cuda does not run.")
    return int(reason is not None and extension.FILE.is_file())


def put_in_place(built: Path) -> None:
    """Copies an extension into the package, unless it is that one."""
    place = ROOT / "dinov2_fast" / extension.FILE.name
    if not (place.is_file() and place.samefile(built)):
        shutil.copy(built, place)


def carry_out(steps: list[Step], machine: Machine, options: argparse.Namespace) -> int:
    """Runs the steps, then writes the report, the archive, and last the summary."""
    job = Job(options.results.resolve() / machine.folder, options.commit, options.budget)
    print(f"{machine.folder}, commit {job.commit}, {job.budget:g} minutes, {len(steps)} steps")
    outcomes = run(steps, machine, job)
    report(machine, job)
    said = pack(job.folder)
    status = summary(outcomes, job)
    print(f"{job.folder} and {job.folder.name}.tar.gz{''.join(f'; {sentence}' for sentence in said)}")
    return status


def dry_run(steps: list[Step], machine: DryRun, options: argparse.Namespace) -> int:
    """Prints the steps in their order, and what would come of each if it took as long as expected. Writes nothing."""
    job = Job(options.results.resolve() / machine.folder, options.commit, options.budget)
    rows = job.rows()
    with tempfile.TemporaryDirectory() as copy:
        there = Job(Path(copy), job.commit, job.budget)
        if (job.folder / "steps.jsonl").is_file():
            shutil.copy(job.folder / "steps.jsonl", copy)
        outcomes = run(steps, machine, there, say=lambda text: None)
    print(f"The plan for {machine.folder}, commit {job.commit}, {job.budget:g} minutes. Nothing is run.")
    print(f"Commands begin with {shlex.join(CLEAN)}; results go to {job.folder}.")
    for number, outcome in enumerate(outcomes, 1):
        step, state = outcome.step, {"done": "would run", "cut off": "would be cut off"}.get(outcome.state)
        have = sum(_leaves(step, row) for row in rows)
        notes = [outcome.note, f"{have} rows are there" if have else ""]
        print(f"{number:3} {step.name}: about {step.minutes:g} minutes, {state or outcome.state}", end="")
        print("".join(f" ({note})" for note in notes if note))
        print(f"      {shlex.join([*step.prefix, 'python', *step.arguments])}")
    left_out = [outcome.step.name for outcome in outcomes if outcome.state == "left out"]
    print(f"{len(machine.ran)} of {len(steps)} steps would run, in {machine.now() / 60:.1f} minutes.")
    print(f"Left out under the budget: {', '.join(left_out) or 'nothing'}.")
    return 0


def _leaves(step: Step, row: dict[str, Any]) -> bool:
    """Whether a row is one of those that a benchmark writes."""
    wanted = {name: value.split(",") for name, value in step.settings.items()}
    models = [harness.MODELS[name].name for name in wanted.get("models", [])]
    checks = [("models", row["model"] in models), ("sizes", str(row["resolution"]) in wanted.get("sizes", []))]
    checks += [("precisions", row["precision"] in wanted.get("precisions", []))]
    checks += [("modes", str(row["mode"]).removeprefix("xformers-") in wanted.get("modes", []))]
    checks += [("batches", str(row["batch"]) in wanted.get("batches", []))]
    checks += [("outputs", row["output"] in wanted.get("outputs", []))]
    checks += [("ops", re.split("[. ]", str(row["output"]))[0] in wanted.get("ops", []))]
    return row["task"] == step.task and all(holds for name, holds in checks if name in wanted)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="default: bench/results")
    parser.add_argument("--commit", help="what is measured (default: the commit that git names)")
    parser.add_argument("--budget", type=float, help=f"minutes in all (default: {BUDGET:g}; --quick: {QUICK_BUDGET:g})")
    parser.add_argument("--quick", action="store_true", help="under 3 minutes: few tests, S and B, 224 pixels")
    parser.add_argument("--extension", type=Path, help="a built CUDA extension, to put into the package")
    parser.add_argument("--smoke", action="store_true", help="the first step: say whether the CUDA extension loads")
    parser.add_argument(
        "--dry-run",
        nargs="?",
        const="nvidia-h200",
        metavar="DEVICE",
        help="print the plan, on any machine; DEVICE is the name of the folder of results (default: %(const)s)",
    )
    harness.add_peers(parser)
    options = parser.parse_args(arguments)
    options.budget = options.budget or (QUICK_BUDGET if options.quick else BUDGET)
    options.commit = options.commit or _commit()
    if not options.commit and not options.smoke:
        parser.error("git names no commit here: say what is measured, COMMIT=<sha> (--commit)")
    if options.extension and not options.extension.is_file():
        parser.error(f"EXTENSION (--extension): {options.extension} does not exist; it must be a built extension")
    if options.reference_path and not options.reference_path.is_dir():
        parser.error(f"REFERENCE (--reference-path): {options.reference_path} is no folder")
    return options


def _commit() -> str | None:
    try:
        return records._commit()
    except (OSError, subprocess.SubprocessError):  # no git
        return None


if __name__ == "__main__":
    sys.exit(main())
