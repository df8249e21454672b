"""Runs the steps of ``make gpu``, each in a process of its own, within the minutes of a call."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from bench.gpu_plan import RESERVE_SECONDS, ROOT, GpuRun, Step, group_minutes, order_steps, steps_within
from bench.records import EXIT_RETRY

GRACE_SECONDS = 8.0  # between asking a step to stop and killing it
HANG_FACTOR = 1.5  # a step that takes this many times its minutes hangs
TINY_FACTOR = 3.0  # the minutes are those of a machine with a GPU; with --tiny the CPU may have two slow cores
LOG_BYTES = 1 << 19  # that are kept of a log: of a longer one, its ends
STATES = {0: "done", None: "cut off", EXIT_RETRY: "cut off"}  # by exit status; all others mean failed

Processes = set["subprocess.Popen[bytes]"]


class Outcome(NamedTuple):
    """How a step ended. `state`: done, failed, cut off, left out, or done before."""

    step: Step
    state: str
    seconds: float = 0.0
    note: str = ""

    def __str__(self) -> str:
        return f"{self.step.name:14} {self.state:11} {self.seconds:5.0f} s  {self.note}".rstrip()


def run_steps(steps: list[Step], gpu_run: GpuRun) -> list[Outcome]:
    """Runs the steps that are not done, within the budget. Writes a line and a log for each."""
    end = time.monotonic() + 60 * gpu_run.budget - RESERVE_SECONDS
    groups, done = order_steps(steps, gpu_run)
    outcomes = [Outcome(step, "done before") for step in done]
    for i, group in enumerate(groups):
        left = end - time.monotonic()
        coming = steps_within(groups[i:], left)
        stopped = any(outcome.step.required and outcome.state == "failed" for outcome in outcomes)
        if stopped or group[0] not in coming:
            outcomes += [Outcome(step, "left out") for step in group]
            continue
        names = " and ".join(step.name for step in group)
        print(f"{names}: {group_minutes(group):g} minutes, {left / 60:.1f} left", flush=True)
        ended = _run_group(group, gpu_run, coming, left)
        print(*ended, sep="\n")
        outcomes += ended
    return outcomes


def _run_group(group: list[Step], gpu_run: GpuRun, coming: list[Step], left: float) -> list[Outcome]:
    running: Processes = set()
    with ThreadPoolExecutor(len(group)) as pool:
        futures = [pool.submit(run_step, step, gpu_run, coming, left, running) for step in group]
        try:
            return [future.result() for future in futures]
        except KeyboardInterrupt:
            while not all(future.done() for future in futures):  # a thread may be about to start its process
                for process in list(running):
                    terminate(process)
                time.sleep(0.1)
            raise


def run_step(step: Step, gpu_run: GpuRun, coming: list[Step], left: float, running: Processes) -> Outcome:
    """Runs a step. After `left` seconds it is cut off; if it reaches its own limit before, it has failed."""
    begin, limit, log = time.monotonic(), HANG_FACTOR * 60 * step.minutes, gpu_run.log(step)
    limit *= TINY_FACTOR if gpu_run.tiny else 1
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", *gpu_run.command(step, coming)]
    status: int | None = EXIT_RETRY
    while status == EXIT_RETRY and (rest := begin + min(left, limit) - time.monotonic()) > 0:
        status = run_process(command, log, rest, running)
    seconds, state, note = time.monotonic() - begin, STATES.get(status, "failed"), last_line(log)
    if status is None and limit < left:
        state, note = "failed", f"stopped at its limit of {limit:.0f} s: {note}"
    line = {"step": step.name, "command": step.command, "commit": gpu_run.commit, "state": state}
    line |= {"seconds": round(seconds, 1), "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat()}
    with gpu_run.steps_file.open("a") as file:
        file.write(json.dumps(line) + "\n")
    data, half = log.read_bytes(), LOG_BYTES // 2
    if len(data) > LOG_BYTES:
        log.write_bytes(data[:half] + b"\n[... left out ...]\n" + data[-half:])
    return Outcome(step, state, seconds, note)


def run_process(command: list[str], log: Path, seconds: float, running: Processes) -> int | None:
    """Runs a process in a group of its own. Returns its exit status, or None if it took longer and was stopped."""
    with log.open("ab") as output:
        output.write(f"$ {shlex.join(command)}\n".encode())
        output.flush()
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, cwd=ROOT, env=step_environment(), start_new_session=True, **streams)
    running.add(process)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        terminate(process)
        running.discard(process)


def step_environment() -> dict[str, str]:
    """The environment of all steps: compiled kernels, no forced backend, and shared caches.

    Without TRITON_CACHE_DIR, Inductor would give Triton in its process another cache than the one that `warm` fills.
    """
    cache = Path(tempfile.gettempdir()) / "dinov2_fast-gpu"
    shared = {"TRITON_CACHE_DIR": str(cache / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
    kept = {name: os.environ[name] for name in os.environ if name not in ("TRITON_INTERPRET", "DINOV2_FAST_BACKEND")}
    return shared | kept | {"PYTHONUNBUFFERED": "1"}


def terminate(process: subprocess.Popen[bytes]) -> None:
    """Ends a step and all processes that it started. An interrupt comes first, so that pytest reports its results."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGINT)
            process.wait(GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(log: Path) -> str:
    """The last line of a log that is neither empty nor names a file that was written."""
    lines = [line.strip("= ") for line in log.read_text(errors="replace").splitlines()]
    return next(line for line in reversed(lines) if line and not line.startswith("wrote "))[:100]
