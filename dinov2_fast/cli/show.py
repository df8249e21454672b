"""``dinov2-fast show``: PNGs of what a model finds in images, to look at."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from dinov2_fast import visualize
from dinov2_fast.cli import options
from dinov2_fast.curation.neighbours import nearest
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.errors import InvalidValueError

if TYPE_CHECKING:
    from dinov2_fast.data.sources import ImageSource
    from dinov2_fast.features.store import Features

SOME_FAILED = 3
KINDS = ("pca", "attention", "neighbours")
THUMBNAIL = (252, 252)  # pixels
DESCRIPTION = """\
Draws PNGs of what a model finds in images:

  pca.png         each image beside the first three principal components of
                  its patch features, as red, green and blue. One PCA serves
                  all images: equal colours are equal features.
  attention.png   where the CLS token looks, for each head
  neighbours.png  each image and those nearest to it, by the cosine of their
                  CLS tokens

All that can be drawn are, unless you ask for some of them. PATH are images,
or folders of images, on which --model runs; or one folder that `dinov2-fast
extract` wrote, which needs no model: its neighbours are those of the stored
features, and the PCA of the patches if they were stored.

One PCA serves the images of one run. To give other images the same colours,
keep it with --save-basis, and give it to later runs with --basis.

With random weights the sheets say so, in their titles and in their names.
"""
EPILOG = """\
examples:
  dinov2-fast show photos/ --model dinov2_vits14 --out sheets/
  dinov2-fast show photos/ --model dinov2_vits14_reg --pca --foreground --out sheets/
  dinov2-fast show cat.jpg --model dinov2_vits14 --attention --layer 5,11 --head 0,3 --out sheets/
  dinov2-fast show features/ --neighbours --count 8 --out sheets/
  dinov2-fast show photos/ --model dinov2_vits14 --save-basis colours.safetensors --out sheets/
  dinov2-fast show cat.jpg --model dinov2_vits14 --basis colours.safetensors --out cat/

Exit codes: 0 all good, 1 not possible, 2 wrong usage, 3 some images could not
be read and are left out.
"""


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "show",
        help="draw PCA colours, attention maps and nearest neighbours",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="images and folders of them, or one of features")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the PNGs; those there are replaced")
    what = parser.add_argument_group("what to draw")
    what.add_argument("--pca", action="store_true", help="colours of the patch features")
    what.add_argument("--attention", action="store_true", help="attention maps of the CLS token")
    what.add_argument("--neighbours", action="store_true", help="nearest neighbours")
    what.add_argument(
        "--foreground",
        action="store_true",
        help="in the PCA: background black, and the colours for the foreground alone, as in the DINOv2 paper",
    )
    basis = what.add_mutually_exclusive_group()
    basis.add_argument(
        "--save-basis", metavar="FILE", help="draw the PCA, and keep it in a new file (safetensors) for --basis"
    )
    basis.add_argument(
        "--basis", metavar="FILE", help="draw the PCA in the colours of the run that wrote FILE with --save-basis"
    )
    what.add_argument(
        "--layer",
        type=options.indices,
        default=(-1,),
        metavar="N,N|all",
        help="blocks for PCA and attention; 0 is the first (default: the last)",
    )
    what.add_argument(
        "--head", type=options.indices, metavar="N,N|all", help="heads for the attention maps; 0 is the first"
    )
    what.add_argument(
        "--count", type=options.at_least(1), default=5, metavar="N", help="neighbours of an image (default: 5)"
    )
    what.add_argument(
        "--limit",
        type=options.at_least(1),
        default=24,
        metavar="N",
        help="draw the first N images only. With a folder of features their neighbours are looked for among all "
        "images in it (default: 24)",
    )
    model = parser.add_argument_group("the model, for images")
    model.add_argument("--model", help="dinov2_vit{s,b,l,g}14[_reg], or a file, folder or hub id")
    model.add_argument("--weights", metavar="FILE|random:SEED", help="checkpoint file, or seeded random weights")
    options.add_images_and_device(model, default_size=518)
    options.add_stride(model)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draws; 0, or 3 if images had to be left out."""
    from dinov2_fast.features.schema import find_manifest

    args.pca = args.pca or bool(args.basis or args.save_basis)
    asked = [kind for kind in KINDS if getattr(args, kind)]
    if args.save_basis:
        visualize.check_new(args.save_basis)
    if args.basis:
        visualize.PcaBasis.load(args.basis)  # what is none is refused before a model runs
    if len(args.paths) == 1 and find_manifest(Path(args.paths[0])):
        if args.model or args.weights:
            raise InvalidValueError("A folder of features needs no --model; to run one, give the images instead.")
        return show_features(args, asked)
    return show_images(args, asked)


