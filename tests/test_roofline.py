"""The floor under a forward pass: its counts are those of the model, its rates those that were measured."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import harness, records, roofline
from bench.workloads import WORKLOADS, Shape, attention_flops
from dinov2_fast.configs import BACKBONES
from dinov2_fast.model import DinoVisionTransformer

CPU = torch.device("cpu")
S, B, L, G = (BACKBONES[f"dinov2_vit{letter}14"] for letter in "sblg")
TINY = Shape(harness.TINY, 28, 2)  # 5 tokens, hidden size 64, 1 head
ATTENTION = {224: 250e12, 518: 450e12, 1036: 500e12}  # flops per second assumed below
# Worked out by hand for an H200, apart from this code, at 790 TFLOP/s in bf16, 1400 in fp8, 250, 450 and 500 of
# attention, and 4.3 TB/s: MB of elementwise traffic in one layer for each image in bf16; images per second in bf16 and
# fp8; percent of that time in products, attention and elementwise traffic.
EXPECTED = {
    (S, 224): (1.18, 45175, 64507, (63, 22, 15), (51, 31, 18)),
    (B, 518): (12.6, 2061, 2855, (61, 32, 7), (48, 44, 8)),
    (L, 1036): (67.3, 95.5, 116.6, (40, 56, 4), (28, 69, 4)),
    (G, 518): (25.3, 193, 291, (76, 20, 5), (65, 30, 6)),
}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, size in ((harness, "FLUSH", 0), (roofline, "COPY", 1 << 16), (roofline, "LARGE", 32)):
        monkeypatch.setattr(module, name, {"cpu": size})
    monkeypatch.setattr(roofline, "SECONDS", {"cpu": 0})


@pytest.mark.parametrize(("config", "resolution"), EXPECTED, ids=lambda value: getattr(value, "name", value))
def test_the_floor_is_the_one_worked_out_by_hand(config, resolution) -> None:
    traffic, bf16, fp8, *shares = EXPECTED[config, resolution]
    moved = roofline.elementwise_bytes(config, resolution, 1, "all", "bf16")
    assert moved / config.depth / 1e6 == pytest.approx(traffic, rel=5e-3)
    sizes = roofline.attention_sizes(config, resolution, 3)
    for precision, product, rate, parts in (("bf16", 790e12, bf16, shares[0]), ("fp8", 1400e12, fp8, shares[1])):
        products = {p.sizes: product for p in roofline.products_of(config, resolution, 3, "all")}
        ceilings = roofline.Ceilings(precision, 4.3e12, products, {sizes: ATTENTION[resolution]})
        floor = roofline.floor(config, resolution, 3, "all", ceilings)
        assert 3 / floor.seconds == pytest.approx(rate, rel=3e-3)
        assert [100 * part / floor.seconds for part in floor] == pytest.approx(parts, abs=0.6)


@pytest.mark.parametrize("name", ["dinov2_vitb14_reg", "dinov2_vitg14"])
def test_counts_are_those_of_the_model_and_of_the_ops(name) -> None:
    config = BACKBONES[name]
    with torch.device("meta"):
        model, x = DinoVisionTransformer(**config.constructor_arguments()).eval(), torch.empty(2, 3, 518, 518)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.forward_features(x)
    products, shape = {p.place: p for p in roofline.products_of(config, 518, 2, "all")}, Shape(config, 518, 2)
    counted = sum(p.count * p.flops for p in products.values()) + config.depth * attention_flops(shape)
    assert counted == counter.get_total_flops()
    for workload in WORKLOADS:
        if workload.place in products and workload.applies(shape):
            assert workload.flops(shape) == products[workload.place].flops
    assert round(roofline.parameters(config) / 1e6, 2) == {"dinov2_vitb14_reg": 86.58, "dinov2_vitg14": 1136.48}[name]


def _measured(shape: Shape, *precisions: str) -> list[dict]:
    """Rows of the device and of a backbone; the median of each run is 20 ms, on a cold cache."""
    times = lambda runs, *_, flush, **options: {key: [0.01, 0.02, 0.04] for key in runs if flush}  # noqa: E731
    parts = [roofline.device_parts(CPU, shape.dtype), *(roofline.parts_of(shape, each) for each in precisions)]
    with mock.patch.object(harness, "in_turn", times):
        return [row for each in parts for row in roofline.measure(each, CPU)]


def test_rows_are_work_over_time_and_make_floors() -> None:
    rows = _measured(TINY, "fp32")
    values = {(row["output"], row["implementation"]): row["value"] * roofline.UNITS[row["unit"]] for row in rows}
    assert all(row["p20"] < row["value"] < row["p80"] for row in rows)
    copy = values["copy", "torch"]
    assert copy == pytest.approx(2 * 65536 / 0.02)
    assert values["large product", "torch"] == pytest.approx(2 * 32**3 / 0.02)
    assert values["fc1", "torch"] == pytest.approx(2 * 10 * 64 * 256 / 0.02)
    assert values["patch embedding", "torch"] == pytest.approx(2 * 8 * 588 * 64 / 0.02)  # though 592 values are timed
    for backend in ("flash_attention", "math"):
        assert values["attention", backend] == pytest.approx(4 * 2 * 25 * 64 / 0.02)
    assert all(row["outputs_max_error"] < 1e-6 for row in rows if row["output"] == "attention")
    ceilings = roofline.ceilings_of(rows, "fp32")
    floors = {output: roofline.floor(harness.TINY, 28, 2, output, ceilings) for output in ("all", "cls")}
    assert floors["all"] == pytest.approx((0.02 * (1 + 4 * 12), 0.02 * 12, 2 * 5 * 64 * 24 * 12 / copy))
    assert floors["cls"] == pytest.approx((0.02 * (1 + 4 * 11 + 6), 0.02 * 11, 2 * 5 * 64 * (24 * 11 + 4) / copy))
    with pytest.raises(ValueError, match=r"A rate of tiny, 28 px, batch 3, fp32 was not measured"):
        roofline.floor(harness.TINY, 28, 3, "all", ceilings)


def test_the_best_rate_of_the_right_precision_counts() -> None:
    def row(output: str, precision: str | None, value: float, **about) -> dict:
        place = {"model": "tiny", "resolution": 28, "batch": 2, "unit": "TFLOP/s", "value": value}
        return roofline._row(output, precision) | place | about

    rows = [row("qkv", "bf16", 9.0), row("qkv", "bf16", 8.0), row("qkv", "fp8", 20.0), row("attention", "bf16", 7.0)]
    rows += [row("attention", "fp32", 8.0), row("patch embedding", "bf16", 2.0), row("copy", None, 9.0, task="ops")]
    with pytest.raises(ValueError, match="No copy was measured"):
        roofline.ceilings_of(rows, "bf16")
    rows += [row("copy", None, value, model=None, unit="GB/s") for value in (3.0, 4.0, 1.0)]
    for precision, qkv in (("bf16", 9e12), ("fp8", 20e12)):
        products = {(8, 588, 64): 2e12, (10, 64, 192): qkv}
        assert roofline.ceilings_of(rows, precision) == (precision, 4e9, products, {(2, 1, 5, 64): 7e12})


def test_what_fails_or_is_wrong_has_a_reason_and_sets_no_floor(monkeypatch) -> None:
    attention, refused = roofline.F.scaled_dot_product_attention, mock.Mock(side_effect=RuntimeError("no such\nmore"))
    wrong = mock.Mock(side_effect=lambda *x: attention(*x) * (2 if wrong.call_count == 1 else 1))
    monkeypatch.setattr(roofline.F, "scaled_dot_product_attention", wrong)
    monkeypatch.setattr(torch, "_scaled_mm", refused)
    rows = _measured(replace(TINY, dtype=torch.bfloat16), "bf16", "fp8")
    outputs = {row["output"] for row in rows if row["precision"] == "fp8"}
    assert outputs == {"qkv", "proj", "fc1", "fc2", "cls qkv and proj", "cls fc1", "cls fc2"}
    reasons = {(row["precision"], records.reason(row)[:15]) for row in rows if not row["value"]}
    assert reasons == {("bf16", "refused: an ele"), ("fp8", "failed: no such")}
    assert roofline.floor(harness.TINY, 28, 2, "all", roofline.ceilings_of(rows, "bf16")).seconds > 0
    with pytest.raises(ValueError, match="was not measured"):
        roofline.floor(harness.TINY, 28, 2, "all", roofline.ceilings_of(rows, "fp8"))


def test_the_command_resumes_without_what_the_device_was_lost_in(monkeypatch, tmp_path, capsys) -> None:
    attention, broken = roofline._attention, []

    def breaking(shape, backend, row):
        if shape.tokens == 17 and backend.name == "MATH":
            broken.append(True)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return attention(shape, backend, row)

    monkeypatch.setattr(roofline, "_attention", breaking)
    monkeypatch.setattr(records, "is_lost", lambda device: bool(broken))
    command = "--device cpu --models tiny --sizes 28,56 --batches 1 --commit c0ffee --write --resume --results"
    rows: list[dict] = []
    for status, floors in ((records.AGAIN, 2), (0, 4), (0, 4)):
        broken.clear()
        assert roofline.main([*command.split(), str(tmp_path)]) == status
        assert capsys.readouterr().out.count("Floor(") == floors
        before, rows = rows, records.read(tmp_path / "cpu" / "roofline.jsonl")
        assert rows[: len(before)] == before
        assert [(row["resolution"], row["implementation"]) for row in rows if not row["value"]] == [(56, "math")]
    assert rows == before
