"""The benchmark of the ops: what is wrong is refused before timing, all take turns on a cold cache."""

from __future__ import annotations

import dataclasses
import functools
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import ops as ops_bench
from bench import records, timing
from bench.harness import worst_error
from bench.workloads import E4M3, WORKLOADS, Workload
from dinov2_fast.configs import BACKBONES
from dinov2_fast.ops import dispatch

TINY = ops_bench.Shape(
    dataclasses.replace(BACKBONES["dinov2_vits14"], embed_dim=64, num_heads=2),
    28,
    2,
    torch.device("cpu"),
    torch.float32,
)
SPEEDS = ops_bench.Speeds(copy=1e9, product=1e9, e4m3=4e9)


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops_bench, "SECONDS", {"cpu": 0})
    monkeypatch.setattr(timing, "FLUSH", {"cpu": 0})


def _workload(name: str) -> Workload:
    return next(workload for workload in WORKLOADS if workload.name == name)


def _against(monkeypatch: pytest.MonkeyPatch, **functions) -> None:
    """Puts implementations beside torch's."""
    monkeypatch.setattr(
        ops_bench,
        "candidates",
        lambda workload, *rest: [("torch", ops_bench.torch_function_of(workload)), *functions.items()],
    )


def test_every_form_has_a_row_and_every_row_a_form() -> None:
    forms = {
        op.name_of(form) + after
        for op in dispatch.ops().values()
        for form, sample in op.samples.items()
        for after, dtype in (("", torch.float32), (" e4m3", E4M3))
        if sample(TINY.device, dtype) is not None
    }
    assert {workload.name for workload in WORKLOADS} == forms
    labels = [workload.label for workload in WORKLOADS]
    assert len(set(labels)) == len(labels)


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.label)
def test_each_op_gives_rows(workload: Workload, tmp_path) -> None:
    config = BACKBONES["dinov2_vitg14"] if workload.of_swiglu else TINY.config
    shape = dataclasses.replace(TINY, config=dataclasses.replace(config, embed_dim=64, num_heads=2))
    assert workload.applies(shape)
    modes = ["forward"] if workload.saved is None else ["forward", "backward"]
    for mode in modes:
        rows = {row["implementation"]: row for row in ops_bench.measure(workload, shape, mode == "backward", SPEEDS)}
        assert set(rows) <= {"torch", "onednn"}
        row = rows["torch"]
        assert (row["output"], row["mode"]) == (workload.label, mode)
        assert row["p20"] <= row["value"] <= row["p80"]
        assert row["outputs_max_error"] < 1e-5
        records.write(tmp_path / "ops.jsonl", [dict.fromkeys(records.KEYS) | row | records.environment(TINY.device)])
    assert len(records.read(tmp_path / "ops.jsonl")) == len(modes)


@pytest.mark.usefixtures("_short")
def test_an_op_that_computes_something_else_is_refused_before_timing(monkeypatch, capsys) -> None:
    def failing(*args):
        raise RuntimeError("no such kernel")

    gelu = torch.nn.functional.gelu
    _against(
        monkeypatch,
        tanh=lambda x, *_: gelu(x, approximate="tanh"),
        nan=lambda x, *_: gelu(x) * float("nan"),
        half=lambda x, *_: gelu(x).half(),
        shape=lambda x, *_: gelu(x)[0],
        failing=failing,
        same=lambda x, *_: gelu(x),
    )
    rows = {row["implementation"]: row for row in ops_bench.measure(_workload("activation.gelu"), TINY, False, SPEEDS)}
    assert [name for name, row in rows.items() if row.get("value")] == ["torch", "same"]
    said = capsys.readouterr().out
    for name in ("tanh", "nan", "half", "shape"):
        assert re.match(r"refused: (an element is|the results have other)", records.reason(rows[name]))
        assert re.search(rf"{name} +refused: ", said)
    assert records.reason(rows["failing"]) == "failed: no such kernel"


