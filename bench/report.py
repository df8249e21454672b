"""Writes what is known about speed from ``bench/results``, and from nothing else: ``python -m bench.report``.

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import records
from bench.tables import (
    OUTPUTS,
    PRECISIONS,
    SETTING,
    Comparison,
    Row,
    accelerated_peers,
    accelerated_table,
    commit,
    comparisons,
    facts,
    hardware,
    newest,
    number,
    provenance,
    table,
)

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- speed: written by python -m bench.report -->", "<!-- end of speed -->"
TASKS = ("throughput", "latency", "training", "memory", "mixed", "extraction", "host")
PLOTTED = ("throughput", "latency")
UNITS = {
    "images/s": "pictures per second",
    "ms": "milliseconds",
    "MiB": "peak memory in MiB",
    "images": "the largest batch, in pictures",
}
FLOOR = (
    "The floor is the time that a forward pass cannot go below at the rates of this device's own products, attention "
    "and copies (`bench/roofline.py`)."
)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    folders = devices(options.results)
    for folder in folders:
        (folder / "README.md").write_text(device_readme(folder), encoding="utf-8")
    if options.results == records.RESULTS:
        README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
    try:
        from bench import plots
    except ImportError as error:
        print(f"bench.report: the texts are written, the plots are not: {error}", file=sys.stderr)
        return 1
    for folder in folders:
        for task, chosen in plotted(folder).items():
            plots.save(plots.draw(chosen, heading(chosen)), folder / f"{task}.png", digest(chosen))
    return 0


def updated(readme: str, results: Path = records.RESULTS) -> str:
    """README's text with the part between its two marks made anew.

    Raises:
        ValueError: a mark is missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md must hold the two marks {BEGIN} and {END}: the tables go between them.")
    return f"{before}{begin}\n\n{speed(results)}\n{end}{after}"


def speed(results: Path) -> str:
    """The section of the project's README: GPUs first."""
    folders = devices(results)
    parts = [_device_section(folder) for folder in folders]
    if not any(facts(_all_rows(folder), "gpu") for folder in folders):
        parts.insert(0, "No result on a GPU exists yet: `make gpu` measures one.\n")
    return "\n".join(parts)


def devices(results: Path) -> list[Path]:
    """The folders that hold rows, those of GPUs first."""
    folders = [path for path in sorted(results.iterdir()) if path.is_dir() and _all_rows(path)]
    return sorted(folders, key=lambda folder: not facts(_all_rows(folder), "gpu"))


def rows_of(folder: Path, task: str) -> list[Row]:
    """The rows of the commit measured last in a task's file."""
    return newest(records.read(folder / f"{task}.jsonl"))


def _all_rows(folder: Path) -> list[Row]:
    return [row for task in TASKS for row in rows_of(folder, task)]


def usual(every: list[Comparison]) -> list[Comparison]:
    """Those in the precision and with the output that most people would run."""
    for key, names in (("precision", PRECISIONS), ("output", OUTPUTS)):
        there = {one[key] for one in every}
        wanted = next((name for name in names if name in there), None)
        every = [one for one in every if wanted is None or one[key] == wanted]
    return every


def one_batch(every: list[Comparison], choose: Any) -> list[Comparison]:
    """Of each model and size the one whose batch `choose` (min or max) takes."""
    groups: dict[tuple[Any, ...], list[Comparison]] = {}
    for one in every:
        groups.setdefault((one["model"], one["resolution"]), []).append(one)
    return [choose(group, key=lambda one: one["batch"] or 0) for group in groups.values()]


def shown(folder: Path) -> dict[str, list[Comparison]]:
    """What the project's README shows of a device, by task."""
    every = {task: usual(comparisons(rows_of(folder, task))) for task in PLOTTED}
    chosen = {"throughput": one_batch(every["throughput"], max), "latency": one_batch(every["latency"], min)}
    return {task: some for task, some in chosen.items() if some}


def plotted(folder: Path) -> dict[str, list[Comparison]]:
    """What the plots of a device show, by task: the same, but latency of all batches."""
    chosen = shown(folder)
    if "latency" in chosen:
        chosen["latency"] = usual(comparisons(rows_of(folder, "latency")))
    return {task: some for task, some in chosen.items() if any(row["value"] for one in some for row in one.rows)}


def digest(chosen: list[Comparison]) -> str:
    """Of the rows that a plot shows; it is kept in the picture's file."""
    return hashlib.sha256(json.dumps([one.rows for one in chosen], sort_keys=True).encode()).hexdigest()


def heading(chosen: list[Comparison]) -> str:
    """What a plot shows."""
    rows = [row for one in chosen for row in one.rows]
    better = "less is better" if chosen[0].less_is_better else "more is better"
    return (
        f"{_task_title(chosen)} ({better}): {_what(chosen)}, each implementation in its best mode\n"
        f"{hardware(rows)}, commit {commit(rows)}; each group has its own scale, above it ours against the best peer"
    )


def _task_title(chosen: list[Comparison]) -> str:
    task, unit = chosen[0].rows[0]["task"], _unit(chosen[0])
    return f"{task.capitalize()}, {UNITS.get(unit, unit)}"


def _what(chosen: list[Comparison]) -> str:
    output = {"all": "all tokens", "cls": "class token"}.get(chosen[0]["output"], chosen[0]["output"])
    return f"{output}, {chosen[0]['precision']}"


