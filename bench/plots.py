"""Bars of what each implementation reaches, drawn by bench.report. The same rows give the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bench.tables import OURS, Comparison, implementations, number, title

COLOURS = {OURS: "#0b5fa5", "transformers": "#e8a33d", "timm": "#4f9d69", "facebook": "#a9a9b8"}
OTHERS = "#c98bb9"
WIDTH, PANEL, HEAD, DPI = 10.0, 1.8, 1.0, 100  # inches of the figure, of a panel's height, of the heading; dots
FEW = 24  # bars in a panel, up to which numbers are written from left to right


def draw(chosen: list[Comparison], heading: str) -> Figure:
    """A panel for each size with a group of bars for each model and batch, at each implementation's best mode.

    Each group has its own scale from 0, since models differ by powers of ten: bars compare implementations, and numbers
    say what they reach. A black line is the floor; above a group stands ours against the best peer.
    """
    sizes = list(dict.fromkeys(sorted(one["resolution"] for one in chosen)))
    names = [name for name in implementations(chosen) if any(one.best(name) for one in chosen)]
    with _defaults():
        figure = Figure(figsize=(WIDTH, HEAD + PANEL * len(sizes)), dpi=DPI, layout="constrained")
        for axes, size in zip(figure.subplots(len(sizes), squeeze=False)[:, 0], sizes, strict=True):
            _panel(axes, [one for one in chosen if one["resolution"] == size], names)
            axes.set_ylabel(f"{size} px", fontsize=9)
        handles = [Patch(color=COLOURS.get(name, OTHERS), label=name) for name in names]
        if any(one.floor for one in chosen):
            handles.append(Line2D([], [], color="black", linewidth=1.4, label="floor"))
        figure.suptitle(heading, fontsize=9)
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def _panel(axes: Axes, chosen: list[Comparison], names: list[str]) -> None:
    width = 0.86 / len(names)
    rotation = 0 if len(names) * len(chosen) <= FEW else 90
    top = 1.05 if not any(one.less_is_better for one in chosen) else 1.15 if rotation == 0 else 1.4
    for place, one in enumerate(chosen):
        best = {name: one.best(name) for name in names}
        scale = max([row["value"] for row in best.values() if row] + [one.floor or 0]) or 1
        for index, (name, row) in enumerate(best.items()):
            x = place + (index - (len(names) - 1) / 2) * width
            if row:
                axes.bar(x, row["value"] / scale, 0.92 * width, color=COLOURS.get(name, OTHERS))
            text = number(row["value"]) if row else one.why_not(name) or ""
            # Above the bar where that is free: for times the floor is a line across the bars; the text interrupts it.
            above = row and one.less_is_better
            axes.text(
                x,
                row["value"] / scale + 0.03 if above else 0.03,
                text,
                color="white" if row and not above and name == OURS else "black",
                rotation=rotation if row else 90,
                ha="center",
                va="bottom",
                fontsize=7,
                zorder=3,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0} if above else None,
            )
        if one.floor:
            axes.hlines(one.floor / scale, place - 0.45, place + 0.45, color="black", linewidth=1.4)
        if one.ratio:
            axes.text(place, top, f"{one.ratio:.2f}×", ha="center", va="bottom", fontsize=9, fontweight="bold")
    axes.set_xticks(range(len(chosen)), [f"{title(one['model'])}\nbatch {one['batch']}" for one in chosen])
    axes.set(ylim=(0, top + 0.25), xlim=(-0.6, len(chosen) - 0.4), yticks=[])
    axes.tick_params(axis="x", length=0)
    axes.spines[["top", "left", "right"]].set_visible(False)


def save(figure: Figure, path: Path, digest: str) -> None:
    """Writes a PNG that says which rows it shows, and neither when nor with what it was made."""
    with _defaults():
        figure.savefig(path, metadata={"Software": None, "rows": digest}, pil_kwargs={"optimize": True})


@contextmanager
def _defaults() -> Iterator[None]:
    """The library's own settings, whatever the user's are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.size": 8, "axes.linewidth": 0.6})
        yield
