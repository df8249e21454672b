"""Writes tables and plots from the rows in ``bench/results``: ``python -m bench.report``.

Each device's folder gets a README.md with all values, and the plots throughput.png and latency.png. The project's
README gets, for each device, the plots and the rows that most people would run. Of each file the rows of the commit
that was measured last count. Plots need matplotlib: without it only the texts are written, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import harness, records
from bench.records import Row
from dinov2_fast.configs import BACKBONES

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- speed: written by python -m bench.report -->", "<!-- end of speed -->"
OURS = "dinov2_fast"
TASKS = ("throughput", "latency", "training", "memory", "mixed", "extraction", "host")
PLOTTED = {"throughput": -1, "latency": 0}  # of several batches, README shows the largest and the smallest
SETTING = ("model", "resolution", "precision", "output", "batch")  # what all implementations are asked for
ORDER = [*BACKBONES, "bf16", "fp16", "fp32", "all", "cls"]  # what most people would run comes first
HEADINGS = {"resolution": "pixels"}
UNITS = {"images/s": "images per second", "ms": "milliseconds", "MiB": "peak MiB"}
FLOOR = (
    "The floor is the least time of a forward pass at this device's rates of a large product and of a copy "
    "(`bench/roofline.py`)."
)
WIDTH, HEAD, BAR = 10.0, 0.6, 0.2  # inches: of a figure, above a panel, of a bar
COLUMNS = 2  # panels side by side


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.report", description=__doc__)
    where = "the folder of the devices' folders; README changes with the default, bench/results, only"
    parser.add_argument("--results", type=Path, default=records.RESULTS, help=where)
    results = parser.parse_args(arguments).results
    if not results.is_dir():
        parser.error(f"--results: {results} is no folder")
    measured = devices(results)
    for device in measured:
        (device.folder / "README.md").write_text(device_readme(device), encoding="utf-8")
    if results == records.RESULTS:
        README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
    try:
        for device in measured:
            for task, chosen in device.headline.items():
                save_plot(chosen, device.folder / f"{task}.png")
    except ImportError as error:
        print(f"bench.report: the texts are written, the plots are not: {error}", file=sys.stderr)
        return 1
    return 0


class Comparison:
    """The rows of one task, setting and unit.

    Attributes:
        values: the rows, the best first.
        rows: the same by implementation, ours first.
        share: our best row's share of the floor.
        ratio: how many times better our best row is than the best of a peer.
        accelerated: how many times better each peer's model is with our blocks in it, both eager.
        floor: the floor in the unit of the rows.
    """

    def __init__(self, values: list[Row]) -> None:
        self.setting = tuple(values[0][key] for key in SETTING)
        self.task, self.unit = values[0]["task"], values[0]["unit"]
        self.less_is_better = self.unit in records.LESS_IS_BETTER
        self.values = sorted(values, key=lambda row: row["value"], reverse=not self.less_is_better)
        names = dict.fromkeys([OURS, *(row["implementation"] for row in values)])
        self.rows = {name: [row for row in self.values if row["implementation"] == name] for name in names}
        ours, peers = self.rows[OURS], [row for row in self.values if row["implementation"] != OURS]
        self.ratio = records.ratio(ours[0], peers[0]) if ours and peers else None
        self.share = ours[0]["floor_share"] if ours else None
        modes, eager = {row["mode"]: row for row in ours}, [row for row in peers if row["mode"] == "eager"]
        pairs = [(modes.get(f"accelerated-{row['implementation']}"), row) for row in eager]
        self.accelerated = [records.ratio(with_ours, without) for with_ours, without in pairs if with_ours]
        shares = [(row["value"], row["floor_share"]) for row in values if row["floor_share"]]
        self.floor = next((value * share if self.less_is_better else value / share for value, share in shares), None)

    @property
    def words(self) -> list[str]:
        """The setting as people write it: `ViT-S/14`."""
        model, *others = self.setting
        title = harness.title(BACKBONES[model]) if model in BACKBONES else model
        return [title, *("–" if value is None else str(value) for value in others)]


def comparisons(rows: Iterable[Row]) -> list[Comparison]:
    """Rows with a value by setting and unit: numbers ascend, names are in ORDER, unknown names come last."""
    values = [row for row in rows if row["value"] is not None]
    alike = grouped(values, lambda row: (row["unit"], *(row[key] for key in SETTING)))
    return sorted(map(Comparison, alike), key=lambda one: [_place(value) for value in one.setting])


def grouped(every: Iterable[Any], key: Callable[[Any], Any]) -> list[list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for one in every:
        groups.setdefault(key(one), []).append(one)
    return list(groups.values())


def _place(value: str | int | None) -> int:
    if isinstance(value, str):
        return ORDER.index(value) if value in ORDER else len(ORDER)
    return value or 0


def usual(every: list[Comparison], batch: int) -> list[Comparison]:
    """For each model and size what most people would run: the first precision and output, and one batch size."""
    groups = grouped(every, lambda one: one.setting[:2])
    return [[one for one in some if one.setting[:-1] == some[0].setting[:-1]][batch] for some in groups]


class Device:
    """What was measured on a device: for each task the rows of the commit that was measured last.

    `headline` is what the project's README shows, `rates` a sentence with the rates of the floor.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        every = {task: records.newest(records.read(folder / f"{task}.jsonl")) for task in TASKS}
        self.rows = {task: rows for task, rows in every.items() if rows}
        self.rates = rates(self.rows.get("throughput", []))
        self.comparisons = {task: comparisons(rows) for task, rows in self.rows.items()}
        chosen = {task: usual(self.comparisons.get(task, []), batch) for task, batch in PLOTTED.items()}
        self.headline = {task: some for task, some in chosen.items() if some}
        rows = [row for rows in self.rows.values() for row in rows]
        self.gpu = facts(rows, "gpu")
        self.name = self.gpu or f"CPU: {facts(rows, 'cpu')}"


