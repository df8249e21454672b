"""`extract`: images in, a folder of features out. It can be interrupted at any time and continued."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.data.images import MAX_PIXELS
from dinov2_fast.data.sources import Images, require_images
from dinov2_fast.data.workers import MAX_SECONDS
from dinov2_fast.errors import InvalidValueError
from dinov2_fast.extraction.additions import begin_addition
from dinov2_fast.extraction.compute import DEFAULT, Outputs, check_features
from dinov2_fast.extraction.image_list import ImageList
from dinov2_fast.extraction.provenance import provenance
from dinov2_fast.extraction.run import Progress, make_shards
from dinov2_fast.features.lock import lock
from dinov2_fast.features.manifest import claim, compare, discard
from dinov2_fast.features.schema import default_shard_size, holds_features
from dinov2_fast.features.shards import check_format, open_shards
from dinov2_fast.inference.loading import check_precision, find_device, load_model, processor_for


def extract(
    images: Images,
    model: Any = "dinov2_vits14",
    *,
    out: str | os.PathLike[str],
    weights: str | os.PathLike[str] | None = None,
    position_interpolation: str | None = None,
    stride: int | tuple[int, int] | None = None,
    device: str | None = None,
    precision: str = "auto",
    engine: bool = True,
    size: int | tuple[int, int] | None = None,
    crop: bool = True,
    background: str | None = None,
    processor: Dinov2ImageProcessor | None = None,
    features: Sequence[str] = DEFAULT,
    dtype: str = "auto",
    batch_size: int = 32,
    shard_size: int | None = None,
    format: str = "parquet",
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
    max_seconds: float = MAX_SECONDS,
    part: tuple[int, int] = (1, 1),
    overwrite: bool = False,
    add: bool = False,
    retry_failed: bool = False,
    announce: Callable[[Progress], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Progress:
    """Writes the features of images to the folder `out`: one row for each image, in order, in shards.

    :func:`dinov2_fast.load_features` reads the folder; :mod:`dinov2_fast.features.schema` describes it. An image that
    cannot be read, or whose features are not finite, is a row with an error. A shard is complete or absent, and a
    complete shard is not made again: after an interruption the same call makes the rest, with the same bits. Only a
    shard for which memory ran out, so that its batches were halved, may differ in rounding, and the shard records it.
    Memory holds one shard at most, and with `add` the paths that `out` holds. If no file of the first shard can be
    read, no features are written.

    Args:
        images: one or more paths (files, folders, globs, lists, archives, URLs; see
            :func:`dinov2_fast.data.sources.find_images`), or :class:`ImageSource` objects, each of which is a row.
        model: a name, file, folder or hub id for :func:`dinov2_fast.load`; or a
            :class:`dinov2_fast.DinoVisionTransformer` in eval mode, or an engine made of one by
            :func:`dinov2_fast.optimize_for_inference`, which run as they are. An engine with the mean and std of the
            processor normalizes uint8 images itself: a quarter of the bytes from the workers and to the device.
        out: the output folder; made if it does not exist.
        weights, position_interpolation: see :func:`dinov2_fast.load`. These and the next four settings are for a model
            that is named; with a model object they are an error.
        stride: pixels from one patch to the next; by default the patch size.
        device: by default a GPU if there is one.
        precision: of the computation, "fp32", "bf16", "fp16" or "fp8"; "auto" is bf16 on a GPU and fp32 elsewhere.
        engine: run the faster form of the model for inference (:func:`dinov2_fast.optimize_for_inference`).
        size: of the images for the model, in pixels, an int or (height, width), multiples of 14. By default that of the
            processor beside the model, or 224 x 224.
        crop: cut out the centre of images; False squeezes whole images into `size`.
        background: a colour behind transparent pixels; by default alpha is dropped.
        processor: in place of `size`, `crop` and `background`. Its outputs must have one size.
        features: names, see :mod:`dinov2_fast.extraction.compute`.
        dtype: of the stored features, "fp32" or "fp16"; "auto" is fp32 for single vectors and fp16 for tokens. bf16
            values fit fp32 exactly, and npy and Parquet have no bf16.
        batch_size: images in one forward pass. A batch is a fixed range of rows, rows with errors included, and batches
            begin anew with each shard.
        shard_size: rows of a shard; by default as many whole batches as fit 8192 rows and 256 MiB, at least one.
        format: "parquet" or "npy".
        workers: processes that decode images; 0 decodes in this process, without a limit of time.
        max_pixels, max_seconds: larger images, and with `workers` those that take longer in two tries, get an error.
        part: (number from 1, count): this process makes every `count`-th shard, beginning with the `number`-th. `count`
            processes with the same arguments write together what one would write.
        overwrite: delete the features in `out` first; other files stay.
        add: keep the features that `out` holds, and write those of images with new paths into new shards after them.
        retry_failed: decode images with errors again, and make shards again in which one succeeds. With `add`, which
            keeps all shards, they count as new and get another row.
        announce, progress: functions that are called once before the first image, and after each batch.

    Returns:
        The progress at the end.

    Raises:
        FileNotFoundError: a path does not exist.
        NotADirectoryError: `out` is a file.
        InvalidValueError: no images, a damaged list or archive, or a setting that does not exist or does not fit.
        WeightsError: the weights cannot be had.
        ManifestError: `out` holds features that were made in another way; the message says what differs.
        LockedError: another process writes there.
        NothingReadError: no file of the first shard could be read.
    """
    _check_settings(batch_size, shard_size, workers, part, overwrite, add)
    check_features(features, dtype)
    check_format(format)
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"The output folder {str(folder)!r} is a file.")
    loading: dict[str, Any] = {"weights": weights, "position_interpolation": position_interpolation, "stride": stride}
    loading |= {"device": device, "precision": precision, "engine": engine}
    is_named = isinstance(model, str | os.PathLike)
    if is_named:  # before any weights are read
        check_precision(precision, find_device(device), engine=engine)
    else:
        _refuse_settings_of_loading(loading)
    processor = _choose_processor(model, processor, size, crop, background)
    sources = require_images(images)
    about: dict[str, Any] = {"python": platform.python_version(), "machine": platform.machine()}
    if is_named:
        about["model"] = os.fspath(model)
        model = load_model(model, processor, **loading)
        about["weights"] = getattr(model, "loaded_from", None)
    outputs = Outputs(model, processor, features, dtype)
    shard_size = shard_size or default_shard_size(outputs.features, batch_size)
    shards = open_shards(folder, format, outputs.features)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = provenance(outputs, processor, max_pixels)
    manifest |= {"batch_size": batch_size, "shard_size": shard_size, "format": format, "about": about}
    with lock(folder, part), ExitStack() as stack:
        if add and holds_features(folder):
            compare(folder, manifest)
            listed = begin_addition(folder, sources, shards, stack, retry_failed=retry_failed)
        else:
            listed = ImageList(sources, shard_size, folder, part=part)
            stack.callback(listed.close)
            if overwrite:
                discard(folder)
            inputs = {"images": listed.section.images, "sha256": listed.section.sha256}
            claim(folder, {**manifest, "inputs": inputs})
        decoding = {"workers": workers, "max_pixels": max_pixels, "max_seconds": max_seconds}
        return make_shards(listed, outputs, shards, batch_size, decoding, retry_failed, announce, progress)


def _check_settings(
    batch_size: int, shard_size: int | None, workers: int, part: tuple[int, int], overwrite: bool, add: bool
) -> None:
    if batch_size < 1 or (shard_size is not None and shard_size < 1) or workers < 0:
        raise InvalidValueError(
            f"batch_size and shard_size must be at least 1 and workers at least 0, got {batch_size}, {shard_size} and "
            f"{workers}."
        )
    if not 1 <= part[0] <= part[1]:
        raise InvalidValueError(f"part is (number, count) with a number from 1 to count, got {part}.")
    if overwrite and part[1] > 1:
        raise InvalidValueError("overwrite would delete what the other parts have written: delete the folder first.")
    if add and (overwrite or part[1] > 1):
        raise InvalidValueError(
            "add keeps what is there, and one process decides what is new: leave out overwrite and part."
        )


def _refuse_settings_of_loading(loading: Mapping[str, Any]) -> None:
    defaults = {"precision": "auto", "engine": True}
    given = [name for name, value in loading.items() if value != defaults.get(name)]
    if given:
        raise InvalidValueError(f"The model is loaded already, so leave out {', '.join(given)}.")


def _choose_processor(
    model: Any,
    processor: Dinov2ImageProcessor | None,
    size: int | tuple[int, int] | None,
    crop: bool,
    background: str | None,
) -> Dinov2ImageProcessor:
    if processor is not None:
        if size is not None or not crop or background is not None:
            raise InvalidValueError("Give a processor, or size, crop and background, not both.")
        return processor
    if size is None and not crop:
        raise InvalidValueError("--no-crop needs --size (crop=False needs size=).")
    found = processor_for(model) if size is None else Dinov2ImageProcessor.for_size(size, crop=crop)
    return Dinov2ImageProcessor(**{**found.settings(), "background": background}) if background else found
