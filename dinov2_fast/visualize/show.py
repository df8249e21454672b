"""`show`: sheets of what a model finds in images, from images and a model or from a folder of features."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dinov2_fast.curation.neighbours import nearest
from dinov2_fast.data.batches import Failures
from dinov2_fast.data.sources import require_images
from dinov2_fast.errors import InvalidValueError
from dinov2_fast.features.schema import holds_features
from dinov2_fast.inference.loading import find_device
from dinov2_fast.pretraining.log import holds_metrics
from dinov2_fast.visualize.curves import save_curves
from dinov2_fast.visualize.drawable import KINDS, Drawable, read_stored, run_model
from dinov2_fast.visualize.pca import PcaBasis, check_new
from dinov2_fast.visualize.sheet import Strips, attention_strips, neighbour_strips, pca_strips, save_sheet
from dinov2_fast.weights.load import load

THUMBNAIL = (252, 252)  # pixels


@dataclass(frozen=True)
class Shown:
    """What `show` wrote."""

    # The PNG of each kind of sheet, and "basis", the file of the PCA, if it was saved; of a run, "curves" alone.
    files: dict[str, Path]
    left_out: Failures  # images that cannot be read
    unreadable: Failures  # images of stored features that cannot be read any more; they are grey on the sheets
    is_limited: bool  # there are more images than were drawn


def show(
    paths: Sequence[str],
    out: str | os.PathLike[str],
    *,
    kinds: Collection[str] = (),
    model: str | None = None,
    weights: str | None = None,
    position_interpolation: str | None = None,
    size: tuple[int, int] = (518, 518),
    stride: int | None = None,
    device: str | None = None,
    blocks: Sequence[int] | None = (-1,),
    heads: Sequence[int] | None = None,
    foreground: bool = False,
    basis: str | None = None,
    save_basis: str | None = None,
    count: int = 5,
    limit: int = 24,
    announce: Callable[[int], None] | None = None,
) -> Shown:
    """Draws sheets of images as PNGs: PCA colours, attention maps and nearest neighbours; or the curves of a run.

    Args:
        paths: images, see :mod:`dinov2_fast.data.sources`; or one folder of features, which takes neither model nor
            weights; position_interpolation, size, stride, device, blocks and heads have no effect on it. Or the folder
            of one run of :func:`dinov2_fast.pretrain`, which takes no model, no kinds and no basis.
        out: the folder of the sheets; those in it are replaced.
        kinds: some of "pca", "attention" and "neighbours"; by default all that can be drawn.
        model, weights, position_interpolation: see :func:`dinov2_fast.load`.
        size, stride: (height, width) of the images, and the step from one patch to the next, in pixels.
        device: by default a GPU where there is one.
        blocks, heads: of the PCA and the attention maps; 0 is the first, -1 the last, None are all.
        foreground: draw the colours of the foreground only, and the background black.
        basis, save_basis: a file of an earlier `save_basis`, whose colours the PCA gets; or a new file for the PCA.
        count, limit: the neighbours of each image, and the most images that are drawn.
        announce: called with the number of images before the model runs.

    Raises:
        WeightsError: the weights cannot be had.
        FileExistsError: there is a file `save_basis`.
        NotADirectoryError: `out` is a file.
        ValueError: no images that can be read; settings that do not exist, or do not go with the model, the features or
            the basis.
        UnsupportedError: curves are asked for, and matplotlib is not installed.
    """
    if not set(kinds) <= set(KINDS):
        raise InvalidValueError(f"kinds must be some of {', '.join(KINDS)}; got {', '.join(kinds)}.")
    kinds = [kind for kind in KINDS if kind in kinds or (kind == "pca" and (basis or save_basis))]
    if Path(out).exists() and not Path(out).is_dir():
        raise NotADirectoryError(f"The output folder {os.fspath(out)!r} is a file.")
    if len(paths) == 1 and holds_metrics(Path(paths[0])):
        if kinds or model or weights:
            raise InvalidValueError("Of a run, only its curves are drawn: leave out --model and what to draw.")
        return Shown({"curves": save_curves(Path(paths[0]), Path(out))}, Failures(), Failures(), False)
    if save_basis:
        check_new(save_basis)
    given = PcaBasis.load(basis) if basis else None
    if len(paths) == 1 and holds_features(Path(paths[0])):
        if model or weights:
            raise InvalidValueError("A folder of features needs no --model; to run one, give the images instead.")
        drawable = read_stored(paths[0], kinds, limit)
        is_limited = drawable.n_images > len(drawable.rows)
    else:
        if not model:
            raise InvalidValueError("--model is missing: images are shown as a model sees them.")
        place = find_device(device)
        sources = list(islice(require_images(paths), limit + 1))
        is_limited = len(sources) > limit
        _check_neighbours(kinds, len(sources[:limit]))
        loaded = load(
            model, weights=weights, device=place, dtype="float32", position_interpolation=position_interpolation
        )
        blocks = _resolved(blocks, loaded.n_blocks, "block")
        heads = _resolved(heads, loaded.num_heads, "head")
        if len(blocks) > 1 and (basis or save_basis):
            raise InvalidValueError("A basis is of one block: choose one with --layer.")
        if stride is not None:
            loaded.stride = stride
        if announce:
            announce(len(sources[:limit]))
        drawable = run_model(model, loaded, sources[:limit], kinds, size, blocks)
        _check_neighbours(kinds, len(drawable.names))
    if given:
        _check_basis(given, str(basis), drawable, foreground)
    sheets = _Sheets(Path(out), drawable)
    if drawable.patches:
        sheets.draw_pca(given, basis, save_basis, foreground)
    if drawable.attention:
        sheets.draw_attention(heads or ())
    if drawable.cls is not None:
        sheets.draw_neighbours(nearest(drawable.cls, drawable.rows, count))
    return Shown(sheets.files, drawable.left_out, drawable.unreadable, is_limited)


def _check_neighbours(kinds: Collection[str], count: int) -> None:
    if "neighbours" in kinds and count < 2:
        raise InvalidValueError("Neighbours need two images or more.")


def _resolved(asked: Sequence[int] | None, number: int, what: str) -> list[int]:
    """Ascending indices from 0 on, where negative ones count from the end; None is all."""
    indices = range(number) if asked is None else asked
    outside = [index for index in indices if not -number <= index < number]
    if outside:
        raise InvalidValueError(f"There is no {what} {outside[0]}; the {what}s of this model are 0 to {number - 1}.")
    return sorted({index % number for index in indices})


def _check_basis(basis: PcaBasis, file: str, drawable: Drawable, foreground: bool) -> None:
    """Raises `ValueError` if the basis was made of other features, or has no foreground to be shown alone."""
    made_of = {name: basis.about.get(name) for name in ("model", "weights", "block")}
    if made_of["weights"] != drawable.fingerprint():
        raise InvalidValueError(
            f"The basis {file!r} was made of {made_of['model']!r}, and {drawable.model!r} has other weights: make one "
            "of this model with --save-basis."
        )
    (block,) = drawable.patches
    if made_of["block"] != str(block):
        raise InvalidValueError(
            f"The basis {file!r} is of block {made_of['block']}, and these are the features of block {block}: choose "
            "the block with --layer, or make a basis with --save-basis."
        )
    if foreground and basis.foreground is None:
        raise InvalidValueError(
            f"The basis {file!r} has no foreground: make one with --foreground --save-basis, or leave out --foreground."
        )


class _Sheets:
    """Draws sheets and writes them to a folder; those of random weights say so in name and title."""

    def __init__(self, folder: Path, drawable: Drawable) -> None:
        self.files: dict[str, Path] = {}
        self._folder, self._drawable = folder, drawable
        self._names = [drawable.names[row] for row in drawable.rows]

    def draw_pca(self, given: PcaBasis | None, file: str | None, new_file: str | None, foreground: bool) -> None:
        """Each image and its colours, by the given PCA, which was read from `file`, or by a PCA of each block."""
        drawable, rgb = self._drawable, {}
        about = {"model": drawable.model, "weights": drawable.fingerprint() if new_file else ""}
        way = "threshold" if foreground else None
        for block, patches in drawable.patches.items():
            basis = given or PcaBasis.fit(patches, drawable.grid, foreground=way, about={**about, "block": str(block)})
            rgb[block] = basis.rgb(patches, drawable.grid)
        if new_file:
            basis.save(new_file)
            self.files["basis"] = Path(new_file)
        strips = pca_strips(self._names, self._images(), rgb)
        note = f"The PCA is that of {file}" if file else "One PCA for all images"
        note += ": equal features have equal colours." + (" The background is black." if basis.foreground else "")
        title = f"first three principal components of the patch tokens, {drawable.caption}"
        self._save("pca", strips, title, note, columns=max(6 // len(strips[0]), 1), height=200)

    def draw_attention(self, heads: Sequence[int]) -> None:
        """Each image and its attention maps."""
        drawable = self._drawable
        strips = attention_strips(self._names, self._images(), drawable.attention, drawable.grid, heads)
        note = "Each map is scaled on its own: maps show where a head looks, but not which head looks more."
        self._save("attention", strips, f"attention of the CLS token, {drawable.caption}", note, height=150)

    def draw_neighbours(self, found: tuple[NDArray[np.int64], NDArray[np.float32]]) -> None:
        """Each image and its neighbours, given as indices and cosines."""
        drawable, (neighbours, cosines) = self._drawable, found
        rows = sorted({*drawable.rows, *neighbours.ravel().tolist()})
        thumbnails = {row: ImageOps.fit(drawable.image(row), THUMBNAIL) for row in rows}
        strips = neighbour_strips(dict(enumerate(drawable.names)), thumbnails, drawable.rows, neighbours, cosines)
        nearest_among = f"then those nearest to it among {drawable.n_images}, with the cosine of the CLS tokens."
        self._save("neighbours", strips, "nearest neighbours", f"An image on the left, {nearest_among}", height=150)

    def _images(self) -> list[Image.Image]:
        return [self._drawable.image(row) for row in self._drawable.rows]

    def _save(self, kind: str, strips: Strips, title: str, note: str, **layout: int) -> None:
        name, title, weights = f"{kind}.png", f"{self._drawable.model}, {title}", self._drawable.weights
        if weights.startswith("random:"):
            name, title = f"{kind}-random-weights.png", f"RANDOM WEIGHTS ({weights}): {title}"
        self.files[kind] = save_sheet(self._folder / name, strips, title=title, note=note, **layout)
