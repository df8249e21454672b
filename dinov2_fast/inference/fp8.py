"""Blocks of the engine whose matrix products have e4m3 operands (fp8), and their calibration.

    z = x @ W^T + b   becomes   z = s w (x8 @ W8^T) + b      x8 = e4m3(x / s),    W8 = e4m3(W / w)

`w` is one scale for each output feature: its largest weight divided by 448. LayerScale only changes `w` and the signs
of W8. `s` is one power of two for all of `x`, so that dividing by it is exact:

- For the output of a norm, `s` follows from the bound |layer_norm(x)| < sqrt(hidden), so no value is clipped. The bound
  holds without the norm's weight and bias, which are therefore folded into the linear that reads the norm.
- For the outputs of attention and of the activation, `s` follows from the largest values seen in calibration. Before
  calibration it is a constant.

Room above the largest value costs little precision, since e4m3 is a floating-point format with 15 binary orders of
magnitude. The products inside attention, the patch embedding, the last norm and the head stay in bf16, the residual
stream in its own dtype. Source of e4m3: Micikevicius et al., arXiv:2209.05433.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.inference.backbone import FoldedBackbone
from dinov2_fast.inference.block import FoldedBlock, linears_of
from dinov2_fast.inference.fold import FoldedLinear, FoldedNorm, LinearLayout, fold_exactly, gamma_of, rounded
from dinov2_fast.inference.plan import Calibration, EnginePlan, Scales
from dinov2_fast.ops._fp8 import E4M3, E4M3_MAX, quantize

STATIC = Scales(1 / 16, 1 / 16)  # before calibration: clips beyond ±28
HEADROOM = 2.0  # a calibrated range is at least this many times the largest value seen


class Fp8Norm(FoldedNorm):
    """A layer norm without weight and bias, divided by `scale`, in e4m3.

    The linear that reads it has the norm's weight and bias folded in.
    """

    def __init__(self, norm: Any, name: str, plan: EnginePlan) -> None:
        super().__init__(norm, name, plan)
        self.weight.fill_(1)
        self.bias.zero_()
        self.scale = scale_for(self.weight.numel() ** 0.5)

    def forward(self, x: Tensor, deferred: Tensor | None = None) -> Tensor:
        return self._run(x, deferred, self.scale)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}"


class Fp8Linear(FoldedLinear):
    """A linear of e4m3 operands, from a weight and a bias in fp64.

    `scale` is that of its input, `out_scale` that of the results of `gelu` and `swiglu`, which are in e4m3. The bias
    and the result of `forward` are in `dtype`.
    """

    weight_scale: Tensor  # (out_features,), fp32; divided by it, the largest value of a row is ±448

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        scale: float,
        out_scale: float = 1.0,
        interleaved: bool = False,
    ) -> None:
        smallest = torch.finfo(torch.float32).tiny  # for rows of zeros
        weight_scale = (weight.abs().amax(1) / E4M3_MAX).float().clamp_min(smallest)
        quantized = quantize(weight, weight_scale.double()[:, None]).contiguous()
        super().__init__(quantized, None if bias is None else rounded(bias, dtype), interleaved)
        self.register_buffer("weight_scale", weight_scale)
        self.dtype, self.scale, self.out_scale = dtype, scale, out_scale
        self._results = {"none": dtype, "gelu": E4M3, "swiglu": E4M3, "residual": None}

    def _run(self, epilogue: str, x: Tensor, residual: Tensor | None = None) -> Tensor:
        tensors = self._buffers
        operands = tensors["weight"], tensors["bias"], epilogue, residual, self.scale, tensors["weight_scale"]
        return self._bound[epilogue](x, *operands, self._results[epilogue], self.out_scale, self.interleaved)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}"


class Fp8Block(FoldedBlock):
    """A block with e4m3 linears. The same block without e4m3, `for_cls`, computes the CLS token alone, if given."""

    def __init__(
        self, block: Any, name: str, plan: EnginePlan, layout: LinearLayout, scales: Scales, for_cls: FoldedBlock | None
    ) -> None:
        super().__init__(block, name, plan, layout)
        self.for_cls = for_cls
        attention, mlp, dtype = block.attn, block.mlp, plan.dtype
        up, down = linears_of(mlp)
        interleaved = self.mlp.gated and layout.interleaved
        self.norm1 = Fp8Norm(block.norm1, f"{name}.norm1", plan)
        self.norm2 = Fp8Norm(block.norm2, f"{name}.norm2", plan)
        qkv = fold_exactly(attention.qkv, f"{name}.attn.qkv", norm=block.norm1)
        proj = fold_exactly(attention.proj, f"{name}.attn.proj", gamma_of(block.ls1, f"{name}.ls1"))
        self.attn.qkv = Fp8Linear(*qkv, dtype, self.norm1.scale)
        self.attn.proj = Fp8Linear(*proj, dtype, scales.attention)
        self.attn.out_scale = scales.attention
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
    """The smallest power of two by which values up to `largest` (> 0) are divided to fit into e4m3."""
    mantissa, exponent = math.frexp(largest / E4M3_MAX)
    return 2.0 ** (exponent - 1 if mantissa == 0.5 else exponent)


def scales_of(calibration: Calibration | None, blocks: int) -> tuple[Scales, ...]:
    """The scales of each block; a calibration for another number of blocks is not used."""
    if calibration is None or len(calibration.scales) != blocks:
        return (STATIC,) * blocks
    return calibration.scales


def calibrate(backbone: FoldedBackbone, model: nn.Module, batches: Iterable[Tensor]) -> Calibration:
    """Runs images through `backbone` and chooses scales that leave `HEADROOM` above the largest activations.

    The backbone has no e4m3 linears. This replaces its linears, so do not use it afterwards. `model` is the model that
    it was made from.
    """
    recorders = []
    for block in backbone.blocks:
        block.attn.proj, block.mlp.down = _RecordingLinear(block.attn.proj), _RecordingLinear(block.mlp.down)
        recorders.append((block.attn.proj, block.mlp.down))
    images = 0
    for batch in batches:
        if len(batch):
            backbone._run_blocks(backbone.embed(batch))
        images += len(batch)
    if images == 0:
        raise InvalidValueError("calibrate needs at least one image.")
    scales = tuple(
        Scales(proj.scale(f"The attention of block {i}"), down.scale(f"The MLP of block {i}"))
        for i, (proj, down) in enumerate(recorders)
    )
    return Calibration(scales, images, weights_checksum(model))


class _RecordingLinear(FoldedLinear):
    """A linear that records the largest magnitude of its inputs."""

    def __init__(self, linear: FoldedLinear) -> None:
        super().__init__(linear.weight, linear.bias)
        self.largest = torch.zeros((), device=linear.weight.device)

    def add_to_(self, stream: Tensor, x: Tensor) -> None:
        self.largest = torch.maximum(self.largest, x.abs().amax().float())  # keeps NaN
        super().add_to_(stream, x)

    def scale(self, source: str) -> float:
        largest = self.largest.item()
        if not math.isfinite(largest):
            raise InvalidValueError(f"{source} gave {largest} for these images: nothing can be calibrated on them.")
        return scale_for(HEADROOM * largest) if largest > 0 else STATIC.hidden


def weights_checksum(model: nn.Module) -> int:
    """A checksum of the bits of all floating-point parameters and buffers; the same on every device."""
    total = 0
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
            total += int(tensor.detach().contiguous().view(bits).sum(dtype=torch.int64))
    return total
