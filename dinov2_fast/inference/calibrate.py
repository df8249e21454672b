"""Calibration of precision "fp8": measures on images which ranges the activations of the blocks need."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.inference.backbone import FoldedBackbone
from dinov2_fast.inference.fold import FoldedLinear
from dinov2_fast.inference.fp8 import STATIC, scale_for
from dinov2_fast.inference.plan import Calibration, Scales

HEADROOM = 2.0  # a calibrated range is at least this many times the largest value seen


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
