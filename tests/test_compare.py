"""bench.compare: what got slower is named and fails, noise does not, and nothing is left out in silence."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import compare, records, timing
from bench import model as bench
from bench.peers import OURS, Peer
from dinov2_fast.configs import BACKBONES
from dinov2_fast.model import DinoVisionTransformer

ROW = dict.fromkeys(records.KEYS) | {
    "task": "throughput",
    "model": "dinov2_vits14",
    "resolution": 224,
    "batch": 8,
    "output": "all",
    "precision": "fp32",
    "implementation": "dinov2_fast",
    "mode": "eager",
    "value": 100.0,
    "unit": "images/s",
    "p20": 99.0,
    "p80": 101.0,
    "torch": "2.11.0",
    "versions": {"cpu": "Some CPU", "threads": 2, "copy_per_s": 1e9},
    "commit": "a" * 40,
    "date": "2026-01-01",
}


def _row(value: float = 100.0, spread: float = 0.01, **changes: Any) -> dict[str, Any]:
    return ROW | {"value": value, "p20": value * (1 - spread), "p80": value * (1 + spread)} | changes


def _compare(folder: Path, old: list[dict[str, Any]], new: list[dict[str, Any]], *options: str) -> int:
    for name, rows in (("old", old), ("new", new)):
        (folder / f"{name}.jsonl").unlink(missing_ok=True)
        records.write(folder / f"{name}.jsonl", rows)
    return compare.main([str(folder / "old.jsonl"), str(folder / "new.jsonl"), *options])


@pytest.mark.parametrize(
    ("unit", "slow", "fast"),
    [("images/s", 90, 112), ("TFLOP/s", 90, 112), ("ms", 110, 90), ("us", 110, 90), ("MiB", 110, 90)],
)
def test_a_loss_of_ten_percent_is_seen_in_every_unit(unit, slow, fast, tmp_path, capsys) -> None:
    old = [_row(unit=unit), _row(unit=unit, mode="compile")]
    assert _compare(tmp_path, old, [_row(slow, unit=unit), _row(unit=unit, mode="compile")]) == 1
    said = capsys.readouterr().out
    assert f"   100.000 -> {slow:10.3f} {unit}" in said
    assert "1 slower, 1 within the spread, 0 faster" in said
    assert "SLOWER by more than 0.05: throughput dinov2_vits14 224 px batch 8 all fp32 dinov2_fast eager: 0.9" in said
    assert _compare(tmp_path, old, [_row(fast, unit=unit), _row(unit=unit, mode="compile")]) == 0
    said = capsys.readouterr().out
    assert "0 slower, 1 within the spread, 1 faster" in said
    assert "SLOWER" not in said


def test_the_ratio_and_its_range() -> None:
    speeds = compare.ratio(_row(100, p20=80, p80=125), _row(50, p20=40, p80=64))
    assert speeds == compare.Ratio(50 / 100, 40 / 125, 64 / 80)
    times = compare.ratio(_row(100, p20=80, p80=125, unit="ms"), _row(50, p20=40, p80=64, unit="ms"))
    assert times == compare.Ratio(100 / 50, 80 / 64, 125 / 40)
    once = compare.ratio(_row(100, p20=None, p80=None), _row(99, p20=None, p80=None))
    assert (once, once.verdict) == (compare.Ratio(0.99, 0.99, 0.99), "slower")


def test_a_wobble_inside_the_spread_is_no_loss_and_no_gain(tmp_path, capsys) -> None:
    assert _compare(tmp_path, [_row(spread=0.02)], [_row(97, spread=0.02)], "--threshold", "0") == 0
    assert "0.970 (0.932 to 1.010)  within the spread\n" in capsys.readouterr().out
    assert _compare(tmp_path, [_row(spread=0.2)], [_row(80, spread=0.2)]) == 0
    assert "(0.533 to 1.200)  within the spread\n" in capsys.readouterr().out
    assert _compare(tmp_path, [_row(spread=0.02)], [_row(103, spread=0.02)]) == 0
    assert "1.030 (0.990 to 1.072)  within the spread\n" in capsys.readouterr().out


def test_a_small_loss_beyond_the_spread_is_named_and_fails_only_past_the_threshold(tmp_path, capsys) -> None:
    old, new = [_row(spread=0.001)], [_row(97, spread=0.001)]
    assert _compare(tmp_path, old, new) == 0
    said = capsys.readouterr().out
    assert "0.970 (0.968 to 0.972)  slower\n" in said
    assert "SLOWER" not in said
    assert _compare(tmp_path, old, new, "--threshold", "0.02") == 1


def test_rows_of_one_side_and_rows_that_cannot_be_compared_are_named(tmp_path, capsys) -> None:
    old = [_row(), _row(batch=1), _row(batch=2), _row(batch=3), _row(batch=4, unit="bananas")]
    new = [
        _row(),
        _row(batch=16, model=None),
        _row(batch=2) | {"value": None, "p20": None, "p80": None},
        _row(batch=3, unit="ms"),
        _row(batch=4, unit="bananas"),
    ]
    assert _compare(tmp_path, old, new) == 0
    lines = capsys.readouterr().out.splitlines()
    name = "throughput dinov2_vits14 224 px batch {} all fp32 dinov2_fast eager"
    assert f"only in A: {name.format(1)}" in lines
    assert "only in B: throughput 224 px batch 16 all fp32 dinov2_fast eager" in lines
    assert f"not compared: {name.format(2)}: no value in B" in lines
    assert f"not compared: {name.format(3)}: images/s in A, ms in B" in lines
    assert f"not compared: {name.format(4)}: whether more bananas is better is not known" in lines
    assert "0 slower, 1 within the spread, 0 faster" in lines
    assert sum("only in" in line for line in lines) == 2


def test_nothing_in_common_is_no_success(tmp_path, capsys) -> None:
    assert _compare(tmp_path, [_row()], [_row(precision="bf16")]) == 2
    streams = capsys.readouterr()
    assert "no row in common" in streams.err
    assert "only in A: throughput dinov2_vits14 224 px batch 8 all fp32 dinov2_fast eager" in streams.out
    assert "only in B: throughput dinov2_vits14 224 px batch 8 all bf16 dinov2_fast eager" in streams.out


def test_each_key_of_a_row_tells_rows_apart(tmp_path, capsys) -> None:
    rows = [_row(), *(_row(**{key: "other"}) for key in ROW if key in records.IDENTITY and key != "commit")]
    assert len(rows) == 9
    assert _compare(tmp_path, rows, rows) == 0
    assert "0 slower, 9 within the spread, 0 faster" in capsys.readouterr().out


def test_a_mean_for_each_task_and_implementation(tmp_path, capsys) -> None:
    old = [_row(), _row(batch=1), _row(implementation="timm"), _row(unit="us", task="ops")]
    new = [_row(50), _row(80, batch=1), _row(implementation="timm"), _row(50, unit="us", task="ops")]
    assert _compare(tmp_path, old, new) == 1
    said = capsys.readouterr().out
    assert "throughput: geometric mean 0.737 of 3 rows (dinov2_fast 0.632, timm 1.000)\n" in said
    assert "ops: geometric mean 2.000 of 1 rows (dinov2_fast 2.000)\n" in said
    assert said.index("batch 8 all fp32 dinov2_fast eager: 0.500") < said.index("dinov2_fast eager: 0.800"), (
        "worst first"
    )


def test_other_hardware_or_versions_come_first(tmp_path, capsys) -> None:
    versions = {"cpu": "Some CPU", "threads": 4, "copy_per_s": 2e9}
    new = [_row(gpu="NVIDIA H200", torch="2.13.0", versions=versions), _row(batch=1, versions=versions)]
    assert _compare(tmp_path, [_row(), _row(batch=1)], new) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"A: {tmp_path}/old.jsonl: throughput aaaaaaaa of 2026-01-01 (2 rows)"
    assert lines[2:6] == [
        "NOT THE SAME: gpu: none in A, NVIDIA H200, none in B",
        "NOT THE SAME: threads: 2 in A, 4 in B",
        "NOT THE SAME: torch: 2.11.0 in A, 2.11.0, 2.13.0 in B",
        "",
    ]


def test_a_commit_is_chosen_by_name_or_is_the_one_measured_last(tmp_path, capsys) -> None:
    def at(commit: str, value: float, date: str) -> dict[str, Any]:
        return _row(value, commit=commit, date=date)

    path = tmp_path / "throughput.jsonl"
    new, dirty = "b" * 40, "b" * 40 + "-dirty"
    records.write(path, [at(new, 90, "2026-01-03"), at(dirty, 50, "2026-01-02"), at("bc" * 20, 70, "2026-01-02")])
    records.write(path, [_row(), at(None, 30, "2026-01-01")])
    records.write(tmp_path / "ops.jsonl", [_row(task="ops"), _row(task="ops", batch=1)])

    def values(name: str) -> dict[tuple[str, int], float]:
        return {(key[0], key[3]): row["value"] for key, row in compare.load(name).items()}

    assert values(f"{path}") == {("throughput", 8): 90}
    assert values(f"{tmp_path}") == {("throughput", 8): 90, ("ops", 8): 100, ("ops", 1): 100}
    assert values(f"{tmp_path}@aa") == {("throughput", 8): 100, ("ops", 8): 100, ("ops", 1): 100}
    assert values(f"{path}@{new}") == values(f"{tmp_path}@bbb") == {("throughput", 8): 90}
    assert values(f"{path}@bbb-dirty") == {("throughput", 8): 50}
    assert values(f"{path}@unknown") == {("throughput", 8): 30}
    assert compare.main([f"{path}@aaaa", f"{path}"]) == 1
    assert compare.main([f"{path}", f"{path}@aaaa"]) == 0
    capsys.readouterr()
    for commit, problem in (("b", "several commits begin so"), ("c", "no such commit"), ("a-dirty", "no such commit")):
        assert compare.main([f"{path}", f"{path}@{commit}"]) == 2
        said = capsys.readouterr().err
        assert f"throughput.jsonl@{commit}: {problem}; there are {'a' * 40}, {new}, {dirty}, " in said


def test_of_two_commits_of_a_day_the_last_rows_count(tmp_path) -> None:
    records.write(tmp_path / "x.jsonl", [_row(10, commit="f"), _row(20, commit="e")])
    assert [row["value"] for row in compare.load(str(tmp_path / "x.jsonl")).values()] == [20]


def test_an_at_sign_may_be_a_part_of_the_path(tmp_path) -> None:
    records.write(tmp_path / "me@home" / "x.jsonl", [_row()])
    for name in ("me@home", "me@home@aaa", "me@home/x.jsonl", "me@home/x.jsonl@aaa"):
        assert len(compare.load(str(tmp_path / name))) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "x.jsonl does not exist"),
        ("", "x.jsonl holds no rows"),
        ("\n", "x.jsonl holds no rows"),
        ("\n{", "x.jsonl, line 2: not JSON: Expecting"),
        ("\x89PNG", "x.jsonl, line 1: not JSON"),
        ("[1]", "x.jsonl, line 1: not a result: it is no JSON object"),
        ({"unit": ...}, "x.jsonl, line 1: not a result: it lacks unit"),
        ({"value": "fast"}, "not a result: value is 'fast', not a positive number"),
        ({"value": 0}, "not a result: value is 0, not a positive number"),
        ({"p20": float("nan")}, "not a result: p20 is nan, not a positive number"),
        ({"p80": float("inf")}, "not a result: p80 is inf, not a positive number"),
        ({"versions": "2"}, "not a result: versions is no JSON object"),
        ({"batch": [8]}, r"not a result: batch is \[8\]"),
    ],
)
def test_a_bad_file_is_refused_with_the_reason(text, message, tmp_path, capsys) -> None:
    good, bad = tmp_path / "good.jsonl", tmp_path / "x.jsonl"
    records.write(good, [_row()])
    if isinstance(text, dict):
        text = json.dumps({key: value for key, value in (ROW | text).items() if value is not ...})
    if text is not None:
        bad.write_bytes(text.encode("latin-1"))
    for sides in ([good, bad], [bad, good]):
        assert compare.main([str(side) for side in sides]) == 2
        assert re.search(rf"^bench\.compare: .*{message}", capsys.readouterr().err)


def test_bad_arguments_are_refused_with_the_reason(tmp_path, capsys) -> None:
    assert compare.main([str(tmp_path), str(tmp_path)]) == 2
    assert "holds no .jsonl file" in capsys.readouterr().err
    for arguments, message in (
        (["a"], "required: B"),
        (["a", "b", "--threshold", "5"], "from 0 to below 1, not 5.0"),
        (["a", "b", "--threshold", "nan"], "from 0 to below 1, not nan"),
    ):
        with pytest.raises(SystemExit) as exit_:
            compare.main(arguments)
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err


class _Clock:
    """A time that passes only in the blocks of a model, with a wobble of at most 4 % around their cost."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def charge(self, model: DinoVisionTransformer, seconds: float) -> DinoVisionTransformer:
        wobble = itertools.cycle((1.0, 0.96, 1.02, 0.98, 1.04))

        def pass_time(*_: Any) -> None:
            self.now += seconds * next(wobble)

        model.blocks[0].register_forward_hook(pass_time)
        return model

    def peer(self, name: str, plain: DinoVisionTransformer, seconds: float) -> Peer:
        return dataclasses.replace(OURS, name=name, build=lambda *_: self.charge(copy.deepcopy(plain), seconds))


