"""Benchmark results as JSON lines, one file for each device and task: ``bench/results/<device>/<task>.jsonl``.

A line is a row: what was measured, its value, the versions and the commit. Every row has every key, null where it does
not apply. A row that is measured again at the same commit replaces the old one.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

from dinov2_fast.ops.dispatch import BackendError

Row = dict[str, Any]  # by the keys below
Item = TypeVar("Item")

RESULTS = Path(__file__).parent / "results"
IDENTITY = ("task", "model", "resolution", "batch", "output", "precision", "implementation", "mode", "commit")
MEASURED = ("value", "unit", "p20", "p80", "floor_share", "outputs_max_error")
KEYS = (*IDENTITY[:-1], *MEASURED, "gpu", "torch", "triton", "versions", "commit", "date")
PACKAGES = ("numpy", "transformers", "timm", "torchvision", "xformers", "onnxruntime", "openvino")
LESS_IS_BETTER = ("ms", "us", "MiB")  # units; in all others more is better

NOT_MEASURED = "not_measured"  # the key in `versions` that says why a row has no value
FAILURE_KINDS = {
    torch.OutOfMemoryError: "out of memory",
    AssertionError: "refused",  # the results are wrong
    ValueError: "refused",
    NotImplementedError: "cannot run here",
    BackendError: "cannot run here",
}
# How the reason begins if an implementation is not installed, and if it left the device unusable.
MISSING_PREFIX = "missing: "
LOST_PREFIX = "failed: the device could not be used after this: "
EXIT_RETRY = 75  # exit status (EX_TEMPFAIL) of a benchmark that lost the device: a new process can measure the rest
SENSOR_SECONDS = 5.0  # how long a reading of the sensors is reused
SENSORS = {"sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem"}  # by the names of nvidia-smi
SENSORS |= {"temperature_c": "temperature.gpu", "power_w": "power.draw"}


class DeviceLost(Exception):
    """An error after which this process can run nothing on the GPU, such as an illegal memory access.

    `row` is that of the implementation that caused it.
    """

    def __init__(self, row: Row) -> None:
        super().__init__(reason(row))
        self.row = row


class Recorder:
    """Saves the rows of a task as soon as they are measured, so that a later failure loses none."""

    def __init__(self, task: str, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.folder: Path = options.results / device_folder(self.device)
        self.path = self.folder / f"{task}.jsonl"
        self.rows: list[Row] = []
        self.common = environment(self.device, options.commit)
        self.lost, self.writes, self._task = False, options.write, task
        self._known = read(self.path) if options.resume else []

    def __str__(self) -> str:
        """Hardware, threads, torch, commit."""
        versions = self.common["versions"]
        name = self.common["gpu"] or f"{versions['cpu']}, {versions['threads']} threads"
        return f"{name}, torch {self.common['torch']}, commit {self.common['commit']}"

    def keep(self, rows: list[Row]) -> None:
        """Adds rows. Missing keys get the values of the whole run, or null."""
        state = sensors(self.device)
        for row in rows:
            full = dict.fromkeys(KEYS) | {"task": self._task} | self.common | row
            full["versions"] = self.common["versions"] | state | (row.get("versions") or {})
            self.rows.append(full)
        if self.writes:
            write(self.path, self.rows)

    @property
    def measured(self) -> list[Row]:
        """The rows so far, including those of the file that is written or resumed."""
        return read(self.path) if self.writes else self._known + self.rows

    def has(self, **wanted: Any) -> bool:
        """When resuming: whether this commit has a row with these keys, of an implementation that was installed."""
        return any(not is_missing(row) for row in self._known_rows(wanted))

    def lost_in(self, **wanted: Any) -> list[Row]:
        """When resuming: the rows of this commit with these keys that lost the device. They must not be tried again."""
        return [row for row in self._known_rows(wanted) if (reason(row) or "").startswith(LOST_PREFIX)]

    def _known_rows(self, wanted: dict[str, Any]) -> list[Row]:
        wanted = wanted | {"commit": self.common["commit"]}
        return [row for row in self._known if all(row[key] == value for key, value in wanted.items())]

    @contextlib.contextmanager
    def stop_when_lost(self) -> Iterator[None]:
        """Leaves the block when the device is lost, and keeps the row of the implementation that lost it."""
        try:
            yield
        except DeviceLost as lost:
            self.lost = True
            self.keep([lost.row])
            advice = "Run the command again with --resume: it measures the rest without what lost the device."
            print(
                f"{lost.row['implementation']} {lost.row.get('mode') or ''}: {lost}", advice, sep="\n", file=sys.stderr
            )

    def finish(self) -> int:
        """Prints where the rows are and how many were refused or failed. Returns the exit status."""
        if self.writes:
            print(f"wrote {self.path}")
        if failed := sum(map(is_failure, self.rows)):
            print(f"{failed} rows were refused or failed.", file=sys.stderr)
        return EXIT_RETRY if self.lost else int(failed > 0)


def not_measured(reason: str) -> Row:
    """The keys of a row without a value."""
    return {"value": None, "versions": {NOT_MEASURED: reason}}


def missing(reason: str) -> Row:
    """The keys of a row whose implementation is not installed. It is tried again when a benchmark resumes."""
    return not_measured(f"{MISSING_PREFIX}{reason}")


def is_missing(row: Row) -> bool:
    return (reason(row) or "").startswith(MISSING_PREFIX)


def is_failure(row: Row) -> bool:
    return (reason(row) or "").startswith(("refused", "failed"))


def reason(row: Row) -> str | None:
    """Why a row has no value, or None."""
    return (row.get("versions") or {}).get(NOT_MEASURED)


def record_failure(row: Row, exception: Exception, device: torch.device) -> None:
    """Writes into the row of an implementation that this exception stopped it.

    Raises:
        DeviceLost: this process can run nothing on the device any more, so all others would fail as well.
    """
    lost = is_lost(device)
    kind = next((kind for error, kind in FAILURE_KINDS.items() if isinstance(exception, error)), "failed")
    prefix = LOST_PREFIX if lost else f"{kind}: "
    row |= not_measured(prefix + (str(exception) or type(exception).__name__).splitlines()[0])
    if lost:
        raise DeviceLost(row) from exception


def is_lost(device: torch.device) -> bool:
    """Whether a GPU answers every call of this process with an error. The first error may belong to an earlier call."""
    for _ in range(2 if device.type == "cuda" else 0):
        with contextlib.suppress(Exception):  # the class of the error depends on the version of torch
            torch.cuda.synchronize(device)
            return False
    return device.type == "cuda"


def best_row(rows: Iterable[Row]) -> Row | None:
    """The best of rows with one unit, None if none has a value."""
    measured = [row for row in rows if row["value"] is not None]
    return max(measured, key=lambda row: row["value"] * (-1 if row["unit"] in LESS_IS_BETTER else 1), default=None)


def row_ratio(row: Row, other: Row) -> float:
    """How many times better a row is than another."""
    better, base = (other, row) if row["unit"] in LESS_IS_BETTER else (row, other)
    return better["value"] / base["value"]


def grouped(items: Iterable[Item], key: Callable[[Item], Any]) -> dict[Any, list[Item]]:
    """The items by their key, in the order of the first item of each."""
    groups: dict[Any, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def newest_commit(rows: list[Row]) -> list[Row]:
    """The rows of the commit that was measured last."""
    last = max(enumerate(rows), key=lambda numbered: (numbered[1]["date"] or "", numbered[0]), default=None)
    return [row for row in rows if last and row["commit"] == last[1]["commit"]]


def lookup(row: Row, name: str) -> Any:
    """The value of a key of a row or of its `versions`."""
    return row[name] if name in row else (row["versions"] or {}).get(name)


def environment(device: torch.device, commit: str | None = None) -> Row:
    """The keys that all rows of a run share: hardware, versions, commit, date."""
    versions: dict[str, Any] = {name: version(name) for name in PACKAGES}
    versions |= {"python": platform.python_version(), "cpu": _cpu_name(), "threads": torch.get_num_threads()}
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "triton": version("triton"),
        "versions": versions,
        "commit": commit or current_commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def version(package: str) -> str | None:
    """The installed version of a package, None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def sensors(device: torch.device) -> dict[str, float]:
    """Clocks, temperature and power of a GPU. Empty on a CPU, or if they cannot be read.

    A reading is reused for SENSOR_SECONDS: starting nvidia-smi takes as long as measuring a row of an op.
    """
    return dict(_sensors(device, int(time.monotonic() // SENSOR_SECONDS))) if device.type == "cuda" else {}


@functools.lru_cache(maxsize=1)
def _sensors(device: torch.device, period: int) -> dict[str, float]:
    try:
        uuid = torch.cuda.get_device_properties(device).uuid
        query = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(SENSORS.values())}"]
        query += ["--format=csv,noheader,nounits"]
        output = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout
        return {name: float(value) for name, value in zip(SENSORS, output.split(","), strict=True)}
    except (OSError, subprocess.SubprocessError, ValueError, RuntimeError):
        return {}


def device_folder(device: torch.device) -> str:
    """The name of the folder of a device's results: "cpu", "nvidia-h200", …"""
    return torch.cuda.get_device_name(device).lower().replace(" ", "-") if device.type == "cuda" else "cpu"


def read(path: Path) -> list[Row]:
    """The rows of a file, none if it does not exist. ValueError if a line is not JSON."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} has a line that is not JSON: {error}") from error


def write(path: Path, rows: list[Row]) -> None:
    """Adds rows to a file. A row replaces one with the same values of the keys IDENTITY. ValueError for wrong keys."""
    for row in rows:
        if set(row) != set(KEYS):
            raise ValueError(f"A row must have the keys {KEYS}; missing or unknown: {sorted(set(row) ^ set(KEYS))}.")
    kept = {tuple(row[key] for key in IDENTITY): row for row in [*read(path), *rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text("".join(json.dumps({key: row[key] for key in KEYS}) + "\n" for row in kept.values()))
    part.replace(path)  # a run may be stopped at any moment: the file is written completely or not at all


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def current_commit() -> str | None:
    """The commit of the checkout, with "-dirty" if its code is changed; None without git or outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "dinov2_fast", "kernels", "csrc")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
