"""The predictions: bytes, operations and times equal those computed by hand, and NOTES.md has the tables."""

from __future__ import annotations

import itertools

import pytest

from bench import predictions, records, roofline
from bench.predictions import DESIGNS, ELEMENTWISE, H200, SHAPES, SPEEDS
from bench.roofline import Rates

HEADING = "\n## What each step of the engine should gain on an H200 (predicted; nothing has run)\n"
# Transfers of a layer with GELU (h = 4) and with SwiGLU (h = 8/3): what each kernel reads and writes.
TRANSFERS = {
    # norm: read, write; LayerScale: read, write; sum: read twice, write
    "timm eager": lambda h, gelu: 2 * (2 + 2 + 3) + (2 * h if gelu else 2 * h + 3 * h),
    # LayerScale, sum and norm: read twice, write twice
    "timm compile": lambda h, gelu: 2 * 4 + (2 * h if gelu else 3 * h),
    "engine": lambda h, gelu: 2 * (2 + 3) + (2 * h if gelu else 5 * h),
    # norm: read, write; the residual is read by the product that writes it
    "engine-triton": lambda h, gelu: 2 * (2 + 1),
    "A: residual, GELU, SwiGLU cublas": lambda h, gelu: 2 * (2 + 1) + (0 if gelu else 3 * h),
    "B: A, SwiGLU cuda, attention triton": lambda h, gelu: 2 * (2 + 1),
    "C: B, attention cuda": lambda h, gelu: 2 * (2 + 1),
    "fp8, cublas, activation triton": lambda h, gelu: 2 * (1.5 + 3) + 1.5 + (h if gelu else 2 * h) + h / 2,
    "fp8, cuda": lambda h, gelu: 2 * (1.5 + 1) + 1.5,
    "fp8, cuda, attention as C": lambda h, gelu: 2 * (1.5 + 1) + 1.5,
}
# MB of a layer and an image, computed independently of this code: S, B, L and g at 224 px, then at 518 px.
MEGABYTES = {
    "timm eager": (4.34, 8.68, 11.6, 21.6, 23.2, 46.3, 61.7, 115),
    "timm compile": (3.16, 6.32, 8.42, 12.6, 16.8, 33.7, 44.9, 67.3),
    "engine-triton": (1.18, 2.37, 3.16, 4.74, 6.3, 12.6, 16.8, 25.3),
}


def _moved(name: str, size: str) -> float:
    return predictions.counts(predictions.layer_steps(DESIGNS[name], SHAPES[size]))[2] * 1e6


def test_the_bytes_of_each_design_are_what_its_kernels_read_and_write() -> None:
    assert TRANSFERS.keys() == DESIGNS.keys()
    for name, count in TRANSFERS.items():
        assert _moved(name, "B 518") / (2 * 1370 * 768) == pytest.approx(count(4, gelu=True)), name
        assert _moved(name, "g 224") / (2 * 257 * 1536) == pytest.approx(count(8 / 3, gelu=False)), name
    for name, megabytes in MEGABYTES.items():
        assert [_moved(name, size) / 1e6 for size in SHAPES] == pytest.approx(megabytes, rel=5e-3), name


@pytest.mark.parametrize("name", DESIGNS)
def test_operations_equal_those_of_the_floor_and_no_design_is_faster(name: str, monkeypatch) -> None:
    design = DESIGNS[name]
    cases = list(itertools.product(SHAPES.values(), ("all", "cls")))
    floors = [
        roofline.forward_work(shape.config, shape.resolution, 1, output, 2, design.e4m3) for shape, output in cases
    ]

    def times_the_floor() -> list[float]:
        times = [predictions.seconds(predictions.model_steps(design, *case)) for case in cases]
        return [time / floor.seconds(H200, design.e4m3) for time, floor in zip(times, floors, strict=True)]

    for case, floor in zip(cases, floors, strict=True):
        products, attention, _ = predictions.counts(predictions.model_steps(design, *case))
        assert (products, attention) == pytest.approx(((floor.embedding + floor.products) / 1e9, floor.attention / 1e9))
    assert min(times_the_floor()) > 1
    # Each kernel is slower than the floor assumes. At the floor's speeds no design is faster than the floor. The one in
    # which everything is fused is as fast, where no step is bound by memory.
    perfect = {}
    for kernel, speed in SPEEDS.items():
        of_the_floor = H200.product / 1e12 if kernel.startswith("attention") else 1.0
        assert max(speed.values()) < of_the_floor
        perfect[kernel] = dict.fromkeys(speed, of_the_floor)
    monkeypatch.setattr(predictions, "SPEEDS", perfect)
    monkeypatch.setattr(predictions, "ELEMENTWISE", 1.0)
    assert min(times_the_floor()) > 1 - 1e-9
    if name == "engine-triton":
        assert times_the_floor()[-8:] == pytest.approx([1] * 8)  # at 518 px


