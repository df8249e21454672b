"""Benchmark results as JSON lines, one file for each device and task: ``bench/results/<device>/<task>.jsonl``.

Every row has every key, null where it does not apply. A row measured again at the same commit replaces the old one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
KEYS = (
    "task",
    "model",
    "resolution",
    "batch",
    "output",
    "precision",
    "implementation",
    "mode",
    "value",
    "unit",
    "p20",
    "p80",
    "floor_share",
    "outputs_max_error",
    "gpu",
    "torch",
    "triton",
    "versions",
    "commit",
    "date",
)
IDENTITY = ("task", "model", "resolution", "batch", "output", "precision", "implementation", "mode", "commit")
PACKAGES = ("numpy", "transformers", "timm", "torchvision", "xformers")


NOT_MEASURED = "not_measured"  # the key, among a row's versions, of the reason why it has no value
KINDS = {torch.OutOfMemoryError: "out of memory", ValueError: "refused", NotImplementedError: "cannot run here"}
MISSING = "missing: "  # the beginning of that reason where an implementation is not there
SENSORS = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "temperature_c": "temperature.gpu",
    "power_w": "power.draw",
}


class Recorder:
    """Keeps the rows of a task, at once, so that what fails later costs nothing that was measured.

    Args:
        task: the name of the file.
        options: those of :func:`bench.options.parser`.
    """

    def __init__(self, task: str, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.folder: Path = options.results / device_folder(self.device)
        self.path = self.folder / f"{task}.jsonl"
        self.rows: list[dict[str, Any]] = []
        self.common = environment(self.device, options.commit)
        self._task, self._write = task, options.write
        self._known = read(self.path) if options.resume else []

    def __str__(self) -> str:
        """The hardware and the versions, for a person."""
        versions = self.common["versions"]
        name = self.common["gpu"] or f"{versions['cpu']}, {versions['threads']} threads"
        return f"{name}, torch {self.common['torch']}, commit {self.common['commit']}"

    def keep(self, rows: list[dict[str, Any]]) -> None:
        """Adds rows; keys that they lack are null, or the same for the whole run."""
        state = sensors(self.device)
        for row in rows:
            full = dict.fromkeys(KEYS) | {"task": self._task} | self.common | row
            full["versions"] = self.common["versions"] | state | (row.get("versions") or {})
            self.rows.append(full)
        if self._write:
            write(self.path, self.rows)

    def has(self, **wanted: Any) -> bool:
        """Whether, when resuming, a row with these keys is there already for this commit, of what is not missing."""
        wanted["commit"] = self.common["commit"]
        return any(
            all(row[key] == value for key, value in wanted.items()) for row in self._known if not is_missing(row)
        )

    def known(self, task: str) -> list[dict[str, Any]]:
        """The rows of another task on this device, of whatever commit."""
        return read(self.folder / f"{task}.jsonl")

    def finish(self) -> int:
        """Says where the rows are and how many were refused or failed; the exit status."""
        if self._write:
            print(f"wrote {self.path}")
        wrong = [row for row in self.rows if (reason(row) or "").startswith(("refused", "failed"))]
        if wrong:
            print(f"{len(wrong)} rows were refused or failed.", file=sys.stderr)
        return int(bool(wrong))


def not_measured(reason: str) -> dict[str, Any]:
    """What a row holds in place of a value."""
    return {"value": None, "versions": {NOT_MEASURED: reason}}


def stopped(exception: Exception) -> dict[str, Any]:
    """The same for one that an exception stopped."""
    kind = KINDS.get(type(exception), "failed")
    return not_measured(f"{kind}: {(str(exception) or type(exception).__name__).splitlines()[0]}")


def missing(reason: str) -> dict[str, Any]:
    """The same for an implementation that is not there at all, but may be the next time."""
    return not_measured(f"{MISSING}{reason}")


def is_missing(row: dict[str, Any]) -> bool:
    return (reason(row) or "").startswith(MISSING)


def reason(row: dict[str, Any]) -> str | None:
    """Why a row has no value."""
    return (row.get("versions") or {}).get(NOT_MEASURED)


def environment(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """The keys that are the same for every row of a run: hardware, versions, commit, date."""
    versions: dict[str, Any] = {name: version(name) for name in PACKAGES}
    versions |= {"python": platform.python_version(), "cpu": _cpu_name(), "threads": torch.get_num_threads()}
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "triton": version("triton"),
        "versions": versions,
        "commit": commit or _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def version(package: str) -> str | None:
    """The installed version of a package, None if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def sensors(device: torch.device) -> dict[str, Any]:
    """Clocks, temperature and power of a GPU at this moment; nothing on a CPU or where they cannot be read."""
    if device.type != "cuda":
        return {}
    uuid = torch.cuda.get_device_properties(device).uuid
    query = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(SENSORS.values())}"]
    try:
        output = subprocess.run(
            [*query, "--format=csv,noheader,nounits"], capture_output=True, text=True, check=True, timeout=10
        ).stdout
        return {name: float(value) for name, value in zip(SENSORS, output.split(","), strict=True)}
    except (OSError, subprocess.SubprocessError, ValueError):
        return {}


def device_folder(device: torch.device) -> str:
    """The folder of a device's results: "cpu", "nvidia-h200", …"""
    return torch.cuda.get_device_name(device).lower().replace(" ", "-") if device.type == "cuda" else "cpu"


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none if it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Adds rows to a file, replacing those of the same identity.

    Raises:
        ValueError: a row lacks a key or has one too many.
    """
    for row in rows:
        if set(row) != set(KEYS):
            raise ValueError(f"A row must have the keys {KEYS}; wrong: {sorted(set(row) ^ set(KEYS))}.")
    kept = {tuple(row[key] for key in IDENTITY): row for row in [*read(path), *rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text("".join(json.dumps({key: row[key] for key in KEYS}) + "\n" for row in kept.values()))
    part.replace(path)  # whole or not at all: a run may be stopped at any moment


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    """The commit of the checkout, with "-dirty" if its code is changed; None outside git."""
    git = ["git", "-C", str(Path(__file__).parents[1])]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return None
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", "dinov2_fast", "kernels", "csrc"],
        capture_output=True,
        text=True,
        check=True,
    )
    return head.stdout.strip() + ("-dirty" if changed.stdout else "")
