"""The benchmark of the ops: the bytes and operations of each, what is refused before timing, which backend is best."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import gelu

from bench import harness, ops, records, roofline
from bench.workloads import E4M3, WORKLOADS, Shape, Workload
from dinov2_fast.configs import BACKBONES
from dinov2_fast.ops import dispatch

SHAPE = Shape(harness.TINY, 28, 2)  # 2 images of 5 tokens, hidden size 64, 1 head
RATES = roofline.Rates(copy=1e9, product=1e9, e4m3=4e9)
COMMAND = ["--device", "cpu", "--models", "tiny", "--commit", "c0ffee", "--write", "--resume"]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, size in (
        (harness, "FLUSH_BYTES", 0),
        (roofline, "COPY_BYTES", 1 << 16),
        (roofline, "PRODUCT_SIZE", 32),
    ):
        monkeypatch.setattr(module, name, {"cpu": size})
    monkeypatch.setattr(harness, "UNTIMED_SECONDS", 0.0)
    for module in (ops, roofline):
        monkeypatch.setattr(module, "TIMING_SECONDS", {"cpu": 0})


def _workload(name: str) -> Workload:
    return next(workload for workload in WORKLOADS if workload.name == name)


def _against(monkeypatch: pytest.MonkeyPatch, **functions) -> None:
    """Adds implementations to torch's."""

    def candidates(case: ops.Case):
        every = {"torch": case.torch_function} | functions
        return [(name, function, case.arguments) for name, function in every.items()]

    monkeypatch.setattr(ops.Case, "candidates", candidates)


def _measured(workload: Workload, mode: str) -> dict[str, dict]:
    giant = replace(BACKBONES["dinov2_vitg14"], embed_dim=64, num_heads=1)
    shape = replace(SHAPE, config=giant) if workload.needs_swiglu else SHAPE
    rows = ops.measure_case(ops.Case(workload, shape, mode), RATES)
    return {row["implementation"]: row for row in rows}


def test_every_form_has_a_workload_and_every_workload_a_form() -> None:
    forms = {
        op.name_of(form, dtype == E4M3)
        for op in dispatch.all_ops().values()
        for form, sample in op.sample_inputs.items()
        for dtype in (torch.float32, E4M3)
        if sample(SHAPE.device, dtype) is not None
    }
    assert {workload.name for workload in WORKLOADS} == forms
    assert len({workload.label for workload in WORKLOADS}) == len(WORKLOADS)


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.label)
def test_each_workload_runs_and_obeys_the_rule(workload: Workload) -> None:
    for mode in workload.modes:
        row = _measured(workload, mode)["torch"]
        assert (row["output"], row["mode"], row["unit"]) == (workload.label, mode, "us")
        assert row["p20"] <= row["value"] <= row["p80"]
        assert row["outputs_max_error"] < 1e-5


