"""bench.report: README, the tables and the plots show what was measured, all of it and nothing else."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bench import records, report
from bench.report import Device, comparisons, device_readme, table, updated

WHAT = ("throughput", "dinov2_vits14", 224, 8, "all", "fp32", "dinov2_fast", "eager", "a" * 40)
ROW = dict.fromkeys(records.KEYS) | dict(zip(records.IDENTITY, WHAT, strict=True))
ROW |= {"value": 30.0, "unit": "images/s", "torch": "2.11.0", "triton": "3.6.0", "date": "2026-01-01"}
ROW |= {"versions": {"cpu": "Some CPU", "threads": 2, "timm": "1.0.31", "onnxruntime": "1.23.0"}}
TIMM, TRANSFORMERS = {"implementation": "timm"}, {"implementation": "transformers"}
LATENCY = {"task": "latency", "unit": "ms", "batch": 1}


def missing(reason: str, **keys: Any) -> dict[str, Any]:
    return ROW | {"unit": None} | records.not_measured(reason) | keys


def keep(folder: Path, *rows: dict[str, Any]) -> Path:
    """A device's folder with these rows, each in the file of its task."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        with (folder / f"{row['task']}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    return folder


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| ViT")]


def section(results: Path) -> str:
    return updated(report.BEGIN + report.END, results)


def test_readme_shows_what_was_measured() -> None:
    readme = report.README.read_text(encoding="utf-8")
    assert updated(readme) == readme, "run: python -m bench.report"
    with pytest.raises(ValueError, match="two marks"):
        updated("no marks")


@pytest.mark.parametrize("device", report.devices(records.RESULTS), ids=lambda device: device.folder.name)
def test_the_folder_of_a_device_shows_what_was_measured(device: Device) -> None:
    assert (device.folder / "README.md").read_text(encoding="utf-8") == device_readme(device)
    assert {path.stem for path in device.folder.glob("*.png")} == set(device.plots)
    for task, chosen in device.plots.items():
        path = device.folder / f"{task}.png"
        with Image.open(path) as image:
            assert image.text["rows"] == report.digest(chosen), f"{path} is out of date: python -m bench.report"
        assert path.stat().st_size < 150_000


def test_each_implementation_counts_with_its_best_mode() -> None:
    rows = [
        ROW | {"floor_share": 0.375},
        ROW | {"mode": "engine-best", "value": 40.0, "floor_share": 0.5},
        ROW | TIMM | {"mode": "compile", "value": 32.0, "floor_share": 0.4},
        missing("out of memory: CUDA out of memory", **TIMM, mode="graphs"),
        ROW | TRANSFORMERS | {"value": 9.999},
    ]
    (one,) = comparisons(rows)
    assert table([one], ["model"]).splitlines()[::2] == [
        "| model | dinov2_fast | timm | transformers | ours / best peer | share of the floor |",
        "| ViT-S/14 | 40.0 (engine-best) | 32.0 (compile) | 10.0 | 1.25 | 50% |",
    ]
    (less,) = comparisons([row | {"unit": row["unit"] and "ms"} for row in rows])
    assert "| transformers | best peer / ours |" in table([less], ["model"])
    assert (one.ratio, one.floor, less.ratio, less.floor) == (1.25, 80.0, 9.999 / 30, 11.25)


def test_what_has_no_value_says_why(tmp_path: Path) -> None:
    rows = [
        ROW,
        missing("missing: timm is not installed", **TIMM),
        missing("out of memory: Tried | to\n`allocate`", **TRANSFORMERS),
        missing("refused: an element is 1 off", **TRANSFORMERS, mode="compile"),
        missing("missing: timm is not installed", **TIMM, mode="graphs", batch=9),
        ROW | {"batch": 9},
    ]
    text = device_readme(Device(keep(tmp_path, *rows)))
    assert lines(text)[0].endswith("| 8 | all | fp32 | 30.0 | –¹ | –² | – |")
    assert lines(text)[1].endswith("| 9 | all | fp32 | 30.0 | –¹ | – | – |")
    assert "\n\n¹ timm is not installed, ² out of memory; refused\n" in text
    assert "- timm, eager, graphs: `missing: timm is not installed` (2 rows)\n" in text
    assert "- transformers, eager: `out of memory: Tried | to 'allocate'` (1 rows)\n" in text
    keep(tmp_path / "results" / "cpu", missing("refused: x", task="latency", batch=1))
    assert "best peer / ours" in section(tmp_path / "results")
    assert ".png" not in section(tmp_path / "results")


def test_models_with_our_blocks_stand_beside_what_they_are_without(tmp_path: Path) -> None:
    ours = ROW | {"mode": "accelerated-timm"}
    throughput = [ROW | {"value": 90.0}, ROW | TIMM | {"value": 60.0, "mode": "compile"}, ours, ours | {"batch": 9}]
    times = [ours | LATENCY | {"value": 3.0}, ROW | LATENCY | TIMM | {"value": 6.0}]
    device = Device(keep(tmp_path / "cpu", ROW | TIMM | {"value": 20.0}, *throughput, *times))
    text = device_readme(device)
    assert "| precision | timm | accelerated | times |" in text
    assert "| 20.0 | 30.0 | 1.50 |\n\n## Latency" in text, "and nothing of the batch of 9, which stands beside nothing"
    assert "| 6.00 | 3.00 | 2.00 |" in text
    assert "both eager: those of timm are 1.50 to 2.00 times as fast (2 rows)." in section(tmp_path)


