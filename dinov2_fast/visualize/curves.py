"""The curves of a pretraining run, from its ``metrics.jsonl``, as one PNG."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2_fast.errors import InvalidValueError, UnsupportedError
from dinov2_fast.pretraining.config import PretrainingConfig
from dinov2_fast.pretraining.log import MANIFEST, METRICS, read_metrics, uniform_losses

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "curves.png"
PANELS = {  # the metrics in each panel; a name that ends in "/" is that of a group
    "loss": ("loss",),
    "DINO loss": ("dino_global", "dino_local"),
    "iBOT loss": ("ibot",),
    "KoLeo loss": ("koleo",),
    "entropy of the targets": ("dino_entropy", "dino_mean_entropy", "ibot_entropy", "ibot_mean_entropy"),
    "k-NN accuracy": ("knn/",),
    "learning rate": ("learning_rate", "last_layer_learning_rate"),
    "weight decay": ("weight_decay",),
    "momentum of the teacher": ("momentum",),
    "temperature of the targets": ("temperature",),
    "gradient norm": ("gradient_norm/",),
    "images per second": ("images_per_second",),
    "share of time waiting for data": ("data_wait",),
}
COLUMNS = 2  # panels side by side
WIDTH, HEIGHT = 5.0, 2.2  # inches of a panel


def save_curves(run: Path, out: Path) -> Path:
    """Draws the curves of the run in the folder `run` to ``curves.png`` in the folder `out`, which is made.

    Raises:
        UnsupportedError: matplotlib is not installed.
        InvalidValueError: the run has not reported anything yet.
        OSError: a file cannot be read or written.
    """
    reports = read_metrics(run)
    if not reports:
        raise InvalidValueError(f"{str(run / METRICS)!r} holds no report yet: wait until the run has made some steps.")
    figure = draw_curves(reports, uniform_values(run), title=str(run))
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / NAME, metadata={"Software": None}, pil_kwargs={"optimize": True})
    return out / NAME


def uniform_values(run: Path) -> dict[str, float]:
    """The losses and entropies of a run at uniform outputs."""
    manifest = json.loads((run / MANIFEST).read_text(encoding="utf-8"))
    config = PretrainingConfig.from_dict(manifest["config"])
    entropies = {"dino": config.dino_head.prototypes, "ibot": (config.ibot_head or config.dino_head).prototypes}
    return uniform_losses(config) | {f"{name}_entropy": math.log(count) for name, count in entropies.items()}


def draw_curves(reports: Sequence[Mapping[str, float]], uniform: Mapping[str, float], *, title: str) -> Figure:
    """A panel for each group of metrics over the steps, two side by side, without those that no report has.

    Args:
        reports: "step" and metrics.
        uniform: values at which a metric gets a dashed line: those at uniform outputs.
        title: of the figure.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError("The curves need matplotlib, which is not installed: pip install matplotlib.") from None
    known = dict.fromkeys(name for report in reports for name in report)
    panels = {
        panel: [name for name in known for each in names if name == each or (each[-1] == "/" and name.startswith(each))]
        for panel, names in PANELS.items()
    }
    panels = {panel: names for panel, names in panels.items() if names}
    rows = -(-len(panels) // COLUMNS)
    figure = Figure((WIDTH * COLUMNS, HEIGHT * rows), dpi=100, layout="constrained")
    every = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for axes, (panel, names) in zip(every, panels.items(), strict=False):
        axes.set_xlim(0, reports[-1]["step"])
        _draw_panel(
            axes, panel, {name: [(r["step"], r[name]) for r in reports if name in r] for name in names}, uniform
        )
    for axes in every[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(title, fontsize=10)
    return figure


def _draw_panel(
    axes: Any, title: str, curves: Mapping[str, list[tuple[float, float]]], uniform: Mapping[str, float]
) -> None:
    """Lines of points (step, value), and dashed lines of the same colour at the values of `uniform`."""
    for name, points in curves.items():
        (line,) = axes.plot(
            *zip(*points, strict=True), linewidth=1.2, marker="." if len(points) < 30 else "", label=name
        )
        if name in uniform:
            axes.axhline(uniform[name], color=line.get_color(), linewidth=1, linestyle="--")
    if any(name in uniform for name in curves):
        title += " (dashed: at uniform outputs)"
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axes.legend(fontsize=8, framealpha=0.8, edgecolor="none")
