"""bench.report: README, tables and plots show all measured values and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bench import records, report
from bench.report import Device, comparisons, table, updated_readme

WHAT = ("throughput", "dinov2_vits14", 224, 8, "all", "fp32", "dinov2_fast", "eager", "a" * 40)
ROW = dict.fromkeys(records.KEYS) | dict(zip(records.IDENTITY, WHAT, strict=True))
ROW |= {"value": 30.0, "unit": "images/s", "torch": "2.11.0", "triton": "3.6.0", "date": "2026-01-01"}
ROW |= {"versions": {"cpu": "Some CPU", "threads": 2, "timm": "1.0.31"}}
TIMM, LATENCY = {"implementation": "timm"}, {"task": "latency", "unit": "ms", "batch": 1}


def keep(folder: Path, *rows: dict[str, Any]) -> Path:
    """A device's folder with these rows, each in the file of its task."""
    for row in rows:
        records.write(folder / f"{row['task']}.jsonl", [row])
    return folder


def test_readme_shows_what_was_measured() -> None:
    readme = report.README.read_text(encoding="utf-8")
    assert updated_readme(readme) == readme, "run: python -m bench.report"
    with pytest.raises(ValueError, match="two marks"):
        updated_readme("no marks")


@pytest.mark.parametrize("device", report.devices(records.RESULTS), ids=lambda device: device.folder.name)
def test_the_folder_of_a_device_shows_what_was_measured(device: Device) -> None:
    text = (device.folder / "README.md").read_text(encoding="utf-8")
    assert text == report.device_readme(device), "run: python -m bench.report"
    assert {path.stem for path in device.folder.glob("*.png")} == set(device.headline)
    for task, chosen in device.headline.items():
        with Image.open(device.folder / f"{task}.png") as image:
            assert image.text["rows"] == report.digest(chosen), "run: python -m bench.report"


def test_ratios_compare_the_best_mode_of_each_implementation() -> None:
    rows = [
        ROW | {"floor_share": 0.375},
        ROW | {"mode": "engine", "value": 40.0, "floor_share": 0.5},
        ROW | TIMM | {"mode": "compile", "value": 32.0},
        ROW | TIMM | {"mode": "graphs", "value": None, "unit": None},
    ]
    (one,) = comparisons(rows)
    head, _, line = table([one]).splitlines()
    assert head.endswith("| batch | dinov2_fast | timm | ours / best peer | share of the floor |")
    assert line == "| ViT-S/14 | 224 | fp32 | all | 8 | 40.0 (engine)<br>30.0 | 32.0 (compile) | 1.25 | 50% |"
    assert "| 8 | 40.0 (engine) | 32.0 (compile) |" in table([one], best_only=True)
    (less,) = comparisons([row | {"unit": row["unit"] and "ms"} for row in rows])
    assert "| 30.0<br>40.0 (engine) | 32.0 (compile) | 1.07 | 38% |" in table([less])
    assert (one.floor, less.floor) == (80.0, 11.25)


def test_rows_without_a_value_are_listed_with_the_reason(tmp_path: Path) -> None:
    none, refused = ROW | TIMM | {"value": None, "unit": None}, records.not_measured("refused: x")
    rows = [ROW, ROW | {"batch": 9}, ROW | TIMM | {"batch": 9}, none | refused | {"task": "latency"}]
    rows += [none | records.not_measured("out of memory: Tried | to\n`allocate`")]
    rows += [none | refused | {"mode": mode, "batch": batch} for mode in ("graphs", "compile") for batch in (8, 9)]
    text = report.device_readme(Device(keep(tmp_path, *rows)))
    assert "| 8 | 30.0 | – | – | – |\n" in text
    assert "- timm, eager: `out of memory: Tried | to 'allocate'` (1 rows)\n" in text
    assert "- timm, graphs, compile: `refused: x` (4 rows)\n" in text
    assert "latency.png" not in text


def test_readme_shows_what_most_people_run(tmp_path: Path) -> None:
    timms = [ROW | TIMM, ROW | TIMM | {"mode": "compile"}]
    keep(tmp_path / "cpu", *timms, ROW | {"mode": "accelerated-timm", "value": 60.0})
    assert "There is no result on a GPU yet" in updated_readme(report.BEGIN + report.END, tmp_path)
    gpu = ROW | {"gpu": "Some GPU", "precision": "bf16", "output": "cls"}
    rates = {"versions": ROW["versions"] | {"copy_per_s": 4.3e12, "product_per_s": 7.9e14, "e4m3_per_s": None}}
    usual = [gpu | {"floor_share": 0.5} | rates, gpu | {"resolution": 518, "output": "all", "batch": 2}]
    others = [gpu | {"precision": name, "batch": 16} for name in ("fp8", "fp32")] + [gpu | {"batch": 1}]
    times = [gpu | LATENCY | {"value": 5.0}, gpu | LATENCY | {"batch": 4}]
    keep(tmp_path / "gpu", *others, *usual, *times)
    first, second = updated_readme(report.BEGIN + report.END, tmp_path).split("\n### ")[1:]
    assert "images per second (more is better): Some GPU, torch 2.11.0, triton 3.6.0, commit aaaaaaaa, 2026" in first
    assert [line for line in first.splitlines() if line.startswith("| ViT")] == [
        "| ViT-S/14 | 224 | bf16 | cls | 8 | 30.0 | – | 50% |",
        "| ViT-S/14 | 518 | bf16 | all | 2 | 30.0 | – | – |",
        "| ViT-S/14 | 224 | bf16 | cls | 1 | 5.00 | – | – |",
    ]
    assert f"{report.FLOOR} Here a copy reaches 4300 GB/s, a product reaches 790 TFLOP/s." in first
    assert "Some CPU, 2 threads, torch 2.11.0, timm 1.0.31, commit" in second
    assert "both eager: 2.00 to 2.00 times as fast (1 rows)." in second


def test_the_length_of_bars_is_their_value(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [ROW | {"value": 40.0, "floor_share": 0.8}, ROW | TIMM | {"value": 20.0}, ROW | {"resolution": 518}]
    chosen = comparisons(rows)
    small, large = report.draw(chosen).axes
    assert [bar.get_width() for bar in small.patches] == [40.0, 20.0]
    assert [label.get_text() for label in small.get_yticklabels()] == ["dinov2_fast  40.0", "timm  20.0"]
    assert (list(small.lines[0].get_xdata()), len(large.lines)) == ([50.0, 50.0], 0)
    assert (small.get_title("left"), small.get_title("right")) == ("ViT-S/14, 224 px, fp32, all, batch 8", "2.00×")
    report.save_plot(chosen, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.text == {"rows": report.digest(chosen)}


def test_without_matplotlib_the_texts_are_written(tmp_path: Path, monkeypatch, capsys) -> None:
    folder = keep(tmp_path / "cpu", ROW)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert report.main(["--results", str(tmp_path)]) == 1
    assert "the plots are not" in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == {"README.md", "throughput.jsonl"}