@pytest.mark.parametrize(("factor", "status"), [(1.0, 0), (1.03, 0), (1.1, 1)])
def test_a_slower_model_is_seen_from_its_measurement(factor, status, tmp_path, capsys, monkeypatch) -> None:
    config = dataclasses.replace(BACKBONES["dinov2_vits14"], embed_dim=32, depth=1, num_heads=2)
    plain = DinoVisionTransformer(**config.constructor_arguments()).eval()
    setting = bench.Setting("throughput", config, 28, 2, "all", "fp32")
    path = tmp_path / "throughput.jsonl"
    for commit, cost in (("a" * 40, 0.010), ("b" * 40, 0.010 * factor)):
        clock = _Clock()
        monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=clock.perf_counter))
        ours, other = clock.peer("dinov2_fast", plain, cost), clock.peer("other", plain, 0.012)
        rows = bench.measure(setting, [(ours, "eager"), (other, "eager")], bench.Models(config, plain), 0.5, [])
        assert rows[0]["value"] == pytest.approx(2 / cost)
        common = dict.fromkeys(records.KEYS) | records.environment(torch.device("cpu"), commit)
        records.write(path, [common | row for row in rows])
    assert compare.main([f"{path}@a", f"{path}@b"]) == status
    said = capsys.readouterr().out
    assert f"(dinov2_fast {1 / factor:.3f}, other 1.000)" in said
    assert f"{status} slower, {2 - status} within the spread, 0 faster" in said
    assert ("all fp32 dinov2_fast eager: 0.909" in said) == bool(status)
