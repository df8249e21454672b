"""What ``knn`` and ``linear`` share: pictures in class folders, or their stored features, with their classes."""

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
from dinov2_fast.cli.options import DIALECTS, at_least, default_workers, size

if TYPE_CHECKING:
    from dinov2_fast.evaluate import Tokens

SOURCES = """\
Each is a folder with a folder of pictures for each class, on which --model
runs, or a folder that `dinov2-fast extract` wrote, which needs no model. The
class of a picture is the name of the folder that it lies in."""


@dataclass(frozen=True)
class Labelled:
    """The pictures of one folder that have features.

    Attributes:
        folder: where they are.
        tokens: their features.
        names: the class of each.
        failures: pictures without features, which are left out.
    """

    folder: str
    tokens: Tokens
    names: list[str]
    failures: int

    def describe(self) -> dict[str, Any]:
        """For the JSON."""
        classes = len(set(self.names))
        return {"folder": self.folder, "pictures": len(self.names), "classes": classes, "failures": self.failures}


def add_options(parser: Any) -> None:
    """Adds those of the model, and --json."""
    model = parser.add_argument_group("the model, for pictures")
    model.add_argument("--model", help="dinov2_vit{s,b,l,g}14[_reg], or a file, folder or hub id")
    model.add_argument("--weights", metavar="FILE|random:SEED", help="checkpoint file, or seeded random weights")
    model.add_argument(
        "--dialect",
        choices=DIALECTS,
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
        help="processes that decode pictures, 0 for none (default: %(default)s)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--json", metavar="FILE", help="write the results there as well")


def read_all(args: argparse.Namespace, folders: Sequence[str], blocks: int) -> tuple[list[Labelled], str | None]:
    """The folders, with the class tokens of up to `blocks` last blocks, and where the model's weights came from.

    Raises:
        ValueError: no class folders, pictures without a model, a model without pictures, nothing readable.
    """
    stored = [is_stored(Path(folder)) for folder in folders]
    if all(stored):
        if args.model or args.weights:
            raise ValueError("Folders of features need no --model; to run one, give folders of pictures.")
        return [_read_stored(folder) for folder in folders], None
    if any(stored):
        raise ValueError("Give folders of pictures or folders of features, not both: features of two models differ.")
    if not args.model:
        raise ValueError("--model is missing: these folders hold no features, and pictures need a model.")
    from dinov2_fast.extraction.extractor import find_device, processor_for

    files = [_list_labelled(folder) for folder in folders]
    model = dinov2_fast.load(
        args.model, weights=args.weights, device=find_device(args.device), dtype="float32", dialect=args.dialect
    )
    processor = processor_for(args.model, args.size)
    engine = dinov2_fast.optimize_for_inference(model, args.precision)
    blocks = min(blocks, model.n_blocks)
    read = [
        _run_model(folder, listed, engine, processor, args, blocks)
        for folder, listed in zip(folders, files, strict=True)
    ]
    return read, model.loaded_from


def classes_of(train: Labelled, others: Sequence[Labelled]) -> list[NDArray[np.int64]]:
    """The labels of the training pictures and of the others, as numbers of the training classes in alphabetical order.

    Raises:
        ValueError: fewer than two classes, or a class that no training picture has.
    """
    numbers = {name: number for number, name in enumerate(sorted(set(train.names)))}
    if len(numbers) < 2:
        raise ValueError(f"{train.folder!r} has one class, {train.names[0]!r}: there is nothing to tell apart.")
    for other in others:
        unknown = sorted(set(other.names) - set(numbers))
        if unknown:
            raise ValueError(
                f"{other.folder!r} has {len(unknown)} class(es) that {train.folder!r} lacks, such as {unknown[0]!r}."
            )
    return [np.array([numbers[name] for name in labelled.names], np.int64) for labelled in (train, *others)]


