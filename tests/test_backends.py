"""Dispatch: precedence, refusals, fallbacks, and what is reported."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from dinov2_fast import backends, ops
from dinov2_fast.backends import BackendError, Implementation, Op, use_backend
from tests import devices


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Op:
    """An op with a kernel for small meta tensors, one for small tensors anywhere, and the torch reference.

    "meta" stands for the device a kernel is made for: tensors of it exist on every machine.
    """
    monkeypatch.setattr(backends, "_OPS", dict(backends._OPS))

    def refuses_large(x: torch.Tensor) -> str | None:
        return f"takes at most 4 elements, got {x.numel()}" if x.numel() > 4 else None

    return Op(
        "toy",
        "toy",
        (
            Implementation("kernel", lambda x: "kernel", refuses_large, devices=("meta",)),
            Implementation("small", lambda x: "small", refuses_large),
            Implementation("torch", lambda x: "torch"),
        ),
        lambda device, dtype: (torch.empty(2, device=device, dtype=dtype),),
    )


def test_auto_takes_the_first_that_does_not_refuse(toy: Op) -> None:
    assert toy(torch.zeros(2)) == "small"
    assert toy(torch.zeros(5)) == "torch"
    assert toy(torch.zeros(2, device="meta")) == "kernel"


def test_a_fallback_is_logged_once_and_another_device_is_none(toy: Op, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dinov2_fast"):
        toy(torch.zeros(2))
        assert not caplog.records
        toy(torch.zeros(5))
        toy(torch.zeros(5))
    (record,) = caplog.records
    assert record.getMessage() == "toy: falling back to torch: small takes at most 4 elements, got 5"


def test_precedence_is_argument_then_context_then_environment(toy: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOV2_FAST_BACKEND", "toy=torch")
    for name in ("_setting", "_active"):
        monkeypatch.setattr(backends, name, getattr(backends, name))
    backends.apply_environment()
    assert toy(torch.zeros(2)) == "torch"
    with use_backend("small"):
        assert toy(torch.zeros(2)) == "small"
        assert toy(torch.zeros(2), backend="torch") == "torch"
        with use_backend("toy=torch"):
            assert toy(torch.zeros(2)) == "torch"
        assert toy(torch.zeros(2)) == "small"
    assert toy(torch.zeros(2)) == "torch"


def test_a_forced_backend_that_refuses_says_why(toy: Op) -> None:
    with use_backend("small"), pytest.raises(BackendError, match=r"'small' was asked for but .* at most 4 elements"):
        toy(torch.zeros(5))
    with pytest.raises(BackendError, match="needs a meta tensor, got one on cpu"):
        toy(torch.zeros(2), backend="kernel")


def test_a_forced_name_leaves_ops_without_it_alone(toy: Op) -> None:
    x = torch.randn(2, 8)
    with use_backend("small"):
        assert torch.equal(ops.gelu(x), torch.nn.functional.gelu(x))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("tritn", "'tritn' is no backend of any op"),
        ("toy=cudnn", "'cudnn' is no backend of toy. There are: kernel, small, torch"),
        ("atention=torch", "there is no op 'atention'. The ops are activation, attention,"),
        ("", "'' is no backend"),
        ("toy=", "'' is no backend of toy"),
    ],
)
def test_unknown_settings_are_refused_and_change_nothing(toy: Op, setting: str, message: str) -> None:
    before = backends._setting
    with pytest.raises(BackendError, match=message), use_backend(setting):
        pass
    assert backends._setting is before


def test_an_implementation_for_inference_steps_back_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_OPS", dict(backends._OPS))
    fast = Implementation("fast", lambda x: "fast", trains=False)
    op = Op("toy", "toy", (fast, Implementation("torch", lambda x: "torch")), lambda device, dtype: (torch.empty(1),))
    weight = torch.zeros(1, requires_grad=True)
    assert op(weight.detach()) == "fast"
    assert op(weight) == "torch"
    with use_backend("fast"):
        assert op(weight) == "torch"  # the name holds for inference alone
        with torch.no_grad():
            assert op(weight) == "fast"
    with pytest.raises(BackendError, match="is for inference only, and gradients are recorded"):
        op(weight, backend="fast")
    with use_backend("fast"):
        rows = {row.backend: row for row in backends.table(training=True) if row.op == "toy"}
    assert rows["torch"].chosen
    assert rows["fast"].reason == "is for inference only, and gradients are recorded"


def test_an_op_for_inference_alone_refuses_training_and_is_not_the_model_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_OPS", dict(backends._OPS))
    fast = Implementation("fast", lambda x: "fast", trains=False)
    op = Op("toy", "toy", (fast,), lambda device, dtype: (torch.empty(1),))
    for setting in ("fast", "torch"):
        with use_backend(setting), pytest.raises(BackendError, match="inference only"):
            op(torch.zeros(1, requires_grad=True))
    assert "toy" in {row.op for row in backends.table()}
    assert "toy" not in {row.op for row in backends.table(only_trainable=True)}


def test_a_kernel_can_be_forced_elsewhere_but_is_not_chosen_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_OPS", dict(backends._OPS))
    kernel = Implementation("kernel", lambda x: "kernel", devices=("cuda",), elsewhere=lambda d: d.type == "cpu")
    op = Op("toy", "toy", (kernel, Implementation("torch", lambda x: "torch")), lambda device, dtype: (torch.empty(1),))
    assert op(torch.zeros(1)) == "torch"
    assert op(torch.zeros(1), backend="kernel") == "kernel"
    with use_backend("kernel"):
        assert op(torch.zeros(1)) == "kernel"
        with pytest.raises(BackendError, match="needs a cuda tensor, got one on meta"):
            op(torch.zeros(1, device="meta"))


def test_tensors_in_lists_count() -> None:
    inner = torch.zeros(1, device="meta", requires_grad=True)
    assert backends.device_of(([inner], 1)).type == "meta"
    assert backends.records_gradient(([inner.detach(), inner],))
    assert not backends.records_gradient(([inner.detach()], None, 2.0))


@devices.fakes_cuda
def test_kernels_refuse_devices_that_are_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov2_fast.ops._registry._capability", lambda index: (7, 5))
    rows = [row for row in backends.table("cuda") if row.backend == "triton"]
    assert rows
    assert {row.reason for row in rows} == {"needs a device of sm_80 or newer, got sm_75"}


@devices.runs_triton
def test_kernels_do_not_export_and_a_forced_one_says_so() -> None:
    class Norm(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ops.layer_norm(x, x[0], x[0], 1e-6)

    x = torch.randn(2, 8, device=devices.DEVICE)
    assert "dinov2_fast" not in str(torch.export.export(Norm(), (x,)).graph)
    for strict in (False, True):
        with use_backend("triton"), pytest.raises(Exception, match="does not export"):
            torch.export.export(Norm(), (x,), strict=strict)


def test_a_setting_ends_with_its_block_also_on_error(toy: Op) -> None:
    with pytest.raises(KeyError), use_backend("small"):
        raise KeyError
    assert toy(torch.zeros(5)) == "torch"


def test_blocks_of_two_threads_leave_nothing_forced(toy: Op) -> None:
    begun, ended, before = threading.Event(), threading.Event(), backends._setting

    def first() -> None:
        with use_backend("small"):
            begun.set()
            assert ended.wait(60)

    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(60)
    with use_backend("toy=torch"):
        ended.set()
        thread.join()
        assert toy(torch.zeros(2)) == "torch"  # the other block's end does not touch this one
    assert toy(torch.zeros(2)) == "small"
    assert backends._setting is before


def test_blocks_of_two_tasks_with_one_setting_leave_nothing_forced(toy: Op) -> None:
    async def forced(begun: asyncio.Event, end: asyncio.Event) -> None:
        with use_backend("toy=torch"):
            begun.set()
            await end.wait()

    async def overlapping() -> None:
        (a_begun, a_end), (b_begun, b_end) = [(asyncio.Event(), asyncio.Event()) for _ in range(2)]
        a = asyncio.create_task(forced(a_begun, a_end))
        await a_begun.wait()
        with use_backend("small"):
            b = asyncio.create_task(forced(b_begun, b_end))
            await b_begun.wait()
            b_end.set()
            await b
            assert toy(torch.zeros(2)) == "small"
        assert toy(torch.zeros(2)) == "torch"  # b has removed its own setting, not its equal, which is a's
        a_end.set()
        await a

    before = backends._setting
    asyncio.run(overlapping())
    assert toy(torch.zeros(2)) == "small"
    assert backends._setting is before


def test_blocks_that_begin_and_end_at_once_lose_none(toy: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    def many() -> None:
        for _ in range(10):
            with use_backend("toy=torch"):
                assert toy(torch.zeros(2)) == "torch"

    def slow(settings: tuple[backends.Setting, ...], activate: Any = backends._activate) -> None:
        time.sleep(1e-3)  # what another thread writes meanwhile would be lost
        activate(settings)

    before = backends._setting
    monkeypatch.setattr(backends, "_activate", slow)
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(many) for _ in range(4)]:
            done.result()
    assert backends._setting is before


def test_no_implementation_left_names_all_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_OPS", dict(backends._OPS))
    only = Implementation("kernel", lambda x: x, devices=("meta",))
    op = Op("lonely", "lonely", (only,), lambda device, dtype: (torch.empty(1, device=device),))
    with pytest.raises(BackendError, match="lonely: no implementation runs this input: kernel needs a meta tensor"):
        op(torch.zeros(1))
    rows = [row for row in backends.table("cpu") if row.op == "lonely"]
    assert rows == [backends.Row("lonely", "kernel", False, "needs a meta tensor, got one on cpu")]


def test_the_table_tells_what_runs_and_why_not_the_rest(toy: Op) -> None:
    rows = {row.backend: row for row in backends.table("cpu") if row.op == "toy"}
    assert rows["small"].chosen
    assert rows["kernel"].reason == "needs a meta tensor, got one on cpu"
    assert rows["torch"].reason == "small comes first"
    with use_backend("toy=torch"):
        rows = {row.backend: row for row in backends.table("meta") if row.op == "toy"}
    assert [name for name, row in rows.items() if row.chosen] == ["torch"]
    assert rows["kernel"].reason == "another backend was asked for"


def test_every_op_is_in_the_table_on_every_device() -> None:
    for device in ("cpu", "meta", *(["cuda"] if torch.backends.cuda.is_built() else [])):
        chosen = {row.op: row.backend for row in backends.table(device) if row.chosen}
        assert set(chosen) == set(ops.__all__) - {"use_backend"}
        assert {name for op, name in chosen.items() if not op.startswith("linear")} == {"torch"}
        assert set(chosen.values()) <= {"torch", "onednn"}
        assert device == "cpu" or "onednn" not in chosen.values()


@pytest.mark.parametrize(("value", "good"), [("torch", True), ("attention=torch,layer_norm=torch", True), ("x", False)])
def test_the_environment_variable_is_read_and_checked(value: str, good: bool) -> None:
    code = "import dinov2_fast.ops, dinov2_fast.backends as b; print(b._setting)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"DINOV2_FAST_BACKEND": value, "PATH": "", "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode == 0) == good, run.stderr
    assert ("torch" in run.stdout) if good else ("'x' is no backend of any op" in run.stderr)


def test_compiled_code_follows_the_setting(toy: Op) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x + (1 if toy(x) == "torch" else 2)

    compiled = torch.compile(f, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).item() == 2
    with use_backend("toy=torch"):
        assert compiled(torch.zeros(1)).item() == 1
    assert compiled(torch.zeros(1)).item() == 2


def test_a_block_inside_compiled_code_is_traced(toy: Op) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        with use_backend("toy=torch"):
            inside = x + (1 if toy(x) == "torch" else 2)
        return inside + (10 if toy(x) == "torch" else 20)

    compiled = torch.compile(f, fullgraph=True, backend="eager")
    for _ in range(2):
        assert compiled(torch.zeros(1)).item() == 21
        assert toy(torch.zeros(1)) == "small"
