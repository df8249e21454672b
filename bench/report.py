"""Writes tables and plots of what was measured: ``python -m bench.report``. All comes from ``bench/results``.

Each device's folder gets a README.md with all tables, and the plots throughput.png and latency.png. The project's
README gets, for each device, the plots and the rows that most people would run. A task's rows are those of the commit
that was measured last in its file. Plots need matplotlib; without it only the texts are written, and the exit status
is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from bench import harness, records
from bench.records import Row
from dinov2_fast.configs import BACKBONES

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- speed: written by python -m bench.report -->", "<!-- end of speed -->"
OURS = "dinov2_fast"
TASKS = ("throughput", "latency", "training", "memory", "mixed", "extraction", "host")
PLOTTED = {"throughput": "the largest batch", "latency": "the smallest batch"}  # which of them README shows
# What is asked of all alike, and the order of names: of outputs and precisions, first what most people would run.
SETTING = ("model", "resolution", "batch", "output", "precision")
ORDER = {"model": list(BACKBONES), "output": ["all", "cls"], "precision": ["bf16", "autocast-bf16", "fp16", "fp32"]}
WORDS = {"resolution": "pixels", "all": "all tokens", "cls": "class token"}
WORDS |= {"images/s": "pictures per second", "ms": "milliseconds", "MiB": "peak memory in MiB"}
WORDS |= {"images": "the largest batch, in pictures"}
FLOOR = (
    "The floor is the time that a forward pass cannot go below at the rates of this device's own products, attention "
    "and copies (`bench/roofline.py`)."
)
SHARES = {"extraction": "share of the time in which the device works"}  # what a task's `floor_share` is
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
WITH_OUR_BLOCKS = "with our blocks in them, by `dinov2_fast.accelerate(model)`, both eager:"
COLOURS = {OURS: "#0b5fa5", "transformers": "#e8a33d", "timm": "#4f9d69", "facebook": "#a9a9b8"}
COLOURS |= {"onnxruntime": "#7b5ea7", "openvino": "#c0504d"}
OTHERS = "#c98bb9"
WIDTH, PANEL, HEAD, DPI = 10.0, 1.8, 1.0, 100  # inches of the figure, of a panel's height, of the heading; dots
FEW = 24  # bars in a panel, up to which numbers are written from left to right


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
            for task, chosen in device.plots.items():
                save_plot(chosen, device.folder / f"{task}.png")
    except ImportError as error:
        print(f"bench.report: the texts are written, the plots are not: {error}", file=sys.stderr)
        return 1
    return 0


class Comparison:
    """All rows of one task and setting, side by side.

    Attributes:
        unit: of the rows, or of the task where nothing could be measured.
        best: each implementation's best row, None if none has a value.
        ratio: how many times better ours is than the best peer.
        accelerated: of each peer the rows of its model without and with our blocks in it, both eager, and how many
            times better the second is.
        floor: what the floor of bench.roofline allows, in the unit of the rows.
    """

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        units = {"latency": "ms", "host": "ms", "memory": "MiB" if self["batch"] else "images"}
        self.unit = next((row["unit"] for row in rows if row["unit"]), units.get(self["task"], "images/s"))
        self.less_is_better = self.unit in records.LESS_IS_BETTER
        self.best = {some[0]["implementation"]: records.best(some) for some in grouped(rows, "implementation")}
        ours, peer = self.best.get(OURS), records.best(row for row in rows if row["implementation"] != OURS)
        self.ratio = records.ratio(ours, peer) if ours and peer else None
        modes = {(row["implementation"], row["mode"]): row for row in rows if row["value"] is not None}
        pairs = {peer: (modes.get((peer, "eager")), modes.get((OURS, f"accelerated-{peer}"))) for peer in self.best}
        measured = ((peer, *pair) for peer, pair in pairs.items() if all(pair))
        self.accelerated = {peer: (without, ours, records.ratio(ours, without)) for peer, without, ours in measured}
        shares = [(row["value"], row["floor_share"]) for row in rows if row["value"] is not None and row["floor_share"]]
        floors = [value * share if self.less_is_better else value / share for value, share in shares]
        self.floor = floors[0] if floors else None

    def __getitem__(self, key: str) -> Any:
        """The task, or one of SETTING."""
        return self.rows[0][key]

    def why_not(self, implementation: str) -> str:
        """Why it has no value, in a few words; "" if there is no row of it."""
        reasons = [str(records.reason(row)) for row in self.rows if row["implementation"] == implementation]
        return "; ".join(dict.fromkeys(why.removeprefix(records.MISSING).partition(": ")[0] for why in reasons))


def grouped(every: Iterable[Any], *keys: str) -> list[list[Any]]:
    """Rows or comparisons with the same keys together, as they come."""
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for one in every:
        groups.setdefault(tuple(one[key] for key in keys), []).append(one)
    return list(groups.values())


def place(one: Comparison, *keys: str) -> list[Any]:
    """What to sort by: numbers as they are, names in their ORDER, others behind them."""
    names = {key: [*ORDER[key], one[key]] for key in keys if key in ORDER}
    return [names[key].index(one[key]) if key in names else one[key] or 0 for key in keys]


def comparisons(rows: Iterable[Row]) -> list[Comparison]:
    """The rows by setting, in the order of models, sizes, batches, outputs and precisions."""
    return sorted((Comparison(group) for group in grouped(rows, *SETTING)), key=lambda one: place(one, *SETTING))


def usual(every: list[Comparison], batch: Callable[..., Comparison] | None = None) -> list[Comparison]:
    """Of each model and size what most people would run: one precision and output, and, by max or min, one batch."""
    chosen: list[Comparison] = []
    for group in grouped(every, "model", "resolution"):
        first = min(place(one, "precision", "output") for one in group)
        some = [one for one in group if place(one, "precision", "output") == first]
        chosen += [batch(some, key=lambda one: one["batch"])] if batch else some
    return chosen


def implementations(chosen: Iterable[Comparison]) -> list[str]:
    """Ours first, the others as they come."""
    return list(dict.fromkeys([OURS, *(row["implementation"] for one in chosen for row in one.rows)]))


class Device:
    """What was measured on a device, by task: `rows` and `comparisons` hold all of the commit measured last.

    `headline` is what the project's README shows: of each model and size the largest batch, for latency the smallest.
    `plots` show the same, but latency of all batches. `ceilings` says in one sentence what bench.roofline measured.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = {task: records.newest(records.read(folder / f"{task}.jsonl")) for task in (*TASKS, "roofline")}
        self.comparisons = {task: comparisons(self.rows[task]) for task in TASKS if self.rows[task]}
        self.every = [row for task in self.comparisons for row in self.rows[task]]
        self.gpu = facts(self.every, "gpu")
        chosen = {task: self.comparisons[task] for task in PLOTTED if task in self.comparisons}
        self.headline = {task: usual(every, max if task == "throughput" else min) for task, every in chosen.items()}
        plots = self.headline | {task: usual(every) for task, every in chosen.items() if task == "latency"}
        self.plots = {task: some for task, some in plots.items() if any(any(one.best.values()) for one in some)}
        rates = [row for row in self.rows["roofline"] if row["model"] is None and row["value"] is not None]
        words = [(row["output"], row["precision"], number(row["value"]), row["unit"]) for row in rates]
        ceilings = ", ".join(" ".join(filter(None, each)) for each in words)
        self.ceilings = f"Ceilings: {ceilings} ({provenance(rates)})." if rates else ""


