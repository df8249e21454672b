"""Rows side by side, and as tables in Markdown: what each implementation reaches in the same setting."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bench import harness, records
from bench.compare import LESS_IS_BETTER
from dinov2_fast.configs import BACKBONES

Row = dict[str, Any]

OURS = "dinov2_fast"
ACCELERATED = "accelerated-"  # a mode of ours: our blocks in the model of the peer whose name follows
SETTING = ("model", "resolution", "batch", "output", "precision")  # what is asked of all alike
HEADINGS = {"resolution": "pixels"}
PRECISIONS = ("bf16", "autocast-bf16", "fp16", "fp32")  # what most people would run on a device comes first
OUTPUTS = ("all", "cls")
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def best(rows: Iterable[Row]) -> Row | None:
    """The best of rows of one setting, or None."""
    measured = [row for row in rows if row["value"] is not None]
    return max(measured, key=lambda row: row["value"] * (-1 if row["unit"] in LESS_IS_BETTER else 1), default=None)


def ratio(row: Row, other: Row) -> float:
    """How many times better a row is than another."""
    better, base = (other, row) if row["unit"] in LESS_IS_BETTER else (row, other)
    return better["value"] / base["value"]


def _ratio_if_measured(row: Row | None, other: Row | None) -> float | None:
    return None if row is None or other is None else ratio(row, other)


@dataclass(frozen=True)
class Comparison:
    """All rows of one task and setting; of each implementation the best mode counts."""

    rows: tuple[Row, ...]

    def __getitem__(self, key: str) -> Any:
        """One of SETTING."""
        return self.rows[0][key]

    @cached_property
    def less_is_better(self) -> bool:
        return any(row["unit"] in LESS_IS_BETTER for row in self.rows)

    def best(self, implementation: str) -> Row | None:
        """The best row that has a value."""
        return best(row for row in self.rows if row["implementation"] == implementation)

    def measured(self, implementation: str, mode: str) -> Row | None:
        """The row of one mode, if it has a value."""
        rows = (row for row in self.rows if (row["implementation"], row["mode"]) == (implementation, mode))
        return best(rows)

    @property
    def peer(self) -> Row | None:
        """The best row of all other implementations."""
        return best(row for row in self.rows if row["implementation"] != OURS)

    @property
    def ratio(self) -> float | None:
        """How many times better ours is than the best peer."""
        return _ratio_if_measured(self.best(OURS), self.peer)

    def accelerated(self, peer: str) -> float | None:
        """How many times better a peer's model is with our blocks in it than without, both eager."""
        return _ratio_if_measured(self.measured(OURS, f"{ACCELERATED}{peer}"), self.measured(peer, "eager"))

    @property
    def floor(self) -> float | None:
        """What the floor of bench.roofline allows, in the unit of the rows."""
        row = next((row for row in self.rows if row["value"] is not None and row["floor_share"]), None)
        if row is None:
            return None
        return row["value"] * row["floor_share"] if self.less_is_better else row["value"] / row["floor_share"]

    def why_not(self, implementation: str) -> str | None:
        """Why it has no value, in a few words; None if there is no row of it."""
        reasons = [
            records.reason(row) or "no reason given" for row in self.rows if row["implementation"] == implementation
        ]
        return "; ".join(dict.fromkeys(r.removeprefix(records.MISSING).partition(": ")[0] for r in reasons)) or None


def newest(rows: list[Row]) -> list[Row]:
    """Those of the commit that was measured last."""
    if not rows:
        return []
    last = max(enumerate(rows), key=lambda numbered: (numbered[1]["date"] or "", numbered[0]))[1]
    return [row for row in rows if row["commit"] == last["commit"]]


