"""The benchmark of extraction: it refuses features of other images, runs passes in turn, and writes rows."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import extraction, harness, records
from bench.peers import OURS, Peer, load_ours
from bench.tasks import Models, Scenario

SCENARIO = Scenario("extraction", harness.TINY, 224, 4, "cls", "fp32")
OTHER = replace(OURS, name="a")  # with the preprocessing of timm, and our model
CHANGES = {
    "reversed": (lambda rows: rows[::-1].copy(), "refused: the order is wrong"),
    "shifted": (lambda rows: np.roll(rows, 1, axis=0), "refused: the order is wrong"),
    "ends exchanged": (lambda rows: rows[[-1, *range(1, len(rows) - 1), 0]], "refused: the order is wrong: 2 of 5"),
    "one lost": (lambda rows: rows[:-1], "refused: the features are (8, 64)"),
    "not finite": (lambda rows: np.where(rows == rows.max(), np.nan, rows), "refused: the features are (9, 64)"),
    "slightly wrong": (lambda rows: rows * np.float32(1 + 1e-4), "refused: the features: an element is"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    pytest.importorskip("timm", reason="timm is not installed")
    return extraction.make_images(tmp_path_factory.mktemp("images"), 9)  # the sample: every second one


def reasons(files: list[str], *peers: Peer, passes: int = 1) -> list[str]:
    """For each peer the reason why it has no value, or "measured"."""
    variants = [(peer, "eager") for peer in (OURS, *peers)]
    rows = extraction.measure_scenario(SCENARIO, variants, files, Namespace(device="cpu", workers=0, passes=passes))
    assert rows[0]["value"] > 0  # ours, whatever happens to others
    return [records.reason(row) or (row["value"] and "measured") for row in rows[1:]]


def change_features(monkeypatch: pytest.MonkeyPatch, change: Callable[[str, np.ndarray], np.ndarray]) -> None:
    """Changes the features that peers return."""
    right = extraction.peer_pipeline

    def changed_pipeline(peer: Peer, *rest) -> extraction.Pipeline:
        whole = right(peer, *rest)
        return whole._replace(features=lambda paths: change(peer.name, whole.features(paths)))

    monkeypatch.setattr(extraction, "peer_pipeline", changed_pipeline)


@pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=CHANGES)
def test_wrong_features_are_refused(files: list[str], monkeypatch: pytest.MonkeyPatch, change, reason: str) -> None:
    change_features(monkeypatch, lambda name, rows: change(rows))
    assert reasons(files, OTHER)[0].startswith(reason)


def test_passes_run_in_turn_and_a_failing_peer_does_not_stop_the_others(
    files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    change_features(monkeypatch, lambda name, rows: (taken.append(name), rows)[1])
    missing, second = replace(OTHER, missing="not here"), replace(OTHER, name="b")
    broken = replace(OTHER, build=lambda *arguments: 1 // 0)
    found = reasons(files, missing, broken, OTHER, second, passes=3)
    assert found == ["missing: not here", "failed: integer division or modulo by zero", "measured", "measured"]
    assert taken[2:] == ["a", "b", "b", "a", "a", "b"]  # ours: last, between, first


def test_our_extraction_fails_on_an_unreadable_image(files: list[str], tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(Path(files[0]).read_bytes()[:2000])
    pipeline = extraction.our_pipeline(SCENARIO, Models(harness.TINY, load_ours(harness.TINY, torch.device("cpu"))), 0)
    with pytest.raises(ValueError, match="1 images have no features"):
        pipeline.features([*files[:2], str(tmp_path / "broken.jpg")])


def test_the_command_writes_rows_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = "--device cpu --models tiny --images 5 --workers 0 --batch 2 --passes 1 --write --resume --commit a"
    assert extraction.main([*command.split(), "--results", str(tmp_path)]) == 0
    rows = records.read(tmp_path / "cpu" / "extraction.jsonl")
    assert [row["implementation"] for row in rows] == ["dinov2_fast", "transformers", "timm"]
    assert rows[0]["versions"]["decoding"] > 0
    for row in (row for row in rows if not records.is_missing(row)):
        assert row["value"] > 0
        assert row["floor_share"] > 0
        assert row["outputs_max_error"] < 1e-4
    monkeypatch.setattr(extraction, "measure_scenario", lambda *arguments: pytest.fail("measured again"))
    assert extraction.main([*command.split(), "--results", str(tmp_path)]) == 0