def show_images(args: argparse.Namespace, asked: Sequence[str]) -> int:
    """Runs the model on images and draws what was asked for, by default everything."""
    import dinov2_fast
    from dinov2_fast.features.manifest import fingerprint
    from dinov2_fast.inference.loading import find_device

    if not args.model:
        raise InvalidValueError("--model is missing: images are shown as a model sees them.")
    seen, failures = _read_images(args)
    if "neighbours" in asked and len(seen.images) < 2:
        raise InvalidValueError("Neighbours need two images or more.")
    device = find_device(args.device)
    model = dinov2_fast.load(
        args.model,
        weights=args.weights,
        device=device,
        dtype="float32",
        position_interpolation=args.position_interpolation,
    )
    layers = _resolved(args.layer, model.n_blocks, "block")
    heads = _resolved(args.head, model.num_heads, "head")
    if len(layers) > 1 and (args.basis or args.save_basis):
        raise InvalidValueError("A basis is of one block: choose one with --layer.")
    if args.stride is not None:
        model.stride = args.stride
    grid = model.patch_grid(*args.size)
    size = f"{args.size[0]} x {args.size[1]}"
    print(f"Running {args.model} on {len(seen.images)} image(s) of {size} ...", file=sys.stderr)
    _look(model, seen, layers, device, attention=not asked or "attention" in asked)
    sheets = _Sheets(Path(args.out), args.model, str(model.loaded_from))
    if not asked or "pca" in asked:
        patches = {layer: np.stack(tokens) for layer, tokens in seen.patches.items()}
        weights = fingerprint(model) if args.basis or args.save_basis else ""
        bases = {
            layer: _basis(args, tokens, grid, {"model": args.model, "weights": weights, "block": str(layer)})
            for layer, tokens in patches.items()
        }
        rgb = {layer: basis.rgb(patches[layer], grid) for layer, basis in bases.items()}
        strips = visualize.pca_strips(seen.names, seen.images, rgb)
        sheets.save_pca(strips, f"{size}, {_blocks(layers)}", _note(args, bases[layers[0]]))
    if not asked or "attention" in asked:
        strips = visualize.attention_strips(seen.names, seen.images, seen.attention, grid, heads)
        sheets.save_attention(strips, f"{size}, {_blocks(layers)}")
    if "neighbours" in asked or (not asked and len(seen.images) > 1):
        rows = range(len(seen.images))
        found, cosines = nearest(np.stack(seen.cls), rows, args.count)
        images = {row: _square(image) for row, image in enumerate(seen.images)}
        strips = visualize.neighbour_strips(dict(enumerate(seen.names)), images, rows, found, cosines)
        sheets.save_neighbours(strips, len(rows))
    return SOME_FAILED if failures else 0


@dataclass
class _Seen:
    """What a model sees and finds, one of each for every image."""

    names: list[str] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)  # cut to size
    cls: list[Any] = field(default_factory=list)  # (hidden,)
    patches: dict[int, list[Any]] = field(default_factory=dict)  # block -> (patches, hidden)
    attention: dict[int, list[Any]] = field(default_factory=dict)  # block -> (heads, patches)


def _read_images(args: argparse.Namespace) -> tuple[_Seen, int]:
    """Names and images, and how many could not be read."""
    from dinov2_fast.data.sources import find_images

    found = list(islice(find_images(args.paths), args.limit + 1))
    if not found:
        raise InvalidValueError(f"There are no images in {', '.join(map(repr, args.paths))}.")
    if len(found) > args.limit:
        print(f"The first {args.limit} images are shown; --limit sets how many.", file=sys.stderr)
    processor = Dinov2ImageProcessor.for_size(args.size, do_rescale=False, do_normalize=False)
    seen, failures = _Seen(), 0
    for image in found[: args.limit]:
        cut = _cut(image, processor)
        if cut is None:
            failures += 1
        else:
            seen.names.append(Path(image.path).stem)
            seen.images.append(cut)
    if not seen.images:
        raise InvalidValueError("None of the images could be read.")
    return seen, failures