def devices(results: Path) -> list[Device]:
    """Those that something was measured on, GPUs first."""
    every = [Device(path) for path in sorted(results.iterdir()) if path.is_dir()]
    return sorted((device for device in every if device.every), key=lambda device: not device.gpu)


def updated(readme: str, results: Path = records.RESULTS) -> str:
    """README's text with the part between its two marks made anew; ValueError if a mark is missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md must hold the two marks {BEGIN} and {END}: the tables go between them.")
    measured = devices(results)
    no_gpu = "No result on a GPU exists yet: `make gpu` measures one.\n"
    parts = [] if any(device.gpu for device in measured) else [no_gpu]
    return "\n".join([f"{before}{begin}\n", *parts, *map(device_section, measured), f"{end}{after}"])


def device_section(device: Device) -> str:
    """What the project's README says of a device."""
    results = f"bench/results/{device.folder.name}"
    parts = [f"### {device.gpu or 'CPU'}\n"]
    for task, chosen in device.headline.items():
        if task in device.plots:
            parts.append(f"![{task.capitalize()} of each implementation, by model and size]({results}/{task}.png)\n")
        parts.append(f"{_title(chosen)}: {_what(chosen)}, {PLOTTED[task]}. {provenance(device.rows[task])}.\n")
        mixed = [key for key in ("output", "precision") if len(grouped(chosen, key)) > 1]
        parts.append(table(chosen, ("model", "resolution", "batch", *mixed)))
    sentences = [
        "These are the rows that most people would run, each implementation in its best mode (in brackets where that "
        f"is not eager); [all that was measured]({results}/README.md).",
        FLOOR if any(one.floor for chosen in device.headline.values() for one in chosen) else "",
        device.ceilings,
    ]
    parts.append(" ".join(filter(None, sentences)) + "\n")
    times: dict[str, list[float]] = {}
    for one in (one for task in device.headline for one in device.comparisons[task]):
        for peer, (_, _, ratio) in one.accelerated.items():
            times.setdefault(peer, []).append(ratio)
    if times:
        low_to_high = [
            f"those of {peer} are {min(some):.2f} to {max(some):.2f} times as fast ({len(some)} rows)"
            for peer, some in times.items()
        ]
        parts.append(f"Models {WITH_OUR_BLOCKS} {' and '.join(low_to_high)}.\n")
    return "\n".join(parts)