def rates(rows: list[Row]) -> str:
    """A sentence with the rates of a copy and of large products in the `versions` of rows, "" without any."""
    units = {"copy_per_s": ("a copy", "GB/s", 1e9), "product_per_s": ("a product", "TFLOP/s", 1e12)}
    units |= {"e4m3_per_s": ("one in e4m3", "TFLOP/s", 1e12)}
    words = []
    for name, (what, unit, scale) in units.items():
        values = sorted({rate for row in rows if (rate := records.fact(row, name))})
        span = " to ".join(dict.fromkeys(number(value / scale) for value in (values[0], values[-1]))) if values else ""
        words += [f"{what} {span} {unit}"] if values else []
    return f"Here {', '.join(words)}." if words else ""


def devices(results: Path) -> list[Device]:
    """The devices with rows, GPUs first."""
    every = [Device(path) for path in sorted(results.iterdir()) if path.is_dir()]
    return sorted((device for device in every if device.rows), key=lambda device: not device.gpu)


def updated(readme: str, results: Path = records.RESULTS) -> str:
    """README's text with a new part between its two marks; ValueError if a mark is missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md must hold the two marks {BEGIN} and {END}: the tables go between them.")
    measured = devices(results)
    no_gpu = "No result on a GPU exists yet: `make gpu` measures one.\n"
    parts = [] if any(device.gpu for device in measured) else [no_gpu]
    return "\n".join([f"{before}{begin}\n", *parts, *map(device_section, measured), f"{end}{after}"])


def device_section(device: Device) -> str:
    """The part of the project's README about a device."""
    results = f"bench/results/{device.folder.name}"
    parts = [f"### {device.name}\n"]
    for task, chosen in device.headline.items():
        parts.append(f"![{task.capitalize()} of each implementation, by model and size]({results}/{task}.png)\n")
        parts.append(f"{task.capitalize()}, {_unit(chosen)}: {provenance(device.rows[task])}.\n")
        parts.append(table(chosen, best_only=True))
    parts.append(
        "These are the rows that most people would run, each implementation in its best mode (in brackets where that "
        f"is not eager); [all that was measured]({results}/README.md). {FLOOR} {device.rates}\n"
    )
    every = [times for task in device.headline for one in device.comparisons[task] for times in one.accelerated]
    if every:
        times = f"{min(every):.2f} to {max(every):.2f} times as fast ({len(every)} rows)"
        parts.append(f"Peers' models with our blocks in them (`dinov2_fast.accelerate(model)`), both eager: {times}.\n")
    return "\n".join(parts)


def device_readme(device: Device) -> str:
    """All values of a device, and the reasons of rows without one."""
    parts = [
        f"# Speed on {device.name}\n",
        "Written by `python -m bench.report` from the rows beside this file. The best mode of each implementation "
        "stands first and counts; in brackets the mode where it is not eager; – where nothing was measured.\n",
        f"{FLOOR} {device.rates}\n",
    ]
    for task, chosen in device.comparisons.items():
        parts.append(f"## {task.capitalize()}\n\n{provenance(device.rows[task])}.\n")
        if task in device.headline:
            parts.append(f"![{task.capitalize()} of each implementation, by model and size]({task}.png)\n")
        for unit in dict.fromkeys(one.unit for one in chosen):
            some = [one for one in chosen if one.unit == unit]
            parts.append(f"Unit: {_unit(some)}\n\n{table(some)}")
        parts += _not_measured(device.rows[task])
    return "\n".join(parts)


def _not_measured(rows: list[Row]) -> Iterator[str]:
    modes: dict[tuple[str, str], list[str]] = {}
    for row in (row for row in rows if row["value"] is None):
        why = " ".join(str(records.reason(row)).replace("`", "'").split())
        modes.setdefault((row["implementation"], why), []).append(row["mode"] or "eager")
    if modes:
        yield "Not measured:\n"
        for (name, why), some in modes.items():
            yield f"- {name}, {', '.join(dict.fromkeys(some))}: `{why}` ({len(some)} rows)"
        yield ""


