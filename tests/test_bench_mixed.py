"""The benchmark of pictures of many sizes: every way gives each picture its own class token, in the list's order."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import mixed, model, options, peers, records, timing
from bench.peers import OURS, Peer
from dinov2_fast.configs import BACKBONES
from dinov2_fast.model import DinoVisionTransformer

CPU = torch.device("cpu")
CONFIG = dataclasses.replace(BACKBONES["dinov2_vits14"], embed_dim=32, depth=2, num_heads=2)
SIDES = [42, 28, 56, 28, 42]
SETTING = mixed.setting_of(CONFIG, [28, 56], 5, "fp32")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "PATIENCE", 0.0)


def _models() -> model.Models:
    torch.manual_seed(0)
    ours = DinoVisionTransformer(**CONFIG.constructor_arguments()).eval()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.Models(CONFIG, ours)


def _peer(name: str, **changes: Any) -> Peer:
    return dataclasses.replace(OURS, name=name, **changes)


def _measure(*entrants: tuple[Peer, str], precision: str = "fp32") -> list[dict[str, Any]]:
    setting = dataclasses.replace(SETTING, precision=precision)
    return mixed.measure(setting, entrants, _models(), mixed.pictures_of(SIDES, precision, CPU), 0.0)


def test_every_way_gives_the_class_tokens_of_a_loop_but_the_padded_one() -> None:
    other = _peer("other")
    rows = _measure((OURS, "eager"), (OURS, "engine"), *((other, way) for way in mixed.WAYS))
    assert [row["mode"] for row in rows] == ["eager", "engine", "single", "grouped", "padded", "list"]
    for row in rows:
        assert (row["unit"], row["batch"], row["resolution"], row["output"]) == ("images/s", 5, "28-56", "cls")
        if row["mode"] == "padded":
            assert "outputs_max_error" not in row
            assert row["versions"]["outputs"].startswith("of padded pictures: not compared")
        else:
            assert row["outputs_max_error"] < 1e-5


def test_fp8_is_held_to_the_cosine() -> None:
    (row,) = _measure((OURS, "engine"), precision="fp8")
    assert row["value"] > 0
    assert model.COSINE <= row["versions"]["cosine"] < 0.999999


def test_wrong_tokens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_the_order_of_groups(places: list[list[int]], found: list[Tensor]) -> Tensor:
        return torch.cat(found)

    monkeypatch.setattr(mixed, "in_order", in_the_order_of_groups)
    nan = _peer("nan", take={"cls": lambda tokens: tokens * float("nan")})
    off = _peer("off", take={"cls": lambda tokens: tokens * (1 + 1e-4)})
    rows = _measure((OURS, "eager"), (_peer("x"), "grouped"), (nan, "padded"), (off, "single"), (_peer("y"), "single"))
    reasons = [records.reason(row) for row in rows]
    assert all(reason.startswith("refused: ") for reason in reasons[:4])
    assert (reasons[4], rows[4]["value"] > 0) == (None, True)


def test_pictures_of_one_size_are_one_batch_and_padding_reaches_the_largest() -> None:
    shapes: list[tuple[int, ...]] = []

    def call(model: nn.Module, x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return torch.zeros(len(x), 32)

    pictures = mixed.pictures_of(SIDES, "fp32", CPU)
    peer = _peer("any", call={"cls": call}, take={"cls": lambda tokens: tokens})
    for way, expected in (
        ("single", [(1, 3, side, side) for side in SIDES]),
        ("grouped", [(2, 3, 42, 42), (2, 3, 28, 28), (1, 3, 56, 56)]),
        ("padded", [(5, 3, 56, 56)]),
    ):
        shapes.clear()
        mixed.WAYS[way](peer, nn.Identity(), pictures)
        assert shapes == expected


def test_a_padded_picture_is_the_picture_and_zeros() -> None:
    seen: list[Tensor] = []

    def call(model: nn.Module, x: Tensor) -> Tensor:
        seen.append(x)
        return torch.zeros(len(x), 32)

    pictures = mixed.pictures_of([28, 42], "fp32", CPU)
    mixed.padded(_peer("any", call={"cls": call}, take={"cls": lambda t: t}), nn.Identity(), pictures)
    (batch,) = seen
    assert torch.equal(batch[0, :, :28, :28], pictures[0])
    assert torch.equal(batch[1], pictures[1])
    assert batch[0].count_nonzero() == pictures[0].count_nonzero()


def test_sides_hold_both_ends_and_are_the_same_each_time() -> None:
    drawn = mixed.sides(64, 224, 518)
    assert (len(drawn), min(drawn), max(drawn)) == (64, 224, 518)
    assert all(side % 14 == 0 for side in drawn)
    assert len(set(drawn)) > 15
    assert drawn == mixed.sides(64, 224, 518)
    assert sorted(mixed.sides(2, 28, 56)) == [28, 56]


def test_ours_takes_the_list_and_the_others_all_their_ways() -> None:
    with_xformers = _peer("facebook", variant="xformers")
    everyone = [OURS, peers.TIMM, _peer("facebook"), with_xformers]
    found = mixed.entrants_of(everyone, ["eager", "engine-cuda", "single", "padded", "list"])
    assert [(peer.name, peer.mode(mode)) for peer, mode in found] == [
        ("dinov2_fast", "eager"),
        ("dinov2_fast", "engine-cuda"),
        ("timm", "single"),
        ("timm", "padded"),
        ("facebook", "single"),
        ("facebook", "padded"),
        ("facebook", "xformers-single"),
        ("facebook", "xformers-padded"),
        ("facebook", "xformers-list"),
    ]
    assert not any(mode.endswith("graphs") for mode in mixed.LISTS)


@pytest.mark.parametrize("peer", [peers.TRANSFORMERS, peers.TIMM], ids=lambda peer: peer.name)
def test_peers_have_our_class_tokens(peer: Peer) -> None:
    if peer.missing:
        pytest.skip(peer.missing)
    config = dataclasses.replace(BACKBONES["dinov2_vits14"], depth=12)
    ours = DinoVisionTransformer(**config.constructor_arguments()).eval()
    setting = mixed.setting_of(config, [28, 42], 3, "fp32")
    pictures = mixed.pictures_of([42, 28, 42], "fp32", CPU)
    for row in mixed.measure(setting, [(peer, "single"), (peer, "grouped")], model.Models(config, ours), pictures, 0.0):
        assert row["outputs_max_error"] < 1e-5


def test_the_command_keeps_rows_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(mixed, "load_models", lambda config, device: _models())
    monkeypatch.setattr(mixed, "peers", lambda path: [OURS, _peer("absent", missing="absent is not installed")])
    monkeypatch.setitem(options.MODELS, "S", CONFIG)
    command = ["--device", "cpu", "--models", "S", "--sides", "28,56", "--pictures", "3", "--seconds", "0"]
    command += ["--results", str(tmp_path), "--commit", "c0ffee", "--write"]
    assert mixed.main(command) == 0
    rows = records.read(tmp_path / "cpu" / "mixed.jsonl")
    ours, theirs = [("dinov2_fast", mode) for mode in ("eager", "engine")], ["single", "grouped", "padded"]
    assert [(row["implementation"], row["mode"]) for row in rows] == [*ours, *(("absent", way) for way in theirs)]
    assert all(row["value"] for row in rows[:2])
    assert "ViT-S/14 28-56 px, batch 3, class token, fp32" in capsys.readouterr().out
    monkeypatch.setattr(mixed, "measure", None)  # nothing is left to measure
    assert mixed.main([*command, "--resume"]) == 0
    for wrong, said in ((["--sides", "56,28"], "smaller one first"), (["--pictures", "1"], "at least 2")):
        with pytest.raises(SystemExit):
            mixed._parse(wrong)
        assert said in capsys.readouterr().err
