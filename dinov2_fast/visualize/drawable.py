"""What `show` draws: images and what a model computes of them, either by running it or from a folder of features."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dinov2_fast.data.batches import Failures, readable_batches, run_in_parts
from dinov2_fast.data.decoding import decode
from dinov2_fast.data.image_processor import Dinov2ImageProcessor, fixed_output_size
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
    """Images, and what a model computes of them. What is empty is not drawn."""

    model: str  # its name
    weights: str  # where they came from
    fingerprint: Callable[[], str]  # gives the SHA-256 of the weights
    caption: str  # what the images and features are, for the titles of sheets
    names: Sequence[str]  # of all images
    rows: Sequence[int]  # the images that are drawn, as indices in `names`
    image: Callable[[int], Image.Image]  # from a row to the image as the processor cuts it
    grid: tuple[int, int]  # rows and columns of patches
    n_images: int  # how many images have features
    patches: Mapping[int, NDArray[Any]]  # block -> (drawn images, patches, hidden)
    attention: Mapping[int, NDArray[Any]]  # block -> (drawn images, heads, patches)
    cls: NDArray[Any] | None  # (all images, hidden), the class tokens by which neighbours are found
    left_out: Failures  # images that cannot be read
    unreadable: Failures  # images of stored features that cannot be read any more; `image` gives grey for them


def run_model(
    name: str,
    model: DinoVisionTransformer,
    sources: Sequence[ImageSource],
    kinds: Collection[str],
    size: tuple[int, int],
    blocks: Sequence[int],
) -> Drawable:
    """What a model in eval mode computes of images of `size` (height, width), for some or, by default, all sheets.

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
    cls, patches, *attention = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
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
        n_images=len(images),
        patches=_by_block(patches, blocks) if not kinds or "pca" in kinds else {},
        attention=_by_block(attention[0], blocks) if attention else {},
        cls=cls if with_neighbours else None,
        left_out=left_out,
        unreadable=Failures(),
    )


def _tokens(
    model: DinoVisionTransformer, blocks: Sequence[int], with_attention: bool, pixels: Tensor
) -> list[NDArray[Any]]:
    """Class tokens (images, hidden), patches (images, blocks, patches, hidden), and attention if it is asked for."""
    last, pixels = model.n_blocks - 1, pixels.to(model.pos_embed.device)
    kept = sorted({*blocks, last})
    with torch.inference_mode():
        outputs = model.get_intermediate_layers(pixels, n=kept, return_class_token=True)
        found = dict(zip(kept, outputs, strict=True))
        tensors = [found[last][1], torch.stack([found[block][0] for block in blocks], dim=1)]
        if with_attention:
            tensors.append(model.attention_maps(pixels, blocks).flatten(-2))  # (images, blocks, heads, patches)
    return [tensor.cpu().numpy() for tensor in tensors]


def _by_block(arrays: NDArray[Any], blocks: Sequence[int]) -> dict[int, NDArray[Any]]:
    return {block: arrays[:, i] for i, block in enumerate(blocks)}


def read_stored(folder: str | os.PathLike[str], kinds: Collection[str], limit: int) -> Drawable:
    """What a folder of features allows to draw: neighbours if `cls` is stored, and the PCA if `patches` are.

    Raises:
        ValueError: attention maps or features that are not stored are asked for, or there is nothing to draw.
    """
    features = load_features(folder)
    if "attention" in kinds:
        raise InvalidValueError("Features hold no attention maps: give the images, and --model.")
    for kind, name in (("pca", "patches"), ("neighbours", "cls")):
        if kind in kinds and name not in features:
            raise InvalidValueError(f"--{kind} needs the feature {name!r}; stored are {', '.join(features)}.")
    good = [row for row, error in enumerate(features.error) if error is None]
    if not good:
        raise InvalidValueError(f"No image in {os.fspath(folder)!r} has features.")
    rows = good[:limit]
    manifest, paths, unreadable = features.manifest, features.path, Failures()
    about, model = manifest.get("about", {}), manifest["model"]
    processor = without_normalization(processor_of(manifest))
    with_pca = "pca" in kinds or (not kinds and "patches" in features)
    with_neighbours = "neighbours" in kinds or (not kinds and "cls" in features and len(good) > 1)
    if not with_pca and not with_neighbours:
        raise InvalidValueError(f"{os.fspath(folder)!r} holds neither patches, nor cls of two images: nothing to draw.")
    return Drawable(
        model=str(about.get("model", "stored features")),
        weights=str(about.get("weights", "")),
        fingerprint=lambda: str(manifest["weights"]),
        caption="as they were stored",
        names=[Path(path).stem for path in paths],
        rows=rows,
        image=cache(lambda row: _read_image(paths[row], processor, unreadable)),
        grid=_stored_grid(model, processor),
        n_images=len(good),
        patches={model["n_blocks"] - 1: _stored_patches(features, rows)} if with_pca else {},
        attention={},
        cls=features["cls"] if with_neighbours else None,
        left_out=Failures(),
        unreadable=unreadable,
    )


def _read_image(path: str, processor: Dinov2ImageProcessor, unreadable: Failures) -> Image.Image:
    """An image as the processor cuts it, or a grey one of that size if it cannot be read."""
    decoded = decode(ImageSource(path), processor)
    if decoded.pixels is not None:
        return _as_image(decoded.pixels)
    unreadable.add(path, decoded.error or "")
    height, width = fixed_output_size(processor)
    return Image.new("RGB", (width, height), "lightgrey")


def _as_image(pixels: NDArray[Any]) -> Image.Image:
    """(3, height, width) uint8 as an image."""
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def _stored_grid(model: Mapping[str, Any], processor: Dinov2ImageProcessor) -> tuple[int, int]:
    """Rows and columns of patches."""
    sides, patch = fixed_output_size(processor), model["patch_size"]
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
