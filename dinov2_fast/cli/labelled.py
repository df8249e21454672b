"""What ``knn`` and ``linear`` share: images in class folders, or their stored features, with their classes."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import dinov2_fast
from dinov2_fast.cli.extract import SECONDS_BETWEEN_LINES
from dinov2_fast.cli.options import POSITION_INTERPOLATIONS, at_least, default_workers, size
from dinov2_fast.data.failures import Failures
from dinov2_fast.errors import InvalidValueError

if TYPE_CHECKING:
    from dinov2_fast.evaluation.evaluate import Tokens
    from dinov2_fast.features.store import Features

SOURCES = """\
Each folder holds a folder of images for each class, on which --model runs, or
is one that `dinov2-fast extract` wrote, which needs no model. The class of an
image is the name of the folder that it lies in."""


@dataclass(frozen=True)
class Source:
    """A model.

    Attributes:
        name: as it was given.
        weights: where they came from.
        blocks: how many it has.
    """

    name: str | None
    weights: str | None
    blocks: int

    def describe(self) -> dict[str, Any]:
        """For the JSON."""
        return {"model": self.name, "weights": self.weights}


@dataclass(frozen=True)
class Labelled:
    """The images of one folder that have features.

    Attributes:
        folder: where they are.
        tokens: their features.
        names: the class of each.
        failures: images without features, which are left out.
        model: what the features are of.
    """

    folder: str
    tokens: Tokens
    names: list[str]
    failures: Failures
    model: Source

    def describe(self) -> dict[str, Any]:
        """For the JSON."""
        classes = len(set(self.names))
        return {"folder": self.folder, "images": len(self.names), "classes": classes, "failures": len(self.failures)}


class Progress:
    """Says on stderr now and then, and at the end, how many of a total are done."""

    def __init__(self, name: str, total: int, unit: str) -> None:
        self._name, self._total, self._unit, self._said = name, total, unit, time.perf_counter()

    def __call__(self, done: int) -> None:
        now = time.perf_counter()
        if done == self._total or now - self._said >= SECONDS_BETWEEN_LINES:
            print(f"{self._name}: {done}/{self._total} {self._unit}", file=sys.stderr, flush=True)
            self._said = now


def add_options(parser: Any) -> None:
    """Adds those of the model, and --json."""
    model = parser.add_argument_group("the model, for images")
    model.add_argument("--model", help="dinov2_vit{s,b,l,g}14[_reg], or a file, folder or hub id")
    model.add_argument("--weights", metavar="FILE|random:SEED", help="checkpoint file, or seeded random weights")
    model.add_argument(
        "--position-interpolation",
        choices=POSITION_INTERPOLATIONS,
        help="how positions are resampled (default: as Meta's code does; transformers: size, timm: antialias)",
    )
    model.add_argument("--size", type=size, metavar="N|HxW", help="pixels, a multiple of 14 (default: 224)")
    model.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="auto is bf16 on a GPU and fp32 on a CPU (default: auto)",
    )
    model.add_argument("--batch-size", type=at_least(1), default=32, metavar="N", help="(default: 32)")
    model.add_argument(
        "--workers",
        type=at_least(0),
        default=default_workers(),
        metavar="N",
        help="processes that decode images, 0 for none (default: %(default)s)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--json", metavar="FILE", help="write the results there as well")


def read_all(args: argparse.Namespace, folders: Sequence[str], blocks: int) -> list[Labelled]:
    """The folders, with the class tokens of up to `blocks` last blocks.

    Raises:
        ValueError: no class folders, classes that do not fit, images without a model, a model without images,
            features of two models, nothing readable, or a file for --json that cannot be written.
    """
    for folder in folders:
        if not os.path.isdir(folder):
            raise InvalidValueError(
                f"{folder!r} is {'a file' if os.path.exists(folder) else 'not there'}; give a folder."
            )
    if args.json:
        _check_writable(Path(args.json))
    stored = [is_stored(Path(folder)) for folder in folders]
    if all(stored):
        if args.model or args.weights:
            raise InvalidValueError("Folders of features need no --model; to run one, give folders of images.")
        return _read_stored(folders, blocks)
    if any(stored):
        raise InvalidValueError(
            "Give folders of images or folders of features, not both: features of two models differ."
        )
    if not args.model:
        raise InvalidValueError("--model is missing: these folders hold no features, and images need a model.")
    return _read_images(args, folders, blocks)


def classes_of(read: Sequence[Labelled]) -> list[NDArray[np.int64]]:
    """The labels of the images, as numbers of the classes of the first folder, the training's, in alphabetical order.

    Raises:
        ValueError: fewer than two classes, or a class that no training image has.
    """
    return _numbers([(each.folder, each.names) for each in read])


def _numbers(named: Sequence[tuple[str, Sequence[str]]]) -> list[NDArray[np.int64]]:
    """`classes_of` for folders and the classes of the images in each."""
    train, names = named[0]
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    if len(numbers) < 2:
        raise InvalidValueError(f"{train!r} has one class, {names[0]!r}: there is nothing to tell apart.")
    for folder, others in named[1:]:
        unknown = sorted(set(others) - set(numbers))
        if unknown:
            raise InvalidValueError(
                f"{folder!r} has {len(unknown)} class(es) that {train!r} lacks, such as {unknown[0]!r}."
            )
    return [np.array([numbers[name] for name in names], np.int64) for _, names in named]


def report(args: argparse.Namespace, read: Sequence[Labelled], table: str, results: dict[str, Any]) -> None:
    """Prints which images there were and the table, on stderr which are left out, and writes the JSON asked for."""
    for labelled in read:
        if labelled.failures:
            print(f"Left out of {labelled.folder}:\n{labelled.failures}", file=sys.stderr)
        about = labelled.describe()
        failed = f", {about['failures']} left out" if about["failures"] else ""
        print(f"{labelled.folder}: {about['images']} images in {about['classes']} classes{failed}")
    print(f"\n{table}")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def features_for(depth: int, blocks: int) -> str:
    """What ``extract --features`` stores for linear probes on up to `blocks` last blocks of a model of `depth`."""
    return ",".join([*(f"cls@{depth - back}" for back in range(blocks, 1, -1)), "cls", "patch_mean"])


def counts(text: str) -> list[int]:
    """The type of options that are whole numbers from 1 on with commas between them."""
    try:
        return [at_least(1)(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, or several such as 1,4") from None


def _check_writable(path: Path) -> None:
    """Before the work that it is to hold the results of; makes its folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidValueError(f"--json: the folder {str(path.parent)!r} cannot be made: {error.strerror}.") from None
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InvalidValueError(f"--json: {str(path)!r} is a folder, or may not be written.")