def comparisons(rows: list[Row]) -> list[Comparison]:
    """The rows by setting, in the order of models, sizes, batches, outputs and precisions."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in SETTING), []).append(row)
    return sorted((Comparison(tuple(group)) for group in groups.values()), key=_order)


def _order(one: Comparison) -> tuple[Any, ...]:
    def place(name: Any, names: Iterable[str]) -> tuple[int, str]:
        known = list(names)
        return (known.index(name) if name in known else len(known), str(name))

    numbers = (one["resolution"] or 0, one["batch"] or 0)
    return place(one["model"], BACKBONES), *numbers, place(one["output"], OUTPUTS), place(one["precision"], PRECISIONS)


def implementations(chosen: Iterable[Comparison]) -> list[str]:
    """Ours first, the others as they come."""
    return list(dict.fromkeys([OURS, *(row["implementation"] for one in chosen for row in one.rows)]))


def table(chosen: list[Comparison], columns: Iterable[str] = SETTING, share: str = "share of the floor") -> str:
    """A table with notes below it. Columns and shares that nothing has are left out.

    Args:
        chosen: all of one unit.
        columns: the parts of the setting to show.
        share: what the rows' `floor_share` means.
    """
    shown = [key for key in columns if any(one[key] is not None for one in chosen)]
    names = implementations(chosen)
    ratio = "best peer / ours" if chosen[0].less_is_better else "ours / best peer"
    heads = [*(HEADINGS.get(key, key) for key in shown), *names, ratio]
    with_share = any((one.best(OURS) or {}).get("floor_share") for one in chosen)
    lines, notes = [], dict[str, int]()
    for one in chosen:
        ours = one.best(OURS)
        cells = [title(one["model"]) if key == "model" else _or_dash(one[key], str) for key in shown]
        cells += [_cell(one, name, notes) for name in names]
        cells.append(_or_dash(one.ratio, "{:.2f}".format))
        if with_share:
            cells.append(_or_dash(ours and ours["floor_share"], "{:.0%}".format))
        lines.append(cells)
    heads += [share] * with_share
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines))
    below = ", ".join(f"{_raised(number)} {note}" for note, number in notes.items())
    return f"{text}\n\n{below}\n" if below else f"{text}\n"


def accelerated_peers(chosen: Iterable[Comparison]) -> list[str]:
    """Those whose models were measured with our blocks in them and without."""
    every = list(chosen)
    modes = dict.fromkeys(row["mode"] or "" for one in every for row in one.rows)
    names = (mode.removeprefix(ACCELERATED) for mode in modes if mode.startswith(ACCELERATED))
    return [name for name in names if any(one.accelerated(name) for one in every)]


def accelerated_table(chosen: list[Comparison]) -> str:
    """Peers' models without and with our blocks in them; "" if none was measured."""
    peers = accelerated_peers(chosen)
    if not peers:
        return ""
    heads = [HEADINGS.get(key, key) for key in SETTING]
    for name in peers:
        heads += [name, "accelerated", "times"]
    lines = []
    for one in chosen:
        if any(one.accelerated(name) for name in peers):
            cells = [title(one["model"]), *(str(one[key]) for key in SETTING[1:])]
            for name in peers:
                rows = one.measured(name, "eager"), one.measured(OURS, f"{ACCELERATED}{name}")
                cells += [_or_dash(row and row["value"], number) for row in rows]
                cells.append(_or_dash(one.accelerated(name), "{:.2f}".format))
            lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heads, ["---"] * len(heads), *lines))


def _cell(one: Comparison, implementation: str, notes: dict[str, int]) -> str:
    row = one.best(implementation)
    if row is not None:
        value = str(round(row["value"])) if row["unit"] == "images" else number(row["value"])
        return value + ("" if row["mode"] in (None, "eager") else f" ({row['mode']})")
    why = one.why_not(implementation)
    return "–" + (_raised(notes.setdefault(why, len(notes) + 1)) if why else "")


def _or_dash(value: Any, text: Any) -> str:
    return "–" if value is None else text(value)


def _raised(value: int) -> str:
    return str(value).translate(SUPERSCRIPTS)


def number(value: float) -> str:
    """Three digits, or all before the point."""
    decimals = next((n for n, least in enumerate((100, 10, 1)) if round(value, n) >= least), 3)
    return f"{value:.{decimals}f}"


def title(model: str) -> str:
    """As people write it: `ViT-S/14`."""
    return harness.title(BACKBONES[model]) if model in BACKBONES else model


def hardware(rows: list[Row]) -> str:
    gpu = facts(rows, "gpu")
    return gpu or f"{facts(rows, 'cpu')}, {facts(rows, 'threads')} threads"


def provenance(rows: list[Row]) -> str:
    """Where rows come from: hardware, versions, commit and date."""
    measured = [row for row in rows if row["value"] is not None] or rows
    used = {row["implementation"] for row in measured} | {(row["mode"] or "").partition("-")[0] for row in measured}
    packages = ["torch", *(["triton"] if facts(rows, "gpu") else [])]
    packages += [name for name in ("transformers", "timm", "xformers") if name in used]
    versions = [f"{name} {facts(measured, name)}" for name in packages]
    return ", ".join([hardware(rows), *versions, f"commit {commit(rows)}", facts(rows, "date")])


def facts(rows: list[Row], name: str) -> str:
    """The values of a key, or of one among the versions; rows of one run have the same."""
    values = [row[name] if name in row else (row["versions"] or {}).get(name) for row in rows]
    return " or ".join(dict.fromkeys(str(value) for value in values if value is not None))


def commit(rows: list[Row]) -> str:
    """Its first digits; rows that are shown together have the same."""
    digits, dirty, _ = (rows[0]["commit"] or "unknown").partition("-dirty")
    return digits[:8] + dirty
