"""The benchmark: records keep their form, a wrong peer is refused, peers take turns, README shows what was measured."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
import torch

from bench import model as bench
from bench import records, report
from bench.peers import PEERS, Peer
from dinov2_fast.configs import BACKBONES
from dinov2_fast.model import DinoVisionTransformer

CONFIG = dataclasses.replace(BACKBONES["dinov2_vits14"], embed_dim=32, depth=1, num_heads=2)
OURS = PEERS[0]


def _ours() -> DinoVisionTransformer:
    return DinoVisionTransformer(**CONFIG.constructor_arguments()).eval()


def _peer(name: str, **changes) -> Peer:
    return dataclasses.replace(OURS, name=name, dialect=lambda config: "size", **changes)


def test_peers_share_weights_and_agree() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    ours, x = _ours(), torch.randn(1, 3, 56, 84)
    peer = next(peer for peer in PEERS if peer.name == "transformers")
    model = peer.build(CONFIG, ours).eval()
    with torch.inference_mode():
        assert bench.disagreement(CONFIG, peer, model, ours, x) < 1e-5
        wrong_dialect = dataclasses.replace(peer, dialect=lambda config: "antialias")
        assert bench.disagreement(CONFIG, wrong_dialect, model, ours, x) > bench.MAX_ERROR
    assert ours.position_dialect == "offset"


def test_wrong_outputs_are_refused_before_timing() -> None:
    ours, x = _ours(), torch.randn(1, 3, 56, 56)
    broken = _peer("broken", tokens=lambda features: OURS.tokens(features) + 1e-3)
    not_finite = _peer("nan", tokens=lambda features: OURS.tokens(features) * float("nan"))
    for peer in (broken, not_finite):
        with pytest.raises(RuntimeError, match=rf"disagree with ours: {{'{peer.name}'"):
            bench.measure(CONFIG, {OURS: ours, peer: ours}, x, 0.1, records.environment(torch.device("cpu")))


def test_rows_have_every_key_and_a_slower_peer_is_seen(tmp_path) -> None:
    def slow(model, x):
        time.sleep(0.2)
        model.position_dialect = "size"
        features = OURS.forward(model, x)
        model.position_dialect = "offset"
        return features

    ours, x = _ours(), torch.randn(2, 3, 56, 56)
    models = {OURS: ours, _peer("slow", forward=slow): ours}
    rows = bench.measure(CONFIG, models, x, 0.5, records.environment(torch.device("cpu")))
    fast, slower = rows
    assert (fast["implementation"], slower["implementation"]) == ("dinov2_fast", "slow")
    assert slower["value"] < fast["value"] / 2
    assert fast["p20"] <= fast["value"] <= fast["p80"]
    path = tmp_path / "throughput.jsonl"
    records.write(path, rows)
    assert [tuple(json.loads(line)) for line in path.read_text().splitlines()] == [records.KEYS] * 2
    records.write(path, [{**fast, "value": 1.0}])
    assert sorted(row["value"] for row in records.read(path)) == sorted([1.0, slower["value"]])
    with pytest.raises(ValueError, match="wrong: \\['unit'\\]"):
        records.write(path, [{key: value for key, value in fast.items() if key != "unit"}])


def test_runs_take_turns() -> None:
    calls: list[str] = []
    runs = {_peer(name): (lambda name=name: calls.append(name)) for name in "abc"}
    bench.interleave(runs, 0.0, torch.device("cpu"))
    assert calls == list("abcbcacababcbca")


def test_readme_shows_what_was_measured() -> None:
    assert report.updated(report.README.read_text()) == report.README.read_text(), "run: python -m bench.report"


def test_the_table_comes_from_the_newest_rows_of_each_kind() -> None:
    row = dict.fromkeys(records.KEYS) | {
        "task": "throughput",
        "model": "dinov2_vits14",
        "resolution": 224,
        "batch": 1,
        "precision": "fp32",
        "implementation": "dinov2_fast",
        "mode": "eager",
        "value": 30.0,
        "unit": "images/s",
        "torch": "2.11.0",
        "versions": {"cpu": "Some CPU", "threads": 2, "transformers": "5.17.0", "timm": "1.0.31"},
        "commit": "a" * 40,
        "date": "2026-01-01",
    }
    rows = [
        row,
        row | {"implementation": "timm", "value": 20.0},
        row | {"implementation": "transformers", "value": 25.0},
    ]
    text = report.table(rows)
    assert "| ViT-S/14 | 224 | 1 | 30.0 | 25.0 | 20.0 | 1.20 |" in text
    assert "Some CPU, 2 threads" in text
    assert "aaaaaaaa" in text
    newer = [r | {"value": 2 * r["value"], "commit": "b" * 40, "date": "2026-01-02"} for r in rows]
    assert "| 60.0 | 50.0 | 40.0 | 1.20 |" in report.table(rows + newer)