def _cut(image: ImageSource, processor: Dinov2ImageProcessor) -> Image.Image | None:
    """An image as the processor cuts it; None, and the reason on stderr, if it cannot be read."""
    from dinov2_fast.data.decoding import decode

    decoded = decode(image, processor)
    if decoded.pixels is None:
        print(f"{image.path!r} cannot be shown: {decoded.error}", file=sys.stderr)
        return None
    return Image.fromarray(np.ascontiguousarray(decoded.pixels.transpose(1, 2, 0)))


def _grey(processor: Dinov2ImageProcessor) -> Image.Image:
    """In the place of an image that cannot be read any more."""
    height, width = processor.output_size or THUMBNAIL
    return Image.new("RGB", (width, height), "lightgrey")


def _look(model: Any, seen: _Seen, layers: list[int], device: Any, attention: bool) -> None:
    """Adds what the model finds in each image, its attention maps if they are wanted."""
    import torch

    normalize = Dinov2ImageProcessor(do_resize=False, do_center_crop=False)
    last = model.n_blocks - 1
    kept = sorted({*layers, last})
    with torch.inference_mode():
        for image in seen.images:
            pixels = normalize(image).pixel_values.to(device)
            outputs = model.get_intermediate_layers(pixels, n=kept, return_class_token=True)
            found = dict(zip(kept, outputs, strict=True))
            seen.cls.append(found[last][1][0].cpu().numpy())
            for layer in layers:
                seen.patches.setdefault(layer, []).append(found[layer][0][0].cpu().numpy())
            if attention:
                maps = model.attention_maps(pixels, layers)[0].flatten(-2).cpu().numpy()
                for layer, weights in zip(layers, maps, strict=True):
                    seen.attention.setdefault(layer, []).append(weights)


def show_features(args: argparse.Namespace, asked: Sequence[str]) -> int:
    """Draws what stored features allow: neighbours, and the PCA of patches."""
    import dinov2_fast
    from dinov2_fast.data.sources import ImageSource
    from dinov2_fast.extraction.as_stored import processor_of
    from dinov2_fast.extraction.compute import without_normalization

    features = dinov2_fast.load_features(args.paths[0])
    if "attention" in asked:
        raise InvalidValueError("Features hold no attention maps: give the images, and --model.")
    for kind, name in (("pca", "patches"), ("neighbours", "cls")):
        if kind in asked and name not in features:
            raise InvalidValueError(f"--{kind} needs the feature {name!r}; stored are {', '.join(features)}.")
    there = [row for row, error in enumerate(features.error) if error is None]
    rows = there[: args.limit]
    if not rows:
        raise InvalidValueError(f"No image in {args.paths[0]!r} has features.")
    if len(there) > len(rows):
        print(f"The first {len(rows)} images are shown; --limit sets how many.", file=sys.stderr)
    sheets = _Sheets(Path(args.out), *_origin(features))
    processor = without_normalization(processor_of(features.manifest))
    paths = features.path
    names = [Path(path).stem for path in paths]
    if "pca" in asked or (not asked and "patches" in features):
        last = features.manifest["model"]["n_blocks"] - 1
        grid = _stored_grid(features.manifest["model"], processor)
        patches = _stored_patches(features, rows)
        about = {"model": _origin(features)[0], "weights": features.manifest["weights"], "block": str(last)}
        basis = _basis(args, patches, grid, about)
        images = [_cut(ImageSource(paths[row]), processor) or _grey(processor) for row in rows]
        strips = visualize.pca_strips([names[row] for row in rows], images, {last: basis.rgb(patches, grid)})
        sheets.save_pca(strips, "as they were stored", _note(args, basis))
    if "neighbours" in asked or (not asked and "cls" in features and len(there) > 1):
        found, cosines = nearest(features["cls"], rows, args.count)
        drawn = {
            row: _square(_cut(ImageSource(paths[row]), processor) or _grey(processor))
            for row in sorted({*rows, *found.ravel().tolist()})
        }
        strips = visualize.neighbour_strips(dict(enumerate(names)), drawn, rows, found, cosines)
        sheets.save_neighbours(strips, len(there))
    return 0


def _origin(features: Features) -> tuple[str, str]:
    """The model and its weights, as an extraction recorded them."""
    about = features.manifest.get("about", {})
    return str(about.get("model", "stored features")), str(about.get("weights", ""))


