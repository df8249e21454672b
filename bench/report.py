"""Writes tables and plots from the rows in ``bench/results``: ``python -m bench.report``.

Each device's folder gets a README.md with all values, and the plots throughput.png and latency.png. The project's
README gets, for each device, the plots and the models and sizes that most people run. Each file counts with the commit
that was measured last. Plots need matplotlib: without it only the texts are written, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from bench import harness, records
from bench.records import Row
from dinov2_fast.configs import BACKBONES

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- speed: written by python -m bench.report -->", "<!-- end of speed -->"
OURS = "dinov2_fast"
TASKS = ("throughput", "latency", "training", "pretraining", "memory", "mixed", "extraction", "host")
PLOTTED = {"throughput": -1, "latency": 0}  # the index of the batch size that README shows: the largest, the smallest
LABEL_KEYS = ("model", "resolution", "precision", "output", "batch")  # the columns that name a scenario
ORDER = [*BACKBONES, "bf16", "fp16", "fp32", "all", "cls"]  # what most people run comes first
LABEL_HEADINGS = ("model", "pixels", "precision", "output", "batch")
UNITS = {"images/s": "images per second", "ms": "milliseconds", "MiB": "peak MiB"}
UNITS |= {"images/core-s": "images per second of one core"}
FLOOR = (
    "The floor is an estimate of the least time: products run as fast as a large product on this device, and all other "
    "bytes move as fast as in a copy (`bench/roofline.py`)."
)
WIDTH, HEAD, BAR = 10.0, 0.6, 0.2  # inches: of a figure, above a panel, of a bar
COLUMNS = 2  # panels side by side


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.report", description=__doc__)
    results_help = "a folder of devices' folders (default: bench/results); only with the default is README.md written"
    parser.add_argument("--results", type=Path, default=records.RESULTS, help=results_help)
    results = parser.parse_args(arguments).results
    if not results.is_dir():
        parser.error(f"--results: {results} is not a folder")
    measured = devices(results)
    for device in measured:
        (device.folder / "README.md").write_text(device_readme(device), encoding="utf-8")
    if results == records.RESULTS:
        README.write_text(updated_readme(README.read_text(encoding="utf-8")), encoding="utf-8")
    try:
        for device in measured:
            for task, chosen in device.headline.items():
                save_plot(chosen, device.folder / f"{task}.png")
    except ImportError as error:
        print(f"bench.report: the texts are written, the plots are not: {error}", file=sys.stderr)
        return 1
    return 0


class Comparison:
    """The rows of one task, scenario and unit: `ranked`, the best first, and `by_name`, ours first."""

    def __init__(self, rows: list[Row]) -> None:
        self.scenario = itemgetter(*LABEL_KEYS)(rows[0])
        self.task, self.unit = rows[0]["task"], rows[0]["unit"]
        self.less_is_better = self.unit in records.LESS_IS_BETTER
        self.ranked = sorted(rows, key=lambda row: row["value"], reverse=not self.less_is_better)
        names = dict.fromkeys([OURS, *(row["implementation"] for row in rows)])
        self.by_name = {name: [row for row in self.ranked if row["implementation"] == name] for name in names}
        ours, peers = self.by_name[OURS], [row for row in self.ranked if row["implementation"] != OURS]
        # How many times better our best row is than a peer's best, and its share of the floor.
        self.ratio = records.row_ratio(ours[0], peers[0]) if ours and peers else None
        self.share = ours[0]["floor_share"] if ours else None
        # How many times better each peer's model is with our blocks in it, both eager.
        modes, eager = {row["mode"]: row for row in ours}, [row for row in peers if row["mode"] == "eager"]
        pairs = [(modes.get(f"accelerated-{row['implementation']}"), row) for row in eager]
        self.accelerated = [records.row_ratio(with_ours, without) for with_ours, without in pairs if with_ours]
        # The floor in the unit of the rows.
        shares = [(row["value"], row["floor_share"]) for row in rows if row["floor_share"]]
        self.floor = next((value * share if self.less_is_better else value / share for value, share in shares), None)

    @property
    def labels(self) -> list[str]:
        """The scenario in the usual spelling, such as `ViT-S/14`."""
        model, *others = self.scenario
        title = harness.model_title(BACKBONES[model]) if model in BACKBONES else model
        return [title, *("–" if value is None else str(value) for value in others)]


def comparisons(rows: Iterable[Row]) -> list[Comparison]:
    """Rows with a value by scenario and unit. Numbers ascend, names are in ORDER, and unknown names come last."""
    values = [row for row in rows if row["value"] is not None]
    groups = records.grouped(values, itemgetter("unit", *LABEL_KEYS))
    return sorted(
        map(Comparison, groups.values()), key=lambda comparison: [_rank(value) for value in comparison.scenario]
    )


def _rank(value: str | int | None) -> int:
    if isinstance(value, str):
        return ORDER.index(value) if value in ORDER else len(ORDER)
    return value or 0


def most_used(every: list[Comparison], batch_index: int) -> list[Comparison]:
    """What most people run of each model and size: the first precision and output, and a batch size by its index."""
    groups = records.grouped(every, lambda comparison: comparison.scenario[:2]).values()
    return [[each for each in group if each.scenario[:-1] == group[0].scenario[:-1]][batch_index] for group in groups]


class Device:
    """The results of a device: for each task the rows of the commit that was measured last.

    `headline` is what the project's README shows. `rates` is a sentence with the rates behind the floor.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        every = {task: records.newest_commit(records.read(folder / f"{task}.jsonl")) for task in TASKS}
        self.rows = {task: rows for task, rows in every.items() if rows}
        self.rates = rates_sentence(self.rows.get("throughput", []))
        self.comparisons = {task: comparisons(with_peaks(rows)) for task, rows in self.rows.items()}
        chosen = {task: most_used(self.comparisons.get(task, []), batch) for task, batch in PLOTTED.items()}
        self.headline = {task: shown for task, shown in chosen.items() if shown}
        rows = [row for rows in self.rows.values() for row in rows]
        self.gpu = facts(rows, "gpu")
        self.name = self.gpu or f"CPU: {facts(rows, 'cpu')}"