def device_readme(device: Device) -> str:
    """All tables of a device."""
    parts = [
        f"# Speed on {'' if device.gpu else 'a CPU: '}{hardware(device.every)}\n",
        "Written by `python -m bench.report` from the rows beside this file. Of each implementation the best mode "
        "counts, in brackets where it is not eager.\n",
    ]
    parts += [f"{FLOOR} {device.ceilings}\n"] if device.ceilings else []
    for task, chosen in device.comparisons.items():
        parts.append(f"## {task.capitalize()}\n")
        if task in device.plots:
            parts.append(f"![{task.capitalize()}: {_what(device.plots[task])}]({task}.png)\n")
        for unit in sorted({one.unit for one in chosen}, key=[*WORDS, *(one.unit for one in chosen)].index):
            some, what = [one for one in chosen if one.unit == unit], WORDS.get(unit, unit)
            workers = facts([row for one in some for row in one.rows], "workers")
            with_workers = f" with {workers} decoding processes" if workers else ""
            parts.append(f"{what[0].upper()}{what[1:]}{with_workers}. {provenance(device.rows[task])}.\n")
            parts.append(table(some))
            if any(one.accelerated for one in some):
                parts.append(f"{WITH_OUR_BLOCKS.capitalize()}\n\n{accelerated_table(some)}")
        parts += _not_measured(chosen)
    return "\n".join(parts)


def _not_measured(chosen: list[Comparison]) -> Iterator[str]:
    modes: dict[tuple[str, str], list[str]] = {}
    for row in (row for one in chosen for row in one.rows if row["value"] is None):
        why = " ".join(str(records.reason(row)).replace("`", "'").split())
        modes.setdefault((row["implementation"], why), []).append(row["mode"] or "eager")
    if modes:
        yield "Not measured:\n"
        for (name, why), some in modes.items():
            yield f"- {name}, {', '.join(dict.fromkeys(some))}: `{why}` ({len(some)} rows)"
        yield ""


def table(chosen: list[Comparison], keys: Iterable[str] = SETTING) -> str:
    """What each implementation reaches in settings of one unit, of which the keys are shown; notes stand below."""
    names = implementations(chosen)
    missing = [one.why_not(name) for one in chosen for name in names if not one.best.get(name)]
    marks = {why: str(n).translate(SUPERSCRIPTS) for n, why in enumerate(dict.fromkeys(filter(None, missing)), 1)}
    columns = _setting_columns(chosen, keys)
    columns += [[name, *(_cell(one, name, marks) for one in chosen)] for name in names]
    times = "best peer / ours" if chosen[0].less_is_better else "ours / best peer"
    columns.append([times, *(_or_dash(one.ratio, "{:.2f}") for one in chosen)])
    shares = [(one.best.get(OURS) or {}).get("floor_share") for one in chosen]
    share = SHARES.get(chosen[0]["task"], "share of the floor")
    columns += [[share, *(_or_dash(each, "{:.0%}") for each in shares)]] if any(shares) else []
    notes = ", ".join(f"{mark} {why}" for why, mark in marks.items())
    return _markdown(columns) + (f"\n{notes}\n" if notes else "")


