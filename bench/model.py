"""Throughput of whole models, side by side in one process: ``python -m bench.model --device cpu``.

The peers get the same weights and the same random pictures. Their outputs are compared first (ours resampling positions
as that peer does), and a peer that disagrees is refused. Then they run in turn, A B C A B C, and the medians count.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import dinov2_fast
from bench import records
from bench.peers import PEERS, Peer
from dinov2_fast.configs import BACKBONES, BackboneConfig

TASK = "throughput"
WARM_UP = 2  # rounds
MAX_ERROR = 1e-4  # worst element of the outputs in fp32, which have unit variance


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    common = records.environment(device)
    for peer in PEERS:
        if not peer.installed:
            print(f"{peer.name} is not installed: its rows are missing", file=sys.stderr)
    print(f"{common['gpu'] or common['versions']['cpu']}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    rows = []
    for name in options.models:
        config = BACKBONES[name]
        ours = dinov2_fast.load(name, weights="random:0", device=device)
        models = {peer: peer.build(config, ours).to(device).eval() for peer in PEERS if peer.installed}
        for resolution in options.resolutions:
            for batch in options.batches:
                x = torch.randn(batch, 3, resolution, resolution, device=device)
                rows += measure(config, models, x, options.seconds, common)
                _print_group(rows[-len(models) :])
    if options.write:
        path = records.RESULTS / records.device_folder(device) / f"{TASK}.jsonl"
        records.write(path, rows)
        print(f"wrote {path}")
    _print_ratios(rows)
    return 0


@torch.inference_mode()
def measure(
    config: BackboneConfig, models: dict[Peer, nn.Module], x: Tensor, seconds: float, common: dict[str, Any]
) -> list[dict[str, Any]]:
    """One row for each peer, measured in turn for about `seconds` in all.

    Raises:
        RuntimeError: a peer's outputs are not ours.
    """
    ours = models[PEERS[0]]
    errors = {peer: disagreement(config, peer, model, ours, x) for peer, model in models.items()}
    wrong = {peer.name: error for peer, error in errors.items() if not error <= MAX_ERROR}
    if wrong:
        raise RuntimeError(f"Not timed: the outputs for {config.name} at {tuple(x.shape)} disagree with ours: {wrong}.")
    runs = {peer: (lambda peer=peer, model=model: peer.forward(model, x)) for peer, model in models.items()}
    times = interleave(runs, seconds, x.device)
    rows = []
    for peer, values in times.items():
        fastest, median, slowest = (x.shape[0] / t for t in quantiles(values))
        rows.append(
            {
                "task": TASK,
                "model": config.name,
                "resolution": x.shape[-1],
                "batch": x.shape[0],
                "output": "all",
                "precision": "fp32",
                "implementation": peer.name,
                "mode": "eager",
                "value": median,
                "unit": "images/s",
                "p20": slowest,
                "p80": fastest,
                "floor_share": None,
                "outputs_max_error": errors[peer],
                **common,
            }
        )
    return rows


def disagreement(config: BackboneConfig, peer: Peer, model: nn.Module, ours: nn.Module, x: Tensor) -> float:
    """The worst element between a peer's output and ours, with positions resampled as the peer does."""
    ours.position_dialect = peer.dialect(config)
    expected = run(PEERS[0], ours, x)
    ours.position_dialect = config.dialect
    return (run(peer, model, x) - expected).abs().max().item()


def run(peer: Peer, model: nn.Module, x: Tensor) -> Tensor:
    """All tokens after the final norm, (batch, tokens, hidden)."""
    return peer.tokens(peer.forward(model, x))


def interleave(runs: dict[Peer, Callable[[], Any]], seconds: float, device: torch.device) -> dict[Peer, list[float]]:
    """Seconds of each run, taken in turn so that a change of the machine's speed meets all alike.

    The first rounds are not kept: the allocator still asks the system for memory then, which costs whoever comes first.
    """
    times: dict[Peer, list[float]] = {peer: [] for peer in runs}
    order, start, rounds = list(runs), time.perf_counter(), 0
    while rounds < WARM_UP + 3 or time.perf_counter() - start < seconds:
        for peer in order:
            before = time.perf_counter()
            runs[peer]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if rounds >= WARM_UP:
                times[peer].append(time.perf_counter() - before)
        order = order[1:] + order[:1]
        rounds += 1
    return times


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """The 20th percentile, the median and the 80th."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def _print_group(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    best = max((row["value"] for row in rows[1:]), default=first["value"])
    shown = "  ".join(f"{row['implementation']} {row['value']:8.3f}" for row in rows)
    print(
        f"{first['model']:15} {first['resolution']:5} px  batch {first['batch']:3}  {shown}  images/s"
        f"  ours/best peer {first['value'] / best:.3f}"
    )


def _print_ratios(rows: list[dict[str, Any]]) -> None:
    groups: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        key = (row["model"], row["resolution"], row["batch"])
        groups.setdefault(key, {})[row["implementation"]] = row["value"]
    ratios = [g.pop("dinov2_fast") / max(g.values()) for g in groups.values() if len(g) > 1]
    if ratios:
        print(
            f"ours over the best peer: geometric mean {statistics.geometric_mean(ratios):.3f}, worst {min(ratios):.3f}"
        )


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.model", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--models", nargs="+", default=["dinov2_vits14", "dinov2_vitb14"], choices=list(BACKBONES))
    parser.add_argument("--resolutions", nargs="+", type=int, default=[224, 518])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each row's peers together")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--write", action="store_true", help="keep the rows in bench/results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