def with_peaks(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, and after each one whose `versions` have `peak_mib` a row with that value."""
    for row in rows:
        yield row
        if peak := records.lookup(row, "peak_mib"):
            yield row | {"value": peak, "unit": "MiB", "floor_share": None}


def rates_sentence(rows: list[Row]) -> str:
    """A sentence with the rates of a copy and of large products in the `versions` of rows, "" if there are none."""
    units = {"copy_per_s": ("a copy", "GB/s", 1e9), "product_per_s": ("a product", "TFLOP/s", 1e12)}
    units |= {"e4m3_per_s": ("a product in e4m3", "TFLOP/s", 1e12)}
    parts = []
    for name, (what, unit, scale) in units.items():
        if rates := [rate / scale for row in rows if (rate := records.lookup(row, name))]:
            span = " to ".join(dict.fromkeys(map(format_number, (min(rates), max(rates)))))
            parts.append(f"{what} reaches {span} {unit}")
    return f"Here {', '.join(parts)}." if parts else ""


def devices(results: Path) -> list[Device]:
    """The devices with rows, GPUs first."""
    every = [Device(path) for path in sorted(results.iterdir()) if path.is_dir()]
    return sorted((device for device in every if device.rows), key=lambda device: not device.gpu)


def updated_readme(readme: str, results: Path = records.RESULTS) -> str:
    """README's text with a new section between its two marks. ValueError if a mark is missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md must hold the two marks {BEGIN} and {END}: the tables go between them.")
    measured = devices(results)
    no_gpu = "There is no result on a GPU yet: `make gpu` measures one.\n"
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
    if steps := [each for each in device.comparisons.get("pretraining", []) if each.scenario[0] != "loader"]:
        parts.append(f"Steps of pretraining: {provenance(device.rows['pretraining'])}.\n")
        for same_unit in records.grouped(steps, lambda each: each.unit).values():
            parts.append(f"Unit: {_unit(same_unit)}\n\n{table(same_unit, best_only=True)}")
    parts.append(
        "Each implementation is shown in its best mode, which is in brackets unless it is eager; "
        f"[the page of this device]({results}/README.md) has all results. {FLOOR} {device.rates}\n"
    )
    every = [times for task in device.headline for each in device.comparisons[task] for times in each.accelerated]
    if every:
        times = f"{min(every):.2f} to {max(every):.2f} times as fast ({len(every)} rows)"
        parts.append(f"Peers' models with our blocks in them (`dinov2_fast.accelerate(model)`), both eager: {times}.\n")
    return "\n".join(parts)


def device_readme(device: Device) -> str:
    """All values of a device, and why rows have no value."""
    parts = [
        f"# Speed on {device.name}\n",
        "`python -m bench.report` writes this file from the rows beside it. The best mode of each implementation comes "
        "first, and the ratios compare those. The mode is in brackets unless it is eager; – means not measured.\n",
        f"{FLOOR} {device.rates}\n",
    ]
    for task, chosen in device.comparisons.items():
        parts.append(f"## {task.capitalize()}\n\n{provenance(device.rows[task])}.\n")
        if task in device.headline:
            parts.append(f"![{task.capitalize()} of each implementation, by model and size]({task}.png)\n")
        for unit in dict.fromkeys(each.unit for each in chosen):
            same_unit = [each for each in chosen if each.unit == unit]
            parts.append(f"Unit: {_unit(same_unit)}\n\n{table(same_unit)}")
        parts += _notes(device.rows[task])
        parts += _not_measured(device.rows[task])
    return "\n".join(parts)


def _notes(rows: list[Row]) -> Iterator[str]:
    for name, note in dict.fromkeys((row["implementation"], records.lookup(row, "note")) for row in rows):
        if note:
            yield f"In {name}, replaced for this measurement: {note}.\n"


def _not_measured(rows: list[Row]) -> Iterator[str]:
    modes: dict[tuple[str, str], list[str]] = {}
    for row in (row for row in rows if row["value"] is None):
        why = " ".join(str(records.reason(row)).replace("`", "'").split())
        modes.setdefault((row["implementation"], why), []).append(row["mode"] or "eager")
    if modes:
        yield "Not measured:\n"
        for (name, why), names in modes.items():
            yield f"- {name}, {', '.join(dict.fromkeys(names))}: `{why}` ({len(names)} rows)"
        yield ""


def table(chosen: list[Comparison], best_only: bool = False) -> str:
    """A line for each scenario: the values of each implementation, in its best mode or in all, and our ratio."""
    names = list(dict.fromkeys(name for each in chosen for name in each.by_name))
    share = "device busy" if chosen[0].task == "extraction" else "share of the floor"
    ratio = "best peer / ours" if chosen[0].less_is_better else "ours / best peer"
    lines = []
    for each in chosen:
        rows = [each.by_name.get(name, [])[: 1 if best_only else None] for name in names]
        cells = ["<br>".join(map(_value, same_name)) or "–" for same_name in rows]
        ratio_and_share = _or_dash(each.ratio, "{:.2f}"), _or_dash(each.share, "{:.0%}")
        lines.append([*each.labels, *cells, *ratio_and_share])
    return markdown_table([*LABEL_HEADINGS, *names, ratio, share], lines)


def markdown_table(head: Sequence[str], lines: list[list[str]]) -> str:
    """A table of these cells."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [head, ["---"] * len(head), *lines])


def _value(row: Row) -> str:
    return format_number(row["value"]) + (f" ({row['mode']})" if row["mode"] not in (None, "eager") else "")


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def format_number(value: float) -> str:
    """A number with at least three digits and all digits before the point; integers unchanged."""
    if isinstance(value, int):
        return str(value)
    decimals = next((n for n, least in enumerate((100, 10, 1)) if round(value, n) >= least), 3)
    return f"{value:.{decimals}f}"


def _unit(chosen: list[Comparison]) -> str:
    better = "less is better" if chosen[0].less_is_better else "more is better"
    return f"{UNITS.get(chosen[0].unit, chosen[0].unit)} ({better})"


def provenance(rows: list[Row]) -> str:
    """The hardware, versions, commit and date of rows."""
    measured = [row for row in rows if row["value"] is not None] or rows
    used = " ".join(f"{row['implementation']} {row['mode']}" for row in measured)
    gpu, workers = facts(rows, "gpu"), facts(rows, "workers")
    parts = [gpu or f"{facts(rows, 'cpu')}, {facts(rows, 'threads')} threads"]
    parts += [f"{workers} decoding processes"] if workers else []
    packages = ["torch", *(["triton"] if gpu else []), *(name for name in records.PACKAGES if name in used)]
    parts += [f"{name} {facts(measured, name)}" for name in packages]
    # The first digits, with "-dirty" if the code was changed.
    digits, dirty, _ = (rows[0]["commit"] or "unknown").partition("-dirty")
    return ", ".join([*parts, f"commit {digits[:8]}{dirty}", facts(rows, "date")])


def facts(rows: list[Row], name: str) -> str:
    """The values of a key of rows or of their `versions`. Rows of one run have the same value."""
    values = dict.fromkeys(records.lookup(row, name) for row in rows)
    return " or ".join(str(value) for value in values if value is not None)


def save_plot(chosen: list[Comparison], path: Path) -> None:
    """Writes a PNG with a digest of its rows and without matplotlib's version: the same rows give the same bytes."""
    metadata = {"Software": None, "rows": digest(chosen)}
    draw(chosen).savefig(path, metadata=metadata, pil_kwargs={"optimize": True})


def digest(chosen: list[Comparison]) -> str:
    """A digest of the rows that a plot shows."""
    return hashlib.sha256(json.dumps([each.ranked for each in chosen], sort_keys=True).encode()).hexdigest()


def draw(chosen: list[Comparison]) -> Any:
    """A panel for each scenario, with a bar for each implementation's best mode and a black line at the floor.

    Each panel has its own scale, which starts at 0, since values differ by powers of ten between models.
    """
    from matplotlib.figure import Figure

    lines, bars = -(-len(chosen) // COLUMNS), max(len(each.by_name) for each in chosen)
    figure = Figure((WIDTH, HEAD + lines * (HEAD + BAR * bars)), dpi=100, layout="constrained")
    panels = list(figure.subplots(lines, COLUMNS, squeeze=False).flat)
    for axes, comparison in zip(panels, chosen, strict=False):
        _panel(axes, comparison)
    for axes in panels[len(chosen) :]:
        axes.set_axis_off()
    what, source = chosen[0].task.capitalize(), provenance([row for each in chosen for row in each.ranked])
    how = f"{_unit(chosen)}, best modes; bold: ours against the best peer; black: the floor"
    figure.suptitle(f"{what}, {how}\n{source}", fontsize=8)
    return figure


def _panel(axes: Any, comparison: Comparison) -> None:
    best = {name: rows[0]["value"] for name, rows in comparison.by_name.items() if rows}
    colours = ["#0b5fa5" if name == OURS else "#b8bcc4" for name in best]
    axes.barh([f"{name}  {format_number(value)}" for name, value in best.items()], list(best.values()), color=colours)
    if comparison.floor:
        axes.axvline(comparison.floor, color="black", linewidth=1.4)
    axes.set_title("{}, {} px, {}, {}, batch {}".format(*comparison.labels), loc="left", fontsize=8)
    axes.set_title(f"{comparison.ratio:.2f}×" if comparison.ratio else "", loc="right", fontsize=9, fontweight="bold")
    axes.set_xticks([])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(main())