def test_readme_shows_the_rows_that_most_people_would_run(tmp_path: Path) -> None:
    names = ("dinov2_fast", "transformers", "timm", "onnxruntime", "openvino")
    keep(tmp_path / "cpu", *(ROW | {"implementation": n, "value": 9.0 - len(n) / 2} for n in names))
    (tmp_path / "cpu" / "best.json").write_text("{}")
    assert "No result on a GPU exists yet" in section(tmp_path)
    gpu = ROW | {"gpu": "Some GPU", "precision": "bf16", "versions": {"cosine": 0.99}, "output": "cls"}
    of_two_sizes = [gpu | {"floor_share": 0.5}, gpu | {"resolution": 518, "output": "all", "batch": 2}]
    others = [gpu | {"precision": name, "batch": 16} for name in ("fp8", "fp32")]
    others += [gpu | {"batch": 1}, gpu | LATENCY | {"batch": 4}]
    rates = [gpu | {"task": "roofline", "model": model, "output": "copy", "unit": "GB/s"} for model in (None, "S")]
    keep(tmp_path / "gpu", *of_two_sizes, *others, gpu | LATENCY | {"value": 5.0}, *rates)
    first, second = section(tmp_path).split("\n### ")[1:]
    assert first.startswith("Some GPU\n")
    assert "class token or all tokens, bf16, the largest batch. Some GPU, torch 2.11.0, triton 3.6.0, commit" in first
    assert lines(first) == [
        "| ViT-S/14 | 224 | 8 | cls | 30.0 | – | 50% |",
        "| ViT-S/14 | 518 | 2 | all | 30.0 | – | – |",
        "| ViT-S/14 | 224 | 1 | 5.00 | – |",
    ]
    assert [one["batch"] for one in Device(tmp_path / "gpu").plots["latency"]] == [1, 4]
    assert "Ceilings: copy bf16 30.0 GB/s (Some GPU" in first
    assert (report.FLOOR in first, report.FLOOR in second, "latency" in second) == (True, False, False)
    assert "| dinov2_fast | transformers | timm | onnxruntime | openvino | ours / best peer |" in second
    assert lines(second) == ["| ViT-S/14 | 224 | 8 | 3.50 | 3.00 | 7.00 | 3.50 | 5.00 | 0.50 |"]
    assert "timm 1.0.31, onnxruntime 1.23.0, " in second


def test_bars_are_as_high_as_what_they_show() -> None:
    pytest.importorskip("matplotlib")
    ours = ROW | {"value": 40.0, "floor_share": 0.8}
    large = {"resolution": 518, "implementation": "facebook"}
    rows = [ours, ROW | TIMM | {"value": 20.0}, ROW | large, missing("out of memory: y", resolution=518)]
    small, large = report.draw(comparisons(rows)).axes
    assert [bar.get_height() for bar in small.patches] == [0.8, 0.4]
    assert [line.get_segments()[0][0][1] for line in small.collections] == [1.0]
    assert {"40.0", "20.0", "2.00×"} <= {text.get_text() for text in small.texts}
    assert [text.get_text() for text in large.texts] == ["out of memory", "", "30.0"]
    times = [ROW | {"unit": "ms", "floor_share": 0.5}, ROW | TIMM | {"unit": "ms", "value": 20.0}]
    (axes,) = report.draw(comparisons(times)).axes
    assert [bar.get_height() for bar in axes.patches] == [1.0, 2 / 3]
    assert [line.get_segments()[0][0][1] for line in axes.collections] == [0.5]


def test_the_same_rows_give_the_same_plot_which_fits_on_a_page(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    settings = itertools.product("sblg", (224, 518, 1036), ("dinov2_fast", "transformers", "timm", "openvino", "a"))
    names = ({"model": f"dinov2_vit{m}14", "resolution": size, "implementation": name} for m, size, name in settings)
    chosen = comparisons([ROW | keys for keys in names])
    report.save_plot(chosen, tmp_path / "a.png")
    with matplotlib.rc_context({"savefig.dpi": 50, "font.size": 20}):
        report.save_plot(chosen, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert (image.width, image.height < 700, image.text.keys()) == (1000, True, {"rows"})


def test_without_matplotlib_the_texts_are_written(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = keep(tmp_path / "cpu", ROW)
    assert report.main(["--results", str(tmp_path)]) == 1
    assert "the plots are not" in capsys.readouterr().err
    assert (folder / "README.md").is_file()
    with pytest.raises(SystemExit):
        report.main(["--results", str(tmp_path / "none")])