def table(chosen: list[Comparison], best_only: bool = False) -> str:
    """A line for each setting: the values of each implementation, in its best mode or in all, and the ratio of ours."""
    shown = list(dict.fromkeys(name for one in chosen for name in one.rows))
    share = "device busy" if chosen[0].task == "extraction" else "share of the floor"
    times = "best peer / ours" if chosen[0].less_is_better else "ours / best peer"
    head, lines = [*(HEADINGS.get(key, key) for key in SETTING), *shown, times, share], []
    for one in chosen:
        rows = [one.rows.get(name, [])[: 1 if best_only else None] for name in shown]
        cells = ["<br>".join(map(_value, some)) or "–" for some in rows]
        lines.append([*one.words, *cells, _or_dash(one.ratio, "{:.2f}"), _or_dash(one.share, "{:.0%}")])
    return markdown(head, lines)


def markdown(head: Sequence[str], lines: list[list[str]]) -> str:
    """A table of these cells."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [head, ["---"] * len(head), *lines])


def _value(row: Row) -> str:
    return number(row["value"]) + (f" ({row['mode']})" if row["mode"] not in (None, "eager") else "")


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def number(value: float) -> str:
    """At least three digits, and all before the point; integers as they are."""
    if isinstance(value, int):
        return str(value)
    decimals = next((n for n, least in enumerate((100, 10, 1)) if round(value, n) >= least), 3)
    return f"{value:.{decimals}f}"


def _unit(chosen: list[Comparison]) -> str:
    better = "less is better" if chosen[0].less_is_better else "more is better"
    return f"{UNITS.get(chosen[0].unit, chosen[0].unit)} ({better})"


def provenance(rows: list[Row]) -> str:
    """Hardware, versions, commit and date of rows."""
    measured = [row for row in rows if row["value"] is not None] or rows
    used = " ".join(f"{row['implementation']} {row['mode']}" for row in measured)
    gpu, workers = facts(rows, "gpu"), facts(rows, "workers")
    hardware = gpu or f"{facts(rows, 'cpu')}, {facts(rows, 'threads')} threads"
    packages = ["torch", *(["triton"] if gpu else []), *(name for name in records.PACKAGES if name in used)]
    versions = [f"{name} {facts(measured, name)}" for name in packages]
    decoding = [f"{workers} decoding processes"] if workers else []
    commit = f"commit {records.short(rows[0]['commit'])}"
    return ", ".join([hardware, *decoding, *versions, commit, facts(rows, "date")])


def facts(rows: list[Row], name: str) -> str:
    """The values of a key of rows or of their `versions`; rows of one run have the same."""
    values = dict.fromkeys(records.fact(row, name) for row in rows)
    return " or ".join(str(value) for value in values if value is not None)


def save_plot(chosen: list[Comparison], path: Path) -> None:
    """Writes a PNG with a digest of its rows but without matplotlib's version: the same rows give the same bytes."""
    metadata = {"Software": None, "rows": digest(chosen)}
    draw(chosen).savefig(path, metadata=metadata, pil_kwargs={"optimize": True})


def digest(chosen: list[Comparison]) -> str:
    """A digest of the rows that a plot shows."""
    return hashlib.sha256(json.dumps([one.values for one in chosen], sort_keys=True).encode()).hexdigest()


def draw(chosen: list[Comparison]) -> Any:
    """A panel for each setting, with a bar for each implementation's best mode and a black line at the floor.

    Each panel has its own scale, which starts at 0, since models differ by powers of ten.
    """
    from matplotlib.figure import Figure

    lines, bars = -(-len(chosen) // COLUMNS), max(len(one.rows) for one in chosen)
    figure = Figure((WIDTH, HEAD + lines * (HEAD + BAR * bars)), dpi=100, layout="constrained")
    panels = list(figure.subplots(lines, COLUMNS, squeeze=False).flat)
    for axes, one in zip(panels, chosen, strict=False):
        _panel(axes, one)
    for axes in panels[len(chosen) :]:
        axes.set_axis_off()
    what, source = chosen[0].task.capitalize(), provenance([row for one in chosen for row in one.values])
    how = f"{_unit(chosen)}, best modes; bold: ours against the best peer; black: the floor"
    figure.suptitle(f"{what}, {how}\n{source}", fontsize=8)
    return figure


def _panel(axes: Any, one: Comparison) -> None:
    best = {name: some[0]["value"] for name, some in one.rows.items() if some}
    colours = ["#0b5fa5" if name == OURS else "#b8bcc4" for name in best]
    axes.barh([f"{name}  {number(value)}" for name, value in best.items()], list(best.values()), color=colours)
    if one.floor:
        axes.axvline(one.floor, color="black", linewidth=1.4)
    axes.set_title("{}, {} px, {}, {}, batch {}".format(*one.words), loc="left", fontsize=8)
    axes.set_title(f"{one.ratio:.2f}×" if one.ratio else "", loc="right", fontsize=9, fontweight="bold")
    axes.set_xticks([])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(main())