def is_stored(folder: Path) -> bool:
    """Whether `dinov2-fast extract` wrote this folder."""
    from dinov2_fast.features.schema import find_manifest

    return find_manifest(folder) is not None


def _read_stored(folders: Sequence[str], blocks: int) -> list[Labelled]:
    opened = [dinov2_fast.load_features(folder) for folder in folders]
    for folder, features in zip(folders[1:], opened[1:], strict=True):
        if features.manifest["weights"] != opened[0].manifest["weights"]:
            raise InvalidValueError(f"The features in {folder!r} are of another model than those in {folders[0]!r}.")
    return [_labelled(folder, features, blocks) for folder, features in zip(folders, opened, strict=True)]


def _labelled(folder: str, features: Features, blocks: int) -> Labelled:
    about = features.manifest["about"]
    model = Source(about.get("model"), about.get("weights"), features.manifest["model"]["n_blocks"])
    good = np.array([error is None for error in features.error], bool)
    failures = Failures()
    for row in np.flatnonzero(~good):
        failures.add(features.path[row], features.error[row] or "")
    if not good.any():
        raise InvalidValueError(f"No image in {folder!r} has features:\n{failures}")
    names = [_class_of(features.path[row]) for row in np.flatnonzero(good)]
    stored = _last_blocks(features, model.blocks, blocks)
    if not stored:
        raise InvalidValueError(
            f"{folder!r} has no class tokens of the last block: extract the features cls,patch_mean."
        )
    cls = np.stack([features[name][good] for name in stored], axis=1)
    patch_mean = next((name for name in ("patch_mean", f"patch_mean@{model.blocks - 1}") if name in features), None)
    tokens = _tokens(cls, features[patch_mean][good] if patch_mean else None)
    return Labelled(folder, tokens, names, failures, model)


def _last_blocks(features: Features, depth: int, blocks: int) -> list[str]:
    """The names of the class tokens after the last blocks, as many as there are without a gap, up to `blocks`."""
    found: list[str] = []
    for layer in range(depth - 1, max(depth - blocks, 0) - 1, -1):
        names = ["cls"] * (layer == depth - 1) + [f"cls@{layer}"]
        there = [name for name in names if name in features]
        if not there:
            break
        found.insert(0, there[0])
    return found


