"""Captures of CUDA graphs: the calls into torch.cuda, and that calls which make the host wait are not captured."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov2_fast import optimize_for_inference, use_backend
from dinov2_fast.inference import capture
from dinov2_fast.inference.capture import CudaRuntime, ForbidDeviceSync
from dinov2_fast.inference.cuda_graphs import GraphCache
from tests.helpers.devices import DEVICE, runs_triton
from tests.helpers.engines import CALLS, SIZE, WAITING_HEADS, Head, random_images
from tests.helpers.small_models import small


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces parts of torch.cuda by fakes that record their calls."""
    happened: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            happened.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event: Event) -> None:
            happened.append(f"{self.name} waits for event")

    class Event:
        def record(self, stream: Stream) -> None:
            happened.append(f"event on {stream.name}")

        def synchronize(self) -> None:
            happened.append("host waits for event")

    class Context:
        def __init__(self, name: str, *_: Any) -> None:
            self.name = name

        def __enter__(self) -> None:
            happened.append(f"into {self.name}")

        def __exit__(self, *_: object) -> None:
            happened.append(f"out of {self.name}")

    def graph(graph: Any, *, pool: Any, stream: Stream, capture_error_mode: str) -> Context:
        return Context(f"capture on {stream.name}, pool {pool}, {capture_error_mode}")

    fakes = {
        "Stream": lambda device: Stream("side"),
        "Event": Event,
        "CUDAGraph": lambda: "graph",
        "current_stream": lambda device: Stream("current"),
        "stream": lambda stream: Context(stream.name),
        "device": lambda device: Context(str(device)),
        "graph": graph,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return happened


def test_capture_and_replay_order_their_calls_into_cuda(calls: list[str]) -> None:
    cuda, device = CudaRuntime(), torch.device("cuda:1")
    cuda.end(cuda.begin(device))
    cuda.wait()
    assert calls == []

    def run() -> str:
        calls.append("run")
        capture.keep_alive((len(calls),))
        return "output"

    assert cuda.capture(run, device, "shared") == ("graph", "output", [(7,)])
    how = "capture on side, pool shared, thread_local"
    assert calls == [
        *("into cuda:1", "into side", "side waits for current", "run", "run"),
        *(f"into {how}", "run", f"out of {how}"),
        *("out of side", "out of cuda:1", "current waits for side"),
    ]
    calls.clear()
    stream = cuda.begin(device)
    stream.name = "the same"
    cuda.end(stream)
    cuda.wait()
    assert calls == ["current waits for event", "event on the same", "host waits for event"]
    assert capture.keep_alive((1,)) is None, "the capture is over"


def test_a_failed_capture_gives_the_caller_s_stream_back(calls: list[str]) -> None:
    def run() -> None:
        if "into capture on side, pool None, thread_local" in calls:
            raise RuntimeError("not permitted")

    cuda = CudaRuntime()
    with pytest.raises(RuntimeError, match="not permitted"):
        cuda.capture(run, torch.device("cuda"), None)
    assert calls[-2:] == ["out of side", "out of cuda"]
    assert capture.keep_alive((1,)) is None
    assert not capture._capture_lock.locked()


HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: nn.functional.linear(x, x),
    "indices": lambda x: x[torch.arange(1, device=x.device)],
    "rows set": lambda x: x.index_put((torch.arange(1, device=x.device),), x[0]),
    "where": lambda x: torch.where(x > 0, x, x.sum()),
    "top": lambda x: x.topk(2).values,
}


class OnCpu(CudaRuntime):
    """Captures on the CPU, with the torch.cuda of the fixture `calls`."""

    def supports(self, device: torch.device) -> bool:
        return True


def with_a_head(function: Callable[[Tensor], Tensor]) -> tuple[Any, Any]:
    """An engine that captures, and one that does not."""
    model = small()
    model.head = Head(function)
    engine, eager = (optimize_for_inference(model, "fp32", cuda_graphs=False) for _ in range(2))
    engine._graphs = GraphCache(True, OnCpu())
    return engine, eager


