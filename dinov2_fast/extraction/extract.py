"""The main job: pictures in, one Parquet file of features out."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from numpy.typing import NDArray

from dinov2_fast import __version__
from dinov2_fast.extraction.decoding import Decoded, decode_all
from dinov2_fast.extraction.features_file import FeaturesFile, output_path
from dinov2_fast.extraction.images import MAX_PIXELS
from dinov2_fast.image_processor import Dinov2ImageProcessor
from dinov2_fast.inference import Engine

PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

Features = NDArray[np.float32]  # (batch, embed_dim)


@dataclass(frozen=True)
class Summary:
    """What an extraction did: the counts, the time it took (model already loaded) and where the file is."""

    path: Path
    pictures: int
    failures: int
    seconds: float


def extract(
    files: Sequence[str],
    model: Any,
    out: str | os.PathLike[str],
    *,
    processor: Dinov2ImageProcessor | None = None,
    batch_size: int = 32,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
    overwrite: bool = False,
    metadata: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Writes the features of every file to ``features.parquet`` in the folder `out`: one row each, in order.

    A picture that cannot be read, or whose features are not finite, is a row with its error. The columns are those of
    :mod:`dinov2_fast.extraction.features_file`.

    Args:
        files: pictures, from :func:`dinov2_fast.extraction.list_images` for instance.
        model: a :class:`dinov2_fast.DinoVisionTransformer` in eval mode, or an engine made of one by
            :func:`dinov2_fast.optimize_for_inference`; its device and dtype are used. An engine with the processor's
            mean and std gets uint8 pictures and normalises them itself: a quarter of the bytes from worker processes
            and to the device.
        processor: by default the checkpoints' (224 x 224). Its outputs must have one size, a multiple of the patch.
        batch_size: pictures in one forward pass. A batch is a fixed range of rows, unreadable pictures included.
        workers: processes that decode; 0 decodes in this one.
        max_pixels: larger pictures are refused.
        overwrite: replace features that are there already.
        metadata: what to record in the file besides processor, dtype, engine, precision, device, batch size and
            versions.
        progress: called after each batch with the number of pictures done and, among them, of failures.

    Raises:
        ValueError: nothing to do, a model in training mode, or a processor that does not fit the model.
        FileExistsError: there are features already.
    """
    processor = processor or Dinov2ImageProcessor()
    _check(files, model, processor, batch_size, workers)
    path = output_path(out, overwrite=overwrite)
    recorded = {**(metadata or {}), **_describe(model, processor), "batch_size": batch_size}
    start, failures = time.perf_counter(), 0
    decoder = _without_normalization(processor) if _normalizes(model, processor) else processor
    decoding = decode_all(files, decoder, max_pixels=max_pixels, workers=workers, ahead=max(2 * batch_size, 8))
    with FeaturesFile(path, model.embed_dim, recorded) as file, closing(decoding) as decoded:
        for first in range(0, len(files), batch_size):
            pictures, cls, patch_mean = _features(model, list(islice(decoded, batch_size)))
            file.write(files[first : first + batch_size], pictures, cls, patch_mean)
            failures += sum(picture.error is not None for picture in pictures)
            if progress:
                progress(first + len(pictures), failures)
    return Summary(path, len(files), failures, time.perf_counter() - start)


def _check(files: Sequence[str], model: Any, processor: Dinov2ImageProcessor, batch_size: int, workers: int) -> None:
    if not files:
        raise ValueError("There are no pictures to extract.")
    if batch_size < 1 or workers < 0:
        raise ValueError(f"batch_size must be at least 1 and workers at least 0, got {batch_size} and {workers}.")
    if model.training:
        raise ValueError("The model is in training mode; call model.eval() first.")
    size = processor.output_size
    if size is None:
        raise ValueError("The processor's outputs differ in size; set do_center_crop, or an exact height and width.")
    if any(side % model.patch_size for side in size):
        raise ValueError(
            f"The processor's output is {size[0]} x {size[1]}, not a multiple of the patch size {model.patch_size}."
        )


def _normalizes(model: Any, processor: Dinov2ImageProcessor) -> bool:
    """Whether the model does to uint8 pictures what the processor does last: scaling by 1/255 and normalisation."""
    if not isinstance(model, Engine) or not processor.do_rescale or not processor.do_normalize:
        return False
    settings = processor.rescale_factor, tuple(processor.image_mean), tuple(processor.image_std)
    return settings == (1 / 255, tuple(model.plan.mean), tuple(model.plan.std))


def _without_normalization(processor: Dinov2ImageProcessor) -> Dinov2ImageProcessor:
    return Dinov2ImageProcessor(**{**processor.settings(), "do_rescale": False, "do_normalize": False})


def _place(model: Any) -> Any:
    """What has the device and the dtype of the model: a parameter, or the engine itself."""
    return model if isinstance(model, Engine) else next(model.parameters())


def _describe(model: Any, processor: Dinov2ImageProcessor) -> dict[str, Any]:
    place, engine = _place(model), isinstance(model, Engine)
    return {
        "processor": processor.to_dict(),
        "position_dialect": model.position_dialect,
        "dtype": str(place.dtype).removeprefix("torch."),
        "engine": engine,
        "precision": model.precision if engine else PRECISIONS.get(place.dtype, str(place.dtype)),
        "device": place.device.type,
        "versions": {
            "dinov2_fast": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
        },
    }


def _features(model: Any, pictures: list[Decoded]) -> tuple[list[Decoded], Features, Features]:
    """The pictures, with an error added where features are not finite, and their vectors (zeros without features)."""
    cls = np.zeros((len(pictures), model.embed_dim), np.float32)
    patch_mean = np.zeros_like(cls)
    pixels = {row: picture.pixels for row, picture in enumerate(pictures) if picture.pixels is not None}
    if pixels:
        batch = torch.from_numpy(np.stack(list(pixels.values()))).to(_place(model).device)
        with torch.inference_mode():
            output = model.forward_features(batch if isinstance(model, Engine) else batch.to(_place(model).dtype))
            cls[list(pixels)] = output["x_norm_clstoken"].float().cpu().numpy()
            patch_mean[list(pixels)] = output["x_norm_patchtokens"].float().mean(dim=1).cpu().numpy()
    for row in np.flatnonzero(~np.isfinite(cls + patch_mean).all(axis=1)):
        pictures[row] = replace(pictures[row], error="the model's features are not finite")
    return pictures, cls, patch_mean