def _stored_grid(model: dict[str, Any], processor: Dinov2ImageProcessor) -> Any:
    """Rows and columns of patches."""
    patch = model["patch_size"]
    strides = model.get("stride", (patch, patch))
    return tuple((side - patch) // step + 1 for side, step in zip(processor.output_size or (), strides, strict=False))


def _stored_patches(features: Features, rows: list[int]) -> Any:
    """The patch tokens of some rows, in order, (rows, patches, hidden); shards behind the last row are not read."""
    found, first = [], 0
    for shard in features.shards():
        inside = [row - first for row in rows if first <= row < first + len(shard)]
        if inside:
            found.append(shard["patches"][inside])
        first += len(shard)
        if first > rows[-1]:
            break
    return np.concatenate(found)


def _basis(args: argparse.Namespace, patches: Any, grid: Any, about: dict[str, str]) -> visualize.PcaBasis:
    """The PCA of --basis, or that of these patches, which --save-basis keeps.

    Raises:
        ValueError: the basis is of other features than `about` says of these, or has no foreground to be shown alone.
    """
    if args.basis:
        basis = visualize.PcaBasis.load(args.basis)
        _check_basis(args, basis, about)
        return basis
    foreground = "threshold" if args.foreground else None
    basis = visualize.PcaBasis.fit(patches, grid, foreground=foreground, about=about)
    if args.save_basis:
        basis.save(args.save_basis)
        print(f"{'basis:':12}{args.save_basis}")
    return basis


def _check_basis(args: argparse.Namespace, basis: visualize.PcaBasis, about: dict[str, str]) -> None:
    """Raises `ValueError` as `_basis` does."""
    of = {name: basis.about.get(name) for name in about}
    if of["weights"] != about["weights"]:
        raise InvalidValueError(
            f"The basis {args.basis!r} was made of {of['model']!r}, and {about['model']!r} has other weights: make one "
            "of this model with --save-basis."
        )
    if of["block"] != about["block"]:
        raise InvalidValueError(
            f"The basis {args.basis!r} is of block {of['block']}, and these are the features of block "
            f"{about['block']}: choose the block with --layer, or make a basis with --save-basis."
        )
    if args.foreground and basis.foreground is None:
        raise InvalidValueError(
            f"The basis {args.basis!r} knows no foreground: make one with --foreground --save-basis, or leave out "
            "--foreground."
        )


def _note(args: argparse.Namespace, basis: visualize.PcaBasis) -> str:
    """What the colours of a sheet mean."""
    note = f"The PCA is that of {args.basis}" if args.basis else "One PCA for all images"
    return f"{note}: equal colours are equal features." + (" The background is black." if basis.foreground else "")


class _Sheets:
    """Where the sheets go, and the mark of random weights on each."""

    def __init__(self, folder: Path, model: str, weights: str) -> None:
        self._folder, self._model, self._random = folder, model, weights if weights.startswith("random:") else None

    def save_pca(self, strips: visualize.Strips, what: str, note: str) -> None:
        columns = max(6 // len(strips[0]), 1)
        self._save(
            "pca",
            strips,
            f"first three principal components of the patch tokens, {what}",
            note,
            columns=columns,
            height=200,
        )

    def save_attention(self, strips: visualize.Strips, what: str) -> None:
        note = "Each map is scaled on its own: it shows where a head looks, not how strongly beside another."
        self._save("attention", strips, f"attention of the CLS token, {what}", note, height=150)

    def save_neighbours(self, strips: visualize.Strips, images: int) -> None:
        note = f"On the left an image, then those nearest to it among {images}, with the cosine of the CLS tokens."
        self._save("neighbours", strips, "nearest neighbours", note, height=150)

    def _save(self, kind: str, strips: visualize.Strips, title: str, note: str, **layout: int) -> None:
        """Writes the sheet and says where it is."""
        name, title = f"{kind}.png", f"{self._model}, {title}"
        if self._random is not None:
            name, title = f"{kind}-random-weights.png", f"RANDOM WEIGHTS ({self._random}): {title}"
        path = visualize.save_sheet(self._folder / name, strips, title=title, note=note, **layout)
        print(f"{kind + ':':12}{path}")


def _blocks(layers: list[int]) -> str:
    return f"block{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def _square(image: Image.Image) -> Image.Image:
    """The centre of an image."""
    return ImageOps.fit(image, THUMBNAIL)


def _resolved(asked: tuple[int, ...] | None, number: int, what: str) -> list[int]:
    """Indices from 0 on, in order; None is all."""
    indices = range(number) if asked is None else asked
    outside = [index for index in indices if not -number <= index < number]
    if outside:
        raise InvalidValueError(f"There is no {what} {outside[0]}; the {what}s of this model are 0 to {number - 1}.")
    return sorted({index % number for index in indices})