def accelerated_table(chosen: list[Comparison]) -> str:
    """Peers' models without and with our blocks in them."""
    some = [one for one in chosen if one.accelerated]
    columns = _setting_columns(some, SETTING)
    for peer in dict.fromkeys(peer for one in some for peer in one.accelerated):
        without, ours, times = zip(*(one.accelerated.get(peer, (None, None, None)) for one in some), strict=True)
        columns += [
            [peer, *map(_value, without)],
            ["accelerated", *map(_value, ours)],
            ["times", *(_or_dash(each, "{:.2f}") for each in times)],
        ]
    return _markdown(columns)


def _setting_columns(chosen: list[Comparison], keys: Iterable[str]) -> list[list[str]]:
    """A column for each key that any of them has, its heading first."""
    shown = [key for key in keys if any(one[key] is not None for one in chosen)]
    words = {key: [_model(one) if key == "model" else _or_dash(one[key]) for one in chosen] for key in shown}
    return [[WORDS.get(key, key), *cells] for key, cells in words.items()]


def _markdown(columns: list[list[str]]) -> str:
    heads, *lines = zip(*columns, strict=True)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heads, ["---"] * len(heads), *lines))


def _cell(one: Comparison, implementation: str, marks: dict[str, str]) -> str:
    row = one.best.get(implementation)
    mode = f" ({row['mode']})" if row and row["mode"] not in (None, "eager") else ""
    return _value(row) + (mode if row else marks.get(one.why_not(implementation), ""))


def _value(row: Row | None) -> str:
    if row is None:
        return "–"
    return str(round(row["value"])) if row["unit"] == "images" else number(row["value"])


def _or_dash(value: Any, form: str = "{}") -> str:
    return "–" if value is None else form.format(value)


def number(value: float) -> str:
    """Three digits, or all before the point."""
    decimals = next((n for n, least in enumerate((100, 10, 1)) if round(value, n) >= least), 3)
    return f"{value:.{decimals}f}"


def _model(one: Comparison) -> str:
    """Its model as people write it: `ViT-S/14`."""
    return harness.title(BACKBONES[one["model"]]) if one["model"] in BACKBONES else one["model"]


def _title(chosen: list[Comparison]) -> str:
    return f"{chosen[0]['task'].capitalize()}, {WORDS.get(chosen[0].unit, chosen[0].unit)}"


def _what(chosen: list[Comparison]) -> str:
    every = [dict.fromkeys(WORDS.get(one[key], one[key]) for one in chosen) for key in ("output", "precision")]
    return ", ".join(" or ".join(names) for names in every)


def hardware(rows: list[Row]) -> str:
    return facts(rows, "gpu") or f"{facts(rows, 'cpu')}, {facts(rows, 'threads')} threads"


def provenance(rows: list[Row]) -> str:
    """Where rows come from: hardware, versions, commit and date."""
    measured = [row for row in rows if row["value"] is not None] or rows
    used = {row["implementation"] for row in measured} | {(row["mode"] or "").partition("-")[0] for row in measured}
    packages = ["torch", *(["triton"] if facts(rows, "gpu") else []), *(n for n in records.PACKAGES if n in used)]
    versions = [f"{name} {facts(measured, name)}" for name in packages]
    return ", ".join([hardware(rows), *versions, f"commit {records.short(rows[0]['commit'])}", facts(rows, "date")])


def facts(rows: list[Row], name: str) -> str:
    """The values of a key, or of one among the versions; rows of one run have the same."""
    values = dict.fromkeys(records.fact(row, name) for row in rows)
    return " or ".join(str(value) for value in values if value is not None)