@pytest.mark.usefixtures("_short")
def test_a_wrong_gradient_is_refused(monkeypatch) -> None:
    gelu = torch.nn.functional.gelu
    _against(
        monkeypatch,
        wrong=lambda x, *_: gelu(x.detach()) + (x - x.detach()),
        compiled=torch.compile(lambda x, *_: gelu(x), backend="aot_eager"),
    )
    rows = {row["implementation"]: row for row in ops_bench.measure(_workload("activation.gelu"), TINY, True, SPEEDS)}
    assert [name for name, row in rows.items() if row["value"]] == ["torch", "compiled"]
    assert records.reason(rows["wrong"]).startswith("refused: ")


def test_few_wrong_elements_and_many_slightly_wrong_ones_are_seen() -> None:
    usual = [1 + torch.rand(1000)]
    reference = [usual[0].double()]
    one, all_ = usual[0].clone(), torch.nextafter(usual[0], torch.tensor(2.0))
    one[3] += 1e-6
    assert worst_error(usual, reference, usual) == 0
    with pytest.raises(ValueError, match="an element is"):
        worst_error([one], reference, usual)
    with pytest.raises(ValueError, match="the error is"):
        worst_error([all_], reference, usual)


def test_the_floor_comes_from_bytes_or_from_products() -> None:
    def work(name: str, backward: bool) -> tuple[int, float]:
        workload = _workload(name)
        arguments = ops_bench.recorded(workload.arguments(TINY), backward)
        return ops_bench.work(workload, TINY, arguments, backward)

    stream, vector = 4 * 2 * 5 * 64, 4 * 64  # bytes: fp32, 2 pictures of 5 tokens, hidden 64
    assert work("layer_norm.plain", False) == (2 * stream + 2 * vector, 0.0)
    assert work("layer_norm.plain", True) == (3 * stream + 3 * vector, 0.0)
    assert work("layer_norm.add", False) == (4 * stream + 3 * vector, 0.0)
    assert work("residual.gather", False) == (2 * 4 * (5 + 50) * 64, 0.0)
    assert work("residual.add", True) == (3 * stream + 2 * vector, 0.0)
    assert work("attention.batch", False) == (4 * stream, 4 * 2 * 5 * 5 * 64)
    assert work("attention.batch", True)[1] == 2.5 * 4 * 2 * 5 * 5 * 64
    x = (torch.zeros(1),)
    assert SPEEDS.floor(2000, 1000, x) == ops_bench.Floor(2e-6, True)
    assert SPEEDS.floor(1000, 2000, x) == ops_bench.Floor(2e-6, False)
    assert SPEEDS.floor(100, 2000, (None, x[0].to(torch.float8_e4m3fn))) == ops_bench.Floor(5e-7, False)
    assert work("linear.residual", False) == (4 * (3 * 640 + 64 * 64 + 64), 2 * 10 * 64 * 64)


@pytest.mark.usefixtures("_short")
def test_ops_take_turns_on_a_cold_cache() -> None:
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.zero_.default:
                calls.append("flush")
            return function(*args, **kwargs or {})

    calls: list[str] = []
    runs = {name: (lambda name=name: [calls.append(name)]) for name in "abc"}
    with Watch():
        times = timing.in_turn(runs, torch.device("cpu"), 0, flush=True)
    assert calls[::2] == ["flush"] * 15
    assert calls[1::2] == list("abcbcacababcbca")
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys("abc", 5)


@pytest.mark.usefixtures("_short")
def test_the_torch_implementation_and_its_compiled_form_run_on_a_cpu_only_if_asked() -> None:
    workload, arguments = _workload("activation.gelu"), (torch.randn(3, 8), "gelu", False, None)
    function = ops_bench.torch_function_of(workload)
    assert list(ops_bench.candidates(workload, arguments, compiled=False)) == [("torch", function)]
    both = ops_bench.candidates(workload, arguments, compiled=True)
    assert [name for name, _ in both] == ["torch", "torch.compile"]