def test_bytes_operations_and_floor_equal_those_counted_by_hand(monkeypatch) -> None:
    stream, vector = 4 * 2 * 5 * 64, 4 * 64  # bytes in fp32
    expected = {
        ("layer_norm.plain", "forward"): (2 * stream + 2 * vector, 0),
        ("layer_norm.plain", "backward"): (3 * stream + 3 * vector, 0),
        ("layer_norm.plain e4m3", "forward"): (stream + stream / 4 + 2 * vector, 0),
        ("layer_norm.add", "forward"): (4 * stream + 3 * vector, 0),
        ("residual.gather", "forward"): (2 * 4 * (5 + 50) * 64, 0),  # a global crop and a local one
        ("residual.add", "backward"): (3 * stream + 2 * vector, 0),  # one gradient is passed on as it is
        ("attention.batch", "backward"): (7 * stream, 2.5 * 4 * 2 * 5 * 5 * 64),
        ("attention.varlen", "forward"): (4 * 4 * 2 * 55 * 64, 4 * 2 * (5 * 5 + 50 * 50) * 64),
        ("attention.probabilities", "forward"): (stream + 4 * 2 * 5, 0),  # the keys, and one query's weights
        ("linear.residual", "forward"): (3 * stream + 4 * 64 * 64, 2 * 10 * 64 * 64),
        # the class tokens of two global crops of two images; of eight local crops too
        ("sinkhorn", "forward"): (4 * (4 * 256 + 65536 * 256 + 65536 + 4), 2 * 4 * 65536 * 256),
        ("prototype_loss", "forward"): (
            4 * (20 * 256 + 4 * 256 + 2 * 65536 * 256 + 65536 + 4 + 20 + 20),
            2 * (20 + 4 + 4) * 65536 * 256,
        ),
    }
    assert {key: ops.Case(_workload(key[0]), SHAPE, key[1]).work() for key in expected} == expected
    plain, e4m3 = (ops.Case(_workload(name), SHAPE, "forward") for name in ("linear.residual", "linear.residual e4m3"))
    assert [case.floor_seconds(RATES) for case in (plain, e4m3)] == pytest.approx([81920e-9, 81920e-9 / 4])
    assert e4m3.floor_seconds(RATES._replace(e4m3=None)) == pytest.approx(81920e-9)
    assert plain.floor_seconds(RATES._replace(product=1e10)) == pytest.approx(24064e-9)
    cold = lambda runs, *_, flush, **options: {name: [1e-6, 2e-6, 4e-6] for name in runs if flush}  # noqa: E731
    monkeypatch.setattr(harness, "time_in_turn", cold)
    row = _measured(_workload("layer_norm.plain"), "forward")["torch"]
    assert (row["value"], row["floor_share"]) == pytest.approx((2.0, (2 * stream + 2 * vector) / 1e9 / 2e-6))


def test_a_wrong_or_failing_implementation_has_a_reason_and_no_value(monkeypatch) -> None:
    wrong = {
        "tanh": lambda x, *_: gelu(x, approximate="tanh"),
        "nan": lambda x, *_: gelu(x) * float("nan"),
        "half": lambda x, *_: gelu(x).half(),
        "shape": lambda x, *_: gelu(x)[0],
    }
    _against(monkeypatch, **wrong, failing=lambda x, *_: x.no_such_thing, same=lambda x, *_: gelu(x))
    rows = _measured(_workload("activation.gelu"), "forward")
    assert [name for name, row in rows.items() if row.get("value")] == ["torch", "same"]
    assert all(records.reason(rows[name]).startswith("refused: ") for name in wrong)
    assert records.reason(rows["failing"]).startswith("failed: ")
    _against(monkeypatch, wrong=lambda x, *_: gelu(x.detach()) + (x - x.detach()))  # only its gradient is wrong
    assert records.reason(_measured(_workload("activation.gelu"), "backward")["wrong"]).startswith("refused: ")


@pytest.mark.parametrize("name", ["linear.swiglu", "linear.swiglu e4m3"])
def test_an_implementation_gets_the_order_of_features_it_needs(name: str) -> None:
    """Kernels need alternating gates and values, the others all gates first. Both are measured."""
    giant = replace(BACKBONES["dinov2_vitg14"], embed_dim=64, num_heads=1)
    case = ops.Case(_workload(name), replace(SHAPE, config=giant), "forward")
    (torch_s,) = (each for each in case.workload.implementations() if each.backend == "torch")
    kernel = replace(torch_s, refuses=lambda *args: None if args[-1] else "takes gates and values in turn")
    results = []
    for implementation, interleaved in ((torch_s, False), (kernel, True)):
        arguments, reason = case.arguments_for(implementation)
        assert (arguments[-1], reason) == (interleaved, None)
        results += case.make_run(implementation.function, arguments)()
    torch.testing.assert_close(*(y.float() for y in results))


def test_other_ops_run_activation_with_its_fastest_backend() -> None:
    fastest = {
        "forms": {"28": {"activation.identity e4m3": "triton", "activation.swiglu": "torch", "patches": "triton"}}
    }
    settings = []
    for name in ("attention.batch e4m3", "linear.residual"):
        with ops.with_activation(ops.Case(_workload(name), SHAPE, "forward"), fastest):
            settings.append(dispatch.current_setting().by_name)
    assert settings == [{"activation.identity": "triton"}, {"activation.swiglu": "torch"}]
    outside = dispatch.current_setting()
    with ops.with_activation(ops.Case(_workload("patches"), replace(SHAPE, resolution=56), "forward"), fastest):
        assert dispatch.current_setting() is outside


