"""The floor under a forward pass: its counts are those of the model, its rates those that were measured."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode

from bench import ops as ops_bench
from bench import records, roofline, timing
from bench.workloads import WORKLOADS, Shape
from dinov2_fast.configs import BACKBONES
from dinov2_fast.model import DinoVisionTransformer

CPU = torch.device("cpu")
S, B, L, G = (BACKBONES[f"dinov2_vit{letter}14"] for letter in "sblg")
SIZES = (224, 518, 1036)
# Worked out by hand for an H200, apart from this code. Per picture: GFLOP of products and of attention, MB of
# elementwise traffic in one layer in bf16, pictures per second in bf16 and fp8 at the rates of `_assumed`, and percent
# of that time in products, attention and elementwise traffic.
EXPECTED = {
    (S, 224): ("11.0", "1.2", "1.18", 45175, 64507, (63, 22, 15), (51, 31, 18)),
    (S, 518): ("58.8", "34.6", "6.3", 5920, 7487, (44, 46, 10), (31, 58, 11)),
    (S, 1036): ("235", "553", "25.2", 679, 751, (20, 75, 5), (13, 83, 4)),
    (B, 224): ("43.9", "2.4", "2.37", 13908, 21461, (77, 14, 9), (67, 21, 12)),
    (B, 518): ("234", "69.2", "12.6", 2061, 2855, (61, 32, 7), (48, 44, 8)),
    (B, 1036): ("935", "1106", "50.5", 283, 334, (34, 63, 4), (22, 74, 4)),
    (L, 224): ("155.5", "6.5", "3.16", 4159, 6590, (82, 11, 7), (73, 17, 10)),
    (L, 518): ("829", "184.5", "16.8", 644, 926, (68, 26, 6), (55, 38, 7)),
    (L, 1036): ("3315", "2949", "67.3", 95.5, 116.6, (40, 56, 4), (28, 69, 4)),
    (G, 224): ("582.5", "16.2", "4.74", 1182, 1931, (87, 8, 5), (80, 13, 7)),
    (G, 518): ("3105", "461", "25.3", 193, 291, (76, 20, 5), (65, 30, 6)),
    (G, 1036): ("12415", "7372", "101", 31.8, 41.0, (50, 47, 3), (36, 60, 3)),
}
EACH = pytest.mark.parametrize(("config", "resolution"), EXPECTED, ids=lambda value: getattr(value, "name", value))


def _printed_as(text: str, value: float) -> bool:
    """Whether a number rounds to what is printed."""
    return f"{value:.{len(text.partition('.')[2])}f}" == text


def _assumed(config, resolution: int, batch: int, precision: str) -> roofline.Ceilings:
    """790 TFLOP/s for products in bf16, 1400 in fp8; 4.3 TB/s."""
    product = {"bf16": 790e12, "fp8": 1400e12}[precision]
    attention = {224: 250e12, 518: 450e12, 1036: 500e12}[resolution]
    sizes = [p.sizes for p in roofline.products_of(config, resolution, batch, "cls")]
    return roofline.Ceilings(
        precision,
        4.3e12,
        dict.fromkeys(sizes, product),
        {roofline.attention_sizes(config, resolution, batch): attention},
    )


@EACH
def test_operations_and_bytes_are_the_expected_ones(config, resolution) -> None:
    products, attention, traffic, *_ = EXPECTED[config, resolution]
    assert _printed_as(products, roofline.product_flops(config, resolution, 1, "all") / 1e9)
    assert _printed_as(attention, roofline.attention_flops(config, resolution, 1, "all") / 1e9)
    moved = roofline.elementwise_bytes(config, resolution, 1, "all", "bf16")
    assert _printed_as(traffic, moved / config.depth / 1e6)
    assert roofline.elementwise_bytes(config, resolution, 1, "all", "fp32") == 2 * moved
    assert roofline.elementwise_bytes(config, resolution, 1, "all", "fp8") == moved * 5 / 6


@EACH
def test_the_floor_is_the_expected_one_for_every_batch(config, resolution) -> None:
    *_, bf16, fp8, bf16_shares, fp8_shares = EXPECTED[config, resolution]
    for precision, rate, shares in (("bf16", bf16, bf16_shares), ("fp8", fp8, fp8_shares)):
        for batch in (1, 3):
            floor = roofline.floor(config, resolution, batch, "all", _assumed(config, resolution, batch, precision))
            assert batch / floor.seconds == pytest.approx(rate, abs=0.6 if isinstance(rate, int) else 0.06)
            assert [100 * part / floor.seconds for part in floor] == pytest.approx(shares, abs=0.6)


@pytest.mark.parametrize(("config", "millions"), [(S, "22.06"), (B, "86.58"), (L, "304.37"), (G, "1136.48")])
def test_parameters_are_those_of_the_checkpoints(config, millions) -> None:
    assert _printed_as(millions, roofline.parameters(config) / 1e6)


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vitb14_reg", "dinov2_vitg14_reg"])
def test_counts_are_those_of_the_model(name) -> None:
    config = BACKBONES[name]
    with torch.device("meta"):
        model, x = DinoVisionTransformer(**config.constructor_arguments()).eval(), torch.empty(2, 3, 518, 518)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.forward_features(x)
    assert roofline.parameters(config) == sum(p.numel() for p in model.parameters())
    attention = roofline.attention_flops(config, 518, 2, "all")
    assert counter.get_total_flops() == roofline.product_flops(config, 518, 2, "all") + attention
    assert counter.get_flop_counts()["Global"][torch.ops.aten.bmm] == attention


@pytest.mark.parametrize("config", [S, G])
def test_products_are_those_that_the_ops_are_timed_on(config) -> None:
    shape = Shape(config, 518, 2, CPU, torch.float32)
    products = {p.place: p for p in roofline.products_of(config, 518, 2, "all")}
    for workload in WORKLOADS:
        if workload.place in products and workload.applies(shape):
            assert workload.flops(shape) == products[workload.place].flops
    assert list(products) == ["patch embedding", "qkv", "proj", "fc1", "fc2"]
    attention = next(workload for workload in WORKLOADS if workload.name == "attention.batch")
    assert attention.flops(shape) * config.depth == roofline.attention_flops(config, 518, 2, "all")


def _layers(config, output: str) -> float:
    """Operations of the layers at 224 px, those of the pooling of the last one included."""
    products = roofline.product_flops(config, 224, 1, output) - 2 * 256 * 588 * config.embed_dim
    pool = next(workload for workload in WORKLOADS if workload.op == "attention_pool")
    pooling = pool.flops(Shape(config, 224, 1, CPU, torch.float32)) if output == "cls" else 0
    return products + roofline.attention_flops(config, 224, 1, output) + pooling


@pytest.mark.parametrize(("config", "percent"), [(S, "8.3"), (B, "8.3"), (L, "4.1"), (G, "2.5")])
def test_a_class_token_alone_spares_almost_the_last_layer(config, percent) -> None:
    every, cls = _layers(config, "all"), _layers(config, "cls")
    assert _printed_as(percent, 100 * (1 - cls / every)), (every, cls)
    for precision, stream, operand in (("fp32", 4, 4), ("bf16", 2, 2), ("fp8", 2, 1)):
        layer = 257 * config.embed_dim * (4 * stream + 2 * operand)
        read = 257 * config.embed_dim * stream
        moved = roofline.elementwise_bytes(config, 224, 1, "cls", precision)
        assert moved == (config.depth - 1) * layer + read
    times = [roofline.floor(config, 224, 1, output, _assumed(config, 224, 1, "bf16")) for output in ("all", "cls")]
    assert all(less < more for more, less in zip(*times, strict=True))


def test_the_last_layer_of_a_class_token_costs_5_9_megaflop_instead_of_1011() -> None:
    layer = _layers(S, "all") / S.depth
    assert _printed_as("1011", layer / 1e6)
    left = _layers(S, "cls") - (S.depth - 1) * layer
    assert left == 24 * 384**2 + 4 * 257 * 384 * 6  # q, keys, values, proj: 2 each, fc1, fc2: 8 each; pooling


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "SECONDS", {"cpu": 0})
    monkeypatch.setattr(ops_bench, "SECONDS", {"cpu": 0})
    monkeypatch.setattr(timing, "FLUSH", {"cpu": 0})
    monkeypatch.setattr(ops_bench, "COPY", {"cpu": 1 << 16})
    monkeypatch.setattr(ops_bench, "PRODUCT", {"cpu": 32})


def _timed(monkeypatch: pytest.MonkeyPatch, times: list[float]) -> None:
    """Every run takes these seconds."""
    monkeypatch.setattr(roofline, "in_turn", lambda runs, *rest, **options: dict.fromkeys(runs, times))


def test_rows_are_work_over_time_and_come_back_from_a_file(monkeypatch, tmp_path) -> None:
    _timed(monkeypatch, [0.01, 0.02, 0.04])
    speeds = iter(ops_bench.Speeds(copy=copy, product=2e12) for copy in (1e9, 5e9, 2e9, 4e9, 3e9))
    monkeypatch.setattr(roofline.Speeds, "measured", lambda device, dtype: next(speeds))
    rows = roofline.measure_device(CPU, torch.float32)
    assert [(row["output"], row["precision"], row["value"], row["unit"]) for row in rows] == [
        ("copy", None, 3.0, "GB/s"),
        ("large product", "fp32", 2.0, "TFLOP/s"),
    ]
    assert rows[0]["p20"] < rows[0]["value"] < rows[0]["p80"]
    rows += roofline.measure(S, 28, 2, "fp32", CPU)
    places = ["patch embedding", "qkv", "proj", "fc1", "fc2", "cls qkv and proj", "cls fc1", "cls fc2"]
    rows = [row for row in rows if row["implementation"] != "onednn"]
    assert [row["output"] for row in rows[2:]] == [*places, "attention", "attention"]
    assert [row["implementation"] for row in rows[-2:]] == ["flash_attention", "math"]
    values = {row["output"]: row["value"] * 1e12 for row in rows[2:]}
    assert values["fc1"] == pytest.approx(2 * 10 * 384 * 1536 / 0.02)
    assert values["patch embedding"] == pytest.approx(2 * 8 * 588 * 384 / 0.02)  # of 588 values, though 592 are timed
    assert values["attention"] == pytest.approx(4 * 2 * 25 * 384 / 0.02)
    assert all(row["outputs_max_error"] < 1e-6 for row in rows[-2:])

    path = tmp_path / "roofline.jsonl"
    records.write(path, [row | records.environment(CPU) for row in rows])
    ceilings = roofline.ceilings_of(records.read(path), "fp32")
    floor = roofline.floor(S, 28, 2, "all", ceilings)
    assert floor == pytest.approx((0.02 * (1 + 4 * 12), 0.02 * 12, 2 * 5 * 384 * 24 * 12 / 3e9))
    assert floor.seconds == pytest.approx(sum(floor))
    cls = roofline.floor(S, 28, 2, "cls", ceilings)
    assert cls == pytest.approx((0.02 * (1 + 4 * 11 + 6), 0.02 * 11, 2 * 5 * 384 * (24 * 11 + 4) / 3e9))
    with pytest.raises(ValueError, match=r"No rate was measured in fp32 .* dinov2_vits14, 28 px, batch 3"):
        roofline.floor(S, 28, 3, "all", ceilings)


def test_the_best_rate_of_the_right_precision_counts() -> None:
    def row(output: str, precision: str | None, value: float, **changes) -> dict:
        unit = "GB/s" if output == "copy" else "TFLOP/s"
        place = {"model": S.name, "resolution": 28, "batch": 2}
        return roofline._row(output, precision, unit, [value * roofline.UNITS[unit]] * 2, **(place | changes))

    rows = [
        row("copy", None, 3.0, model=None),
        row("copy", None, 4.0, model=None),
        row("copy", None, 9.0, task="throughput"),
        row("large product", "bf16", 90.0, model=None),
        *(row("attention", "bf16", value) for value in (5.0, 7.0, 6.0)),
        row("attention", "fp32", 1.0),
        row("patch embedding", "bf16", 2.0),
        row("qkv", "bf16", 8.0),
        row("qkv", "bf16", 10.0),
        row("qkv", "fp8", 20.0),
        row("qkv", "fp8", 19.0),
    ]
    attention, patches, qkv = (2, 6, 5, 64), (8, 588, 384), (10, 384, 1152)
    bf16, fp8 = (roofline.ceilings_of(rows, precision) for precision in ("bf16", "fp8"))
    assert bf16 == ("bf16", 4e9, {patches: 2e12, qkv: 10e12}, {attention: 7e12})
    assert fp8 == ("fp8", 4e9, {patches: 2e12, qkv: 20e12}, {attention: 7e12})
    with pytest.raises(ValueError, match="No copy was measured"):
        roofline.ceilings_of(rows[3:], "bf16")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_a_product_runs_in_its_precision(precision) -> None:
    product = roofline.Product("fc1", 6, 588 if precision != "fp8" else 592, 48, 1)
    runs = roofline.product_runs(product, precision, CPU)
    with FlopCounterMode(display=False) as counter:
        (result,) = runs["torch"]()
    assert result.shape == (6, 48)
    assert result.dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)
    scaled = counter.get_flop_counts()["Global"]
    assert (torch.ops.aten._scaled_mm in scaled) == (precision == "fp8")
    assert counter.get_total_flops() == 2 * 6 * 592 * 48
    assert ("onednn" in runs) == (precision != "fp8" and torch.backends.mkldnn.is_available())
    for run in runs.values():  # each library computes the same
        torch.testing.assert_close(run()[0], result, rtol=2**-7, atol=2**-4)


def test_fp8_measures_only_what_bf16_does_not(monkeypatch) -> None:
    _timed(monkeypatch, [0.01, 0.01])
    each = {p: {row["output"] for row in roofline.measure(S, 28, 16, p, CPU)} for p in ("bf16", "fp8")}
    assert each["bf16"] - each["fp8"] == {"patch embedding", "attention"}
    assert each["fp8"] < each["bf16"]


def _attention_with(monkeypatch: pytest.MonkeyPatch, change) -> None:
    """Attention whose first backend does as `change` says, once torch has done its part."""
    usual, calls = torch.nn.functional.scaled_dot_product_attention, []

    def attention(q, k, v):
        calls.append(q)
        return change(usual(q, k, v)) if len(calls) == 1 else usual(q, k, v)

    monkeypatch.setattr(roofline.F, "scaled_dot_product_attention", attention)


def _failing(error: Exception):
    def fail(result):
        raise error

    return fail


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda result: result * 1.001, "an element is"),
        (lambda result: result * float("nan"), "an element is"),
        (_failing(RuntimeError("No available kernel.\nMore.")), "No available kernel."),
    ],
    ids=["wrong", "nan", "refuses"],
)
def test_attention_that_is_wrong_or_refuses_is_left_out_and_named(change, said, monkeypatch, capsys) -> None:
    _attention_with(monkeypatch, change)
    runs, errors = roofline.attention_runs(Shape(S, 28, 2, CPU, torch.float32))
    assert list(runs) == list(errors) == ["math"]
    assert f"flash_attention left out: {said}" in capsys.readouterr().out


def test_attention_out_of_memory_is_an_error(monkeypatch) -> None:
    _attention_with(monkeypatch, _failing(torch.OutOfMemoryError("too much")))
    with pytest.raises(torch.OutOfMemoryError):
        roofline.attention_runs(Shape(S, 28, 2, CPU, torch.float32))


def test_each_backend_of_attention_runs_alone(monkeypatch) -> None:
    chosen = []
    usual = roofline.sdpa_kernel
    monkeypatch.setattr(roofline, "sdpa_kernel", lambda backend: chosen.append(backend) or usual(backend))
    runs, _ = roofline.attention_runs(Shape(S, 28, 2, CPU, torch.float32))
    chosen.clear()
    for run in runs.values():
        run()
    assert chosen == [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


@pytest.mark.usefixtures("_short")
def test_runs_are_warm_before_they_are_timed(monkeypatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(roofline, "in_turn", lambda runs, *rest, **options: calls.append("timed") or {})
    roofline._warm_times({"a": lambda: calls.append("a")}, CPU)
    assert calls == ["a"] * roofline.WARM_UP + ["timed"]
    assert roofline._warm_times({}, CPU) == {}


@pytest.mark.usefixtures("_short")
def test_the_command_measures_keeps_and_resumes(tmp_path, capsys) -> None:
    command = ["--device", "cpu", "--models", "S", "--sizes", "28", "--batches", "2", "--results", str(tmp_path)]
    assert roofline.main(command) == 0
    said = capsys.readouterr().out
    assert "dinov2_vits14, 22.06 M parameters, 28 px, batch 2" in said
    assert said.count("floor fp32, ") == 2
    assert not list(tmp_path.iterdir())
    assert roofline.main([*command, "--write"]) == 0
    path = tmp_path / "cpu" / "roofline.jsonl"
    rows = records.read(path)
    assert len(rows) == 2 + 8 * (1 + torch.backends.mkldnn.is_available()) + 2
    assert {row["task"] for row in rows} == {"roofline"}
    assert roofline.floor(S, 28, 2, "all", roofline.ceilings_of(rows, "fp32")).seconds > 0
    capsys.readouterr()
    assert roofline.main([*command, "--write", "--resume"]) == 0
    assert records.read(path) == rows
    assert capsys.readouterr().out.count("floor fp32, ") == 2
    assert roofline.main([*command, "--write", "--resume", "--commit", "another"]) == 0
    assert len(records.read(path)) == 2 * len(rows)


def test_floors_are_measured_for_the_batches_of_all_tasks() -> None:
    assert roofline._batches("cuda", 224) == [256, 1, 4, 16, 64]
    assert roofline._batches("cuda", 1036) == [16, 1]
    assert roofline._batches("cpu", 224) == [8, 1, 3]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--models", "S,H"], "H: there are S, B, L, g"),
        (["--sizes", "224,225"], "225: a size is a multiple of 14"),
        (["--sizes", "0"], "0: positive numbers"),
        (["--batches", "4,-1"], "4,-1: positive numbers"),
        (["--device", "cpu", "--precisions", "fp8"], "fp8: only fp32 on a CPU"),
        (["--device", "cuda", "--precisions", "fp8"], "fp8 needs bf16"),
        (["--precisions", "int8"], "int8: there are fp32, bf16, fp8"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(arguments, said, capsys) -> None:
    with pytest.raises(SystemExit):
        roofline._parse(arguments)
    assert said in capsys.readouterr().err


def _product_fails(monkeypatch: pytest.MonkeyPatch, rows: int, error: Exception) -> None:
    """Products of e4m3 fail if they have so many rows."""
    usual = torch._scaled_mm

    def scaled_mm(x, *rest, **options):
        if len(x) == rows:
            raise error
        return usual(x, *rest, **options)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)


def test_a_product_that_fails_is_a_row_with_the_reason_and_sets_no_floor(monkeypatch, capsys) -> None:
    _timed(monkeypatch, [0.01, 0.01])
    _product_fails(monkeypatch, 16, RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nmore"))  # those of the class tokens
    rows = [row for precision in ("bf16", "fp8") for row in roofline.measure(S, 28, 16, precision, CPU)]
    failed = [row for row in rows if row["value"] is None]
    assert [(row["output"], row["precision"]) for row in failed] == [
        (place, "fp8") for place in ("cls qkv and proj", "cls fc1", "cls fc2")
    ]
    assert {records.reason(row) for row in failed} == {"failed: CUBLAS_STATUS_NOT_SUPPORTED"}
    roofline._print_rows(rows)
    assert "cls fc1 fp8              – failed: CUBLAS_STATUS_NOT_SUPPORTED" in capsys.readouterr().out
    full = [dict.fromkeys(records.KEYS) | row for row in rows]
    ceilings = roofline.ceilings_of([*full, roofline._row("copy", None, "GB/s", [5e9] * 2)], "fp8")
    assert roofline.floor(S, 28, 16, "all", ceilings).seconds > 0
    with pytest.raises(ValueError, match="No rate was measured in fp8"):
        roofline.floor(S, 28, 16, "cls", ceilings)


def test_a_product_out_of_memory_is_an_error(monkeypatch) -> None:
    _timed(monkeypatch, [0.01, 0.01])
    _product_fails(monkeypatch, 16, torch.OutOfMemoryError("too much"))
    with pytest.raises(torch.OutOfMemoryError):
        roofline.measure(S, 28, 16, "fp8", CPU)


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize(("function", "output"), [("_product_rows", "patch embedding"), ("attention", "attention")])
def test_what_the_device_was_lost_in_is_left_out_next_time(function, output, monkeypatch, tmp_path, capsys) -> None:
    broken: list[bool] = []

    def breaking(*args):
        broken.append(True)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    if function == "attention":
        _attention_with(monkeypatch, breaking)
    else:
        usual = roofline.product_runs
        monkeypatch.setattr(
            roofline, "product_runs", lambda p, *rest: breaking() if p.place == output else usual(p, *rest)
        )
    monkeypatch.setattr(records, "is_lost", lambda device: bool(broken))
    command = ["--device", "cpu", "--models", "S", "--sizes", "28", "--batches", "2", "--results", str(tmp_path)]
    command += ["--commit", "c0ffee", "--write", "--resume"]
    assert roofline.main(command) == 1
    path = tmp_path / "cpu" / "roofline.jsonl"
    (lost,) = (row for row in records.read(path) if row["value"] is None)
    assert (lost["output"], records.reason(lost).startswith(records.LOST)) == (output, True)
    broken.clear()
    assert roofline.main(command) == 0
    rows = [row for row in records.read(path) if row["model"]]
    assert [row["output"] for row in rows if row["value"] is None] == [output]
    assert {"qkv", "cls fc2", "attention"} <= {row["output"] for row in rows if row["value"]}
    assert "--resume leaves out what this happened in" in capsys.readouterr().err
