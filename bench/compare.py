"""Compares two results and lists what got slower: ``python -m bench.compare A B``.

A and B are folders ``bench/results/<device>`` or single files in them. ``PATH@COMMIT`` selects the rows of one commit,
which is named by its first digits. Without a commit, each file counts with the commit that was measured last.

B is better where a ratio is above 1. The range in brackets covers the spread of both, from their 20th to their 80th
percentiles: if it includes 1, the difference is within the spread. The exit status is 1 if a row is slower by more than
its spread and the threshold, 2 if there is nothing to compare, otherwise 0.
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
ENVIRONMENT = ("commit", "date", "gpu", "cpu", "threads", "torch", "triton", "python", *records.PACKAGES)


class Ratio(NamedTuple):
    """How many times better B is than A, and the range that the spreads of both allow."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        return "slower" if self.high < 1 else "faster" if self.low > 1 else "within the spread"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.compare", description=__doc__)
    parser.add_argument("a", metavar="A", help="old results: a folder or a .jsonl file, with or without @COMMIT")
    parser.add_argument("b", metavar="B", help="new results")
    parser.add_argument(
        "--threshold", type=float, default=0.05, help="the loss that is accepted (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        ratios = compare_rows(load_rows(options.a), load_rows(options.b))
    except (OSError, ValueError, KeyError) as error:
        what = f"a row lacks {error}" if isinstance(error, KeyError) else error
        print(f"bench.compare: {what}", file=sys.stderr)
        return 2
    too_slow = [key for key, r in ratios.items() if r.verdict == "slower" and r.value < 1 - options.threshold]
    for key in sorted(too_slow, key=lambda key: ratios[key]):
        print(f"SLOWER by more than {options.threshold:.3g}: {_name(key)}: {ratios[key].value:.3f}")
    return int(bool(too_slow))


def load_rows(name: str) -> dict[Key, Row]:
    """The rows of `PATH` or `PATH@COMMIT` by what they measure. ValueError if there are none."""
    file_or_folder, commit = (name, "") if Path(name).exists() or "@" not in name else name.rsplit("@", 1)
    path = Path(file_or_folder)
    # steps.jsonl belongs to bench.gpu and holds no results.
    files = sorted(set(path.glob("*.jsonl")) - {path / "steps.jsonl"}) if path.is_dir() else [path]
    every = [row for rows in map(records.read, files) for row in (rows if commit else records.newest_commit(rows))]
    commits = {str(row["commit"]) for row in every}
    matching = {commit} & commits or {each for each in commits if each.startswith(commit)}
    if commit and len(matching) != 1:
        raise ValueError(f"{name}: {len(matching)} commits start with this; choose from {', '.join(sorted(commits))}")
    if not every:
        raise ValueError(f"{path} does not exist or holds no rows")
    return {tuple(row[key] for key in IDENTITY): row for row in every if str(row["commit"]) in matching}


def compare_rows(a: dict[Key, Row], b: dict[Key, Row]) -> dict[Key, Ratio]:
    """Prints the ratio of each row in both, and which rows are only in one. ValueError if no row can be compared."""
    _print_differences(a, b)
    ratios = {}
    for key in a | b:
        sides = [side for side, rows in (("A", a), ("B", b)) if rows.get(key, {}).get("value")]
        if len(sides) < 2:
            print(f"not compared: {_name(key)}: {f'only {sides[0]} has a value' if sides else 'no value'}")
        elif a[key]["unit"] != b[key]["unit"]:
            print(f"not compared: {_name(key)}: {a[key]['unit']} in A, {b[key]['unit']} in B")
        else:
            r = ratios[key] = row_ratio_range(a[key], b[key])
            values = f"{a[key]['value']:.3f} -> {b[key]['value']:.3f} {a[key]['unit']}"
            print(f"{_name(key)}: {values}, {r.value:.3f} ({r.low:.3f} to {r.high:.3f}), {r.verdict}")
    if not ratios:
        raise ValueError("A and B have no row in common that can be compared")
    _print_means(ratios)
    return ratios


def row_ratio_range(old: Row, new: Row) -> Ratio:
    """How many times better the new row is, with its range. A row that was measured once has no spread."""
    better, base = (old, new) if old["unit"] in records.LESS_IS_BETTER else (new, old)
    low, high = ([row["value"] if row[key] is None else row[key] for row in (better, base)] for key in ("p20", "p80"))
    return Ratio(better["value"] / base["value"], low[0] / high[1], high[0] / low[1])


def _print_differences(a: dict[Key, Row], b: dict[Key, Row]) -> None:
    """Prints the commits, hardware and versions that differ."""
    for name in ENVIRONMENT:
        old, new = (", ".join(sorted({str(records.lookup(row, name)) for row in rows.values()})) for rows in (a, b))
        if old != new:
            print(f"NOT THE SAME: {name}: {old} in A, {new} in B")


def _name(key: Key) -> str:
    """The parts that are not null: `throughput dinov2_vits14 224 8 all fp32 dinov2_fast eager`."""
    return " ".join(str(part) for part in key if part is not None)


def _print_means(ratios: dict[Key, Ratio]) -> None:
    """Prints how many rows got slower, and means by task and implementation, which show a drift of the machine."""
    groups: dict[str, list[float]] = {}
    for (task, *_, implementation, _mode), r in ratios.items():
        groups.setdefault(f"{task}, {implementation}", []).append(r.value)
    for name, values in sorted(groups.items()):
        print(f"{name}: geometric mean {statistics.geometric_mean(values):.3f} of {len(values)} rows")
    counts = Counter(r.verdict for r in ratios.values())
    print(", ".join(f"{counts[verdict]} {verdict}" for verdict in ("slower", "within the spread", "faster")))


if __name__ == "__main__":
    sys.exit(main())