def _class_of(path: str) -> str:
    return os.path.basename(os.path.dirname(path))


def _read_images(args: argparse.Namespace, folders: Sequence[str], blocks: int) -> list[Labelled]:
    from dinov2_fast.inference.loading import find_device, processor_for

    files = [_list_labelled(folder) for folder in folders]
    _numbers([(folder, list(map(_class_of, listed))) for folder, listed in zip(folders, files, strict=True)])
    model = dinov2_fast.load(
        args.model,
        weights=args.weights,
        device=find_device(args.device),
        dtype="float32",
        position_interpolation=args.position_interpolation,
    )
    processor = processor_for(args.model, args.size)
    engine = dinov2_fast.optimize_for_inference(model, args.precision, follow_weights=False)
    source = Source(args.model, model.loaded_from, model.n_blocks)
    return [
        _run_model(folder, listed, engine, processor, args, min(blocks, model.n_blocks), source)
        for folder, listed in zip(folders, files, strict=True)
    ]


def _list_labelled(folder: str) -> list[str]:
    """The images in the class folders of `folder`."""
    from dinov2_fast.data.sources import list_images

    files = list_images([folder])
    if not files:
        raise InvalidValueError(f"There are no images in {folder!r}.")
    loose = [file for file in files if os.path.dirname(os.path.relpath(file, folder)) == ""]
    if loose:
        raise InvalidValueError(f"{loose[0]!r} lies in no class folder: {folder!r} must hold a folder for each class.")
    return files


def _run_model(
    folder: str,
    files: Sequence[str],
    engine: Any,
    processor: Any,
    args: argparse.Namespace,
    blocks: int,
    source: Source,
) -> Labelled:
    from dinov2_fast.extraction.batches import NOT_FINITE

    cls, patch_mean, names, failures = [], [], [], Failures()
    for batch, pixels in _batches(folder, files, processor, args, failures):
        for file, one, mean in zip(batch, *_run_batch(engine, pixels, blocks), strict=True):
            if np.isfinite(one).all() and np.isfinite(mean).all():
                cls.append(one)
                patch_mean.append(mean)
                names.append(_class_of(file))
            else:
                failures.add(file, NOT_FINITE)
    if not cls:
        raise InvalidValueError(f"No image in {folder!r} can be read:\n{failures}")
    return Labelled(folder, _tokens(np.stack(cls), np.stack(patch_mean)), names, failures, source)


def _batches(
    folder: str, files: Sequence[str], processor: Any, args: argparse.Namespace, failures: Failures
) -> Iterator[tuple[list[str], NDArray[Any]]]:
    """The images that can be read and their pixels (batch, 3, height, width), and on stderr how far it is.

    Those that cannot be read go to `failures`.
    """
    from dinov2_fast.data.sources import ImageSource
    from dinov2_fast.data.workers import decode_all

    done, progress = 0, Progress(folder, len(files), "images")
    answers = decode_all(map(ImageSource, files), processor, workers=args.workers, ahead=2 * args.batch_size)
    decoded = zip(files, answers, strict=True)
    while batch := list(islice(decoded, args.batch_size)):
        good = [(file, image.pixels) for file, image in batch if image.pixels is not None]
        for file, image in batch:
            if image.error is not None:
                failures.add(file, image.error)
        if good:
            yield [file for file, _ in good], np.stack([pixels for _, pixels in good])
        done += len(batch)
        progress(done)


def _run_batch(engine: Any, pixels: NDArray[Any], blocks: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The class tokens of the last blocks (batch, blocks, dim), and the last block's mean of the patches."""
    import torch

    with torch.inference_mode():
        layers = engine.get_intermediate_layers(
            torch.from_numpy(pixels).to(engine.device), n=blocks, return_class_token=True
        )
        cls = torch.stack([one for _, one in layers], dim=1).float()
        return cls.cpu().numpy(), layers[-1][0].float().mean(dim=1).cpu().numpy()


def _tokens(cls: NDArray[Any], patch_mean: NDArray[Any] | None) -> Tokens:
    import torch

    from dinov2_fast.evaluation.evaluate import Tokens

    mean = None if patch_mean is None else torch.from_numpy(np.ascontiguousarray(patch_mean))
    return Tokens(torch.from_numpy(np.ascontiguousarray(cls)), mean)