TIMES = [
    ({"torch": [2, 8], "cuda": [8, 2]}, {"linear.residual": "torch"}),  # a tie: the package's order
    ({"torch": [9, 50], "cuda": [1, 100]}, {"linear.residual": "cuda"}),  # each wins one place, torch the sum
    ({"torch": [3, 3], "cuda": [1, None]}, {"linear.residual": "torch"}),  # refused in one place
    ({"torch": [3, 1], "cuda": [2]}, {"linear.residual": "cuda"}),  # missing in one place, which does not count then
    ({"torch": [None, 1]}, None),
]


@pytest.mark.parametrize(("times", "form"), TIMES)
def test_the_best_backend_of_a_form(times, form) -> None:
    row = {"commit": "new", "mode": "forward", "resolution": 224, "model": "S", "batch": 2, "precision": "bf16"}
    rows = [
        row | {"implementation": name, "output": f"linear.residual ({place})", "value": value}
        for name, values in times.items()
        for place, value in zip(("proj", "fc2"), values, strict=False)
    ]
    other = rows[0] | {"value": 0.1, "implementation": "triton"}
    rows += [other | {"commit": "old"}, other | {"mode": "backward"}]
    assert ops.fastest_backends(rows, "new") == {"commit": "new", "forms": {"224": form} if form else {}}


def test_the_command_measures_resumes_and_writes_best_json(monkeypatch, tmp_path) -> None:
    folder, measure, ran = tmp_path / "cpu", ops.measure_case, []
    monkeypatch.setattr(ops, "measure_case", lambda case, *rest: ran.append(case) or measure(case, *rest))
    command = [*COMMAND, "--results", str(tmp_path), "--sizes", "28", "--ops"]
    assert ops.main([*command, "layer_norm", "--modes", "forward"]) == 0
    before = records.read(folder / "ops.jsonl")
    assert ops.main([*command, "layer_norm,patches"]) == 0
    assert [case.mode for case in ran[:3]] == ["forward"] * 3
    resumed = [(case.workload.name, case.mode) for case in ran[3:]]
    assert resumed == [("layer_norm.plain", "backward"), ("layer_norm.add", "backward"), ("patches", "forward")]
    assert records.read(folder / "ops.jsonl")[: len(before)] == before
    forms = dict.fromkeys(("layer_norm.plain", "layer_norm.plain e4m3", "layer_norm.add", "patches"), "torch")
    assert json.loads((folder / "best.json").read_text()) == {"commit": "c0ffee", "forms": {"28": forms}}


def test_best_json_keeps_what_an_earlier_command_measured_of_the_commit(tmp_path) -> None:
    command = [*(option for option in COMMAND if option != "--resume"), "--results", str(tmp_path), "--sizes", "28"]
    for op in ("patches", "attention_pool"):
        assert ops.main([*command, "--ops", op]) == 0
    forms = json.loads((tmp_path / "cpu" / "best.json").read_text())["forms"]
    assert forms == {"28": {"patches": "torch", "attention_pool": "torch"}}


def test_the_implementation_that_lost_the_device_is_recorded_and_skipped(monkeypatch, tmp_path) -> None:
    broken: list[bool] = []
    _against(monkeypatch, breaking=lambda x, *_: broken.append(True) or x.no_such_thing)
    monkeypatch.setattr(records, "is_lost", lambda device: bool(broken))
    command = [*COMMAND, "--sizes", "28", "--ops", "patches", "--results", str(tmp_path)]
    for status, kept in ((records.EXIT_RETRY, {"breaking": False}), (0, {"breaking": False, "torch": True})):
        broken.clear()
        assert ops.main(command) == status
        rows = records.read(tmp_path / "cpu" / "ops.jsonl")
        assert {row["implementation"]: row["value"] is not None for row in rows} == kept
