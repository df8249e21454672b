"""The ways to run a model: precisions, and modes such as eager, compiled, as a CUDA graph, in our engine.

A mode is one of

- eager: the implementation as it is;
- compile: torch.compile of a peer's forward pass; freezing: the same with the weights as constants, on a CPU;
- graphs: a CUDA graph of a peer's forward pass;
- triton, or another backend: our plain model with that backend forced;
- engine, engine-best, engine-NAME: our inference engine with its defaults, with the backends in ``best.json``, which
  bench.ops writes, or with one backend forced; followed by -graphs, every call runs as a CUDA graph;
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
from bench.peers import ACCELERATED, Peer
from dinov2_fast import optimize_for_inference
from dinov2_fast.extension import load
from dinov2_fast.inference.cuda_graphs import Cuda
from dinov2_fast.ops import dispatch
from dinov2_fast.ops.dispatch import use_backend

# Of weights and images. In fp8 only the engine runs, which quantises the weights itself.
DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.bfloat16,
}
COMPILED = ("compile", "freezing")
BACKENDS = tuple(sorted({each.backend for op in dispatch.all_ops().values() for each in op.implementations}))
ENGINE = re.compile(rf"engine(?:-(best|{'|'.join(BACKENDS)}))?(-graphs)?")
Forward = Callable[[Tensor], Any]
Context = Callable[[], contextlib.AbstractContextManager[Any]]
CALIBRATING = 8  # images, for the scales of fp8
RECOMPILE_LIMIT = 64  # all peers share one compiled function; past torch's limit of 8 it would silently run eagerly


def parse(text: str) -> list[str]:
    """Modes with commas between them."""
    modes = text.split(",")
    known = ("eager", *COMPILED, "graphs", *BACKENDS, *ACCELERATED)
    if unknown := [mode for mode in modes if mode not in known and not is_engine(mode)]:
        raise argparse.ArgumentTypeError(
            f"{', '.join(unknown)}: there are {', '.join(known)}, engine, engine-best, engine-BACKEND, and these "
            "three with -graphs"
        )
    return modes


def is_engine(mode: str) -> bool:
    return ENGINE.fullmatch(mode) is not None


def is_best(mode: str) -> bool:
    """Whether a mode is engine-best or engine-best-graphs."""
    engine = ENGINE.fullmatch(mode)
    return engine is not None and engine[1] == "best"


def backend_of(mode: str, best: str | None = None) -> str | None:
    """What a mode gives to :func:`use_backend`: `best` if it is engine-best, None if it forces nothing."""
    engine = ENGINE.fullmatch(mode)
    name = engine[1] if engine else mode if mode in BACKENDS else None
    return best if name == "best" else name


def best_backends(folder: Path, resolution: int, precision: str) -> str | None:
    """The fastest backend of each form, as :func:`use_backend` takes it; None if the folder has no ``best.json``.

    The measured resolution that is nearest to `resolution` counts.
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


def why_missing(peer: Peer, mode: str, best: str | None = None) -> str | None:
    """Why a peer cannot run in a mode until something is installed, built or measured, or None."""
    if is_best(mode) and best is None:
        return "there is no best.json, which bench.ops writes"
    needs_extension = "cuda" in re.split("[=,]", backend_of(mode, best) or "")
    reason = load().reason if needs_extension else None
    return peer.missing or (reason and f"the CUDA extension is not available ({reason})")


def prepare(
    peer: Peer, model: nn.Module, x: Tensor, output: str, precision: str, mode: str, best: str | None = None
) -> Run:
    """A function that runs a forward pass on `x`, to be called in inference mode.

    Args:
        model: the peer's, its weights in the dtype of the precision; for the engine in fp32.
        x: images (batch, 3, height, width) in the dtype of the precision.
        best: the backends of engine-best.
    """
    call, context = peer.call[output], surroundings(mode, best)
    if is_engine(mode):
        with context():  # whose weights are laid out for these backends
            model = engine(model, x, output, precision, mode)

    def forward(x: Tensor) -> Any:
        return call(model, x)

    if mode == "compile":
        forward = torch.compile(forward, dynamic=False)
    if mode == "freezing":
        forward = _frozen(forward, x, context)
    if mode == "graphs":
        return _captured(forward, x, context)

    def run() -> Any:
        with context():
            return forward(x)

    return run


def engine(model: nn.Module, x: Tensor | list[Tensor], output: str, precision: str, mode: str) -> nn.Module:
    """Our engine, from weights in fp32; also in a precision that is slower here than fp32."""
    graphs = True if mode.endswith("-graphs") else "auto"
    made = optimize_for_inference(model, precision, outputs=output, cuda_graphs=graphs, allow_slow=True)
    if precision == "fp8":
        made.calibrate(x[:CALIBRATING])
    return made


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Raises torch.compile's limit of compiled versions inside, and drops them all at the end."""
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        yield
    torch._dynamo.reset()


def surroundings(mode: str, best: str | None = None) -> Context:
    """The context of a mode's runs. A forced backend must take all inputs; those of engine-best may fall back."""
    backend = backend_of(mode, best)
    return partial(use_backend, backend, strict=backend != best) if backend else contextlib.nullcontext


def _frozen(forward: Forward, x: Tensor, context: Context) -> Forward:
    """torch.compile with the weights as constants.

    The option keeps its graph apart from that of mode compile. The patch is for dynamo, which reads the global setting
    at the first call.
    """
    compiled = torch.compile(forward, dynamic=False, options={"freezing": True})
    with torch._inductor.config.patch(freezing=True), torch.inference_mode(), context():
        compiled(x)
    return compiled


def _captured(forward: Forward, x: Tensor, context: Context) -> Run:
    """A CUDA graph of the forward pass, captured as our engine does. A run copies the images into the graph's input.

    Raises:
        RuntimeError: the forward pass waits for the device.
    """
    static = x.clone()

    def run() -> Any:
        with context():
            return forward(static)

    graph, result, _ = Cuda().capture(run, x.device, None)

    def replay() -> Any:
        static.copy_(x)
        graph.replay()
        return result

    return replay
