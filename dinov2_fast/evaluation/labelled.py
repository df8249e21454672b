"""Labelled features: of images in class folders, on which a model runs, or of a folder of stored features.

The class of an image is the name of the folder that it lies in, also within an archive.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dinov2_fast.data.batches import Failures
from dinov2_fast.data.files import shown
from dinov2_fast.data.sources import ImageSource, require_images
from dinov2_fast.errors import InvalidValueError
from dinov2_fast.evaluation.linear import ProbeInputs
from dinov2_fast.extraction.compute import Outputs
from dinov2_fast.features.schema import holds_features
from dinov2_fast.features.store import Features, load_features
from dinov2_fast.inference import Engine
from dinov2_fast.inference.loading import check_precision, find_device, load_model, processor_for

Progress = Callable[[str, int, int, str], None]  # what is worked on, how much is done, of how much, its unit


@dataclass(frozen=True)
class ModelOptions:
    """The model that runs on images, as :func:`dinov2_fast.load` takes it, and how. Stored features need none."""

    model: str | None = None
    weights: str | None = None
    position_interpolation: str | None = None
    size: int | tuple[int, int] | None = None  # of the images in pixels; by default that of the model's processor
    precision: str = "auto"  # bf16 on a GPU and fp32 on a CPU
    device: str | None = None  # by default a GPU where there is one
    batch_size: int = 32  # images in one forward pass, fewer where memory runs out
    workers: int = 0  # processes that decode images


@dataclass(frozen=True)
class LabelledFeatures:
    """The features and classes of the images of one source, without the images that failed."""

    source: str
    tokens: ProbeInputs
    classes: list[str]  # the name of the class of each image
    failures: Failures  # images without features, which are left out
    model: str | None  # the name of the model
    weights: str | None  # where the model's weights came from
    n_blocks: int  # of the model


def read_labelled(
    sources: Sequence[str], blocks: int, options: ModelOptions, progress: Progress | None = None
) -> list[LabelledFeatures]:
    """The features and classes of each source, with the class tokens of up to `blocks` last blocks.

    Each source is a path or glob at which `find_images` finds images in class folders, and the model of `options` runs
    on them; or each is a folder of features. `progress` is called after each batch of images.

    Raises:
        WeightsError, OSError: the model's weights cannot be had; a source is missing or cannot be read.
        ValueError: images outside of class folders, classes that do not fit, images without a model, stored features
            and a model, features of two models, or a source without any features.
    """
    device = find_device(options.device)
    stored = [holds_features(Path(source)) for source in sources]
    if all(stored):
        if options.model or options.weights:
            raise InvalidValueError("Folders of features need no model; to run one, give folders of images.")
        return _read_stored(sources, blocks)
    if any(stored):
        raise InvalidValueError(
            "Give folders of images or folders of features, not both: features of two models differ."
        )
    if not options.model:
        raise InvalidValueError("--model is missing: these folders hold no features, and images need a model.")
    check_precision(options.precision, device)
    found = check_labelled(sources)
    processor = processor_for(options.model, options.size)
    engine = load_model(
        options.model,
        processor,
        weights=options.weights,
        position_interpolation=options.position_interpolation,
        device=str(device),
        precision=options.precision,
    )
    names = feature_names(engine.n_blocks, min(blocks, engine.n_blocks))
    outputs = Outputs(engine, processor, names, "fp32")
    return [_run_model(source, images, outputs, options, progress) for source, images in found]


def check_labelled(sources: Sequence[str]) -> list[tuple[str, list[ImageSource]]]:
    """Each source with its images, the training source first.

    Raises:
        OSError: a source is missing or cannot be read.
        ValueError: images outside of class folders, or classes that do not fit.
    """
    found = [_find_labelled(source) for source in sources]
    number_classes([(source, [_class_of(image.path) for image in images]) for source, images in found])
    return found


def number_classes(classes: Sequence[tuple[str, Sequence[str]]]) -> list[NDArray[np.int64]]:
    """The class of each image as a number: its place among the training classes in alphabetical order.

    `classes` has the name and the class of each image for each source, the training source first. Fewer than two
    classes, and a class that no training image has, raise `ValueError`.
    """
    train, names = classes[0]
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    if len(numbers) < 2:
        raise InvalidValueError(f"{train!r} has one class, {names[0]!r}; at least two are needed.")
    for source, others in classes[1:]:
        unknown = sorted(set(others) - set(numbers))
        if unknown:
            raise InvalidValueError(
                f"{source!r} has {len(unknown)} class(es) that {train!r} lacks, such as {unknown[0]!r}."
            )
    return [np.array([numbers[name] for name in names], np.int64) for _, names in classes]


def feature_names(depth: int, blocks: int) -> list[str]:
    """The features for linear probes on the last `blocks` blocks of a model of `depth` blocks, as extract has them."""
    return [*(f"cls@{depth - back}" for back in range(blocks, 1, -1)), "cls", "patch_mean"]


def _class_of(path: str) -> str:
    return os.path.basename(os.path.dirname(path))


def _find_labelled(source: str) -> tuple[str, list[ImageSource]]:
    """The images of a source, all of which lie in class folders."""
    images = list(require_images([source]))
    for image in images:
        if os.path.dirname(image.path) in (source.rstrip("/" + os.sep), image.archive):
            raise InvalidValueError(
                f"{shown(image.path)!r} lies in no class folder: {shown(source)!r} must hold a folder for each class."
            )
    return source, images


def _run_model(
    source: str, images: Sequence[ImageSource], outputs: Outputs, options: ModelOptions, progress: Progress | None
) -> LabelledFeatures:
    engine: Engine = outputs.model
    names = [feature.name for feature in outputs.features if feature.name != "patch_mean"]
    cls, patch_mean, classes, failures = [], [], [], Failures()
    done = 0
    with closing(outputs.run(images, batch_size=options.batch_size, workers=options.workers)) as batches:
        for decoded, found in batches:
            good = [row for row, image in enumerate(decoded) if image.error is None]
            for image, result in zip(images[done : done + len(decoded)], decoded, strict=True):
                if result.error is None:
                    classes.append(_class_of(image.path))
                else:
                    failures.add(image.path, result.error)
            cls.append(np.stack([found[name][good] for name in names], axis=1))
            patch_mean.append(found["patch_mean"][good])
            done += len(decoded)
            if progress:
                progress(source, done, len(images), "images")
    if not classes:
        raise InvalidValueError(f"No image in {source!r} has features:\n{failures}")
    tokens = ProbeInputs(torch.from_numpy(np.concatenate(cls)), torch.from_numpy(np.concatenate(patch_mean)))
    return LabelledFeatures(source, tokens, classes, failures, options.model, engine.loaded_from, engine.n_blocks)


def _read_stored(folders: Sequence[str], blocks: int) -> list[LabelledFeatures]:
    opened = [load_features(folder) for folder in folders]
    for folder, features in zip(folders[1:], opened[1:], strict=True):
        if features.manifest["weights"] != opened[0].manifest["weights"]:
            raise InvalidValueError(f"The features in {folder!r} are of another model than those in {folders[0]!r}.")
    return [_labelled(folder, features, blocks) for folder, features in zip(folders, opened, strict=True)]


def _labelled(folder: str, features: Features, blocks: int) -> LabelledFeatures:
    about, n_blocks = features.manifest["about"], features.manifest["model"]["n_blocks"]
    failures = Failures()
    for path, error in zip(features.path, features.error, strict=True):
        if error is not None:
            failures.add(path, error)
    good = [row for row, error in enumerate(features.error) if error is None]
    if not good:
        raise InvalidValueError(f"No image in {folder!r} has features:\n{failures}")
    classes = [_class_of(features.path[row]) for row in good]
    stored = _last_blocks(features, n_blocks, blocks)
    if not stored:
        raise InvalidValueError(
            f"{folder!r} has no class tokens of the last block: extract the features cls,patch_mean."
        )
    cls = np.stack([features[name][good] for name in stored], axis=1)
    patch_mean = next((name for name in ("patch_mean", f"patch_mean@{n_blocks - 1}") if name in features), None)
    mean = torch.from_numpy(features[patch_mean][good]) if patch_mean else None
    tokens = ProbeInputs(torch.from_numpy(cls), mean)
    return LabelledFeatures(folder, tokens, classes, failures, about.get("model"), about.get("weights"), n_blocks)


def _last_blocks(features: Features, depth: int, blocks: int) -> list[str]:
    """The names of the stored class tokens of the last blocks, without a gap and the last block last."""
    found: list[str] = []
    for layer in range(depth - 1, max(depth - blocks, 0) - 1, -1):
        names = ["cls"] * (layer == depth - 1) + [f"cls@{layer}"]
        name = next((name for name in names if name in features), None)
        if name is None:
            break
        found.insert(0, name)
    return found
