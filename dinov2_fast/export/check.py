"""The check of an exported file: it is run, and its outputs are compared with the model's."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2_fast.export.graph import GraphModule
from dinov2_fast.export.settings import DTYPES, INPUT, ExportError
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.ops._backends import is_installed

# The largest relative L2 difference from the model. Rounding stays far below (ViT-S: fp32 1e-6, fp16 1e-3, bf16 1e-2);
# a lost bias or a wrong operator is far above.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}


@dataclass(frozen=True)
class Difference:
    """How far an output of the file is from the model's, for one batch."""

    output: str
    shape: tuple[int, ...]
    relative: float  # norm of the difference / norm of the model's output
    worst: float  # largest difference of an element


def file_runner(path: Path, format: str) -> Callable[[Tensor], Sequence[Tensor]] | None:
    """A function that runs the file; None for an ONNX file without onnxruntime."""
    if format != "onnx":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from torch's reader, about its own buffers
            module = torch.export.load(path).module()
        return lambda pixels: module(pixels)
    if not is_installed("onnxruntime"):
        return None
    onnxruntime: Any = importlib.import_module("onnxruntime")
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"onnxruntime {onnxruntime.__version__} cannot read the file: {error}") from error
    return lambda pixels: [torch.from_numpy(output) for output in session.run(None, {INPUT: pixels.numpy()})]


def noise(model: DinoVisionTransformer, size: tuple[int, int] | None) -> list[Tensor]:
    """Noise to compare file and model on, of the fixed size or of two sizes."""
    patch, generator = model.patch_size, torch.Generator().manual_seed(0)
    sizes = [size] if size else [(16 * patch, 16 * patch), (11 * patch, 14 * patch)]
    channels = model.patch_embed.in_chans
    return [torch.randn(count, channels, *sides, generator=generator) for count, sides in enumerate(sizes, start=1)]


def compare(
    run: Callable[[Tensor], Sequence[Tensor]],
    model: GraphModule,
    batches: Sequence[Tensor],
    dtype: str,
    batch_size: int | None,
) -> tuple[Difference, ...]:
    """The differences of each output for each batch; `ExportError` if one is larger than TOLERANCES allows."""
    like = next(model.parameters())
    found = []
    for pixels in batches:
        with torch.no_grad():
            expected = model(pixels.to(like))
            ours = _run_all(run, pixels.to(DTYPES[dtype]), batch_size or len(pixels))
        for name, output, reference in zip(model.outputs, ours, expected, strict=True):
            found.append(_difference(name, output.double(), reference.double().cpu()))
    wrong = [each for each in found if not each.relative <= TOLERANCES[dtype]]  # NaN is wrong too
    if wrong:
        worst = wrong[0]
        raise ExportError(
            f"The file does not compute what the model does: {worst.output} {worst.shape} differs by "
            f"{worst.relative:.1e} (relative; {dtype} allows {TOLERANCES[dtype]:.0e}). Nothing was written."
        )
    return tuple(found)


def _run_all(run: Callable[[Tensor], Sequence[Tensor]], pixels: Tensor, batch_size: int) -> list[Tensor]:
    """The outputs for all images. All batches have one size: the last is filled up with the first images."""
    starts = range(0, len(pixels), batch_size)
    parts = [run(pixels[torch.arange(start, start + batch_size) % len(pixels)]) for start in starts]
    wholes = [torch.cat(outputs) for outputs in zip(*parts, strict=True)]
    filled = len(parts) * batch_size - len(pixels)
    return [whole[: len(whole) - filled] for whole in wholes]


def _difference(name: str, ours: Tensor, expected: Tensor) -> Difference:
    if ours.shape != expected.shape:
        raise ExportError(f"The file gives {name} {tuple(ours.shape)}, the model {tuple(expected.shape)}.")
    error = ours - expected
    relative = float(error.norm() / expected.norm())
    return Difference(name, tuple(ours.shape), relative, float(error.abs().max()))
