"""bench.compare: what got slower is named and fails, noise does not, and nothing is left out in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import compare, records

WHAT = ("throughput", "dinov2_vits14", 224, 8, "all", "fp32", "dinov2_fast", "eager", "a" * 40)
ROW = dict.fromkeys(records.KEYS) | dict(zip(records.IDENTITY, WHAT, strict=True))
ROW |= {"unit": "images/s", "torch": "2.11.0", "versions": {"cpu": "Some CPU", "threads": 2}, "date": "2026-01-01"}
NAME = "throughput dinov2_vits14 224 px batch {} all fp32 dinov2_fast eager"


def _row(value: float = 100.0, spread: float = 0.01, **changes: Any) -> dict[str, Any]:
    return ROW | {"value": value, "p20": value * (1 - spread), "p80": value * (1 + spread)} | changes


def _compare(folder: Path, old: list[dict[str, Any]], new: list[dict[str, Any]], *options: str) -> int:
    for name, rows in (("old", old), ("new", new)):
        (folder / f"{name}.jsonl").unlink(missing_ok=True)
        records.write(folder / f"{name}.jsonl", rows)
    return compare.main([str(folder / "old.jsonl"), str(folder / "new.jsonl"), *options])


@pytest.mark.parametrize(("unit", "slow", "fast"), [("images/s", 90, 112), ("ms", 110, 90), ("MiB", 110, 90)])
def test_a_loss_of_ten_percent_is_seen_in_every_unit(unit, slow, fast, tmp_path, capsys) -> None:
    same = _row(unit=unit, mode="compile")
    assert _compare(tmp_path, [_row(unit=unit), same], [_row(slow, unit=unit), same]) == 1
    said = capsys.readouterr().out
    assert "1 slower, 1 within the spread, 0 faster" in said
    assert f"SLOWER by more than 0.05: {NAME.format(8)}: 0.9" in said
    assert _compare(tmp_path, [_row(unit=unit), same], [_row(fast, unit=unit), same]) == 0
    assert "0 slower, 1 within the spread, 1 faster" in capsys.readouterr().out


def test_the_ratio_and_its_range() -> None:
    speeds = compare.ratio(_row(100, p20=80, p80=125), _row(50, p20=40, p80=64))
    assert speeds == (50 / 100, 40 / 125, 64 / 80)
    times = compare.ratio(_row(100, p20=80, p80=125, unit="ms"), _row(50, p20=40, p80=64, unit="ms"))
    assert times == (100 / 50, 80 / 64, 125 / 40)
    once = compare.ratio(_row(100, p20=None, p80=None), _row(99, p20=None, p80=None))
    assert (once, once.verdict) == ((0.99, 0.99, 0.99), "slower")


def test_only_a_loss_beyond_the_spread_and_the_threshold_fails(tmp_path, capsys) -> None:
    assert _compare(tmp_path, [_row(spread=0.02)], [_row(97, spread=0.02)], "--threshold", "0") == 0
    assert "0.970 (0.932 to 1.010), within the spread\n" in capsys.readouterr().out
    exact = [_row(spread=0.001)], [_row(97, spread=0.001)]
    assert _compare(tmp_path, *exact) == 0
    assert "0.970 (0.968 to 0.972), slower\n" in capsys.readouterr().out
    assert _compare(tmp_path, *exact, "--threshold", "0.02") == 1


def test_nothing_is_left_out_in_silence(tmp_path, capsys) -> None:
    old = [*(_row(batch=batch) for batch in (8, 1, 2, 3, 4)), _row(implementation="timm"), _row(unit="us", task="ops")]
    new = [_row(50, gpu="H200"), _row(80, batch=1), _row(batch=2) | {"value": None}, _row(batch=3, unit="ms")]
    new += [_row(batch=16, model=None), *(row | {"versions": {"cpu": "Some CPU", "threads": 4}} for row in old[-2:])]
    assert _compare(tmp_path, old, new) == 1
    said = capsys.readouterr().out
    assert said.startswith(
        "A: throughput aaaaaaaa of 2026-01-01 (6 rows), ops aaaaaaaa of 2026-01-01 (1 rows)\n"
        "B: throughput aaaaaaaa of 2026-01-01 (6 rows), ops aaaaaaaa of 2026-01-01 (1 rows)\n"
        "NOT THE SAME: gpu: None in A, H200, None in B\nNOT THE SAME: threads: 2 in A, 2, 4 in B\n\n"
    )
    for line in (
        f"only in A: {NAME.format(4)}",
        "only in B: throughput 224 px batch 16 all fp32 dinov2_fast eager",
        f"not compared: {NAME.format(2)}: no value in B",
        f"not compared: {NAME.format(3)}: images/s in A, ms in B",
        "throughput: geometric mean 0.737 of 3 rows",
        "throughput, dinov2_fast: geometric mean 0.632 of 2 rows",
        f"SLOWER by more than 0.05: {NAME.format(8)}: 0.500\nSLOWER by more than 0.05: {NAME.format(1)}: 0.800",
    ):
        assert f"\n{line}\n" in said
    assert _compare(tmp_path, [_row()], [_row(precision="bf16")]) == 2
    assert "no row in common" in capsys.readouterr().err


def test_a_commit_is_chosen_by_name_or_is_the_one_measured_last(tmp_path, capsys) -> None:
    path = tmp_path / "me@home" / "throughput.jsonl"
    new, dirty = "b" * 40, "b" * 40 + "-dirty"
    for commit, value, date in ((new, 90, 3), (dirty, 50, 2), ("bc" * 20, 70, 2), ("a" * 40, 100, 1), (None, 30, 1)):
        records.write(path, [_row(value, commit=commit, date=f"2026-01-0{date}")])
    records.write(path.with_name("ops.jsonl"), [_row(task="ops"), _row(task="ops", batch=1)])
    path.with_name("steps.jsonl").write_text('{"step": "tests"}\n')
    path.with_name("best.json").write_text("{}")

    def values(name: str) -> list[float]:
        return [row["value"] for row in compare.load(name).values()]

    records.write(same_day := tmp_path / "x.jsonl", [_row(10, commit="f"), _row(20, commit="e")])
    assert values(f"{same_day}") == [20]
    assert values(f"{path}") == values(f"{path}@{new}") == values(f"{path.parent}@bbb") == [90]
    assert values(f"{path.parent}") == [100, 100, 90]
    assert values(f"{path.parent}@aa") == [100, 100, 100]
    assert (values(f"{path}@bbb-dirty"), values(f"{path}@unknown")) == ([50], [30])
    assert compare.main([f"{path}@aaaa", f"{path}"]) == 1
    assert compare.main([f"{path}", f"{path}@aaaa"]) == 0
    for commit, problem in (("b", "several commits begin so"), ("c", "no such commit"), ("a-dirty", "no such commit")):
        assert compare.main([f"{path}", f"{path}@{commit}"]) == 2
        assert f"throughput.jsonl@{commit}: {problem}; there are {'a' * 40}, {new}" in capsys.readouterr().err


def test_a_bad_file_is_refused_with_the_reason(tmp_path, capsys) -> None:
    good, bad = tmp_path / "good.jsonl", tmp_path / "x.jsonl"
    records.write(good, [_row()])
    for text, message in (("", "no rows"), ("{", "not JSON: Expecting"), ('{"step": 1}', "line 1, is not a result")):
        bad.write_text(text)
        assert compare.main([str(good), str(bad)]) == 2
        assert message in capsys.readouterr().err
    assert compare.main([str(good), str(tmp_path / "none")]) == 2
    assert "none does not exist" in capsys.readouterr().err