def test_a_compiled_backward_can_be_run_again_and_again(monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    workload, arguments = _workload("activation.swiglu"), (torch.randn(3, 8, requires_grad=True), "swiglu", False, None)
    compiled = dict(ops_bench.candidates(workload, arguments, compiled=True))["torch.compile"]
    run = ops_bench.gradients(compiled, arguments)
    (expected,) = ops_bench.gradients(ops_bench.torch_function_of(workload), arguments)()
    for _ in range(3):
        torch.testing.assert_close(run()[0], expected)


@pytest.mark.usefixtures("_short")
def test_the_command_chooses_ops_and_says_what_a_cpu_lacks(monkeypatch, capsys) -> None:
    monkeypatch.setattr(ops_bench, "COPY", {"cpu": 1 << 20})
    monkeypatch.setattr(ops_bench, "PRODUCT", {"cpu": 64})
    assert ops_bench.main(["--device", "cpu", "--ops", "layer_norm,residual", "--models", "S", "--sizes", "224"]) == 0
    said = capsys.readouterr().out
    assert "On a CPU no kernel and no torch.compile runs" in said
    assert "residual.gather backward: dinov2_vits14, 224 px, batch 2" in said
    assert "gelu" not in said
    _against(monkeypatch, wrong=lambda x, *rest: x)
    assert ops_bench.main(["--device", "cpu", "--ops", "layer_norm", "--models", "S", "--sizes", "224"]) == 1
    with pytest.raises(SystemExit):
        ops_bench.main(["--ops", "layer_norms"])
    assert "layer_norms: there are activation, attention" in capsys.readouterr().err


@pytest.mark.usefixtures("_short")
def test_what_the_device_was_lost_in_is_kept_and_left_out_next_time(monkeypatch, tmp_path, capsys) -> None:
    broken: list[bool] = []
    ran: list[str] = []

    def breaking(*args):
        broken.append(True)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def last(x, weight, bias, eps, *rest):
        ran.append("last")
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)

    _against(monkeypatch, breaking=breaking, last=last)
    monkeypatch.setattr(records, "is_lost", lambda device: bool(broken))
    monkeypatch.setattr(ops_bench, "WORKLOADS", (_workload("layer_norm.plain"),))
    monkeypatch.setattr(ops_bench, "COPY", {"cpu": 1 << 20})
    monkeypatch.setattr(ops_bench, "PRODUCT", {"cpu": 64})
    command = ["--device", "cpu", "--ops", "layer_norm", "--models", "S", "--sizes", "224", "--write", "--resume"]
    command += ["--results", str(tmp_path), "--commit", "c0ffee"]

    def kept() -> list[tuple[str, str, bool]]:
        rows = records.read(tmp_path / "cpu" / "ops.jsonl")
        return [(row["mode"], row["implementation"], row["value"] is not None) for row in rows]

    assert ops_bench.main(command) == records.AGAIN
    assert kept() == [("forward", "breaking", False)]
    assert not ran
    assert "breaking" in capsys.readouterr().err
    broken.clear()
    assert ops_bench.main(command) == records.AGAIN
    forward = [("forward", "breaking", False), ("forward", "torch", True), ("forward", "last", True)]
    assert kept() == [*forward, ("backward", "breaking", False)]
    broken.clear()
    ran.clear()
    assert ops_bench.main(command) == 0
    assert [row[:2] for row in kept()[4:]] == [("backward", "torch"), ("backward", "last")]
    ran.clear()
    assert ops_bench.main(command) == 0
    assert not ran


def test_on_a_gpu_the_smallest_norm_moves_much_more_than_it_takes_to_start_it() -> None:
    shape = ops_bench.Shape(BACKBONES["dinov2_vits14"], 224, 1, torch.device("cpu"), torch.bfloat16)
    batch = ops_bench.BATCH_TOKENS["cuda"] // shape.tokens
    moved = 2 * batch * shape.tokens * 384 * 2  # read and written
    assert moved / 4.3e12 > 20e-6  # seconds, at the speed of an H200's copy
    assert ops_bench.BATCH_TOKENS["cpu"] == 512
