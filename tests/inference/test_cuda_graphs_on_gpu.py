"""CUDA graphs of the engine on a GPU: results are those of eager calls, on streams, in threads and after changes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_fast import optimize_for_inference, use_backend
from dinov2_fast.inference.cuda_graphs import CACHED_GRAPHS
from tests.helpers.devices import on_gpu
from tests.helpers.engines import CALLS, WAITING_HEADS, Head, random_images
from tests.helpers.small_models import small


def cuda_engine(mode: bool | str = True, **kwargs: Any) -> tuple[Any, Any]:
    """An engine with graphs and one without, of the same model."""
    torch.manual_seed(kwargs.pop("seed", 0))
    model = small(embed_dim=128, num_heads=2, **kwargs).cuda()
    return tuple(optimize_for_inference(model, "bf16", cuda_graphs=graphs) for graphs in (mode, False))


WAITING_HEADS_ON_A_GPU = {name: WAITING_HEADS[name] for name in ("item", "mask", "new numbers")} | {
    "numbers of the CPU": lambda x: x + torch.ones(1).to(x.device, x.dtype)
}


def captured(engine: Any) -> int:
    return sum(kind is not None for kind in engine._graphs._calls.values())


def equal(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@on_gpu
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@torch.inference_mode()
def test_a_graph_computes_what_eager_calls_do(call: Any) -> None:
    engine, eager = cuda_engine(num_register_tokens=2)
    given = [(random_images().cuda(), (torch.rand(2, 12) < 0.5).cuda()) for _ in range(3)]
    results = [call(engine, *inputs) for inputs in given]
    for result, inputs in zip(results, given, strict=True):
        equal(result, call(eager, *inputs))
    assert captured(engine) == 1
    assert engine._graphs._failure == ""


@on_gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
@torch.inference_mode()
def test_graphs_of_every_backend_compute_what_eager_calls_do_also_for_uint8(backend: str) -> None:
    engine, eager = cuda_engine("auto")
    with use_backend(backend, strict=True):
        for _ in range(3):
            pixels = torch.randint(256, (2, 56, 70, 3)).byte().cuda()
            equal(engine(pixels), eager(pixels))
    assert captured(engine) == 1


@on_gpu
@torch.inference_mode()
def test_calls_on_side_streams_wait_for_their_inputs_and_do_not_mix() -> None:
    """A graph reads its input after a slow write on the same stream, and graphs on two streams do not mix."""
    engine, eager = cuda_engine()
    engine(random_images().cuda())
    given = [random_images().cuda() for _ in range(8)]
    slow = torch.randn(4096, 4096, device="cuda")
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for i, x in enumerate(given):
        with torch.cuda.stream(streams[i % 2]):
            late = x + 0 * (slow @ slow).sum()
            results.append(engine(late))
            late.fill_(7)
    torch.cuda.synchronize()
    for result, x in zip(results, given, strict=True):
        equal(result, eager(x))
    assert captured(engine) == 1


@on_gpu
@torch.inference_mode()
def test_interleaved_calls_of_two_engines_and_many_sizes_do_not_mix() -> None:
    pairs = [cuda_engine(seed=seed) for seed in range(2)]
    sizes = [(1, 3, 14, 14 * (i + 1)) for i in range(CACHED_GRAPHS + 4)]
    for _ in range(2):
        for size in sizes:
            x = random_images(*size).cuda()
            results = [engine(x, is_training=True) for engine, _ in pairs]
            for result, (_, eager) in zip(results, pairs, strict=True):
                equal(result, eager(x, is_training=True))
    assert [captured(engine) for engine, _ in pairs] == [CACHED_GRAPHS] * 2


@on_gpu
@torch.no_grad()
def test_changed_weights_and_a_moved_engine_are_captured_again() -> None:
    engine, eager = cuda_engine()
    x = random_images().cuda()
    before = engine(x)
    engine._model.norm.bias.add_(1)
    equal(engine(x), eager(x))
    assert not torch.equal(engine(x), before)
    engine.to("cpu").to("cuda")
    equal(engine(x), eager(x))


@on_gpu
@torch.inference_mode()
def test_an_engine_runs_inside_a_graph_that_the_user_captures() -> None:
    engine, eager = cuda_engine()
    static = random_images().cuda()
    engine(static)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        engine(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = engine(static)
    for i in range(40):  # drops the cached positions of this size
        eager(random_images(1, 3, 14, 14 * (i + 1)).cuda())
        engine(random_images(1, 3, 14, 14 * (i + 1)).cuda())
    x = random_images().cuda()
    static.copy_(x)
    graph.replay()
    equal(output, eager(x))
    equal(engine(x), eager(x))
    engine._model.norm.bias.data.add_(1)
    with pytest.raises(RuntimeError, match="nothing can be folded"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        engine.refresh()


@on_gpu
@pytest.mark.parametrize("function", WAITING_HEADS_ON_A_GPU.values(), ids=WAITING_HEADS_ON_A_GPU)
@torch.inference_mode()
def test_a_head_that_cannot_be_captured_runs_eagerly(
    function: Callable[[Tensor], Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    model = small(embed_dim=128, num_heads=2).cuda()
    model.head = Head(function)
    engine, eager = (optimize_for_inference(model, "bf16", cuda_graphs=graphs) for graphs in (True, False))
    before = torch.cuda.current_stream()
    for _ in range(2):
        x = random_images().cuda()
        equal(engine(x), eager(x))
    assert torch.cuda.current_stream() == before
    assert len([record for record in caplog.records if "capturing one failed" in record.getMessage()]) == 1
    assert "none, since capturing one failed" in str(engine)
    assert torch.randn(1, device="cuda").isfinite(), "random numbers are not in the middle of a capture"
    torch.cuda.empty_cache()
    cached = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    del cached
    reserved = torch.cuda.memory_reserved()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved - 2**28, "nor is the allocator"


@on_gpu
def test_threads_on_a_gpu_do_not_get_each_other_s_results() -> None:
    engine, eager = cuda_engine()
    wrong: list[int] = []

    @torch.inference_mode()
    def calls(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(20):
                x = torch.randn((2, 3, 42, 56 + 14 * (i % 3)), generator=generator).cuda()
                if not torch.equal(engine(x), eager(x)):
                    wrong.append(seed)

    threads = [threading.Thread(target=calls, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert captured(engine) == 3
