"""What `show` draws: images and what a model computes of them, either by running it or from a folder of features."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dinov2_fast.data.batches import Failures, readable_batches, run_in_parts
from dinov2_fast.data.decoding import decode
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.data.sources import ImageSource
from dinov2_fast.errors import InvalidValueError
from dinov2_fast.extraction.compute import without_normalization
from dinov2_fast.extraction.provenance import fingerprint, processor_of
from dinov2_fast.features.store import Features, load_features
from dinov2_fast.model import DinoVisionTransformer

KINDS = ("pca", "attention", "neighbours")
BATCH_SIZE = 8


@dataclass(frozen=True)
class Drawable:
    """Images, and what a model computes of them. What is empty is not drawn.

    Attributes:
        model: the name of the model.
        weights: where they came from.
        fingerprint: gives the SHA-256 of the weights.
        caption: what the images and features are, for the titles of sheets.
        names: of all images.
        rows: the images that are drawn, as indices in `names`.
        image: from a row to the image as the processor cuts it.
        grid: (rows, columns) of patches.
        patches: block -> (drawn images, patches, hidden).
        attention: block -> (drawn images, heads, patches).
        heads: the heads whose attention maps are drawn.
        cls: (all images, hidden), the class tokens by which neighbours are found.
        n_images: how many images have features.
        left_out: images that cannot be read.
        unreadable: images of stored features that cannot be read any more; `image` gives grey for them.
    """

    model: str
    weights: str
    fingerprint: Callable[[], str]
    caption: str
    names: Sequence[str]
    rows: Sequence[int]
    image: Callable[[int], Image.Image]
    grid: tuple[int, int] = (0, 0)
    patches: Mapping[int, NDArray[Any]] = field(default_factory=dict)
    attention: Mapping[int, NDArray[Any]] = field(default_factory=dict)
    heads: Sequence[int] = ()
    cls: NDArray[Any] | None = None
    n_images: int = 0
    left_out: Failures = field(default_factory=Failures)
    unreadable: Failures = field(default_factory=Failures)


def run_model(
    name: str,
    model: DinoVisionTransformer,
    sources: Sequence[ImageSource],
    kinds: Collection[str],
    size: tuple[int, int],
    blocks: Sequence[int],
    heads: Sequence[int],
) -> Drawable:
    """What a model computes of images.

    Args:
        name: of the model, for titles.
        model: in eval mode.
        sources: where the images are.
        kinds: of sheets; empty for all.
        size: (height, width) of the images in pixels.
        blocks: for PCA and attention, ascending.
        heads: for attention.

    Raises:
        ValueError: no image can be read.
    """
    left_out, names, images, parts, part_size = Failures(), [], [], [], BATCH_SIZE
    processor = Dinov2ImageProcessor.for_size(size, do_rescale=False, do_normalize=False)
    normalize = Dinov2ImageProcessor(do_resize=False, do_center_crop=False)
    for read, pixels in readable_batches(sources, processor, left_out, batch_size=BATCH_SIZE):
        names += [Path(source.path).stem for source in read]
        images += (cut := [_as_image(each.numpy()) for each in pixels])
        run = partial(_tokens, model, blocks, not kinds or "attention" in kinds)
        found, part_size = run_in_parts(run, normalize(cut).pixel_values, part_size)
        parts += found
    with_neighbours = "neighbours" in kinds or (not kinds and len(images) > 1)
    return Drawable(
        model=name,
        weights=str(model.loaded_from),
        fingerprint=partial(fingerprint, model),
        caption=f"{size[0]} x {size[1]}, block{'s' * (len(blocks) > 1)} {', '.join(map(str, blocks))}",
        names=names,
        rows=range(len(images)),
        image=images.__getitem__,
        grid=model.patch_grid(*size),
        patches=_joined([part.patches for part in parts]) if not kinds or "pca" in kinds else {},
        attention=_joined([part.attention for part in parts]),
        heads=heads,
        cls=np.concatenate([part.cls for part in parts]) if with_neighbours else None,
        n_images=len(images),
        left_out=left_out,
    )


class _Tokens(NamedTuple):
    cls: NDArray[Any]  # (images, hidden)
    patches: dict[int, NDArray[Any]]  # block -> (images, patches, hidden)
    attention: dict[int, NDArray[Any]]  # block -> (images, heads, patches)


def _tokens(model: DinoVisionTransformer, blocks: Sequence[int], with_attention: bool, pixels: Tensor) -> _Tokens:
    last, pixels = model.n_blocks - 1, pixels.to(model.pos_embed.device)
    kept = sorted({*blocks, last})
    with torch.inference_mode():
        outputs = model.get_intermediate_layers(pixels, n=kept, return_class_token=True)
        found = dict(zip(kept, outputs, strict=True))
        patches = {block: found[block][0].cpu().numpy() for block in blocks}
        attention = {}
        if with_attention:
            maps = model.attention_maps(pixels, blocks).flatten(-2).cpu().numpy()
            attention = {block: maps[:, i] for i, block in enumerate(blocks)}
    return _Tokens(found[last][1].cpu().numpy(), patches, attention)


def _joined(parts: Sequence[Mapping[int, NDArray[Any]]]) -> dict[int, NDArray[Any]]:
    return {block: np.concatenate([part[block] for part in parts]) for block in parts[0]}


def read_stored(folder: str | os.PathLike[str], kinds: Collection[str], limit: int) -> Drawable:
    """What a folder of features allows to draw: neighbours, and the PCA of patches if they are stored.

    Raises:
        ValueError: attention maps are asked for, or features that are not stored; or no image has features.
    """
    features = load_features(folder)
    if "attention" in kinds:
        raise InvalidValueError("Features hold no attention maps: give the images, and --model.")
    for kind, name in (("pca", "patches"), ("neighbours", "cls")):
        if kind in kinds and name not in features:
            raise InvalidValueError(f"--{kind} needs the feature {name!r}; stored are {', '.join(features)}.")
    good = [row for row, error in enumerate(features.error) if error is None]
    rows = good[:limit]
    if not rows:
        raise InvalidValueError(f"No image in {os.fspath(folder)!r} has features.")
    manifest, paths, unreadable = features.manifest, features.path, Failures()
    about, model = manifest.get("about", {}), manifest["model"]
    processor = without_normalization(processor_of(manifest))
    with_pca = "pca" in kinds or (not kinds and "patches" in features)
    with_neighbours = "neighbours" in kinds or (not kinds and "cls" in features and len(good) > 1)
    return Drawable(
        model=str(about.get("model", "stored features")),
        weights=str(about.get("weights", "")),
        fingerprint=lambda: str(manifest["weights"]),
        caption="as they were stored",
        names=[Path(path).stem for path in paths],
        rows=rows,
        image=cache(lambda row: _read_image(paths[row], processor, unreadable)),
        grid=_stored_grid(model, processor),
        patches={model["n_blocks"] - 1: _stored_patches(features, rows)} if with_pca else {},
        cls=features["cls"] if with_neighbours else None,
        n_images=len(good),
        unreadable=unreadable,
    )


def _read_image(path: str, processor: Dinov2ImageProcessor, unreadable: Failures) -> Image.Image:
    """An image as the processor cuts it, or a grey one of that size if it cannot be read."""
    decoded = decode(ImageSource(path), processor)
    if decoded.pixels is not None:
        return _as_image(decoded.pixels)
    unreadable.add(path, decoded.error or "")
    height, width = processor.output_size or (1, 1)
    return Image.new("RGB", (width, height), "lightgrey")


def _as_image(pixels: NDArray[Any]) -> Image.Image:
    """(3, height, width) uint8 as an image."""
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def _stored_grid(model: Mapping[str, Any], processor: Dinov2ImageProcessor) -> tuple[int, int]:
    """Rows and columns of patches."""
    patch = model["patch_size"]
    sides = processor.output_size or (patch, patch)
    rows, columns = ((side - patch) // step + 1 for side, step in zip(sides, model["stride"], strict=True))
    return rows, columns


def _stored_patches(features: Features, rows: Sequence[int]) -> NDArray[Any]:
    """The patch tokens of some ascending rows, (rows, patches, hidden); shards after the last row are not read."""
    found, first = [], 0
    for shard in features.shards():
        inside = [row - first for row in rows if first <= row < first + len(shard)]
        if inside:
            found.append(shard["patches"][inside])
        first += len(shard)
        if first > rows[-1]:
            break
    return np.concatenate(found)
