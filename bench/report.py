"""Writes README's table of speeds from ``bench/results``, and from nothing else: ``python -m bench.report``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import records

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- speed: written by python -m bench.report -->", "<!-- end of speed -->"
IMPLEMENTATIONS = ("dinov2_fast", "transformers", "timm")


def main() -> None:
    README.write_text(updated(README.read_text()))


def updated(readme: str) -> str:
    """README's text with the table between its two marks made anew."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    rows = records.read(records.RESULTS / "cpu" / "throughput.jsonl")
    return f"{before}{BEGIN}\n{table(rows)}{END}{after}"


def table(rows: list[dict[str, Any]]) -> str:
    """Pictures per second of each implementation, and ours over the best of the others; of the commit measured last."""
    if not rows:
        return "\nNo result has been recorded yet.\n\n"
    last = max(enumerate(rows), key=lambda numbered: (numbered[1]["date"], numbered[0]))[1]
    newest = last["commit"]
    rows = [row for row in rows if row["commit"] == newest]
    groups: dict[tuple[str, int, int], dict[str, float]] = {}
    for row in rows:
        key = (row["model"], row["resolution"], row["batch"])
        groups.setdefault(key, {})[row["implementation"]] = row["value"]
    versions, commit = last["versions"], (newest or "unknown")[:8]
    lines = [
        "",
        f"Pictures per second on a CPU, {last['precision']}, all tokens, side by side in one process: "
        f"{versions['cpu']}, {versions['threads']} threads, torch {last['torch']}, "
        f"transformers {versions['transformers']}, timm {versions['timm']}, commit {commit}, {last['date']} "
        "(`make bench`).",
        "",
        "| model | pixels | batch | dinov2_fast | transformers | timm | ours / best peer |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (model, resolution, batch), values in groups.items():
        speeds = [f"{values[name]:.{_decimals(values[name])}f}" if name in values else "–" for name in IMPLEMENTATIONS]
        best = max((value for name, value in values.items() if name != "dinov2_fast"), default=None)
        ratio = "–" if best is None else f"{values['dinov2_fast'] / best:.2f}"
        name = f"ViT-{model.removeprefix('dinov2_vit')[0].upper()}/14" + (" reg" if model.endswith("_reg") else "")
        lines.append(f"| {name} | {resolution} | {batch} | {' | '.join(speeds)} | {ratio} |")
    return "\n".join(lines) + "\n\n"


def _decimals(value: float) -> int:
    return 1 if value >= 10 else 2


if __name__ == "__main__":
    main()
