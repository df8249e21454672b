"""The floor: an estimate of the least time of a forward pass, from two rates of the device that are measured.

Products and attention take the time of their operations at the rate of a large product. Everything else takes the time
of the bytes that must be moved, at the rate of a copy, if all is fused that usual kernels can fuse. The two times are
added, as if nothing overlapped, so a run can be a little faster. Every run that reports shares of a floor measures both
rates and keeps them in its rows.

With output "cls", the class token only, the last layer needs no keys and values. The scores of one query q are
y·(W_k^T q) for the normed stream y, and its result is W_v times the weighted sum of y. So the stream is read once, and
every product has one row for each image. The read takes longer than the products of this pooling, which are not
counted.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from bench.harness import time_in_turn
from bench.workloads import E4M3, PATCH, Shape, attention_flops
from dinov2_fast.configs import BackboneConfig
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.torch_private import onednn_linear, onednn_pack

TIMING_SECONDS = {"cpu": 1.0, "cuda": 0.5}
COPY_BYTES = {"cpu": 128 << 20, "cuda": 4 << 30}
PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}  # rows and columns of the large product
CLASS_TOKEN_LAYERS = {"all": 0, "cls": 1}  # by output: layers that compute only the class token's row


class Rates(NamedTuple):
    """Bytes per second of a copy; operations per second of a large product, and of one in e4m3 if there is one."""

    copy: float
    product: float
    e4m3: float | None = None

    @property
    def as_versions(self) -> dict[str, float]:
        """As they stand in the `versions` of a row."""
        return {f"{name}_per_s": rate for name, rate in self._asdict().items() if rate}


@cache
def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measures the rates of a device. On a CPU the faster product counts: torch's, or oneDNN's with packed weights."""
    source, size = torch.empty(COPY_BYTES[device.type], dtype=torch.uint8, device=device), PRODUCT_SIZE[device.type]
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
        times = time_in_turn(runs, device, TIMING_SECONDS[device.type], flush=True)
    seconds = {name: statistics.median(taken) for name, taken in times.items()}
    flops, fastest = 2.0 * size**3, min(seconds["product"], seconds.get("onednn", float("inf")))
    return Rates(
        2.0 * source.nbytes / seconds["copy"], flops / fastest, flops / seconds["e4m3"] if "e4m3" in seconds else None
    )


class Work(NamedTuple):
    """The operations and bytes of a batch's forward pass."""

    embedding: float  # operations of the patch embedding
    products: float  # operations of the linears of all layers
    attention: float  # operations
    elementwise: float  # bytes

    def seconds(self, rates: Rates, in_e4m3: bool) -> float:
        """The floor. In fp8, attention and the patch embedding are still in 16 bits."""
        layer_rate = (in_e4m3 and rates.e4m3) or rates.product
        in_16_bits = (self.embedding + self.attention) / rates.product
        return in_16_bits + self.products / layer_rate + self.elementwise / rates.copy


def forward_work(
    config: BackboneConfig, resolution: int, batch: int, output: str, itemsize: int, in_e4m3: bool
) -> Work:
    """The least work of a forward pass, with `itemsize` bytes for an element of the residual stream.

    In each layer two layer norms read the residual stream and write an operand, and two epilogues read the residual.
    These are 6 transfers of the stream (5 in fp8, where an operand has half the bytes). Activation, bias and LayerScale
    move nothing. The bytes of the embedding, of the last norm and of single tokens are not counted.
    """
    shape, class_token_layers = Shape(config, resolution, batch), CLASS_TOKEN_LAYERS[output]
    full_layers = config.depth - class_token_layers
    row_flops = {place: 2.0 * inputs * outputs for place, (inputs, outputs) in shape.features.items()}
    # q, W_k^T q, W_v times the weighted sum, proj. The middle two work on one head at a time, with as many operations.
    class_token_flops = 4 * row_flops["proj"] + row_flops["fc1"] + row_flops["fc2"]
    stream = batch * shape.tokens * config.embed_dim  # elements
    layer_bytes = 2 * (itemsize + (1 if in_e4m3 else itemsize)) + 2 * itemsize
    return Work(
        2.0 * batch * (resolution // PATCH) ** 2 * 3 * PATCH**2 * config.embed_dim,
        batch * (full_layers * shape.tokens * sum(row_flops.values()) + class_token_layers * class_token_flops),
        full_layers * attention_flops(shape),
        stream * (full_layers * layer_bytes + class_token_layers * itemsize),
    )


def count_parameters(config: BackboneConfig) -> int:
    """The number of parameters, including the mask token."""
    with torch.device("meta"):
        return sum(p.numel() for p in DinoVisionTransformer(**config.constructor_arguments()).parameters())
