"""The curves of a run show what its `metrics.jsonl` holds."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov2_fast.cli import main
from dinov2_fast.pretraining.config import PretrainingConfig
from dinov2_fast.pretraining.log import MANIFEST, METRICS, MetricsFile, StepReport
from dinov2_fast.visualize.curves import draw_curves, uniform_values

CONFIG = PretrainingConfig().updated({"dino_head": {"prototypes": 64}, "ibot_head": {"prototypes": 16}})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with reports of steps 10 to 50, and one of an evaluation in step 45."""
    (tmp_path / MANIFEST).write_text(json.dumps({"config": CONFIG.to_dict()}))
    file = MetricsFile(tmp_path, 0)
    for step in (10, 20, 30, 40, 45, 50):
        metrics = {"loss": 1 / step, "dino_global": 2 / step, "dino_local": 3 / step, "ibot": 4 / step}
        metrics |= {"gradient_norm/backbone": 1.0, "gradient_norm/dino_head": 2.0, "skipped_images": 0.0}
        if step % 10 == 0:
            metrics |= {"dino_entropy": 3.0, "dino_mean_entropy": 4.0, "ibot_entropy": 1.0, "ibot_mean_entropy": 2.0}
        else:
            metrics |= {"knn/10": 0.5, "knn/20": 0.6}
        file.write(StepReport(step, 50, metrics, 0.0))
    file.close()
    return tmp_path


def panels(figure: Any) -> Iterator[tuple[str, dict[str, list[list[float]]], list[float]]]:
    """Title, curves by name and heights of the dashed lines of each panel."""
    for axes in figure.axes:
        lines = [line for line in axes.lines if line.get_linestyle() == "-"]
        dashed = [float(line.get_ydata()[0]) for line in axes.lines if line.get_linestyle() == "--"]
        curves = {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in lines}
        if curves:
            yield axes.get_title(loc="left"), curves, dashed


def test_each_panel_shows_its_metrics_and_their_values_at_uniform_outputs() -> None:
    pytest.importorskip("matplotlib")
    reports = [{"step": 10, "dino_global": 4.0, "dino_local": 5.0}, {"step": 20, "dino_global": 3.0, "knn/10": 0.5}]
    figure = draw_curves(reports, {"dino_global": 1.5, "ibot": 9.0}, title="run")
    assert list(panels(figure)) == [
        (
            "DINO loss (dashed: at uniform outputs)",
            {"dino_global": [[10, 4.0], [20, 3.0]], "dino_local": [[10, 5.0]]},
            [1.5],
        ),
        ("k-NN accuracy", {"knn/10": [[20, 0.5]]}, []),
    ]


def test_a_value_that_is_not_finite_is_a_gap() -> None:
    pytest.importorskip("matplotlib")
    reports = [{"step": float(step), "loss": math.nan if step == 20 else 1.0} for step in (10, 20, 30)]
    ((_, curves, _),) = panels(draw_curves(reports, {}, title="run"))
    np.testing.assert_array_equal(curves["loss"], [[10, 1], [20, math.nan], [30, 1]])


def test_the_uniform_values_are_those_of_the_configuration(run: Path) -> None:
    entropies = {"dino_entropy": math.log(64), "ibot_entropy": math.log(16)}
    losses = {"dino_global": math.log(64) * 2 / 18, "dino_local": math.log(64) * 16 / 18, "ibot": math.log(16) / 2}
    assert uniform_values(run) == pytest.approx(entropies | losses)


def test_show_draws_the_curves_of_a_run_that_goes_on(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    with open(run / METRICS, "a") as file:
        file.write('{"step": 60, "lo')  # the run is in the middle of a line
    out = tmp_path / "new" / "out"
    assert main(["show", str(run), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"curves:     {out / 'curves.png'}\n"
    with Image.open(out / "curves.png") as image:
        assert image.size == (1000, 3 * 220)  # loss, DINO, iBOT, entropy, k-NN and gradients in rows of 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "dinov2_vits14"], "Of a run, only its curves are drawn: leave out --model"),
        (["--pca"], "Of a run, only its curves are drawn"),
        (["--save-basis", "basis.safetensors"], "Of a run, only its curves are drawn"),
    ],
)
def test_a_run_has_no_sheets(
    run: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(run), "--out", str(tmp_path / "out"), *options]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_without_reports_is_an_error(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / METRICS).write_text('{"step"')
    assert main(["show", str(run), "--out", str(tmp_path / "out")]) == 1
    assert "holds no report yet: wait until the run" in capsys.readouterr().err


def test_without_matplotlib_the_message_says_what_to_install(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it fails
    assert main(["show", str(run), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.endswith("matplotlib, which is not installed: pip install matplotlib.\n")
    assert not (tmp_path / "out").exists()