def report(args: argparse.Namespace, read: Sequence[Labelled], results: dict[str, Any]) -> None:
    """Prints which pictures there were, and writes the JSON that was asked for."""
    for labelled in read:
        about = labelled.describe()
        failed = f", {about['failures']} left out" if about["failures"] else ""
        print(f"{labelled.folder}: {about['pictures']} pictures in {about['classes']} classes{failed}")
    print()
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def is_stored(folder: Path) -> bool:
    """Whether `dinov2-fast extract` wrote this folder."""
    return (folder / "manifest.json").is_file()


def _read_stored(folder: str) -> Labelled:
    features = dinov2_fast.load_features(folder)
    good = np.array([error is None for error in features.error], bool)
    if not good.any():
        raise ValueError(f"No picture in {folder!r} has features.")
    names = [os.path.basename(os.path.dirname(features.path[row])) for row in np.flatnonzero(good)]
    tokens = _tokens(features["cls"][good, None], features["patch_mean"][good])
    return Labelled(folder, tokens, names, int((~good).sum()))


def _list_labelled(folder: str) -> list[str]:
    """The pictures in the class folders of `folder`."""
    from dinov2_fast.extraction import list_images

    files = list_images([folder])
    if not files:
        raise ValueError(f"There are no pictures in {folder!r}.")
    loose = [file for file in files if os.path.dirname(os.path.relpath(file, folder)) == ""]
    if loose:
        raise ValueError(f"{loose[0]!r} lies in no class folder: {folder!r} must hold a folder for each class.")
    return files


def _run_model(
    folder: str, files: Sequence[str], engine: Any, processor: Any, args: argparse.Namespace, blocks: int
) -> Labelled:
    cls, patch_mean, names = [], [], []
    for batch, pixels in _batches(folder, files, processor, args):
        for file, one, mean in zip(batch, *_run_batch(engine, pixels, blocks), strict=True):
            if np.isfinite(one).all() and np.isfinite(mean).all():
                cls.append(one)
                patch_mean.append(mean)
                names.append(os.path.basename(os.path.dirname(file)))
    if not cls:
        raise ValueError(f"No picture in {folder!r} can be read.")
    return Labelled(folder, _tokens(np.stack(cls), np.stack(patch_mean)), names, len(files) - len(names))


def _batches(
    folder: str, files: Sequence[str], processor: Any, args: argparse.Namespace
) -> Iterator[tuple[list[str], NDArray[Any]]]:
    """The pictures that can be read and their pixels (batch, 3, height, width), and on stderr how far it is."""
    from dinov2_fast.extraction.inputs import Picture
    from dinov2_fast.extraction.workers import decode_all

    done, said = 0, time.perf_counter()
    answers = decode_all(map(Picture, files), processor, workers=args.workers, ahead=2 * args.batch_size)
    decoded = zip(files, answers, strict=True)
    while batch := list(islice(decoded, args.batch_size)):
        good = [(file, picture.pixels) for file, picture in batch if picture.pixels is not None]
        if good:
            yield [file for file, _ in good], np.stack([pixels for _, pixels in good])
        done += len(batch)
        if done == len(files) or time.perf_counter() - said >= SECONDS_BETWEEN_LINES:
            print(f"{folder}: {done}/{len(files)} pictures", file=sys.stderr, flush=True)
            said = time.perf_counter()


def _run_batch(engine: Any, pixels: NDArray[Any], blocks: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The class tokens of the last blocks (batch, blocks, dim), and the last block's mean of the patches."""
    import torch

    with torch.inference_mode():
        layers = engine.get_intermediate_layers(
            torch.from_numpy(pixels).to(engine.device), n=blocks, return_class_token=True
        )
        cls = torch.stack([one for _, one in layers], dim=1).float()
        return cls.cpu().numpy(), layers[-1][0].float().mean(dim=1).cpu().numpy()


def _tokens(cls: NDArray[Any], patch_mean: NDArray[Any]) -> Tokens:
    import torch

    from dinov2_fast.evaluate import Tokens

    return Tokens(torch.from_numpy(np.ascontiguousarray(cls)), torch.from_numpy(np.ascontiguousarray(patch_mean)))
