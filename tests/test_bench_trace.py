"""The trace of a block: each op in its part, whoever's block it is, and floors that add up to that of a whole pass."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import modes, options, peers, records, roofline, trace
from bench.model import Models, Setting
from bench.trace import Line
from dinov2_fast.configs import BACKBONES
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.ops import dispatch

CONFIG = dataclasses.replace(BACKBONES["dinov2_vits14"], embed_dim=32, depth=3, num_heads=2)
SWIGLU = dataclasses.replace(CONFIG, ffn_layer="swiglufused")
PARTS = ["norm1", "qkv", "attention", "proj", "norm2", "fc1", "fc2"]
X = torch.zeros(2, 3, 56, 56)


def _ours(config: Any = CONFIG) -> DinoVisionTransformer:
    return DinoVisionTransformer(**config.constructor_arguments()).eval()


@torch.no_grad()
def _trace(model: Any, output: str = "all", config: Any = CONFIG) -> list[Line]:
    run = modes.prepare(peers.OURS, model, X, output, "fp32", "eager")
    return trace.trace(run, model, config, 2, gpu=False)


def _parts(lines: list[Line]) -> list[str]:
    """In order, without what is in none."""
    parts = [line.part for line in lines if line.part != "other"]
    return [part for i, part in enumerate(parts) if part != (parts[i - 1] if i else "")]


@pytest.mark.parametrize("output", peers.OUTPUTS)
@pytest.mark.parametrize("config", [CONFIG, SWIGLU], ids=["mlp", "swiglu"])
def test_each_op_of_a_block_is_in_its_part(config: Any, output: str) -> None:
    model = _ours(config)
    engine = modes.engine(model, X, output, "fp32", graphs=False)
    for traced in (model, engine):
        lines = _trace(traced, output, config)
        assert _parts(lines) == PARTS
        assert all(line.seconds > 0 for line in lines)
        products = [line for line in lines if line.part in ("qkv", "proj", "fc1", "fc2")]
        assert len(products) == 4
        assert any("norm" in line.name for line in lines)


@pytest.mark.parametrize("peer", [peers.TRANSFORMERS, peers.TIMM], ids=lambda peer: peer.name)
@torch.no_grad()
def test_each_op_of_a_peer_s_block_too(peer: peers.Peer) -> None:
    if peer.missing:
        pytest.skip(peer.missing)
    config = dataclasses.replace(BACKBONES["dinov2_vits14"])
    model = Models(config, _ours(config)).get(peer, torch.float32)
    run = modes.prepare(peer, model, X[:1], "all", "fp32", "eager")
    lines = trace.trace(run, model, config, 1, gpu=False)
    assert _parts(lines) == PARTS
    assert sum(line.part == "qkv" for line in lines) == (3 if peer is peers.TRANSFORMERS else 1)


def test_the_block_is_the_middle_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _ours()
    for i in (0, 2):
        plain = model.blocks[i].mlp.fc1.forward
        monkeypatch.setattr(model.blocks[i].mlp.fc1, "forward", lambda x, plain=plain: plain(x.sin().asin()))
    assert not any("sin" in line.name for line in _trace(model)), "of another block"
    assert type(model.blocks[1]).forward.__qualname__ == "Block.forward", "the class is as it was"


@torch.no_grad()
def test_the_median_of_all_passes_counts() -> None:
    model, big = _ours(), torch.zeros(64, 3, 112, 112)

    def seconds(passes: list[torch.Tensor]) -> float:
        given = iter([X] * trace.WARM_UP + passes)
        lines = trace.trace(lambda: model(next(given)), model, CONFIG, len(passes), gpu=False)
        return sum(line.seconds for line in lines if line.part == "fc1")

    assert seconds([X, X, big, X, X]) < seconds([X, big, big]) / 4


def _event(name: str, microseconds: float = 0.0, kernels: Any = (), children: Any = (), shapes: Any = ()) -> Any:
    made = [SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels]
    return SimpleNamespace(
        name=name, cpu_time_total=microseconds, kernels=made, cpu_children=list(children), input_shapes=list(shapes)
    )


def test_on_a_gpu_the_lines_are_kernels_in_the_order_of_their_launches() -> None:
    gemm = _event("aten::addmm", kernels=[("nvjet", 7.0), ("split_k", 1.0)])
    block = _event(
        "block",
        children=[
            _event("dinov2_fast::layer_norm", 90.0, [("_layer_norm_forward_kernel", 2.0)], shapes=[[2, 17, 32], [32]]),
            _event("aten::linear", 90.0, children=[_event("aten::t"), gemm], shapes=[[2, 17, 32], [96, 32], [96]]),
            _event("aten::view", 5.0),
        ],
    )
    assert list(trace._lines(block, CONFIG, gpu=True)) == [
        Line("norm1", "_layer_norm_forward_kernel", pytest.approx(2e-6)),
        Line("qkv", "nvjet", pytest.approx(7e-6)),
        Line("qkv", "split_k", pytest.approx(1e-6)),
    ]


@pytest.mark.parametrize(
    ("name", "shapes", "part"),
    [
        ("dinov2_fast::linear_residual_", [[2, 17, 32], [2, 17, 32], [32, 32], [32]], "proj"),
        ("dinov2_fast::linear_residual_", [[2, 17, 32], [2, 17, 128], [32, 128], [32]], "fc2"),
        ("dinov2_fast::linear", [[2, 17, 32], [128, 32], [128]], "fc1"),
        ("aten::addmm", [[128], [34, 32], [32, 128], [], []], "fc1"),
        ("aten::addmm_", [[34, 32], [34, 128], [128, 32], [], []], "fc2"),
        ("aten::mul", [[2, 17, 32], [32]], "other"),
        ("aten::gelu", [[34, 128]], "other"),
        ("aten::native_layer_norm", [[2, 17, 32], [32], [32]], "norm2"),
    ],
)
def test_the_part_of_an_op(name: str, shapes: Any, part: str) -> None:
    assert trace.part_of(name, shapes, CONFIG, attended=True) == part


def _known(config: Any, precision: str) -> list[dict[str, Any]]:
    place = {"model": config.name, "resolution": 224, "batch": 4}
    rows = []
    for i, product in enumerate(roofline.products_of(config, 224, 4, "cls")):
        own = roofline._precision_of(product.place, precision)
        rows.append(roofline._row(product.place, own, "TFLOP/s", [(1 + i) * 1e12] * 2, **place))
    own = roofline._precision_of("attention", precision)
    rows.append(roofline._row("attention", own, "TFLOP/s", [3e11] * 2, **place))
    return [*rows, roofline._row("copy", None, "GB/s", [5e9] * 2)]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vitg14_reg"])
def test_the_floors_of_all_blocks_are_the_floor_of_a_pass(name: str, precision: str) -> None:
    config = BACKBONES[name]
    ceilings = roofline.ceilings_of(_known(config, precision), precision)
    parts = trace.floors(config, 224, 4, ceilings)
    assert sorted(parts) == sorted(PARTS)
    patches = next(iter(roofline.products_of(config, 224, 4, "all")))
    embedding = patches.flops / ceilings.products[patches.sizes]
    whole = roofline.floor(config, 224, 4, "all", ceilings).seconds
    assert config.depth * sum(parts.values()) + embedding == pytest.approx(whole)


def test_a_floor_stands_beside_the_first_line_of_its_part(capsys) -> None:
    lines = [Line("qkv", "a", 4e-6), Line("qkv", "b", 4e-6), Line("other", "gelu", 2e-6), Line("other", "tiny", 1e-9)]
    trace.show("title", lines, {"qkv": 2e-6, "fc1": 1e-6})
    title, *table = capsys.readouterr().out.splitlines()
    assert title == "title: 10.0 us, floor 3.0 us"
    assert [line.split() for line in table] == [
        ["qkv", "4.0", "40.0%", "2.0", "25%", "a"],
        ["qkv", "4.0", "40.0%", "b"],
        ["other", "2.0", "20.0%", "0.0", "0%", "gelu"],
    ]


def test_the_command(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(trace.dinov2_fast, "load", lambda name, **given: _ours())
    monkeypatch.setitem(options.MODELS, "S", CONFIG)
    monkeypatch.setitem(BACKBONES, CONFIG.name, CONFIG)
    command = ["--device", "cpu", "--models", "S", "--sizes", "28", "--batches", "2", "--repeats", "1"]
    command += ["--results", str(tmp_path)]
    assert trace.main(command) == 0
    printed = capsys.readouterr().out
    assert "no floors: No copy was measured on this device: python -m bench.roofline does." in printed
    setting = Setting("trace", CONFIG, 28, 2, "all", "fp32")
    assert [
        line for line in printed.splitlines() if line.startswith(f"dinov2_fast engine, middle block of {setting}: ")
    ]
    records.write(tmp_path / "cpu" / "roofline.jsonl", [dict.fromkeys(records.KEYS) | r for r in _at_28()])
    assert trace.main([*command, "--precision", "fp8", "--modes", "eager,engine"]) == 0
    printed = capsys.readouterr().out
    assert "dinov2_fast eager" not in printed
    assert trace.main([*command, "--modes", "engine"]) == 0
    printed = capsys.readouterr().out
    assert " us, floor " in printed
    assert "no floors" not in printed
    for wrong in (["--modes", "graphs"], ["--precision", "autocast-bf16"], ["--implementations", "keras"]):
        with pytest.raises(SystemExit):
            trace._parse(wrong)


def _at_28() -> list[dict[str, Any]]:
    """Rates of the sizes that the command above takes, by the names of a real backbone."""
    place = {"model": CONFIG.name, "resolution": 28, "batch": 2}
    products = roofline.products_of(CONFIG, 28, 2, "cls")
    rows = [roofline._row(product.place, "fp32", "TFLOP/s", [1e12] * 2, **place) for product in products]
    rows.append(roofline._row("attention", "fp32", "TFLOP/s", [1e12] * 2, **place))
    return [*rows, roofline._row("copy", None, "GB/s", [5e9] * 2)]


def test_passes_of_different_kernels_are_an_error_with_a_sentence() -> None:
    one, two = Line("qkv", "a", 1e-6), Line("qkv", "b", 3e-6)
    assert trace.medians([[one, two], [one, two._replace(seconds=1e-6)]]) == [one, two._replace(seconds=2e-6)]
    with pytest.raises(ValueError, match=r"ran 2, 1 kernels in the middle block.*--repeats 1"):
        trace.medians([[one, two], [one]])


def test_an_engine_is_traced_on_the_backends_of_its_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(trace, "trace", lambda run, model, *rest: run() and [])
    config, setting = CONFIG, Setting("trace", CONFIG, 56, 2, "all", "fp32")

    def call(model: Any, x: Any) -> list[Any]:
        seen.append((type(model).__name__, dict(dispatch.current_setting().by_name)))
        return [x]

    peer = dataclasses.replace(peers.OURS, call={"all": call})
    models = Models(config, _ours())
    for mode in ("eager", "engine", "engine-triton-sdpa"):
        trace._lines_of(setting, models, X, peer, mode, 1)
    words = {"layer_norm": "triton", "linear": "triton", "attention_pool": "triton", "patches": "triton"}
    assert seen == [("DinoVisionTransformer", {}), ("Engine", {}), ("Engine", words)]


def test_a_mode_that_cannot_run_says_so_and_the_others_are_traced(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(trace.dinov2_fast, "load", lambda name, **given: _ours())
    monkeypatch.setitem(options.MODELS, "S", CONFIG)
    usual = trace._lines_of

    def refusing(setting: Any, models: Any, x: Any, peer: Any, mode: str, repeats: int) -> list[Line]:
        if mode == "engine-cuda":
            raise dispatch.BackendError("linear.gelu: backend 'cuda' was asked for but cannot run: not built.")
        return usual(setting, models, x, peer, mode, repeats)

    monkeypatch.setattr(trace, "_lines_of", refusing)
    command = ["--device", "cpu", "--models", "S", "--sizes", "28", "--batches", "2", "--repeats", "1"]
    assert trace.main([*command, "--modes", "engine-cuda,engine"]) == 1
    printed = capsys.readouterr().out
    assert "fp32: linear.gelu: backend 'cuda' was asked for but cannot run: not built." in printed
    assert "dinov2_fast engine, middle block" in printed