def save_plot(chosen: list[Comparison], path: Path) -> None:
    """Writes a PNG that names its rows, but neither time nor versions: the same rows give the same bytes."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.size": 8, "axes.linewidth": 0.6})
        metadata = {"Software": None, "rows": digest(chosen)}
        draw(chosen).savefig(path, metadata=metadata, pil_kwargs={"optimize": True})


def digest(chosen: list[Comparison]) -> str:
    """Of the rows that a plot shows; it is kept in the image's file."""
    return hashlib.sha256(json.dumps([one.rows for one in chosen], sort_keys=True).encode()).hexdigest()


def draw(chosen: list[Comparison]) -> Any:
    """A panel for each size with a group of bars for each model and batch, at each implementation's best mode.

    Each group has its own scale from 0, since models differ by powers of ten: bars compare implementations, and numbers
    say what they reach. A black line is the floor; above a group stands ours against the best peer.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    panels = sorted(grouped(chosen, "resolution"), key=lambda some: some[0]["resolution"])
    names = [name for name in implementations(chosen) if any(one.best.get(name) for one in chosen)]
    figure = Figure(figsize=(WIDTH, HEAD + PANEL * len(panels)), dpi=DPI, layout="constrained")
    for axes, some in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        _panel(axes, some, names)
        what = "" if _what(some) == _what(chosen) else f"\n{_what(some)}"
        axes.set_ylabel(f"{some[0]['resolution']} px{what}", fontsize=9)
    handles = [Patch(color=COLOURS.get(name, OTHERS), label=name) for name in names]
    if any(one.floor for one in chosen):
        handles.append(Line2D([], [], color="black", linewidth=1.4, label="floor"))
    figure.suptitle(_heading(chosen), fontsize=9)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def _heading(chosen: list[Comparison]) -> str:
    rows = [row for one in chosen for row in one.rows]
    better = "less is better" if chosen[0].less_is_better else "more is better"
    return (
        f"{_title(chosen)} ({better}): {_what(chosen)}, each implementation in its best mode\n{hardware(rows)}, commit "
        f"{records.short(rows[0]['commit'])}; each group has its own scale, above it ours against the best peer"
    )


def _panel(axes: Any, chosen: list[Comparison], names: list[str]) -> None:
    upright = len(names) * len(chosen) > FEW
    top = (1.4 if upright else 1.15) if chosen[0].less_is_better else 1.05
    for place, one in enumerate(chosen):
        _bars(axes, place, one, names, upright)
        if one.ratio:
            axes.text(place, top, f"{one.ratio:.2f}×", ha="center", va="bottom", fontsize=9, fontweight="bold")
    axes.set_xticks(range(len(chosen)), [f"{_model(one)}\nbatch {one['batch']}" for one in chosen])
    axes.set(ylim=(0, top + 0.25), xlim=(-0.6, len(chosen) - 0.4), yticks=[])
    axes.tick_params(axis="x", length=0)
    axes.spines[["top", "left", "right"]].set_visible(False)


def _bars(axes: Any, place: int, one: Comparison, names: list[str], upright: bool) -> None:
    best = {name: one.best.get(name) for name in names}
    scale = max([row["value"] for row in best.values() if row] + [one.floor or 0]) or 1
    width = 0.86 / len(names)
    for index, (name, row) in enumerate(best.items()):
        x, height = place + (index - (len(names) - 1) / 2) * width, row["value"] / scale if row else 0
        if row:
            axes.bar(x, height, 0.92 * width, color=COLOURS.get(name, OTHERS))
        # Above the bar where that is free: for times the floor is a line across the bars; the text interrupts it.
        above = row and one.less_is_better
        text = axes.text(x, height + 0.03 if above else 0.03, _value(row) if row else one.why_not(name), zorder=3)
        text.set(ha="center", va="bottom", fontsize=7, rotation=90 if upright or not row else 0)
        text.set_color("white" if row and not above and name == OURS else "black")
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.0} if above else None)
    if one.floor:
        axes.hlines(one.floor / scale, place - 0.45, place + 0.45, color="black", linewidth=1.4)


if __name__ == "__main__":
    sys.exit(main())
