"""bench.report: README, the tables and the plots show what was measured, all of it and nothing else."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bench import records, report
from bench.tables import accelerated_table, comparisons, newest, number, table

ROW = dict.fromkeys(records.KEYS) | {
    "task": "throughput",
    "model": "dinov2_vits14",
    "resolution": 224,
    "batch": 8,
    "output": "all",
    "precision": "fp32",
    "implementation": "dinov2_fast",
    "mode": "eager",
    "value": 30.0,
    "unit": "images/s",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "versions": {"cpu": "Some CPU", "threads": 2, "transformers": "5.17.0", "timm": "1.0.31"},
    "commit": "a" * 40,
    "date": "2026-01-01",
}
TIMM, TRANSFORMERS, FACEBOOK = ({"implementation": name} for name in ("timm", "transformers", "facebook"))
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


def test_readme_shows_what_was_measured() -> None:
    readme = report.README.read_text(encoding="utf-8")
    assert report.updated(readme) == readme, "run: python -m bench.report"


@pytest.mark.parametrize("folder", report.devices(records.RESULTS), ids=lambda folder: folder.name)
def test_the_folder_of_a_device_shows_what_was_measured(folder: Path) -> None:
    assert (folder / "README.md").read_text(encoding="utf-8") == report.device_readme(folder)
    plots = report.plotted(folder)
    assert {path.stem for path in folder.glob("*.png")} == set(plots)
    for task, chosen in plots.items():
        path = folder / f"{task}.png"
        with Image.open(path) as picture:
            assert picture.text["rows"] == report.digest(chosen), f"{path} is out of date: python -m bench.report"
        assert path.stat().st_size < 150_000


def test_the_rows_are_those_of_the_commit_measured_last() -> None:
    rows = [ROW, ROW | TIMM | {"value": 20.0}, ROW | TRANSFORMERS | {"value": 25.0}]
    assert lines(table(comparisons(newest(rows)))) == [
        "| ViT-S/14 | 224 | 8 | all | fp32 | 30.0 | 20.0 | 25.0 | 1.20 |"
    ]
    later = [row | {"value": 2 * row["value"], "commit": "b" * 40, "date": "2026-01-02"} for row in rows[:2]]
    for both in (rows + later, later + rows):
        assert newest(both) == later
    same_day = [row | {"date": "2026-01-01"} for row in later]
    assert newest(rows + same_day) == same_day
    assert newest([]) == []


def test_each_implementation_counts_with_its_best_mode() -> None:
    rows = [
        ROW | {"floor_share": 0.375},
        ROW | {"mode": "triton", "value": 40.0, "floor_share": 0.5},
        ROW | TIMM | {"mode": "compile", "value": 32.0, "floor_share": 0.4},
        ROW | TIMM | {"value": 20.0},
        missing("out of memory: CUDA out of memory", **TIMM, mode="max-autotune"),
        ROW | TRANSFORMERS | {"value": 10.0},
    ]
    text = table(comparisons(rows), ["model"])
    assert "| model | dinov2_fast | timm | transformers | ours / best peer | share of the floor |" in text
    assert lines(text) == ["| ViT-S/14 | 40.0 (triton) | 32.0 (compile) | 10.0 | 1.25 | 50% |"]
    (one,) = comparisons(rows)
    assert (one.ratio, one.floor) == (1.25, 80.0)


def test_less_is_better_for_times_and_memory() -> None:
    for unit in ("ms", "MiB"):
        rows = [
            ROW | {"unit": unit, "value": 4.0},
            ROW | {"unit": unit, "value": 2.0, "mode": "graphs", "floor_share": 0.75},
            ROW | TIMM | {"unit": unit, "value": 8.0},
            ROW | TIMM | {"unit": unit, "value": 3.0, "mode": "compile"},
        ]
        (one,) = comparisons(rows)
        assert (one.ratio, one.floor) == (1.5, 1.5)
        assert "| dinov2_fast | timm | best peer / ours |" in table([one], ["model"])
        assert lines(table([one], ["model"])) == ["| ViT-S/14 | 2.00 (graphs) | 3.00 (compile) | 1.50 | 75% |"]


def test_models_with_our_blocks_stand_beside_what_they_are_without(tmp_path: Path) -> None:
    accelerated = {"mode": "accelerated-timm"}
    rows = [
        ROW | {"value": 90.0, "mode": "engine"},
        ROW | TIMM | {"value": 20.0},
        ROW | TIMM | {"value": 60.0, "mode": "compile"},
        ROW | accelerated | {"value": 30.0},
        *(row | {"batch": 1} for row in (ROW | TIMM | {"value": 10.0}, ROW | accelerated | {"value": 11.0})),
        ROW | accelerated | {"batch": 2},  # beside nothing
        ROW | LATENCY | TIMM | {"value": 6.0},
        ROW | LATENCY | accelerated | {"value": 3.0},
    ]
    found = comparisons(rows[:7])
    assert [(one["batch"], one.accelerated("timm"), one.accelerated("transformers")) for one in found] == [
        (1, pytest.approx(1.1), None),
        (2, None, None),
        (8, 1.5, None),
    ]
    assert lines(accelerated_table(found)) == [
        "| ViT-S/14 | 224 | 1 | all | fp32 | 10.0 | 11.0 | 1.10 |",
        "| ViT-S/14 | 224 | 8 | all | fp32 | 20.0 | 30.0 | 1.50 |",
    ]
    folder = keep(tmp_path / "cpu", *rows)
    text = report.device_readme(folder)
    for head in ("pixels | batch | output | precision | timm | accelerated | times |", "| 6.00 | 3.00 | 2.00 |"):
        assert head in text
    assert "both eager: those of timm are 1.10 to 2.00 times as fast (3 rows)." in report.speed(tmp_path)
    without = keep(tmp_path / "other" / "cpu", ROW, ROW | TIMM)
    assert "accelerate" not in report.device_readme(without) + report.speed(without.parent)


def test_what_has_no_value_says_why() -> None:
    rows = [
        ROW,
        missing("timm is not installed", **TIMM),
        missing("out of memory: CUDA out of memory. Tried to allocate", **TRANSFORMERS),
        missing("refused: an element is 1 off", **TRANSFORMERS, mode="compile"),
        missing("timm is not installed", **TIMM, batch=9),
        ROW | {"batch": 9},
        missing("failed: it | does not `run`", batch=10),
        ROW | TRANSFORMERS | {"batch": 10},
    ]
    text = table(comparisons(rows), ["batch"])
    assert [line for line in text.splitlines() if line[:3] in ("| 8", "| 9", "| 1")] == [
        "| 8 | 30.0 | –¹ | –² | – |",
        "| 9 | 30.0 | –¹ | – | – |",
        "| 10 | –³ | – | 30.0 | – |",
    ]
    assert text.endswith("\n\n¹ timm is not installed, ² out of memory; refused, ³ failed\n")


def test_the_readme_of_a_device_lists_what_could_not_be_measured(tmp_path: Path) -> None:
    rows = [missing("failed: it | does not `run`\nat all", mode=mode, batch=n) for mode in ("a", "b") for n in (1, 2)]
    text = report.device_readme(keep(tmp_path, ROW, *rows))
    assert "- dinov2_fast, a, b: `failed: it | does not 'run' at all` (4 rows)\n" in text


def test_every_task_is_in_the_readme_of_a_device_in_its_own_unit(tmp_path: Path) -> None:
    memory = {"task": "memory", "floor_share": None}
    folder = keep(
        tmp_path,
        ROW,
        ROW | LATENCY | {"value": 0.5},
        ROW | {"task": "training", "value": 7.0},
        ROW | memory | {"batch": None, "unit": "images", "value": 12, "output": "all within 1 GiB"},
        ROW | memory | {"unit": "MiB", "value": 345.6},
        missing("refused: x", **memory, batch=None, output="cls within 1 GiB"),
        missing("refused: x", **memory, batch=9),
        ROW | {"task": "extraction", "floor_share": 0.6, "versions": ROW["versions"] | {"workers": 3}},
    )
    text = report.device_readme(folder)
    sections = {part.partition("\n")[0]: part for part in text.split("\n## ")[1:]}
    assert list(sections) == ["Throughput", "Latency", "Training", "Memory", "Extraction"]
    for part in sections.values():
        assert "Some CPU, 2 threads, torch 2.11.0, commit aaaaaaaa, 2026-01-01." in part
    assert lines(sections["Latency"]) == ["| ViT-S/14 | 224 | 1 | all | fp32 | 0.500 | – |"]
    assert lines(sections["Memory"]) == [
        "| ViT-S/14 | 224 | 8 | all | fp32 | 346 | – |",
        "| ViT-S/14 | 224 | 9 | all | fp32 | –¹ | – |",
        "| ViT-S/14 | 224 | all within 1 GiB | fp32 | 12 | – |",
        "| ViT-S/14 | 224 | cls within 1 GiB | fp32 | –¹ | – |",
    ]
    assert "Pictures per second with 3 decoding processes." in sections["Extraction"]
    assert "| share of the time in which the device works |" in sections["Extraction"]


def test_readme_shows_the_rows_that_most_people_would_run(tmp_path: Path) -> None:
    gpu = {"gpu": "Some GPU", "precision": "bf16"}
    keep(tmp_path / "cpu", ROW, ROW | {"batch": 1, "value": 1.0}, ROW | {"output": "cls", "value": 2.0})
    keep(
        tmp_path / "some-gpu",
        ROW | gpu | {"precision": "fp32", "value": 3.0},
        ROW | gpu | {"value": 4.0, "floor_share": 0.5, "versions": {"xformers": "0.0.35"}},
        ROW | gpu | FACEBOOK | {"value": 2.0, "mode": "xformers-eager", "versions": {"xformers": "0.0.35"}},
        ROW | gpu | LATENCY | {"value": 5.0, "batch": 16},
        ROW | gpu | LATENCY | {"value": 6.0},
        ROW | gpu | LATENCY | {"value": 7.0, "output": "cls"},
        *(
            ROW | gpu | {"task": "roofline", "model": model, "output": "copy", "value": 4.3, "unit": "GB/s"}
            for model in (None, "dinov2_vits14")
        ),
    )
    text = report.speed(tmp_path)
    assert "No result on a GPU" not in text
    first, second = text.split("\n### ")
    assert first.startswith("### Some GPU\n")
    assert second.startswith("CPU\n")
    assert lines(first) == [
        "| ViT-S/14 | 224 | 8 | 4.00 | 2.00 (xformers-eager) | 2.00 | 50% |",
        "| ViT-S/14 | 224 | 1 | 6.00 | – |",
    ]
    assert lines(second) == ["| ViT-S/14 | 224 | 8 | 30.0 | – |"]
    assert "all tokens, bf16, the largest batch. Some GPU, torch 2.11.0, triton 3.6.0, xformers 0.0.35, commit" in first
    assert first.count("copy bf16 4.30 GB/s") == 1
    assert report.FLOOR in first
    assert report.FLOOR not in second
    assert "](bench/results/some-gpu/latency.png)" in first
    assert "latency" not in second


def test_readme_says_that_no_gpu_was_measured(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    keep(tmp_path / "cpu", ROW)
    text = report.updated(f"before {report.BEGIN} old {report.END} after", tmp_path)
    assert text.startswith(f"before {report.BEGIN}\n\nNo result on a GPU exists yet")
    assert text.endswith(f"{report.END} after")
    assert " old " not in text
    assert report.updated(text, tmp_path) == text
    with pytest.raises(ValueError, match="two marks"):
        report.updated("no marks", tmp_path)


def test_other_files_and_rows_without_a_value_do_not_disturb(tmp_path: Path) -> None:
    folder = keep(tmp_path / "cpu", missing("timm is not installed", **TIMM))
    (folder / "steps.jsonl").write_text('{"step": "tests"}\n')
    assert report.plotted(folder) == {}
    assert ".png" not in report.speed(tmp_path)
    assert lines(report.speed(tmp_path)) == ["| ViT-S/14 | 224 | 8 | – | –¹ | – |"]


def test_numbers_have_three_digits() -> None:
    assert [number(x) for x in (45174.6, 99.96, 9.999, 0.9996, 0.0456)] == ["45175", "100", "10.0", "1.00", "0.046"]


def test_bars_are_as_high_as_what_they_show() -> None:
    plots = pytest.importorskip("bench.plots", reason="matplotlib is not installed", exc_type=ImportError)
    rows = [
        ROW | {"floor_share": 0.6},
        ROW | {"mode": "triton", "value": 40.0, "floor_share": 0.8},
        ROW | TIMM | {"value": 20.0},
        ROW | FACEBOOK | {"value": 10.0, "resolution": 518},
        missing("no --reference-path was given", **FACEBOOK),
        missing("out of memory: at 518", resolution=518),
        missing("transformers is not installed", **TRANSFORMERS),
    ]
    small, large = plots.draw(comparisons(rows), "heading").axes
    assert [bar.get_height() for bar in small.patches] == [0.8, 0.4]
    assert [line.get_segments()[0][0][1] for line in small.collections] == [1.0]
    assert {"40.0", "20.0", "2.00×", "no --reference-path was given"} <= {text.get_text() for text in small.texts}
    assert [bar.get_height() for bar in large.patches] == [1.0]
    assert [text.get_text() for text in large.texts] == ["out of memory", "", "10.0"]
    times = [ROW | {"unit": "ms", "floor_share": 0.5}, ROW | TIMM | {"unit": "ms", "value": 20.0, "floor_share": 0.75}]
    (axes,) = plots.draw(comparisons(times), "heading").axes
    assert [bar.get_height() for bar in axes.patches] == [1.0, 2 / 3]
    assert [line.get_segments()[0][0][1] for line in axes.collections] == [0.5]
    assert "0.67×" in {text.get_text() for text in axes.texts}


def test_the_same_rows_give_the_same_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    rows = [ROW, ROW | TIMM | {"value": 20.0}, ROW | LATENCY]
    for name in "ab":
        keep(tmp_path / name / "cpu", *rows)
        with matplotlib.rc_context({"savefig.dpi": 50 if name == "b" else 100, "font.size": 20}):
            assert report.main(["--results", str(tmp_path / name)]) == 0
    files = [{path.name: path.read_bytes() for path in (tmp_path / name / "cpu").iterdir()} for name in "ab"]
    assert files[0] == files[1]
    assert set(files[0]) == {"throughput.jsonl", "latency.jsonl", "README.md", "throughput.png", "latency.png"}
    folder = keep(tmp_path / "a" / "cpu", ROW | TRANSFORMERS | {"value": 26.0})
    with Image.open(folder / "throughput.png") as picture:
        assert picture.text.keys() == {"rows"}
        assert picture.text["rows"] != report.digest(report.plotted(folder)["throughput"])
    with Image.open(folder / "latency.png") as picture:
        assert picture.text["rows"] == report.digest(report.plotted(folder)["latency"])
    with pytest.raises(SystemExit):
        report.main(["--results", str(tmp_path / "c")])
    assert "is no folder" in capsys.readouterr().err


def test_without_matplotlib_the_texts_are_written(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.delattr("bench.plots", raising=False)
    monkeypatch.setitem(sys.modules, "bench.plots", None)
    folder = keep(tmp_path / "cpu", ROW)
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    report.README.write_text(f"{report.BEGIN} old {report.END}")
    assert report.main(["--results", str(tmp_path)]) == 1
    assert "the plots are not" in capsys.readouterr().err
    assert (folder / "README.md").is_file()
    assert " old " in report.README.read_text(), "these results are not the project's own"


def test_a_full_set_fits_on_a_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "some-gpu"
    keep(
        folder,
        *(
            ROW
            | {"model": f"dinov2_vit{size}14", "resolution": pixels, "batch": batch, "floor_share": 0.6}
            | {"implementation": name, "value": 17.3 * batch / pixels, "gpu": "Some GPU"}
            | task
            for task in ({}, {"task": "latency", "unit": "ms"})
            for size in "sblg"
            for pixels in ((224, 518) if task else (224, 518, 1036))
            for batch in ((1, 4, 16) if task else (256,))
            for name in ("dinov2_fast", "transformers", "timm", "facebook")
        ),
    )
    assert report.main(["--results", str(tmp_path)]) == 0
    for path in (folder / "throughput.png", folder / "latency.png"):
        assert path.stat().st_size < 150_000
        with Image.open(path) as picture:
            assert picture.width == 1000
            assert picture.height < 700