def test_times_equal_those_computed_by_hand() -> None:
    torch, cuda, gelu = (SPEEDS[name] for name in ("linear torch", "linear cuda", "linear.gelu cublas"))
    cudnn, triton = (1e12 * SPEEDS[f"attention {name}"][257] for name in ("torch", "triton"))
    transfer = 2 * 257 * 384 / (ELEMENTWISE * H200.copy)
    attention, square = 4 * 257 * 257 * 384, 2 * 257 * 384 * 384  # operations; those of proj
    at_384, at_1536 = torch[384] * H200.product, torch[1536] * H200.product
    compiled = {"qkv": 3 * square / at_384, "proj": square / at_384, "fc1": 4 * square / at_384}
    compiled |= {"fc2": 4 * square / at_1536, "attention": attention / cudnn, "quantise": 0}
    compiled |= {"norm": 2 * transfer, "residual": 2 * transfer, "activation": 8 * transfer}
    assert _times("timm compile") == pytest.approx(compiled)
    at_384, at_1536 = cuda[384] * H200.e4m3, cuda[1536] * H200.e4m3
    e4m3 = {"qkv": 3 * square / at_384, "proj": square / at_384, "fc1": 4 * square / at_384}
    e4m3 |= {"fc2": 4 * square / at_1536, "attention": attention / cudnn, "quantise": 1.5 * transfer}
    e4m3 |= {"norm": 1.5 * transfer, "residual": transfer, "activation": 0}
    assert _times("fp8, cuda") == pytest.approx(e4m3)
    # With "cls" the last layer reads the stream once. The class token takes 2 * 384 * 384 operations for each of q, two
    # products by head and proj, and 8 times that in the MLP.
    fc1, last = 4 * square / max(gelu[384], cuda[384]) / H200.product, 12 * 2 * 384 * 384 / H200.product
    b = compiled | {"fc1": fc1, "attention": attention / max(cudnn, triton), "residual": transfer, "activation": 0}
    whole = 11 * (sum(b.values()) + b["norm"] + b["residual"]) + transfer + last
    steps = predictions.model_steps(DESIGNS["B: A, SwiGLU cuda, attention triton"], SHAPES["S 224"], "cls")
    patches = 2 * 256 * 588 * 384 / (torch[588] * H200.product)
    assert predictions.seconds(steps) == pytest.approx(whole + patches)


def _times(name: str) -> dict[str, float]:
    return {step.name: step.seconds(H200) for step in predictions.layer_steps(DESIGNS[name], SHAPES["S 224"])}


def test_a_product_takes_the_time_of_its_bytes_where_memory_is_slower() -> None:
    slow = Rates(copy=1 / ELEMENTWISE, product=1e18, e4m3=1e18)  # a byte a second
    # Bytes of an operand's values, and of those of fc1: both halves of a SwiGLU in 16 bits, or what it makes of them.
    for name, operand, fc1 in (("timm compile", 2, 4), ("C: B, attention cuda", 2, 2), ("fp8, cuda", 1, 1)):
        moved = {"qkv": 1536 * (operand + 3 * 2), "proj": 1536 * (operand + 2)}
        moved |= {"fc1": 1536 * operand + 4096 * fc1, "fc2": 4096 * operand + 1536 * 2}
        steps = predictions.layer_steps(DESIGNS[name], SHAPES["g 224"], slow)
        times = {step.name: step.seconds(slow) / 257 for step in steps if step.name in moved}
        assert times == pytest.approx(moved), name


def test_the_notes_have_the_tables_that_the_command_prints() -> None:
    notes = (records.RESULTS / "NOTES.md").read_text(encoding="utf-8")
    section = notes.partition(HEADING)[2].partition("\n## ")[0]
    assert section.endswith(f"\n\n{predictions.tables()}")
