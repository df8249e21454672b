"""The benchmark of training steps: wrong gradients are refused, steps train, the floor is the formula's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import modes, options, peers, records, roofline, timing, training
from bench.model import Setting
from bench.peers import OURS, Peer
from dinov2_fast.block import Block
from dinov2_fast.configs import BACKBONES, BackboneConfig
from dinov2_fast.model import DinoVisionTransformer

CPU = torch.device("cpu")
CONFIG = dataclasses.replace(BACKBONES["dinov2_vits14"], embed_dim=32, depth=2, num_heads=2)
SETTING = Setting("training", CONFIG, 56, 4, "all", "fp32")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "PATIENCE", 0.0)


def _ours(config: BackboneConfig = CONFIG) -> nn.Module:
    torch.manual_seed(0)
    ours = DinoVisionTransformer(**config.constructor_arguments()).eval()
    torch.nn.init.normal_(ours.pos_embed)
    return ours


def _peer(name: str, **changes: Any) -> Peer:
    return dataclasses.replace(OURS, name=name, **changes)


def _with_hook(parameter: str, change: Any) -> Any:
    """Builds ours, with a gradient that is changed before it is added."""

    def build(config: BackboneConfig, ours: nn.Module, drop_path: float) -> nn.Module:
        made = OURS.build(config, ours, drop_path)
        made.get_parameter(parameter).register_hook(change)
        return made

    return build


def _measure(*entrants: Peer, setting: Setting = SETTING, mode: str = "eager") -> list[dict[str, Any]]:
    return training.measure(setting, [(peer, mode) for peer in entrants], _ours(setting.config), 0.0, [])


def test_wrong_gradients_and_tokens_are_refused_and_the_others_timed() -> None:
    def middle_row_lost(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[40] *= 1 + 1e-3
        return gradient

    wrong = [
        _peer(name, build=_with_hook(name, change))
        for name, change in (
            ("patch_embed.proj.weight", lambda gradient: gradient * (1 + 1e-4)),
            ("blocks.1.attn.qkv.weight", middle_row_lost),
            ("blocks.1.mlp.fc2.weight", lambda gradient: gradient * float("nan")),
            ("norm.weight", lambda gradient: gradient * 0),
        )
    ]
    assert [peer.name for peer in wrong] == training.watched(CONFIG)
    scaled = _peer("scaled", take={"all": lambda features: OURS.take["all"](features) * (1 + 1e-4)})
    absent = _peer("absent", missing="absent is not installed")
    rows = _measure(OURS, *wrong, scaled, absent)
    assert [row["implementation"] for row in rows if row["value"] is not None] == ["dinov2_fast"]
    for row in rows[1:5]:
        assert records.reason(row).startswith(f"refused: the gradient of {row['implementation']}: ")
    assert records.reason(rows[5]).startswith("refused: the tokens: ")
    assert records.reason(rows[6]) == "missing: absent is not installed"


def test_what_only_part_of_the_batch_shows_is_refused() -> None:
    def without_one_picture(features: dict[str, Tensor]) -> Tensor:
        tokens = OURS.take["all"](features)
        return torch.cat([tokens[:1], tokens[1:2].detach(), tokens[2:]])

    (row,) = _measure(_peer("part", take={"all": without_one_picture}))
    assert records.reason(row).startswith("refused: the gradient of ")


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("peer", [peers.TRANSFORMERS, peers.TIMM], ids=lambda peer: peer.name)
def test_peers_have_our_gradients(peer: Peer, registers: int) -> None:
    if peer.missing:
        pytest.skip(peer.missing)
    config = BACKBONES[f"dinov2_vits14{'_reg' if registers else ''}"]
    (row,) = _measure(peer, setting=dataclasses.replace(SETTING, config=config, batch=2))
    assert records.reason(row) is None
    assert (row["implementation"], row["unit"]) == (peer.name, "images/s")
    assert row["outputs_max_error"] < 1e-4


@pytest.mark.parametrize("precision", ["bf16", "autocast-bf16"])
def test_each_precision_is_held_to_its_own_error(precision: str) -> None:
    half = _peer("half", build=_with_hook("norm.weight", lambda gradient: gradient / 2))
    right, wrong = _measure(OURS, half, setting=dataclasses.replace(SETTING, precision=precision))
    assert right["value"] > 0
    assert right["outputs_max_error"] > 1e-4
    assert records.reason(wrong).startswith("refused: the gradient of norm.weight")


def test_the_step_that_was_compared_is_timed_with_stochastic_depth(monkeypatch) -> None:
    seen: list[tuple[int, bool]] = []

    def call(model: nn.Module, x: Tensor) -> Any:
        seen.append((id(model), model.training))
        return OURS.call["all"](model, x)

    built: list[nn.Module] = []

    def build(config: BackboneConfig, ours: nn.Module, drop_path: float) -> nn.Module:
        built.append(OURS.build(config, ours, drop_path))
        return built[-1]

    _measure(_peer("seen", call={"all": call}, build=build))
    assert len(built) == 1
    assert seen == [(id(built[0]), False)] + [(id(built[0]), True)] * (len(seen) - 1)
    assert len(seen) >= 1 + 2 + timing.ROUNDS
    blocks = [module for module in built[0].modules() if isinstance(module, Block)]
    assert [block.sample_drop_ratio for block in blocks] == [training.DROP_PATH] * CONFIG.depth
    before = _ours().state_dict()
    assert all(
        not torch.equal(parameter, before[name])
        for name, parameter in built[0].named_parameters()
        if name != "mask_token"
    )
    assert all(parameter.grad is None for parameter in built[0].parameters())


def test_a_parameter_that_is_not_finite_in_the_end_is_refused() -> None:
    def call(model: nn.Module, x: Tensor) -> Any:
        features = OURS.call["all"](model, x)
        if model.training:
            features["x_norm_clstoken"] = features["x_norm_clstoken"] * float("inf")
        return features

    lost, fine = _measure(_peer("lost", call={"all": call}), OURS)
    assert (lost["value"], records.reason(lost)) == (None, "refused: after the steps a parameter is not finite")
    assert fine["value"] > 0


def test_a_compiled_step_is_compared_and_timed(monkeypatch) -> None:
    graphs = []
    limits = []

    def compile_(function: Any, *, dynamic: bool, mode: str) -> Any:
        def backend(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            limits.append(torch._dynamo.config.recompile_limit)
            return graph

        return original(function, dynamic=dynamic, backend=backend)

    original = torch.compile
    monkeypatch.setattr(torch, "compile", compile_)
    (row,) = _measure(OURS, mode="compile", setting=dataclasses.replace(SETTING, batch=3))
    assert row["value"] > 0
    assert len(graphs) >= 2  # with and without stochastic depth
    assert set(limits) == {modes.RECOMPILE_LIMIT}


def test_the_floor_is_the_formula() -> None:
    config, batch, resolution = BACKBONES["dinov2_vits14"], 8, 224
    products = {p.sizes: 1e12 for p in roofline.products_of(config, resolution, batch, "all")}
    attention = {roofline.attention_sizes(config, resolution, batch): 5e11}
    ceilings = roofline.Ceilings("bf16", 1e11, products, attention)
    kept = 5 / 8
    patches = 2 * 8 * 256 * 588 * 384
    layers = 12 * 2 * 8 * 257 * 12 * 384**2
    scores = 12 * 4 * 8 * 257**2 * 384
    stream = 12 * 6 * 8 * 257 * 384 * 2  # bytes of 6 transfers in bf16
    adamw = 7 * roofline.parameters(config)
    expected = 3 * (patches + kept * layers) / 1e12 + 3.5 * kept * scores / 5e11 + 3 * kept * stream / 1e11
    for precision, size in (("bf16", 2), ("autocast-bf16", 4)):
        found = training.floor(config, resolution, batch, precision, ceilings)
        assert found == pytest.approx(expected + adamw * size / 1e11, rel=1e-12)
    one = training.floor(
        config, resolution, batch, "bf16", ceilings._replace(copy=1e30, attention={(8, 6, 257, 64): 1e30})
    )
    assert one == pytest.approx(3 * (patches + kept * layers) / 1e12)
    with pytest.raises(ValueError, match="No rate was measured"):
        training.floor(config, resolution, 9, "bf16", ceilings)


def test_a_share_of_the_floor_where_the_ceilings_are_known() -> None:
    row = dict.fromkeys(records.KEYS) | {"task": "roofline", "output": "copy", "value": 1.0, "unit": "GB/s"}
    assert training._floor(SETTING, []) is None
    assert training._floor(SETTING, [row]) is None
    config = BACKBONES["dinov2_vits14"]
    place = {"model": config.name, "resolution": 224, "batch": 3, "precision": "bf16", "unit": "TFLOP/s", "value": 1.0}
    outputs = ("patch embedding", "qkv", "proj", "fc1", "fc2", "attention")
    known = [row, *(row | place | {"output": output} for output in outputs)]
    setting = Setting("training", config, 224, 3, "all", "autocast-bf16")
    ceilings = roofline.ceilings_of(known, "bf16")
    assert training._floor(setting, known) == training.floor(config, 224, 3, "autocast-bf16", ceilings)


def test_the_command_keeps_rows_and_resumes(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(training, "peers", lambda path: [OURS, _peer("absent", missing="absent is not installed")])
    monkeypatch.setattr(training.dinov2_fast, "load", lambda name, weights, device: _ours())
    monkeypatch.setattr(options, "MODELS", options.MODELS | {"S": CONFIG})
    command = ["--device", "cpu", "--sizes", "28", "--seconds", "0", "--results", str(tmp_path), "--commit", "c0ffee"]
    assert training.main([*command, "--write"]) == 0
    path = tmp_path / "cpu" / "training.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["implementation"], row["output"], row["unit"]) for row in rows] == [
        ("dinov2_fast", "all", "images/s"),
        ("absent", "all", None),
    ]
    assert "absent is not installed" in capsys.readouterr().out
    monkeypatch.setattr(training, "measure", lambda *args: pytest.fail("measured again"))
    assert training.main([*command, "--write", "--resume"]) == 0
    with pytest.raises(SystemExit):
        training.main([*command, "--precisions", "fp16"])


def test_a_lost_device_ends_the_command_and_the_others_run_next_time(monkeypatch, tmp_path: Path) -> None:
    broken: list[bool] = []

    def breaking(model: nn.Module, x: Tensor) -> Any:
        broken.append(True)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(training, "peers", lambda path: [OURS, _peer("bad", call={"all": breaking}), _peer("last")])
    monkeypatch.setattr(training.dinov2_fast, "load", lambda name, weights, device: _ours())
    monkeypatch.setattr(options, "MODELS", options.MODELS | {"S": CONFIG})
    monkeypatch.setattr(records, "is_lost", lambda device: bool(broken))
    command = ["--device", "cpu", "--sizes", "28", "--seconds", "0", "--results", str(tmp_path), "--commit", "c0ffee"]
    command += ["--write", "--resume"]

    def kept() -> list[tuple[str, bool]]:
        rows = records.read(tmp_path / "cpu" / "training.jsonl")
        return [(row["implementation"], row["value"] is not None) for row in rows]

    assert training.main(command) == records.AGAIN
    assert kept() == [("bad", False)]
    broken.clear()
    assert training.main([*command, "--implementations", "dinov2_fast"]) == 0
    assert kept() == [("bad", False), ("dinov2_fast", True)]
    assert training.main(command) == 0
    assert kept() == [("bad", False), ("dinov2_fast", True), ("last", True)]


def test_the_reference_is_computed_with_cudnn_and_without_tf32(monkeypatch) -> None:
    seen: list[tuple[Any, ...]] = []
    usual = training.Judge._results

    def results(self: Any, step: Any, *rest: Any) -> Any:
        dtype = next(step.model.parameters()).dtype
        seen.append((dtype, torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32))
        return usual(self, step, *rest)

    monkeypatch.setattr(training.Judge, "_results", results)
    _measure(OURS)
    assert seen[0] == (torch.float64, True, False)
    assert all(enabled for _, enabled, _ in seen)


def test_training_runs_every_backend_of_ours_on_a_gpu() -> None:
    assert training.MODES == {"cpu": ["eager"], "cuda": ["eager", "triton", "compile"]}
