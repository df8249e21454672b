"""The floor of a forward pass: the least time by the device's rates of a large matrix product and of a copy.

Products and attention count their operations, at the rate of a large product. All else counts the bytes that must be
moved if everything is fused that usual kernels can fuse, at the rate of a copy. The two are added: nothing overlaps.
Both rates are measured in each run that gives shares of a floor, and are kept in its rows.

With output "cls", the class token only, the last layer needs no keys and values. The scores of one query q are
y·(W_k^T q) for the normed stream y, and its result is W_v times the weighted sum of y. So the stream is read once, and
every product has one row for each image. The products of this pooling hide behind the read.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from bench.harness import in_turn
from bench.workloads import E4M3, PATCH, Shape, attention_flops
from dinov2_fast.configs import BackboneConfig
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.torch_private import onednn_linear, onednn_pack

SECONDS = {"cpu": 1.0, "cuda": 0.5}
COPY = {"cpu": 128 << 20, "cuda": 4 << 30}  # bytes
LARGE = {"cpu": 2048, "cuda": 8192}  # rows and columns of the large product
SKINNY_LAYERS = {"all": 0, "cls": 1}  # by output: layers that compute the class token's row only


class Rates(NamedTuple):
    """Bytes per second of a copy; operations per second of a large product, and of one in e4m3 if there is one."""

    copy: float
    product: float
    e4m3: float | None = None

    @property
    def row(self) -> dict[str, float]:
        """As in the `versions` of a row."""
        return {f"{name}_per_s": rate for name, rate in self._asdict().items() if rate}


@cache
def measured(device: torch.device, dtype: torch.dtype) -> Rates:
    """The rates of a device. On a CPU the faster product counts, torch's or oneDNN's with packed weights."""
    source, size = torch.empty(COPY[device.type], dtype=torch.uint8, device=device), LARGE[device.type]
    target, (a, b) = torch.empty_like(source), torch.randn(2, size, size, device=device).to(dtype)
    runs: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source), "product": lambda: a @ b.T}
    if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        packed = onednn_pack(b)
        runs["onednn"] = lambda: onednn_linear(a, packed, None, "none")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        one, a8, b8 = torch.ones((), device=device), a.to(E4M3), b.to(E4M3)
        out = dtype if dtype != torch.float32 else torch.bfloat16
        runs["e4m3"] = lambda: torch._scaled_mm(a8, b8.T, one, one, out_dtype=out)
    with torch.inference_mode():
        for run in runs.values():
            run()
        times = in_turn(runs, device, SECONDS[device.type], flush=True)
    seconds = {name: statistics.median(taken) for name, taken in times.items()}
    flops, fastest = 2.0 * size**3, min(seconds["product"], seconds.get("onednn", float("inf")))
    return Rates(
        2.0 * source.nbytes / seconds["copy"], flops / fastest, flops / seconds["e4m3"] if "e4m3" in seconds else None
    )


class Work(NamedTuple):
    """Operations of a batch's forward pass, and bytes."""

    embedding: float  # operations of the patch embedding
    products: float  # operations of the linears of all layers
    attention: float  # operations
    elementwise: float  # bytes

    def seconds(self, rates: Rates, in_e4m3: bool) -> float:
        """The floor. In fp8 attention and the patch embedding are in 16 bits."""
        layers = (in_e4m3 and rates.e4m3) or rates.product
        return (
            (self.embedding + self.attention) / rates.product + self.products / layers + self.elementwise / rates.copy
        )


def work(config: BackboneConfig, resolution: int, batch: int, output: str, itemsize: int, in_e4m3: bool) -> Work:
    """The least work of a forward pass.

    In each layer two layer norms read the residual stream and write an operand, and two epilogues read the residual: 6
    transfers of the stream (5 in fp8, where an operand has half the bytes). Activation, bias and LayerScale move
    nothing. Not counted are the bytes of the embedding, of the last norm and of single tokens.

    Args:
        itemsize: bytes of an element of the residual stream.
    """
    shape, skinny = Shape(config, resolution, batch), SKINNY_LAYERS[output]
    full = config.depth - skinny
    of_a_row = {place: 2.0 * inputs * outputs for place, (inputs, outputs) in shape.features.items()}
    # q, W_k^T q, W_v times the weighted sum, proj. The middle two are by head, with as many operations.
    of_the_class_token = 4 * of_a_row["proj"] + of_a_row["fc1"] + of_a_row["fc2"]
    stream = batch * shape.tokens * config.embed_dim  # elements
    layer = 2 * (itemsize + (1 if in_e4m3 else itemsize)) + 2 * itemsize
    return Work(
        2.0 * batch * (resolution // PATCH) ** 2 * 3 * PATCH**2 * config.embed_dim,
        batch * (full * shape.tokens * sum(of_a_row.values()) + skinny * of_the_class_token),
        full * attention_flops(shape),
        stream * (full * layer + skinny * itemsize),
    )


def parameters(config: BackboneConfig) -> int:
    """Number of parameters, the mask token included."""
    with torch.device("meta"):
        return sum(p.numel() for p in DinoVisionTransformer(**config.constructor_arguments()).parameters())