def _unit(one: Comparison) -> str:
    """A setting in which nothing could be measured has the unit of its task."""
    usual_unit = {"latency": "ms", "memory": "MiB" if one["batch"] else "images"}.get(one.rows[0]["task"], "images/s")
    return next((row["unit"] for row in one.rows if row["unit"]), usual_unit)


def _device_section(folder: Path) -> str:
    rows = _all_rows(folder)
    place = f"bench/results/{folder.name}"
    parts = [f"### {facts(rows, 'gpu') or 'CPU'}\n"]
    plots = plotted(folder)
    for task, chosen in shown(folder).items():
        batch = "the largest batch" if task == "throughput" else "the smallest batch"
        if task in plots:
            parts.append(f"![{task.capitalize()} of each implementation, by model and size]({place}/{task}.png)\n")
        parts.append(f"{_task_title(chosen)}: {_what(chosen)}, {batch}. {_source(folder, task)}\n")
        parts.append(table(chosen, ("model", "resolution", "batch")))
    parts.append(
        "These are the rows that most people would run, each implementation in its best mode (in brackets where that "
        f"is not eager); [all that was measured]({place}/README.md).{_floor_and_ceilings(folder)}\n"
    )
    parts += [f"{sentence}\n" for sentence in [_accelerated(folder)] if sentence]
    return "\n".join(parts)


def _accelerated(folder: Path) -> str:
    """What `accelerate` makes of peers' models, in one sentence; "" if that was not measured."""
    every = [one for task in PLOTTED for one in comparisons(rows_of(folder, task))]
    parts = []
    for peer in accelerated_peers(every):
        times = [ratio for one in every if (ratio := one.accelerated(peer))]
        parts.append(f"those of {peer} are {min(times):.2f} to {max(times):.2f} times as fast ({len(times)} rows)")
    found = " and ".join(parts)
    return f"Models with our blocks in them, by `dinov2_fast.accelerate(model)`, both eager: {found}." if found else ""


def _source(folder: Path, task: str) -> str:
    return f"{provenance(rows_of(folder, task))}."


def _floor_and_ceilings(folder: Path) -> str:
    has_floor = any(one.floor for chosen in shown(folder).values() for one in chosen)
    return (f" {FLOOR}" if has_floor else "") + (f" {ceilings(folder)}" if ceilings(folder) else "")


def ceilings(folder: Path) -> str:
    """What bench.roofline measured of the device itself, in one sentence; "" if nothing."""
    rows = [row for row in rows_of(folder, "roofline") if row["model"] is None and row["value"] is not None]
    parts = [f"{' '.join(filter(None, (r['output'], r['precision'])))} {number(r['value'])} {r['unit']}" for r in rows]
    return f"Ceilings: {', '.join(parts)} ({provenance(rows)})." if rows else ""


def device_readme(folder: Path) -> str:
    """All tables of a device."""
    rows = _all_rows(folder)
    parts = [
        f"# Speed on {'a CPU: ' if not facts(rows, 'gpu') else ''}{hardware(rows)}\n",
        "Written by `python -m bench.report` from the rows beside this file. Of each implementation the best mode "
        "counts, in brackets where it is not eager.\n",
        *([f"{FLOOR} {ceilings(folder)}\n"] if ceilings(folder) else []),
    ]
    plots = plotted(folder)
    for task in TASKS:
        chosen = comparisons(rows_of(folder, task))
        if chosen:
            parts.append(f"## {task.capitalize()}\n")
            if task in plots:
                parts.append(f"![{task.capitalize()}: {_what(plots[task])}]({task}.png)\n")
            parts += _tables(folder, task, chosen)
    return "\n".join(parts)


def _tables(folder: Path, task: str, chosen: list[Comparison]) -> Iterator[str]:
    """A table for each unit, then what could not be measured."""
    share = "share of the time in which the device works" if task == "extraction" else "share of the floor"
    units = {_unit(one) for one in chosen}
    for unit in sorted(units, key=[*UNITS, *units].index):
        some = [one for one in chosen if _unit(one) == unit]
        description = UNITS.get(unit, unit)
        workers = facts([row for one in some for row in one.rows], "workers")
        with_workers = f" with {workers} decoding processes" if workers else ""
        yield f"{description[0].upper()}{description[1:]}{with_workers}. {_source(folder, task)}\n"
        yield table(some, SETTING, share)
        if accelerated := accelerated_table(some):
            yield f"With our blocks in them, by `dinov2_fast.accelerate(model)`, both eager:\n\n{accelerated}"
    missing: dict[tuple[str, str], list[str]] = {}
    for row in (row for one in chosen for row in one.rows if row["value"] is None):
        why = " ".join((records.reason(row) or "no reason given").replace("`", "'").split())
        missing.setdefault((row["implementation"], why), []).append(row["mode"] or "eager")
    if missing:
        yield "Not measured:\n"
        for (name, why), modes in missing.items():
            yield f"- {name}, {', '.join(dict.fromkeys(modes))}: `{why}` ({len(modes)} rows)"
        yield ""


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=records.RESULTS,
        help="the folder of the devices' folders (default: bench/results); for another one the project's README stays",
    )
    options = parser.parse_args(arguments)
    if not options.results.is_dir():
        parser.error(f"--results: {options.results} is no folder")
    return options


if __name__ == "__main__":
    sys.exit(main())
