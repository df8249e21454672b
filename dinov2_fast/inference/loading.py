"""Models for the commands and the extraction: the device, the preprocessing and the weights that a user names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dinov2_fast.data.image_processor import CONFIG_NAME, Dinov2ImageProcessor
from dinov2_fast.errors import InvalidValueError
from dinov2_fast.inference.engine import PRECISIONS, optimize_for_inference, why_slow
from dinov2_fast.weights.load import load

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_model(
    model: str | Path,
    processor: Dinov2ImageProcessor,
    *,
    weights: str | Path | None = None,
    position_interpolation: str | None = None,
    device: str | None = None,
    precision: str = "auto",
    engine: bool = True,
    stride: int | tuple[int, int] | None = None,
) -> Any:
    """The model of an extraction: an engine that takes the processor's uint8 images, or the model as it is.

    Raises:
        WeightsError: the weights cannot be had.
        ValueError: a device, precision, position_interpolation or stride that does not exist, or is not for this model.
    """
    place = find_device(device)
    if precision == "auto":
        precision = "bf16" if place.type == "cuda" else "fp32"
    if not engine and precision not in DTYPES:
        raise InvalidValueError(
            f"Precision {precision} exists in the engine only; without it there are {', '.join(DTYPES)}."
        )
    dtype = torch.float32 if engine else DTYPES[precision]  # the engine folds weights in fp32
    loaded = load(model, weights=weights, device=place, dtype=dtype, position_interpolation=position_interpolation)
    if stride is not None:
        loaded.stride = stride
    if not engine:
        return loaded
    mean, std = processor.image_mean, processor.image_std
    return optimize_for_inference(loaded, precision, mean=mean, std=std, follow_weights=False)  # nobody else has it


def find_device(name: str | None) -> torch.device:
    """The device of that name; without one a GPU, or the CPU where there is none.

    Raises:
        ValueError: torch knows no such device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise InvalidValueError(f"There is no device {name!r}; give cpu, cuda or cuda:1, for instance.") from None


def processor_for(model: Any, size: int | tuple[int, int] | None = None) -> Dinov2ImageProcessor:
    """The preprocessing for `size`, or that of a model's folder, or that of the checkpoints."""
    if size is not None:
        return Dinov2ImageProcessor.for_size(size)
    if isinstance(model, (str, Path)) and (Path(model) / CONFIG_NAME).is_file():
        return Dinov2ImageProcessor.from_pretrained(model)
    return Dinov2ImageProcessor()


def check_precision(precision: str, device: torch.device, *, engine: bool = True) -> None:
    """Refuses a precision before any weights are read.

    Raises:
        ValueError: it does not exist, exists in the engine only, or is slower on the device than one of more bits.
    """
    if precision not in ("auto", *PRECISIONS):
        raise InvalidValueError(f"There is no precision {precision!r}; choose auto, {', '.join(PRECISIONS)}.")
    if precision == "fp8" and not engine:
        raise InvalidValueError("Precision fp8 exists in the engine only: leave out --no-engine (engine=False).")
    reason = why_slow(precision, device) if precision != "auto" and engine else None
    if reason:
        instead, otherwise = ("bf16", "") if device.type == "cuda" else ("fp32", ", or a GPU with --device cuda")
        raise InvalidValueError(
            f"--precision {precision} would be slower than {instead} here: {reason}. Use --precision "
            f"{instead}{otherwise}."
        )
