"""What can be exported: formats, dtypes and outputs, and the checks of the arguments before anything is traced."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_fast.errors import Dinov2FastError, InvalidTypeError, InvalidValueError
from dinov2_fast.model import DinoVisionTransformer
from dinov2_fast.ops._backends import is_installed

ENDINGS = {"onnx": ".onnx", "torch-export": ".pt2"}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
OPSET = 20  # the first with Gelu as one operator
LOWEST_OPSET = 18  # torch's exporter has nothing older
INPUT = "pixel_values"
METADATA = "dinov2_fast"  # key of the JSON object in the file

OUTPUTS: dict[str, Callable[[dict[str, Any]], Tensor]] = {
    "cls": lambda features: features["x_norm_clstoken"],
    "patch_mean": lambda features: features["x_norm_patchtokens"].mean(dim=1),
    "patches": lambda features: features["x_norm_patchtokens"],
    "registers": lambda features: features["x_norm_regtokens"],
}
LOGITS = "logits"


class ExportError(Dinov2FastError, RuntimeError):
    """The model cannot be exported this way, or the file does not compute what the model does."""


def check_settings(
    model: Any,
    classifier: nn.Linear | None,
    format: str,
    outputs: Sequence[str],
    dtype: str,
    opset: int | None,
    batch_size: int | None,
    size: tuple[int, int] | None,
) -> None:
    """Refuses models other than a backbone in eval mode, and settings that do not exist or do not go together."""
    if not isinstance(model, DinoVisionTransformer):
        raise InvalidTypeError(
            f"A {type(model).__name__} cannot be exported, only a DinoVisionTransformer: load its weights with "
            "dinov2_fast.load, which reads every layout. In place of an engine, export the model that it was made of."
        )
    if model.training:
        raise InvalidValueError("The model is in training mode; call model.eval() first.")
    if dtype not in DTYPES:
        raise InvalidValueError(f"There is no dtype {dtype!r}; choose one of {', '.join(DTYPES)}.")
    known = (*OUTPUTS, LOGITS)
    if not outputs or len(set(outputs) & set(known)) < len(outputs):
        raise InvalidValueError(
            f"outputs must be some of {', '.join(known)}, each once; got {', '.join(outputs) or 'none'}."
        )
    if "registers" in outputs and not model.num_register_tokens:
        raise InvalidValueError("This model has no registers: leave them out of the outputs.")
    if format == "onnx" and dtype == "bf16":
        raise InvalidValueError(
            "bf16 cannot be exported to ONNX here: onnxruntime does not compute it on a CPU, so the file could not be "
            "checked. Use fp32 or fp16, or the format torch-export."
        )
    if format != "onnx" and opset is not None:
        raise InvalidValueError("Only ONNX has opsets: leave opset out, or use the format onnx.")
    if opset is not None and opset < LOWEST_OPSET:
        raise InvalidValueError(f"opset {opset} is too old: torch's exporter writes {LOWEST_OPSET} and newer.")
    if batch_size is not None and batch_size < 1:
        raise InvalidValueError(f"batch_size must be at least 1, or None for any; got {batch_size}.")
    if size is not None and any(side < 1 or side % model.patch_size for side in size):
        raise InvalidValueError(
            f"size must be multiples of the patch size {model.patch_size}, got {size[0]} x {size[1]}."
        )
    if LOGITS in outputs and classifier is None:
        raise InvalidValueError("There is no classifier for the output logits: give one, or leave logits out.")
    if classifier is not None and classifier.in_features not in (model.embed_dim, 2 * model.embed_dim):
        raise InvalidValueError(
            f"The classifier takes {classifier.in_features} features. It must take the {model.embed_dim} of the CLS "
            f"token, or {2 * model.embed_dim}: those of the CLS token and of the mean of the patches."
        )


def check_path(path: Path, format: str, overwrite: bool) -> None:
    """Refuses an unknown format, a wrong ending, a file that exists already, and a folder that is not writable."""
    if format not in ENDINGS:
        raise InvalidValueError(f"There is no format {format!r}; choose one of {', '.join(ENDINGS)}.")
    if path.suffix != ENDINGS[format]:
        raise InvalidValueError(f"A file of the format {format} ends in {ENDINGS[format]}, {str(path)!r} does not.")
    weights = path.with_name(f"{path.name}.data")  # the second file of a large ONNX graph
    for file in (path, weights) if format == "onnx" else (path,):
        if file.is_dir() or (file.exists() and not overwrite):
            raise FileExistsError(
                f"{str(file)!r} exists already; choose another name, or replace it with --overwrite (overwrite=True)."
            )
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ExportError(f"{str(path)!r} cannot be written: {str(folder)!r} is not a folder that you may write to.")


def check_packages(format: str, images: Sequence[Tensor] | None) -> None:
    """Refuses a format whose packages are not installed."""
    needed = ["onnx", "onnxscript"] + ["onnxruntime"] * (images is not None)
    missing = [name for name in needed if format == "onnx" and not is_installed(name)]
    if missing:
        raise ExportError(
            f"Missing: {', '.join(missing)}. ONNX files are written with onnx and onnxscript, and compared in "
            "onnxruntime: pip install onnx onnxscript onnxruntime"
        )


def check_images(model: DinoVisionTransformer, batches: Sequence[Tensor], size: tuple[int, int] | None) -> None:
    """Refuses batches that are empty or have other shapes than the graph takes."""
    channels, patch = model.patch_embed.in_chans, model.patch_size
    if not batches:
        raise InvalidValueError("There is no image to compare on; leave images out to compare on noise.")
    for batch in batches:
        sides = tuple(batch.shape[2:])
        right = sides == size if size else all(side > 0 and side % patch == 0 for side in sides)
        if batch.ndim != 4 or not len(batch) or batch.shape[1] != channels or not right:
            wanted = f"{size[0]}, {size[1]}" if size else f"multiple of {patch}, multiple of {patch}"
            raise InvalidValueError(f"images must be batches (images, {channels}, {wanted}), got {tuple(batch.shape)}.")
