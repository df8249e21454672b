"""The floor of a forward pass: its operations are those of the model, its rates those that were measured."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import harness, roofline
from bench.roofline import Rates
from bench.workloads import WORKLOADS, Shape
from dinov2_fast.configs import BACKBONES
from dinov2_fast.model import DinoVisionTransformer

S, B, L, G = (BACKBONES[f"dinov2_vit{letter}14"] for letter in "sblg")
# Computed by hand for an H200, independently of this code, at 790 TFLOP/s in bf16, 1400 in fp8 and 4.3 TB/s: MB of
# elementwise traffic in one layer for each image in bf16; GFLOP of products and of attention; images per second.
EXPECTED = {
    (S, 224): (1.18, 11.06, 1.218, 53_080, 81_600),
    (B, 518): (12.6, 234.0, 69.2, 2393, 3511),
}


@pytest.mark.parametrize(("config", "resolution"), EXPECTED, ids=lambda value: getattr(value, "name", value))
def test_the_floor_equals_the_one_computed_by_hand(config, resolution) -> None:
    traffic, products, attention, bf16, fp8 = EXPECTED[config, resolution]
    rates = Rates(4.3e12, 790e12, 1400e12)
    work = roofline.forward_work(config, resolution, 3, "all", 2, False)
    assert work.elementwise / 3 / config.depth / 1e6 == pytest.approx(traffic, rel=5e-3)
    assert (work.embedding + work.products) / 3e9 == pytest.approx(products, rel=5e-3)
    assert work.attention / 3e9 == pytest.approx(attention, rel=5e-3)
    assert 3 / work.seconds(rates, False) == pytest.approx(bf16, rel=1e-2)
    assert 3 / roofline.forward_work(config, resolution, 3, "all", 2, True).seconds(rates, True) == pytest.approx(
        fp8, rel=1e-2
    )


def test_output_cls_computes_one_row_in_the_last_layer() -> None:
    every, alone = (roofline.forward_work(harness.TINY, 28, 2, output, 4, False) for output in ("all", "cls"))
    layer = 2 * 64 * 64 * 12  # operations of one row: qkv 3, proj 1, fc1 and fc2 4 each
    assert every == (2 * 8 * 588 * 64, 12 * 10 * layer, 12 * 4 * 2 * 25 * 64, 12 * 10 * 64 * 24)
    assert alone == (every[0], 11 * 10 * layer + 2 * layer, 11 / 12 * every[2], 10 * 64 * (11 * 24 + 4))


@pytest.mark.parametrize("name", ["dinov2_vitb14_reg", "dinov2_vitg14"])
def test_operations_equal_those_of_the_model_and_the_ops(name) -> None:
    config = BACKBONES[name]
    with torch.device("meta"):
        model, x = DinoVisionTransformer(**config.constructor_arguments()).eval(), torch.empty(2, 3, 518, 518)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.forward_features(x)
    work, shape = roofline.forward_work(config, 518, 2, "all", 2, False), Shape(config, 518, 2)
    assert work.embedding + work.products + work.attention == counter.get_total_flops()
    places = {each.place: each.flops(shape) for each in WORKLOADS if each.op == "linear" and each.applies(shape)}
    assert config.depth * sum(places.values()) == work.products
    assert (
        round(roofline.count_parameters(config) / 1e6, 2)
        == {"dinov2_vitb14_reg": 86.58, "dinov2_vitg14": 1136.48}[name]
    )


def test_rates_are_work_over_the_median_time_of_the_fastest_library(monkeypatch) -> None:
    seconds = {"copy": [0.01, 0.02, 0.04], "product": [0.02, 0.02, 0.02], "onednn": [0.01, 0.01, 0.09]}
    times = lambda runs, *_, flush: {name: seconds[name] for name in runs if flush and run_once(runs[name])}  # noqa: E731
    run_once = lambda run: run() is not None  # noqa: E731
    for name, size in (("COPY_BYTES", 1 << 16), ("PRODUCT_SIZE", 32)):
        monkeypatch.setattr(roofline, name, {"cpu": size})
    roofline.measure_rates.cache_clear()
    with mock.patch.object(roofline, "time_in_turn", times):
        fp32, bf16 = (roofline.measure_rates(torch.device("cpu"), dtype) for dtype in (torch.float32, torch.bfloat16))
    roofline.measure_rates.cache_clear()
    best = 0.01 if torch.backends.mkldnn.is_available() else 0.02
    assert fp32 == pytest.approx((2 * 65536 / 0.02, 2 * 32**3 / best, None))
    assert bf16.product == pytest.approx(2 * 32**3 / 0.02)
    assert fp32.as_versions == {"copy_per_s": fp32.copy, "product_per_s": fp32.product}
