"""Dispatch: precedence, refusals, fallbacks, and what is reported."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import logging
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from dinov2_fast import ops
from dinov2_fast.ops import dispatch
from dinov2_fast.ops.choices import backend_choices
from dinov2_fast.ops.dispatch import BackendError, Op, use_backend
from dinov2_fast.ops.implementation import Implementation
from tests.helpers import devices


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Op:
    """An op with a kernel for small meta tensors, one for small tensors anywhere, and the torch reference.

    "meta" stands for the device a kernel is made for: tensors of it exist on every machine.
    """
    monkeypatch.setattr(dispatch, "_OPS", dict(dispatch._OPS))

    def refuses_large(x: torch.Tensor) -> str | None:
        return f"takes at most 4 elements, got {x.numel()}" if x.numel() > 4 else None

    return Op(
        "toy",
        (
            Implementation("kernel", lambda x: "kernel", refuses_large, devices=("meta",)),
            Implementation("small", lambda x: "small", refuses_large),
            Implementation("torch", lambda x: "torch"),
        ),
        {"form": _sample},
    )


def _sample(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor]:
    return (torch.empty(2, device=device, dtype=dtype),)


def run(op: Op, x: torch.Tensor, backend: str | None = None, form: str = "form") -> Any:
    return op.choose(form, (x,), backend).function(x)


def test_auto_takes_the_first_that_does_not_refuse(toy: Op) -> None:
    assert run(toy, torch.zeros(2)) == "small"
    assert run(toy, torch.zeros(5)) == "torch"
    assert run(toy, torch.zeros(2, device="meta")) == "kernel"


def test_a_fallback_is_logged_once_except_from_a_kernel_for_other_devices(
    toy: Op, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "dinov2_fast"):
        run(toy, torch.zeros(2))
        assert not caplog.records
        run(toy, torch.zeros(5))
        run(toy, torch.zeros(5))
    (record,) = caplog.records
    assert record.getMessage() == "toy: falling back to torch: small takes at most 4 elements, got 5"


def test_precedence_is_argument_then_context_then_environment(toy: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOV2_FAST_BACKEND", "toy=torch")
    for name in ("_setting", "_active"):
        monkeypatch.setattr(dispatch, name, getattr(dispatch, name))
    dispatch.apply_environment()
    assert run(toy, torch.zeros(2)) == "torch"
    with use_backend("small"):
        assert run(toy, torch.zeros(2)) == "small"
        assert run(toy, torch.zeros(2), backend="torch") == "torch"
        with use_backend("toy=torch"):
            assert run(toy, torch.zeros(2)) == "torch"
        assert run(toy, torch.zeros(2)) == "small"
    assert run(toy, torch.zeros(2)) == "torch"


def test_a_forced_backend_that_refuses_says_why(toy: Op) -> None:
    reason = "'small' was asked for but cannot run: takes at most 4 elements, got 5"
    with use_backend("small", strict=True), pytest.raises(BackendError, match=reason):
        run(toy, torch.zeros(5))
    with pytest.raises(BackendError, match=reason):
        run(toy, torch.zeros(5), backend="small")
    with use_backend("kernel", strict=True):
        for _ in range(2):  # the first call has cached no fallback for the second
            with pytest.raises(BackendError, match="needs a meta tensor, got one on cpu"):
                run(toy, torch.zeros(2))
    with pytest.raises(BackendError, match="needs a meta tensor, got one on cpu"):
        run(toy, torch.zeros(2), backend="kernel")


def test_a_setting_that_cannot_run_falls_back_with_one_warning(toy: Op, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dinov2_fast"), use_backend("kernel"):
        backend_choices()  # lists the choices without warnings
        assert not caplog.records
        assert run(toy, torch.zeros(2)) == "small"
        assert run(toy, torch.zeros(2)) == "small"
    (record,) = caplog.records
    assert record.getMessage() == "toy: falling back to small: kernel needs a meta tensor, got one on cpu"


def test_a_forced_name_leaves_ops_without_it_alone(toy: Op) -> None:
    x = torch.randn(2, 8)
    with use_backend("small"):
        assert torch.equal(ops.activation(x, "gelu"), torch.nn.functional.gelu(x))


def test_the_name_of_a_form_holds_before_that_of_its_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_OPS", dict(dispatch._OPS))
    a, b = Implementation("a", lambda x: "a"), Implementation("b", lambda x: "b")
    only = Implementation("only", lambda x: "only", forms=("second",))
    op = Op("toy", (a, b, only), {"first": _sample, "second": _sample})
    x = torch.zeros(2)
    with use_backend("a,toy=b,toy.second=only"):
        assert [run(op, x, form=form) for form in ("first", "second")] == ["b", "only"]
    with use_backend("only", strict=True):  # the first form has no backend of that name
        assert [run(op, x, form=form) for form in ("first", "second")] == ["a", "only"]
    for setting, message in {
        "toy.third=a": "toy has no form 'third', only first, second",
        "toy.first=only": "'only' is not a backend of toy.first. The backends are: a, b",
    }.items():
        with pytest.raises(BackendError, match=message):
            dispatch.parse_setting(setting)
    with pytest.raises(BackendError, match=r"toy\.first has no backend 'only' for torch.float32. It has: a, b"):
        run(op, x, backend="only", form="first")


def test_a_choice_is_made_once_for_each_kind_and_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_OPS", dict(dispatch._OPS))
    asked = []

    def unavailable(device: torch.device) -> None:
        asked.append(device.type)

    op = Op(
        "toy", (Implementation("a", lambda x: "a", refuses_device=unavailable, has_backward=False),), {"form": _sample}
    )
    x, weight = torch.zeros(2), torch.zeros(2, requires_grad=True)
    run(op, x)
    run(op, x.double())
    with use_backend("torch"):
        run(op, x)
    first = len(asked)
    assert first
    run(op, x)
    run(op, x.double())
    assert len(asked) == first
    with use_backend("torch"):  # another setting makes its own choice
        run(op, x)
    assert len(asked) > first
    with pytest.raises(BackendError, match="inference only"):  # the choice for inference does not apply
        run(op, weight)


def test_what_an_implementation_refuses_is_asked_in_each_call(toy: Op) -> None:
    x = torch.zeros(4)
    assert [run(toy, x), run(toy, torch.zeros(5)), run(toy, x)] == ["small", "torch", "small"]
    with use_backend("small", strict=True):
        assert run(toy, x) == "small"
        with pytest.raises(BackendError, match="takes at most 4 elements, got 5"):
            run(toy, torch.zeros(5))


def test_a_choice_without_gradients_does_not_hold_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_OPS", dict(dispatch._OPS))
    fast, plain = (
        Implementation("fast", lambda x: "fast", has_backward=False),
        Implementation("torch", lambda x: "torch"),
    )
    op, x = Op("toy", (fast, plain), {"form": _sample}), torch.zeros(2)
    weight = torch.nn.Parameter(torch.zeros(2))
    for _ in range(2):
        assert [run(op, x), run(op, weight)] == ["fast", "torch"]
        with torch.no_grad():
            assert run(op, weight) == "fast"


def test_a_form_that_does_not_exist_is_refused_each_time(toy: Op) -> None:
    for backend in (None, None, "torch"):
        with pytest.raises(ValueError, match="toy has no form 'from', only form"):
            run(toy, torch.zeros(2), backend, form="from")


def test_set_backend_holds_until_it_is_called_again(toy: Op) -> None:
    try:
        dispatch.set_backend("toy=torch")
        assert run(toy, torch.zeros(2)) == "torch"
        with use_backend("small"):
            dispatch.set_backend("torch")
            assert run(toy, torch.zeros(2)) == "small"
        assert run(toy, torch.zeros(2)) == "torch"
    finally:
        dispatch.set_backend(None)
    assert run(toy, torch.zeros(2)) == "small"


def test_a_bound_op_chooses_once_and_follows_the_setting(toy: Op) -> None:
    bound = dispatch.BoundOp(toy, "form")
    assert bound(torch.zeros(2)) == "small"
    assert bound(torch.zeros(5)) == "small"  # sizes are not checked again: those of the caller do not change
    with use_backend("toy=torch"):
        assert bound(torch.zeros(2)) == "torch"
    assert bound(torch.zeros(2)) == "small"
    other = copy.deepcopy(bound)
    assert other(torch.zeros(5)) == "torch"  # a copy chooses for itself
    assert bound(torch.zeros(5)) == "small"


def test_a_bound_op_whose_setting_ends_while_it_chooses_caches_no_wrong_choice(toy: Op) -> None:
    """A choice belongs to the setting under which it began, whatever another thread does meanwhile."""
    bound, begun, ended = dispatch.BoundOp(toy, "form"), threading.Event(), threading.Event()
    small = toy.implementations[1]

    def slow(x: torch.Tensor) -> None:
        begun.set()
        assert ended.wait(60)

    toy.implementations = (dataclasses.replace(small, refuses=slow), *toy.implementations[2:])
    with ThreadPoolExecutor(1) as pool, use_backend("small"):
        first = pool.submit(bound, torch.zeros(2))
        assert begun.wait(60)
        with use_backend("toy=torch"):
            assert bound(torch.zeros(2)) == "torch"
            ended.set()
            assert first.result() == "small"
            assert bound(torch.zeros(2)) == "torch"
        assert bound(torch.zeros(2)) == "small"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("tritn", "'tritn' is not a backend of any op"),
        ("toy=cudnn", "'cudnn' is not a backend of toy. The backends are: kernel, small, torch"),
        ("atention=torch", "there is no op 'atention'. The ops are activation, attention,"),
        ("", "'' is not a backend"),
        ("toy=", "'' is not a backend of toy"),
    ],
)
def test_unknown_settings_are_refused_and_change_nothing(toy: Op, setting: str, message: str) -> None:
    before = dispatch._setting
    with pytest.raises(BackendError, match=message), use_backend(setting):
        pass
    assert dispatch._setting is before


def test_an_implementation_without_backward_is_not_chosen_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_OPS", dict(dispatch._OPS))
    fast = Implementation("fast", lambda x: "fast", has_backward=False)
    op = Op("toy", (fast, Implementation("torch", lambda x: "torch")), {"form": _sample})
    weight = torch.zeros(1, requires_grad=True)
    assert run(op, weight.detach()) == "fast"
    assert run(op, weight) == "torch"
    with use_backend("fast"):
        assert run(op, weight) == "torch"  # the name applies to inference only
        with torch.no_grad():
            assert run(op, weight) == "fast"
    with pytest.raises(BackendError, match="is for inference only, and gradients are recorded"):
        run(op, weight, backend="fast")
    with use_backend("fast"):
        (row,) = [row for row in backend_choices(training=True) if row.op == "toy"]
    assert row.backend == "torch"


def test_an_op_without_backward_refuses_training_and_is_not_listed_for_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "_OPS", dict(dispatch._OPS))
    fast = Implementation("fast", lambda x: "fast", has_backward=False)
    op = Op("toy", (fast,), {"form": _sample})
    for setting in ("fast", "torch"):
        with use_backend(setting), pytest.raises(BackendError, match="inference only"):
            run(op, torch.zeros(1, requires_grad=True))
    assert "toy" in {row.op for row in backend_choices()}
    assert "toy" not in {row.op for row in backend_choices(in_model=True)}
    assert "toy" not in {row.op for row in backend_choices(training=True)}


def test_a_kernel_can_be_forced_on_a_device_that_it_is_not_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_OPS", dict(dispatch._OPS))
    kernel = Implementation("kernel", lambda x: "kernel", devices=("cuda",), can_force_on=lambda d: d.type == "cpu")
    op = Op("toy", (kernel, Implementation("torch", lambda x: "torch")), {"form": _sample})
    assert run(op, torch.zeros(1)) == "torch"
    assert run(op, torch.zeros(1), backend="kernel") == "kernel"
    with use_backend("kernel", strict=True):
        assert run(op, torch.zeros(1)) == "kernel"
        with pytest.raises(BackendError, match="needs a cuda tensor, got one on meta"):
            run(op, torch.zeros(1, device="meta"))


@devices.fakes_cuda
def test_kernels_refuse_devices_that_are_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov2_fast.ops._backends.capability", lambda index: (7, 5))
    with use_backend("triton"):
        rows = backend_choices("cuda")
    assert {row.because for row in rows} == {
        "triton was asked for, but needs a device of sm_80 or newer, got sm_75",
    }


@devices.runs_triton
def test_kernels_do_not_export_and_a_forced_one_says_so() -> None:
    class Norm(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ops.layer_norm(x, x[0], x[0], 1e-6)

    x = torch.randn(2, 8, device=devices.DEVICE)
    assert "dinov2_fast" not in str(torch.export.export(Norm(), (x,)).graph)
    for strict in (False, True):
        with use_backend("triton", strict=True), pytest.raises(Exception, match="cannot be exported"):
            torch.export.export(Norm(), (x,), strict=strict)


def test_a_setting_ends_with_its_block_also_on_error(toy: Op) -> None:
    with pytest.raises(KeyError), use_backend("small"):
        raise KeyError
    assert run(toy, torch.zeros(5)) == "torch"


def test_blocks_of_two_threads_leave_nothing_forced(toy: Op) -> None:
    begun, ended, before = threading.Event(), threading.Event(), dispatch._setting

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
        assert run(toy, torch.zeros(2)) == "torch"  # the other block's end does not touch this one
    assert run(toy, torch.zeros(2)) == "small"
    assert dispatch._setting is before


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
            assert run(toy, torch.zeros(2)) == "small"
        assert run(toy, torch.zeros(2)) == "torch"  # b has removed its own setting, not the equal one of a
        a_end.set()
        await a

    before = dispatch._setting
    asyncio.run(overlapping())
    assert run(toy, torch.zeros(2)) == "small"
    assert dispatch._setting is before


def test_blocks_that_begin_and_end_at_once_lose_none(toy: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    def many() -> None:
        for _ in range(10):
            with use_backend("toy=torch"):
                assert run(toy, torch.zeros(2)) == "torch"

    def slow(settings: tuple[dispatch.BackendSetting, ...], activate: Any = dispatch._activate) -> None:
        time.sleep(1e-3)  # so that another thread would write in between
        activate(settings)

    before = dispatch._setting
    monkeypatch.setattr(dispatch, "_activate", slow)
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(many) for _ in range(4)]:
            done.result()
    assert dispatch._setting is before


def test_no_implementation_left_names_all_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_OPS", dict(dispatch._OPS))
    only = Implementation("kernel", lambda x: x, devices=("meta",))
    op = Op("lonely", (only,), {"form": _sample})
    with pytest.raises(BackendError, match="lonely: no implementation can run this input: kernel needs a meta tensor"):
        run(op, torch.zeros(1))
    (row,) = [row for row in backend_choices("cpu") if row.op == "lonely"]
    assert row.backend == "nothing"
    assert "kernel needs a meta tensor, got one on cpu" in row.because


def test_the_table_tells_what_runs_and_why(toy: Op) -> None:
    def of_toy(device: str, setting: str) -> tuple[str, str]:
        with use_backend(setting):
            (row,) = [row for row in backend_choices(device) if row.op == "toy"]
        assert row.name == "toy"
        return row.backend, row.because

    assert of_toy("cpu", "attention=torch") == ("small", "is the first that can run")
    assert of_toy("meta", "toy=torch") == ("torch", "was asked for")
    assert of_toy("cpu", "kernel") == ("small", "kernel was asked for, but needs a meta tensor, got one on cpu")


@pytest.mark.parametrize(("value", "good"), [("torch", True), ("attention=torch,layer_norm=torch", True), ("x", False)])
def test_the_environment_variable_is_read_and_checked(value: str, good: bool) -> None:
    code = "from dinov2_fast.ops import dispatch; print(dispatch.current_setting()[:2])"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"DINOV2_FAST_BACKEND": value, "PATH": "", "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode == 0) == good, run.stderr
    assert ("torch" in run.stdout) if good else ("'x' is not a backend of any op" in run.stderr)


def test_compiled_code_follows_the_setting(toy: Op) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x + (1 if run(toy, x) == "torch" else 2)

    compiled = torch.compile(f, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).item() == 2
    with use_backend("toy=torch"):
        assert compiled(torch.zeros(1)).item() == 1
    assert compiled(torch.zeros(1)).item() == 2


def test_a_choice_that_is_kept_compiles_nothing_again(toy: Op) -> None:
    compiled = torch.compile(lambda x: x + (1 if run(toy, x) == "torch" else 2), fullgraph=True, backend="eager")
    compiled(torch.zeros(1))
    assert run(toy, torch.zeros(1)) == "small"
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert compiled(torch.zeros(1)).item() == 2


def test_a_block_inside_compiled_code_is_traced(toy: Op) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        with use_backend("toy=torch"):
            inside = x + (1 if run(toy, x) == "torch" else 2)
        return inside + (10 if run(toy, x) == "torch" else 20)

    compiled = torch.compile(f, fullgraph=True, backend="eager")
    for _ in range(2):
        assert compiled(torch.zeros(1)).item() == 21
        assert run(toy, torch.zeros(1)) == "small"
