"""What got slower between two result sets: ``python -m bench.compare A B``.

A and B are folders ``bench/results/<device>``, or single files of them. ``PATH@COMMIT`` takes the rows of one commit
(its first digits are enough); without it each file gives those of the commit measured last in it.

Each row's ratio is turned so that more than 1 means B is better: B / A for images/s, A / B for ms and us. The range in
brackets runs from B's slow percentile against A's fast one to the reverse. If it holds 1, the two spreads (20 to 80 %)
overlap, and the difference is within the spread.

The exit status is 1 if a row is slower beyond its spread and by more than the threshold, 2 if there is nothing to
compare (bad arguments, a bad file, no row in common), otherwise 0.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from bench import records
from bench.records import Row

Key = tuple[Any, ...]
IDENTITY = tuple(key for key in records.IDENTITY if key != "commit")
ENVIRONMENT = ("gpu", "cpu", "threads", "torch", "triton", "python", *records.PACKAGES)


class Ratio(NamedTuple):
    """How many times better B is than A, with the range that the spreads of both allow."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f}), {self.verdict}"

    @property
    def verdict(self) -> str:
        return "slower" if self.high < 1 else "faster" if self.low > 1 else "within the spread"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.compare", description=__doc__)
    parser.add_argument("a", metavar="A", help="the old results: a folder, a .jsonl file, or either with @COMMIT")
    parser.add_argument("b", metavar="B", help="the new results")
    parser.add_argument("--threshold", type=float, default=0.05, help="the loss that is let pass (default: 0.05)")
    options = parser.parse_args(arguments)
    if not 0 <= options.threshold < 1:
        parser.error(f"--threshold must be from 0 to below 1, not {options.threshold}")
    try:
        ratios = compared(load(options.a), load(options.b))
    except (OSError, ValueError) as error:
        print(f"bench.compare: {error}", file=sys.stderr)
        return 2
    _print_means(ratios)
    counts = Counter(r.verdict for r in ratios.values())
    print(", ".join(f"{counts[verdict]} {verdict}" for verdict in ("slower", "within the spread", "faster")))
    too_slow = [key for key, r in ratios.items() if r.verdict == "slower" and r.value < 1 - options.threshold]
    for key in sorted(too_slow, key=lambda key: ratios[key]):
        print(f"SLOWER by more than {options.threshold:.3g}: {_name(key)}: {ratios[key].value:.3f}")
    return int(bool(too_slow))


def load(name: str) -> dict[Key, Row]:
    """The rows of `PATH` or `PATH@COMMIT`, by what they measure; OSError or ValueError if there are none."""
    place, commit = (name, "") if Path(name).exists() or "@" not in name else name.rsplit("@", 1)
    path = Path(place)
    # steps.jsonl is bench.gpu's, and holds no results
    files = sorted(set(path.glob("*.jsonl")) - {path / "steps.jsonl"}) if path.is_dir() else [path]
    every = [row for file in files for row in (_read(file) if commit else records.newest(_read(file)))]
    if commit:
        wanted = _resolve(name, commit, {row["commit"] for row in every})
        every = [row for row in every if row["commit"] == wanted]
    if not every:
        raise ValueError(f"{path} does not exist or holds no rows")
    return {tuple(row[key] for key in IDENTITY): row for row in every}


def _read(file: Path) -> list[Row]:
    try:
        rows = records.read(file)
    except ValueError as error:
        raise ValueError(f"{file} holds a line that is not JSON: {error}") from error
    if wrong := [number for number, row in enumerate(rows, 1) if not set(records.KEYS) <= set(row)]:
        raise ValueError(f"{file}, line {wrong[0]}, is not a result")
    return [row | {"commit": row["commit"] or "unknown"} for row in rows]


def _resolve(name: str, wanted: str, commits: set[str]) -> str:
    """The one commit whose first digits are given. One measured with changed code is asked for as `digits-dirty`."""
    digits, dirty = wanted.removesuffix("-dirty"), wanted.endswith("-dirty")
    found = [c for c in commits if c.startswith(digits) and c.endswith("-dirty") == dirty]
    if len(found) != 1:
        problem = "several commits begin so" if found else "no such commit"
        raise ValueError(f"{name}: {problem}; there are {', '.join(sorted(commits))}")
    return found[0]


def compared(a: dict[Key, Row], b: dict[Key, Row]) -> dict[Key, Ratio]:
    """Prints what is in both and what is not; ValueError if no row can be compared."""
    _print_sides(a, b)
    ratios = {}
    for key, old, new in ((key, a[key], b[key]) for key in a if key in b):
        missing = " and ".join(side for side, row in (("A", old), ("B", new)) if not row["value"])
        if missing or old["unit"] != new["unit"]:
            why = f"no value in {missing}" if missing else f"{old['unit']} in A, {new['unit']} in B"
            print(f"not compared: {_name(key)}: {why}")
        else:
            r = ratios[key] = ratio(old, new)
            print(f"{_name(key)}: {old['value']:.3f} -> {new['value']:.3f} {old['unit']}, {r}")
    for side, rows, other in (("A", a, b), ("B", b, a)):
        for key in (key for key in rows if key not in other):
            print(f"only in {side}: {_name(key)}")
    if not ratios:
        raise ValueError("A and B have no row in common that can be compared")
    return ratios


def ratio(old: Row, new: Row) -> Ratio:
    """The new row against the old one; more than 1 is better. A row that was measured once has no spread."""
    better, base = (old, new) if old["unit"] in records.LESS_IS_BETTER else (new, old)
    low, high = ([row["value"] if row[key] is None else row[key] for row in (better, base)] for key in ("p20", "p80"))
    return Ratio(better["value"] / base["value"], low[0] / high[1], high[0] / low[1])


def _print_sides(a: dict[Key, Row], b: dict[Key, Row]) -> None:
    """Where both sides come from, and which hardware and versions are not the same."""
    for side, rows in (("A", a), ("B", b)):
        groups = Counter((row["task"], records.short(row["commit"]), row["date"]) for row in rows.values())
        held = ", ".join(f"{task} {commit} of {date} ({count} rows)" for (task, commit, date), count in groups.items())
        print(f"{side}: {held}")
    for name in ENVIRONMENT:
        old, new = (", ".join(sorted({str(records.fact(row, name)) for row in rows.values()})) for rows in (a, b))
        if old != new:
            print(f"NOT THE SAME: {name}: {old} in A, {new} in B")
    print()


def _name(key: Key) -> str:
    """The parts that apply: `throughput dinov2_vits14 224 px batch 8 all fp32 dinov2_fast eager`."""
    units = {"resolution": "{} px", "batch": "batch {}"}
    parts = dict(zip(IDENTITY, key, strict=True))
    return " ".join(units.get(part, "{}").format(value) for part, value in parts.items() if value is not None)


def _print_means(ratios: dict[Key, Ratio]) -> None:
    """For each task, and for each implementation in it, since a drift of the machine moves them all."""
    groups: dict[str, list[float]] = {}
    for key, r in ratios.items():
        task, implementation = key[IDENTITY.index("task")], key[IDENTITY.index("implementation")]
        for name in (task, f"{task}, {implementation}"):
            groups.setdefault(name, []).append(r.value)
    for name, values in sorted(groups.items()):
        print(f"{name}: geometric mean {statistics.geometric_mean(values):.3f} of {len(values)} rows")


if __name__ == "__main__":
    sys.exit(main())
