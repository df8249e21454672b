"""bench.compare: rows that got slower are named and fail, noise does not, and rows that are not compared are listed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import compare, records

WHAT = ("throughput", "dinov2_vits14", 224, 8, "all", "fp32", "dinov2_fast", "eager", "a" * 40)
ROW = dict.fromkeys(records.KEYS) | dict(zip(records.IDENTITY, WHAT, strict=True))
ROW |= {"unit": "images/s", "date": "2026-01-01"}
NAME = "throughput dinov2_vits14 224 {} all fp32 dinov2_fast eager"
CASES = [(90, 0.01, 0.05, 1, "slower"), (112, 0.01, 0.05, 0, "faster"), (97, 0.02, 0, 0, "within the spread")]


def _row(value: float = 100.0, spread: float = 0.01, **changes: Any) -> dict[str, Any]:
    return ROW | {"value": value, "p20": value * (1 - spread), "p80": value * (1 + spread)} | changes


def _compare(folder: Path, old: list[dict[str, Any]], new: list[dict[str, Any]], *options: str) -> int:
    records.write(folder / "old.jsonl", old)
    records.write(folder / "new.jsonl", new)
    return compare.main([str(folder / "old.jsonl"), str(folder / "new.jsonl"), *options])


def test_the_ratio_and_its_range() -> None:
    a, b = _row(100, p20=80, p80=125), _row(50, p20=40, p80=64)
    assert compare.row_ratio_range(a, b) == (50 / 100, 40 / 125, 64 / 80)
    assert compare.row_ratio_range(a | {"unit": "ms"}, b | {"unit": "ms"}) == (100 / 50, 80 / 64, 125 / 40)
    assert compare.row_ratio_range(_row(100, p20=None, p80=None), _row(99, p20=None, p80=None)) == (0.99, 0.99, 0.99)


@pytest.mark.parametrize(("new", "spread", "limit", "status", "verdict"), [*CASES, (97, 0, 0.05, 0, "slower")])
def test_only_a_loss_beyond_spread_and_threshold_fails(new, spread, limit, status, verdict, tmp_path, capsys) -> None:
    assert _compare(tmp_path, [_row(spread=spread)], [_row(new, spread)], f"--threshold={limit}") == status
    output = capsys.readouterr().out
    assert f"1 {verdict}" in output
    assert (f"SLOWER by more than {limit}: {NAME.format(8)}: 0.9" in output) == bool(status)


def test_rows_that_cannot_be_compared_are_listed(tmp_path, capsys) -> None:
    old = [_row(), _row(batch=2), _row(batch=3), _row(batch=4)]
    new = [_row(50, gpu="H200"), _row(batch=2) | {"value": None}, _row(batch=3, unit="ms"), _row(model=None)]
    assert _compare(tmp_path, old, new) == 1
    output = capsys.readouterr().out
    for line in (
        "NOT THE SAME: gpu: None in A, H200, None in B",
        f"{NAME.format(8)}: 100.000 -> 50.000 images/s, 0.500 (0.490 to 0.510), slower",
        f"not compared: {NAME.format(2)}: only A has a value",
        f"not compared: {NAME.format(3)}: images/s in A, ms in B",
        f"not compared: {NAME.format(4)}: only A has a value",
        "not compared: throughput 224 8 all fp32 dinov2_fast eager: only B has a value",
        "throughput, dinov2_fast: geometric mean 0.500 of 1 rows",
    ):
        assert f"{line}\n" in output


def test_a_commit_is_chosen_by_its_first_digits_or_is_the_newest(tmp_path) -> None:
    path = tmp_path / "me@home" / "throughput.jsonl"
    new, dirty = "b" * 40, "b" * 40 + "-dirty"
    for commit, value, date in ((new, 90, 3), (dirty, 50, 2), ("a" * 40, 100, 1), (None, 30, 1)):
        records.write(path, [_row(value, commit=commit, date=f"2026-01-0{date}")])
    records.write(path.with_name("ops.jsonl"), [_row(task="ops")])
    path.with_name("steps.jsonl").write_text('{"step": "tests"}\n')

    def values(name: str) -> list[float]:
        return [row["value"] for row in compare.load_rows(name).values()]

    assert values(f"{path}") == values(f"{path}@{new}") == [90]
    assert (values(f"{path}@{dirty}"), values(f"{path.parent}@aa")) == ([50], [100, 100])
    assert sorted(values(f"{path.parent}")) == [90, 100]
    with pytest.raises(ValueError, match=f"2 commits start with this; choose from None, {'a' * 40}, {new}, {dirty}"):
        compare.load_rows(f"{path}@b")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "bad.jsonl does not exist or holds no rows"),
        ("{", "bad.jsonl has a line"),
        ('{"step": 1}', "a row lacks"),
    ],
)
def test_a_bad_file_is_refused(text, expected, tmp_path, capsys) -> None:
    (tmp_path / "bad.jsonl").write_text(text)
    assert compare.main([str(tmp_path / "bad.jsonl"), str(tmp_path / "bad.jsonl")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench.compare: ")
    assert expected in error
