"""Blocks of the engine whose matrix products have e4m3 operands (fp8).

    z = x @ W^T + b   becomes   z = s w (x8 @ W8^T) + b      x8 = e4m3(x / s),    W8 = e4m3(W / w)

`w` holds for each output feature its largest weight over 448. It takes LayerScale with it, so that but for signs W8 is
the same whatever LayerScale is. `s` is one power of two for all of `x`, by which dividing rounds nothing:

- of a norm, from its bound |layer_norm(x)| < sqrt(hidden), which holds without weight and bias: those are folded into
  the linear that reads the norm. It can clip no value.
- of what attention and the activation give, from the largest values that calibration met, or a constant before it.

Since e4m3 is a floating-point format with 15 binary orders of magnitude, room above the largest value costs no
precision. The residual stream, the products inside attention, the patch embedding, the last norm and the head stay in
the engine's dtype.
Sources: e4m3: Micikevicius et al., arXiv:2209.05433.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.inference.block import FoldedAttention, FoldedBlock
from dinov2_fast.inference.fold import FoldedLinear, FoldedNorm, Layout, fold_exactly, gamma_of, rounded
from dinov2_fast.ops._fp8 import E4M3, E4M3_MAX, quantize

if TYPE_CHECKING:
    from dinov2_fast.inference.backbone import FoldedBackbone

HEADROOM = 2.0  # a calibrated range is at least so many times the largest value that was met


class Scales(NamedTuple):
    """What the e4m3 values of a block are multiplied by, powers of two."""

    attention: float  # what proj reads
    hidden: float  # what fc2 or w3 reads


STATIC = Scales(1 / 16, 1 / 16)  # before calibration: clips beyond ±28


@dataclass(frozen=True)
class Calibration:
    """What `Engine.calibrate` found: the scales of each block, on how many images, with which weights."""

    scales: tuple[Scales, ...]
    images: int
    checksum: int


class Fp8Norm(FoldedNorm):
    """A layer norm in e4m3 over `scale`, without its weight and bias: the linear that reads it takes them over."""

    def __init__(self, norm: Any, name: str, dtype: torch.dtype, stream: torch.dtype) -> None:
        super().__init__(norm, name, dtype, stream)
        self.weight.fill_(1)
        self.bias.zero_()
        self.scale = scale_for(self.weight.numel() ** 0.5)

    def forward(self, x: Tensor, deferred: Tensor | None = None) -> Tensor:
        return self._run(x, deferred, self.scale)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}"


class Fp8Linear(FoldedLinear):
    """A linear of e4m3 operands.

    Args:
        weight: (out_features, in_features), fp64.
        bias: (out_features,), fp64, or None.
        dtype: of the bias and of a result that is not e4m3.
        scale: of what it reads.
        out_scale: of what `gelu` and `swiglu` give, in e4m3.
        interleaved: as `FoldedLinear` has it.
    """

    weight_scale: Tensor  # (out_features,), fp32

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        scale: float,
        out_scale: float = 1.0,
        interleaved: bool = False,
    ) -> None:
        weight_scale = scale_of_rows(weight)
        super().__init__(
            quantize(weight, weight_scale.double()[:, None]).contiguous(),
            None if bias is None else rounded(bias, dtype),
            interleaved,
        )
        self.register_buffer("weight_scale", weight_scale)
        self.dtype, self.scale, self.out_scale = dtype, scale, out_scale
        self._results = {"none": dtype, "gelu": E4M3, "swiglu": E4M3, "residual": None}

    def _run(self, epilogue: str, x: Tensor, residual: Tensor | None = None) -> Tensor:
        tensors = self._buffers
        operands = tensors["weight"], tensors["bias"], epilogue, residual, self.scale, tensors["weight_scale"]
        return self._bound[epilogue](x, *operands, self._results[epilogue], self.out_scale, self.interleaved)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}"


class Fp8Attention(FoldedAttention):
    """Self-attention between e4m3 linears, which writes what `proj` reads in e4m3."""

    qkv: Fp8Linear
    proj: Fp8Linear

    def __init__(self, num_heads: int, qkv: Fp8Linear, proj: Fp8Linear) -> None:
        nn.Module.__init__(self)  # there is nothing else to fold
        self.num_heads, self.qkv, self.proj, self.out_scale = num_heads, qkv, proj, proj.scale
        self.bind()


class Fp8Block(FoldedBlock):
    """A block with e4m3 linears.

    Args:
        block, name, dtype, stream, layout: as for `FoldedBlock`.
        scales: of its activations.
        for_cls: the same block in `dtype`, which then computes the CLS token alone, or None.
    """

    def __init__(
        self,
        block: Any,
        name: str,
        dtype: torch.dtype,
        stream: torch.dtype,
        layout: Layout,
        scales: Scales,
        for_cls: FoldedBlock | None,
    ) -> None:
        super().__init__(block, name, dtype, stream, layout)
        self.for_cls = for_cls
        attention, mlp, gated = block.attn, block.mlp, self.mlp.gated
        up, down = ("w12", "w3") if gated else ("fc1", "fc2")
        interleaved = gated and layout.interleaved
        self.norm1 = Fp8Norm(block.norm1, f"{name}.norm1", dtype, stream)
        self.norm2 = Fp8Norm(block.norm2, f"{name}.norm2", dtype, stream)
        qkv = fold_exactly(attention.qkv, f"{name}.attn.qkv", norm=block.norm1)
        proj = fold_exactly(attention.proj, f"{name}.attn.proj", gamma_of(block.ls1, f"{name}.ls1"))
        self.attn = Fp8Attention(
            attention.num_heads,
            Fp8Linear(*qkv, dtype, self.norm1.scale),
            Fp8Linear(*proj, dtype, scales.attention),
        )
        first = fold_exactly(getattr(mlp, up), f"{name}.mlp.{up}", norm=block.norm2, interleaved=interleaved)
        self.mlp.up = Fp8Linear(*first, dtype, self.norm2.scale, scales.hidden, interleaved)
        second = fold_exactly(getattr(mlp, down), f"{name}.mlp.{down}", gamma_of(block.ls2, f"{name}.ls2"))
        self.mlp.down = Fp8Linear(*second, dtype, scales.hidden)

    def first_token(self, x: Tensor) -> Tensor:
        return self(x)[:, 0] if self.for_cls is None else self.for_cls.first_token(x)

    def op_names(self) -> dict[torch.dtype, set[str]]:
        (names,) = super().op_names().values()
        return {E4M3: names} | (self.for_cls.op_names() if self.for_cls is not None else {})


def scale_for(largest: float) -> float:
    """The least power of two with which values up to `largest` (> 0) are in the range of e4m3."""
    mantissa, exponent = math.frexp(largest / E4M3_MAX)
    return 2.0 ** (exponent - 1 if mantissa == 0.5 else exponent)


def scale_of_rows(weight: Tensor) -> Tensor:
    """(out_features,) fp32: the scales with which the largest value of each row becomes ±448."""
    smallest = torch.finfo(torch.float32).tiny  # of a row of zeros
    return (weight.abs().amax(1) / E4M3_MAX).float().clamp_min(smallest)


def scales_of(calibration: Calibration | None, blocks: int) -> tuple[Scales, ...]:
    """The scales of each block; a calibration of another number of blocks is not used."""
    if calibration is None or len(calibration.scales) != blocks:
        return (STATIC,) * blocks
    return calibration.scales


# Calibration


class _Recorder(FoldedLinear):
    """A linear that remembers the largest magnitude it read."""

    def __init__(self, linear: FoldedLinear) -> None:
        super().__init__(linear.weight, linear.bias)
        self.largest = torch.zeros((), device=linear.weight.device)

    def add_to_(self, stream: Tensor, x: Tensor) -> None:
        self.largest = torch.maximum(self.largest, x.abs().amax().float())  # keeps NaN
        super().add_to_(stream, x)

    def scale(self, what: str) -> float:
        largest = self.largest.item()
        if not math.isfinite(largest):
            raise InvalidValueError(f"{what} gave {largest} for these images: nothing can be calibrated on them.")
        return scale_for(HEADROOM * largest) if largest > 0 else STATIC.hidden


def measure(backbone: FoldedBackbone, batches: Iterable[Tensor]) -> tuple[tuple[Scales, ...], int]:
    """Runs images through an engine's blocks, which are not in e4m3 and are changed by this.

    Returns:
        The scales of each block in which the largest values met have `HEADROOM`, and the number of images.

    Raises:
        ValueError: no images, or values that are not finite.
    """
    recorders = []
    for block in backbone.blocks:
        block.attn.proj, block.mlp.down = _Recorder(block.attn.proj), _Recorder(block.mlp.down)
        recorders.append((block.attn.proj, block.mlp.down))
    images = 0
    for batch in batches:
        if len(batch):
            backbone._run_blocks(backbone.embed(batch))
        images += len(batch)
    if images == 0:
        raise InvalidValueError("calibrate needs at least one image.")
    scales = [
        Scales(proj.scale(f"the attention of block {i}"), down.scale(f"the MLP of block {i}"))
        for i, (proj, down) in enumerate(recorders)
    ]
    return tuple(scales), images


def checksum(model: nn.Module) -> int:
    """Of the bits of all parameters and buffers; the same on every device."""
    total = 0
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
            total += int(tensor.detach().contiguous().view(bits).sum(dtype=torch.int64))
    return total


def describe(backbone: FoldedBackbone, model: nn.Module) -> list[str]:
    """The lines of `print(engine)` about e4m3."""
    plan, blocks = backbone.plan, len(backbone.blocks)
    kept = [str(i) for i in range(blocks) if i in plan.skip_layers]
    lines = [
        "e4m3: qkv, proj and MLP" + (f", not in the blocks {', '.join(kept)}" if kept else "") + "; a scale for each "
        "output feature, norms over their bound",
        f"calibration: {_describe(plan.calibration, blocks, model)}",
    ]
    in_e4m3 = [row for row in backbone.backends() if row.dtype == E4M3 and row.backend == "torch"]
    slow = [row.name for row in in_e4m3 if row.op != "attention"]  # which has one pass more, and no slow product
    if slow:
        others = "; use_backend(...) chooses others" if backbone.cls_token.is_cuda else ""
        lines.append(f"speed: no faster than bf16 here: torch's forms of {', '.join(slow)} compute in fp32{others}")
    return lines


def _describe(calibration: Calibration | None, blocks: int, model: nn.Module) -> str:
    clipped = f"attention and hidden activations are clipped at ±{E4M3_MAX * STATIC.hidden:g}"
    if calibration is None:
        return f"none: {clipped}; calibrate(images) measures what they need"
    if len(calibration.scales) != blocks:
        return f"made for {len(calibration.scales)} blocks and not used: {clipped}; call calibrate(images) again"
    made = f"on {calibration.images} images, whose activations have {HEADROOM:g} times the room they need"
    if calibration.checksum != checksum(model):
        made += "; stale: the weights have changed since, call calibrate(images) again"
    return made
