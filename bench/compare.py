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
import json
import math
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import records

Row = dict[str, Any]

IDENTITY = tuple(key for key in records.IDENTITY if key != "commit")
HARDWARE_AND_VERSIONS = ("gpu", "cpu", "threads", "torch", "triton", "python", *records.PACKAGES)
MORE_IS_BETTER = ("images",)  # and every unit that ends with /s
LESS_IS_BETTER = ("s", "ms", "us", "bytes", "MiB", "GiB")


@dataclass(frozen=True)
class Ratio:
    """How many times better B is than A, with the range that the spreads of both allow."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        if self.high < 1:
            return "slower"
        return "faster" if self.low > 1 else "within the spread"


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        a, b = load(options.a), load(options.b)
    except (OSError, ValueError) as error:
        print(f"bench.compare: {error}", file=sys.stderr)
        return 2
    _print_sides(options, a, b)
    pairs = {key: (a[key], b[key]) for key in a if key in b}
    reasons = {key: reason for key, pair in pairs.items() if (reason := not_comparable(*pair))}
    ratios = {key: ratio(*pair) for key, pair in pairs.items() if key not in reasons}
    _print_rows(pairs, ratios)
    for key, reason in reasons.items():
        print(f"not compared: {_name(key)}: {reason}")
    for side, rows, other in (("A", a, b), ("B", b, a)):
        for key in rows:
            if key not in other:
                print(f"only in {side}: {_name(key)}")
    if not ratios:
        print("bench.compare: A and B have no row in common that can be compared", file=sys.stderr)
        return 2
    _print_means(ratios)
    return _print_verdict(ratios, options.threshold)


def load(name: str) -> dict[tuple[Any, ...], Row]:
    """The rows of a folder or file, `PATH` or `PATH@COMMIT`, by what they measure.

    Raises:
        OSError: it does not exist or cannot be read.
        ValueError: it holds no rows, one that is not a result, or none or several commits of that name.
    """
    path, commit = Path(name), None
    if not path.exists() and "@" in name:
        before, _, commit = name.rpartition("@")
        path = Path(before)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    # steps.jsonl is bench.gpu's, and holds no results
    files = sorted(set(path.glob("*.jsonl")) - {path / "steps.jsonl"}) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} holds no .jsonl file")
    contents = [rows for file in files if (rows := _read(file))]
    if not contents:
        raise ValueError(f"{path} holds no rows")
    if commit is None:
        wanted = [_measured_last(rows) for rows in contents]
    else:
        wanted = [_resolve(path, commit, {_commit(row) for rows in contents for row in rows})] * len(contents)
    chosen = [row for rows, kept in zip(contents, wanted, strict=True) for row in rows if _commit(row) == kept]
    return {tuple(row[key] for key in IDENTITY): row for row in chosen}


def ratio(old: Row, new: Row) -> Ratio:
    """The new row against the old one; more than 1 is better."""
    better, base = (old, new) if old["unit"] in LESS_IS_BETTER else (new, old)
    (better_low, better_high), (base_low, base_high) = _spread(better), _spread(base)
    return Ratio(better["value"] / base["value"], better_low / base_high, better_high / base_low)


def not_comparable(old: Row, new: Row) -> str | None:
    """Why there is no ratio of two rows, or None."""
    missing = [side for side, row in (("A", old), ("B", new)) if row["value"] is None]
    if missing:
        return f"no value in {' and '.join(missing)}"
    if old["unit"] != new["unit"]:
        return f"{old['unit']} in A, {new['unit']} in B"
    unit = str(old["unit"])
    if not (unit.endswith("/s") or unit in MORE_IS_BETTER or unit in LESS_IS_BETTER):
        return f"whether more {unit} is better is not known"
    return None


def _spread(row: Row) -> tuple[float, float]:
    """p20 and p80; the value itself where a row was measured once."""
    low, high = (row["value"] if row[key] is None else row[key] for key in ("p20", "p80"))
    return low, high


def _read(file: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}: not JSON: {error}") from error
        if problem := _problem(row):
            raise ValueError(f"{file}, line {number}: not a result: {problem}")
        rows.append(row)
    return rows


def _problem(row: Any) -> str | None:
    if not isinstance(row, dict):
        return "it is no JSON object"
    if lacking := [key for key in records.KEYS if key not in row]:
        return f"it lacks {', '.join(lacking)}"
    for key in ("value", "p20", "p80"):
        number = row[key]
        if number is not None and not (isinstance(number, int | float) and 0 < number < math.inf):
            return f"{key} is {number!r}, not a positive number"
    if not isinstance(row["versions"], dict | None):
        return "versions is no JSON object"
    for key in (*records.IDENTITY, "unit", "date"):
        if not isinstance(row[key], str | int | float | None):
            return f"{key} is {row[key]!r}"
    return None


def _commit(row: Row) -> str:
    return row["commit"] or "unknown"


def _measured_last(rows: list[Row]) -> str:
    return _commit(max(enumerate(rows), key=lambda numbered: (numbered[1]["date"] or "", numbered[0]))[1])


def _resolve(path: Path, wanted: str, commits: set[str]) -> str:
    """The one commit whose first digits are given. One measured with changed code is asked for as `digits-dirty`."""
    digits, dirty = wanted.removesuffix("-dirty"), wanted.endswith("-dirty")
    found = [c for c in commits if c.startswith(digits) and c.endswith("-dirty") == dirty]
    if len(found) != 1:
        problem = "several commits begin so" if found else "no such commit"
        raise ValueError(f"{path}@{wanted}: {problem}; there are {', '.join(sorted(commits))}")
    return found[0]


def _print_sides(options: argparse.Namespace, a: dict[tuple[Any, ...], Row], b: dict[tuple[Any, ...], Row]) -> None:
    """Where both sides come from, and which hardware and versions are not the same."""
    for side, path, rows in (("A", options.a, a), ("B", options.b, b)):
        groups = Counter((row["task"], _short(_commit(row)), row["date"]) for row in rows.values())
        held = ", ".join(f"{task} {commit} of {date} ({count} rows)" for (task, commit, date), count in groups.items())
        print(f"{side}: {path}: {held}")
    for name in HARDWARE_AND_VERSIONS:
        there = [sorted({_fact(row, name) for row in rows.values()}) for rows in (a, b)]
        if there[0] != there[1]:
            print(f"NOT THE SAME: {name}: {', '.join(there[0])} in A, {', '.join(there[1])} in B")
    print()


def _short(commit: str) -> str:
    digits, dirty, _ = commit.partition("-dirty")
    return digits[:8] + dirty


def _fact(row: Row, name: str) -> str:
    value = row[name] if name in row else (row["versions"] or {}).get(name)
    return "none" if value is None else str(value)


def _name(key: tuple[Any, ...]) -> str:
    """The parts that apply: `throughput dinov2_vits14 224 px batch 8 all fp32 dinov2_fast eager`."""
    units = {"resolution": "{} px", "batch": "batch {}"}
    return " ".join(
        units.get(part, "{}").format(value) for part, value in zip(IDENTITY, key, strict=True) if value is not None
    )


def _print_rows(pairs: dict[tuple[Any, ...], tuple[Row, Row]], ratios: dict[tuple[Any, ...], Ratio]) -> None:
    width = max((len(_name(key)) for key in ratios), default=0)
    for key, r in ratios.items():
        old, new = pairs[key]
        print(
            f"{_name(key):{width}}  {old['value']:10.3f} -> {new['value']:10.3f} {old['unit']:8}"
            f"  {r.value:.3f} ({r.low:.3f} to {r.high:.3f})  {r.verdict}"
        )


def _print_means(ratios: dict[tuple[Any, ...], Ratio]) -> None:
    """A geometric mean for each task, then for each of its implementations: a drift of the machine moves them all."""
    task_at, implementation_at = IDENTITY.index("task"), IDENTITY.index("implementation")
    print()
    for task in dict.fromkeys(key[task_at] for key in ratios):
        groups: dict[str, list[float]] = {}
        for key, r in ratios.items():
            if key[task_at] == task:
                groups.setdefault(key[implementation_at], []).append(r.value)
        parts = ", ".join(f"{name} {statistics.geometric_mean(values):.3f}" for name, values in groups.items())
        together = [value for values in groups.values() for value in values]
        print(f"{task}: geometric mean {statistics.geometric_mean(together):.3f} of {len(together)} rows ({parts})")


def _print_verdict(ratios: dict[tuple[Any, ...], Ratio], threshold: float) -> int:
    counts = Counter(r.verdict for r in ratios.values())
    print(", ".join(f"{counts[verdict]} {verdict}" for verdict in ("slower", "within the spread", "faster")))
    too_slow = {key: r for key, r in ratios.items() if r.verdict == "slower" and r.value < 1 - threshold}
    for key, r in sorted(too_slow.items(), key=lambda item: item[1].value):
        print(f"SLOWER by more than {threshold:.3g}: {_name(key)}: {r.value:.3f}")
    return int(bool(too_slow))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", metavar="A", help="the old results: a folder, a .jsonl file, or either with @COMMIT")
    parser.add_argument("b", metavar="B", help="the new results")
    parser.add_argument(
        "--threshold", type=float, default=0.05, help="the loss that is let pass (default: %(default)s, which is 5 %%)"
    )
    options = parser.parse_args(arguments)
    if not 0 <= options.threshold < 1:
        parser.error(f"--threshold must be from 0 to below 1, not {options.threshold}")
    return options


if __name__ == "__main__":
    sys.exit(main())
