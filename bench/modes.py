"""How a model is run: in which precision, eagerly, compiled, as a CUDA graph, on a backend or the engine of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.harness import Run
from bench.peers import ACCELERATED, OURS, TIMM, TRANSFORMERS, Peer
from dinov2_fast import optimize_for_inference
from dinov2_fast.extension import load
from dinov2_fast.ops.dispatch import use_backend

# Of weights and pictures; in fp8 the engine alone runs, with weights of its own.
DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "autocast-bf16": torch.float32,
    "fp8": torch.bfloat16,
}
COMPILED = {"compile": "default", "reduce-overhead": "reduce-overhead", "max-autotune": "max-autotune"}
BACKENDS = ("triton",)  # of ours, forced for every op that has such an implementation
# Mixtures. Two leave attention to torch, which takes cuDNN's on an H200; the third is for fp8, in which torch's own
# linears compute in fp32.
SDPA = "layer_norm=triton,linear=triton,attention_pool=triton,patches=triton"
MIXED = "layer_norm=triton,linear=cuda,attention_pool=triton,patches=triton"
CUBLAS = "layer_norm=triton,attention=triton,attention_pool=triton,patches=triton,linear=cublas"


class EngineMode(NamedTuple):
    """Our engine: whether as a CUDA graph, and the setting of :func:`use_backend`."""

    graphs: bool
    backend: str | None


# It makes its weights from fp32 ones.
ENGINES = {
    "engine": EngineMode(False, None),
    "engine-graphs": EngineMode(True, None),
    "engine-triton": EngineMode(False, "triton"),
    "engine-triton-graphs": EngineMode(True, "triton"),
    "engine-triton-sdpa": EngineMode(False, SDPA),
    "engine-cuda": EngineMode(False, "cuda"),
    "engine-cuda-graphs": EngineMode(True, "cuda"),
    "engine-mixed": EngineMode(False, MIXED),
    "engine-mixed-graphs": EngineMode(True, MIXED),
    "engine-cublas": EngineMode(False, CUBLAS),
    "engine-cublas-graphs": EngineMode(True, CUBLAS),
}
MODES = ("eager", *COMPILED, "graphs", *BACKENDS, *ENGINES, *ACCELERATED)
WARM_UP = 3  # runs before a capture
CALIBRATING = 8  # pictures, for the scales of fp8
RECOMPILE_LIMIT = 64  # all peers share one compiled function; past torch's limit of 8 they would run eagerly, unnoticed


def modes_of(peer: Peer, among: list[str], installed: list[Peer]) -> list[str]:
    """The modes that are worth running of a peer.

    The graph that max-autotune gets is the same from every peer, and it takes minutes: one of them is enough.
    """
    autotuned = next((p for p in (TIMM, TRANSFORMERS, OURS) if p in installed), None)
    ours = (*BACKENDS, *ENGINES)
    among = [mode for mode in among if mode not in ACCELERATED]
    return [m for m in among if (m not in ours or peer is OURS) and (m != "max-autotune" or peer is autotuned)]


def goes_with(mode: str, precision: str, output: str, device: torch.device) -> bool:
    """Whether there is such a run: autocast does not change what the engine computes in, and only it has fp8.

    On a GPU its default linears in fp8, which are torch's, would compute in fp32. What the last block computes for the
    class token alone stays in bf16, where cuBLAS' linears do not add their bias.
    """
    if mode not in ENGINES:
        return precision != "fp8"
    engine = ENGINES[mode]
    if engine.backend == CUBLAS:
        return precision == "fp8" and output == "all"
    if precision == "fp8":
        return device.type != "cuda" or engine.backend is not None
    return precision != "autocast-bf16"


def why_missing(peer: Peer, mode: str) -> str | None:
    """Why a peer cannot run in a mode until something is installed or built, or None."""
    extension = load().reason if "cuda" in _names(_backend(mode)) else None
    return peer.missing or (extension and f"the CUDA extension is not available ({extension})")


def _backend(mode: str) -> str | None:
    """The setting of :func:`use_backend` that a mode runs under."""
    return mode if mode in BACKENDS else ENGINES[mode].backend if mode in ENGINES else None


def _names(setting: str | None) -> set[str]:
    """The backends in a setting."""
    return {part.rpartition("=")[2] for part in (setting or "").split(",")}


def prepare(peer: Peer, model: nn.Module, x: Tensor, output: str, precision: str, mode: str) -> Run:
    """A forward pass on `x`, ready to be called again and again; call it in inference mode.

    Args:
        model: of that peer, its weights in the dtype of the precision; in fp32 for the engine.
        x: pictures (batch, 3, height, width) in the dtype of the precision.
    """
    if mode in ENGINES:
        model = engine(model, x, output, precision, ENGINES[mode].graphs)
    return runner(peer, model, x, output, precision, mode)


def runner(peer: Peer, model: nn.Module, x: Tensor, output: str, precision: str, mode: str) -> Run:
    """The same of a model that is the engine already where the mode says so."""
    call = peer.call[output]

    def forward(x: Tensor) -> Any:
        return call(model, x)

    if mode in COMPILED:
        forward = torch.compile(forward, dynamic=False, mode=COMPILED[mode])
    context = contexts(precision, mode, x.device)
    if mode == "graphs":
        return _captured(forward, x, context)

    def run() -> Any:
        with context():
            return forward(x)

    return run


def engine(model: nn.Module, x: Tensor | list[Tensor], output: str, precision: str, graphs: bool) -> nn.Module:
    """Our engine, from weights in fp32, for what :func:`prepare` runs; also where it is slower than fp32."""
    made = optimize_for_inference(model, precision, outputs=output, cuda_graphs=graphs, allow_slow=True)
    if precision == "fp8":
        made.calibrate(x[:CALIBRATING])
    return made


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Inside, as many runs as wanted can be compiled; they are forgotten at the end."""
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        yield
    torch._dynamo.reset()


def contexts(precision: str, mode: str, device: torch.device) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Makes the surroundings of one run."""
    backend = _backend(mode)
    if precision == "autocast-bf16" and backend:
        return lambda: _both(torch.autocast(device.type, torch.bfloat16), use_backend(backend, strict=True))
    if precision == "autocast-bf16":
        return lambda: torch.autocast(device.type, torch.bfloat16)
    return (lambda: use_backend(backend, strict=True)) if backend else contextlib.nullcontext


@contextlib.contextmanager
def _both(*managers: contextlib.AbstractContextManager[Any]) -> Any:
    with contextlib.ExitStack() as stack:
        for manager in managers:
            stack.enter_context(manager)
        yield


def _captured(
    forward: Callable[[Tensor], Any], x: Tensor, context: Callable[[], contextlib.AbstractContextManager[Any]]
) -> Run:
    """A CUDA graph of the forward pass, with the copy of new pictures into its input.

    Raises:
        RuntimeError: the forward pass waits for the device. It is raised in a warm-up: a capture of it would fail, and
            leave torch's random numbers and allocator amid that capture for all that the process measures next.
    """
    static = x.clone()
    side = torch.cuda.Stream(x.device)
    side.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(side), context():
        for _ in range(WARM_UP - 1):
            forward(static)
        with _errors_for_waiting():
            forward(static)
    torch.cuda.current_stream(x.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), context():
        result = forward(static)

    def run() -> Any:
        static.copy_(x)
        graph.replay()
        return result

    return run


@contextlib.contextmanager
def _errors_for_waiting() -> Iterator[None]:
    """Inside, torch raises where the host waits for the device, in every thread."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
