"""The ways to run a model: precisions, and modes such as eager, compiled, as a CUDA graph, in our engine.

The modes:

- eager: the implementation unchanged;
- compile: torch.compile of a peer's forward pass; freezing: the same with the weights as constants, on a CPU;
- graphs: a CUDA graph of a peer's forward pass;
- triton, or another backend: our plain model with that backend forced;
- engine, engine-best, engine-NAME: our inference engine with its default backends, with those in ``best.json``, which
  bench.ops writes, or with one backend forced. With -graphs at the end, every call runs as a CUDA graph;
- accelerated-transformers, accelerated-timm, engine-timm: our blocks or our engine in a peer's model.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import Run
from bench.peers import ACCELERATED_PEERS, Peer
from dinov2_fast import optimize_for_inference
from dinov2_fast.extension import load
from dinov2_fast.inference.capture import CudaRuntime
from dinov2_fast.ops import dispatch
from dinov2_fast.ops.dispatch import use_backend

# The dtype of weights and images. In fp8 only the engine runs, which quantises the weights itself.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
COMPILE_MODES = ("compile", "freezing")
BACKENDS = tuple(sorted({each.backend for op in dispatch.all_ops().values() for each in op.implementations}))
ENGINE_MODE = re.compile(rf"engine(?:-(best|{'|'.join(BACKENDS)}))?(-graphs)?")
ForwardPass = Callable[[Tensor], Any]
Context = Callable[[], contextlib.AbstractContextManager[Any]]
CALIBRATION_IMAGES = 8  # for the scales of fp8
RECOMPILE_LIMIT = 64  # all peers share one compiled function; past torch's limit of 8 it would silently run eagerly


def parse_modes(text: str) -> list[str]:
    """Parses comma-separated modes."""
    modes = text.split(",")
    known = ("eager", *COMPILE_MODES, "graphs", *BACKENDS, *ACCELERATED_PEERS)
    if unknown := [mode for mode in modes if mode not in known and not is_engine(mode)]:
        raise argparse.ArgumentTypeError(
            f"unknown: {', '.join(unknown)}; choose from {', '.join(known)}, engine, engine-best, engine-BACKEND, "
            "engine-graphs, engine-best-graphs, engine-BACKEND-graphs"
        )
    return modes


def is_engine(mode: str) -> bool:
    return ENGINE_MODE.fullmatch(mode) is not None


def uses_best_backends(mode: str) -> bool:
    return mode in ("engine-best", "engine-best-graphs")


def backend_of(mode: str, best_backends: str | None = None) -> str | None:
    """The backends that a mode forces: `best_backends` if it is engine-best, None if it forces none."""
    match = ENGINE_MODE.fullmatch(mode)
    name = match[1] if match else mode if mode in BACKENDS else None
    return best_backends if name == "best" else name


def read_best_backends(folder: Path, resolution: int, precision: str) -> str | None:
    """The fastest backend of each form, as :func:`use_backend` takes it. None if the folder has no ``best.json``.

    They are those of the measured resolution that is nearest to `resolution`.
    """
    path = folder / "best.json"
    forms = json.loads(path.read_text())["forms"] if path.is_file() else {}
    if not forms:
        return None
    nearest = forms[min(forms, key=lambda size: abs(int(size) - resolution))]
    plain = {name: backend for name, backend in nearest.items() if not name.endswith(" e4m3")}
    in_e4m3 = {name.removesuffix(" e4m3"): backend for name, backend in nearest.items() if name.endswith(" e4m3")}
    chosen = plain | (in_e4m3 if precision == "fp8" else {})
    return ",".join(f"{name}={backend}" for name, backend in sorted(chosen.items()))


def reason_missing(peer: Peer, mode: str, best_backends: str | None = None) -> str | None:
    """What must be installed, built or measured before a peer can run in a mode, or None."""
    if uses_best_backends(mode) and best_backends is None:
        return "there is no best.json, which bench.ops writes"
    needs_extension = "cuda" in re.split("[=,]", backend_of(mode, best_backends) or "")
    reason = load().reason if needs_extension else None
    return peer.missing or (reason and f"the CUDA extension is not available ({reason})")


def forward_run(
    peer: Peer, model: nn.Module, x: Tensor, output: str, precision: str, mode: str, best_backends: str | None = None
) -> Run:
    """A function that runs a forward pass on images (batch, 3, height, width). It must be called in inference mode.

    Images and weights are in the dtype of the precision; the weights for the engine in fp32.
    """
    call, context = peer.call[output], backend_context(mode, best_backends)
    if is_engine(mode):
        with context():  # the layout of the weights depends on the backends
            model = build_engine(model, x, output, precision, mode)

    def forward(x: Tensor) -> Any:
        return call(model, x)

    if mode == "compile":
        forward = torch.compile(forward, dynamic=False)
    if mode == "freezing":
        forward = _with_frozen_weights(forward, x, context)
    if mode == "graphs":
        return _capture_graph(forward, x, context)

    def run() -> Any:
        with context():
            return forward(x)

    return run


def build_engine(model: nn.Module, x: Tensor | list[Tensor], output: str, precision: str, mode: str) -> nn.Module:
    """Our engine, from weights in fp32. Precisions that are slower than fp32 on this device are allowed."""
    graphs = True if mode.endswith("-graphs") else "auto"
    engine = optimize_for_inference(model, precision, outputs=output, cuda_graphs=graphs, allow_slow=True)
    if precision == "fp8":
        engine.calibrate(x[:CALIBRATION_IMAGES])
    return engine


@contextlib.contextmanager
def compile_scope() -> Iterator[None]:
    """Inside, torch.compile may compile more versions of a function. At the end they are all dropped."""
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        yield
    torch._dynamo.reset()


def backend_context(mode: str, best_backends: str | None = None) -> Context:
    """The context of a mode's runs. A forced backend must accept all inputs; those of engine-best may fall back."""
    backend = backend_of(mode, best_backends)
    return partial(use_backend, backend, strict=backend != best_backends) if backend else contextlib.nullcontext


def _with_frozen_weights(forward: ForwardPass, x: Tensor, context: Context) -> ForwardPass:
    """torch.compile with the weights as constants.

    With `options`, dynamo keeps this graph apart from that of mode compile. The patch is there because dynamo itself
    reads the global setting at the first call.
    """
    compiled = torch.compile(forward, dynamic=False, options={"freezing": True})
    with torch._inductor.config.patch(freezing=True), torch.inference_mode(), context():
        compiled(x)
    return compiled


def _capture_graph(forward: ForwardPass, x: Tensor, context: Context) -> Run:
    """A run of a CUDA graph of the forward pass, captured as our engine does it. It copies the images into its input.

    RuntimeError if the forward pass waits for the device.
    """
    static = x.clone()

    def run() -> Any:
        with context():
            return forward(static)

    graph, result, _ = CudaRuntime().capture(run, x.device, None)

    def replay() -> Any:
        static.copy_(x)
        graph.replay()
        return result

    return replay
