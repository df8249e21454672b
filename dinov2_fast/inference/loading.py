"""The device, the preprocessing and the model that a user names, for the commands and the extraction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dinov2_fast.data.image_processor import CONFIG_NAME, Dinov2ImageProcessor
from dinov2_fast.errors import InvalidValueError
from dinov2_fast.inference.optimize import optimize_for_inference, why_slow
from dinov2_fast.inference.plan import PRECISIONS, auto_precision
from dinov2_fast.weights.load import load


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
    """Loads a model, by default as an engine that normalises uint8 images with the mean and std of `processor`.

    The engine does not follow the model, which has no other user. `weights` and `position_interpolation` are those of
    :func:`dinov2_fast.load`, `device` that of `find_device`, `precision` that of `optimize_for_inference` ("fp8" for an
    engine only). `stride` is that of the patch embedding in pixels, an int or (vertical, horizontal); None keeps it.

    Raises:
        WeightsError: the weights cannot be found or read.
        ValueError: a device, precision, position_interpolation or stride that does not exist or does not fit the model.
    """
    torch_device = find_device(device)
    check_precision(precision, torch_device, engine=engine)
    dtype = torch.float32  # the engine folds the weights of the checkpoint, before any rounding
    if not engine:
        dtype = PRECISIONS[auto_precision(torch_device) if precision == "auto" else precision]
    loaded = load(
        model, weights=weights, device=torch_device, dtype=dtype, position_interpolation=position_interpolation
    )
    if stride is not None:
        loaded.stride = stride
    if not engine:
        return loaded
    return optimize_for_inference(loaded, precision, processor=processor, follow_weights=False)


def find_device(name: str | None) -> torch.device:
    """The device of this name. With None it is a GPU, or the CPU where there is no GPU.

    Raises:
        ValueError: torch knows no device of this name.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise InvalidValueError(f"There is no device {name!r}; give cpu, cuda or cuda:1, for instance.") from None


def processor_for(model: Any, size: int | tuple[int, int] | None = None) -> Dinov2ImageProcessor:
    """The preprocessing for a model, or for the name, file, folder or hub id of one.

    Its outputs have `size` pixels, an int or (height, width). With None it is the processor in the model's folder, or
    else that of the checkpoints.
    """
    if size is not None:
        return Dinov2ImageProcessor.for_size(size)
    if isinstance(model, (str, Path)) and (Path(model) / CONFIG_NAME).is_file():
        return Dinov2ImageProcessor.from_pretrained(model)
    return Dinov2ImageProcessor()


def check_precision(precision: str, device: torch.device, *, engine: bool = True) -> None:
    """Refuses a precision before any weights are read.

    Raises:
        ValueError: it does not exist, exists in the engine only, or makes the engine slower than one of more bits.
    """
    if precision not in ("auto", *PRECISIONS):
        raise InvalidValueError(f"There is no precision {precision!r}; choose auto, {', '.join(PRECISIONS)}.")
    if precision == "fp8" and not engine:
        raise InvalidValueError("Precision fp8 exists in the engine only: leave out --no-engine (engine=False).")
    if precision != "auto" and engine and (reason := why_slow(precision, device)):
        instead = auto_precision(device)
        otherwise = "" if device.type == "cuda" else ", or a GPU (device cuda)"
        raise InvalidValueError(
            f"Precision {precision} would be slower than {instead} here: {reason}. Use precision {instead}{otherwise}."
        )