@pytest.mark.parametrize("function", WAITING_HEADS.values(), ids=WAITING_HEADS)
@torch.no_grad()
def test_no_capture_begins_if_the_host_would_wait_for_the_device(
    function: Callable[[Tensor], Tensor], calls: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    engine, eager = with_a_head(function)
    for _ in range(2):
        x = random_images()
        assert torch.equal(engine(x), eager(x))
    assert "into side" in calls, "warmed up"
    assert not [call for call in calls if call.startswith("into capture")]
    (record,) = caplog.records
    assert "capturing one failed: RuntimeError: aten." in record.getMessage()
    assert record.getMessage().endswith("makes the host wait for the device")
    assert "makes the host wait for the device" in str(engine)


@pytest.mark.parametrize("function", HEADS.values(), ids=HEADS)
@torch.no_grad()
def test_heads_that_do_not_make_the_host_wait_are_captured(
    function: Callable[[Tensor], Tensor], calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: calls.append("replay")))
    engine, eager = with_a_head(function)
    x = random_images()
    assert torch.equal(engine(x), eager(x))
    assert "into capture on side, pool None, thread_local" in calls
    assert "replay" in calls


LISTS: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "list": lambda m, x, mask: m.forward_features([x, x[:1]]),
    "list, masks": lambda m, x, mask: m([x, x[:1]], masks=[mask, mask[:1]], is_training=True),
    "cls_tokens": lambda m, x, mask: m.cls_tokens([x[0], x[1]]),
}


@pytest.mark.parametrize("call", (CALLS | LISTS).values(), ids=CALLS | LISTS)
@torch.no_grad()
def test_no_call_of_the_engine_makes_the_host_wait(call: Any) -> None:
    engine = optimize_for_inference(small(num_register_tokens=2), "fp32")
    mask = torch.rand(2, 12) < 0.5
    for x in (random_images(), torch.randint(256, SIZE).byte(), torch.randint(256, (2, 42, 56, 3)).byte()):
        expected = call(engine, x, mask)
        with ForbidDeviceSync(x.device):
            found = call(engine, x, mask)
        torch.testing.assert_close(found, expected)


@runs_triton
@torch.no_grad()
def test_no_call_of_the_engine_on_kernels_makes_the_host_wait() -> None:
    engine = optimize_for_inference(small(embed_dim=64, num_heads=2), "fp32").to(DEVICE)
    x, mask = torch.randint(256, (1, 3, 28, 28)).byte().to(DEVICE), torch.zeros(1, 4, dtype=torch.bool, device=DEVICE)
    with use_backend("triton", strict=True):
        expected = engine(x, mask, is_training=True)["x_prenorm"]
        with ForbidDeviceSync(x.device):
            found = engine(x, mask, is_training=True)["x_prenorm"]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@torch.no_grad()
def test_no_call_of_the_engine_mixes_devices(call: Any) -> None:
    """On the meta device in place of a GPU."""
    folded = copy.deepcopy(optimize_for_inference(small(num_register_tokens=2), "fp32").folded).to("meta")
    x, mask = random_images().to("meta"), torch.zeros(2, 12, dtype=torch.bool, device="meta")
    with use_backend("torch"):
        call(folded, x, mask)
        with ForbidDeviceSync(x.device):
            call(folded, x, mask)


NUMBER, NUMBERS = torch.tensor(2.0), torch.tensor([1, 0])
WAITING_OPS: dict[str, Callable[[Tensor], Any]] = {
    "to the device": lambda x: x + NUMBERS.to(x.device),
    "a number to the device": lambda x: x * NUMBER.to(x.device),
    "into what is there": lambda x: x[0, 0].copy_(NUMBER),
    "indices": lambda x: x[NUMBERS],
}
OPS: dict[str, Callable[[Tensor], Any]] = {
    "a number": lambda x: x * NUMBER,
    "a row of a number": lambda x: x[0].fill_(NUMBER),
    "set by a mask to a number": lambda x: x.index_put((x > 0,), NUMBER),
    "elsewhere": lambda x: x * NUMBERS.sum().item() + NUMBERS.nonzero().shape[0] + NUMBERS[NUMBERS > 0].shape[0],
}


@pytest.mark.parametrize("op", (WAITING_OPS | OPS).values(), ids=WAITING_OPS | OPS)
def test_ops_that_copy_between_devices_are_found(op: Callable[[Tensor], Any]) -> None:
    x = torch.empty(2, 2, device="meta")
    with ForbidDeviceSync(x.device):
        if op in OPS.values():
            op(x)
        else:
            with pytest.raises(RuntimeError, match=r"aten\..* makes the host wait for the device"):
                op(x)
