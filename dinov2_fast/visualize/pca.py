"""Patch features as colours: the principal components of the patch tokens, as the DINOv2 paper shows them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dinov2_fast.errors import InvalidValueError

Array = NDArray[np.float64]

PERCENTILES = (1.0, 99.0)

_FORMAT = "dinov2_fast PCA basis 1"
_FLAT = 1e-9  # a component with less than this share of the first one's variance is rounding noise


def pca_rgb(
    features: Any,
    grid: tuple[int, int] | None = None,
    *,
    foreground: Any = None,
    percentiles: tuple[float, float] = PERCENTILES,
) -> NDArray[np.uint8]:
    """The first three principal components of patch features as red, green and blue.

    One PCA serves the whole batch, so equal features have equal colours across its images; use a `PcaBasis` to apply it
    to other images. The sign of each component makes its largest loading positive. Each component is scaled between two
    percentiles of its values, so that a few outliers (high-norm patches) do not decide the colours. A component without
    variance is mid-grey.

    Args:
        features: patch tokens, a tensor or array (patches, dim), (batch, patches, dim) or (batch, height, width, dim);
            channels are last (permute the maps of ``get_intermediate_layers(reshape=True)``).
        grid: (height, width) in patches where the tokens are flat and the image is not square.
        foreground: ``"threshold"`` separates foreground from background by the sign of a first PCA's first component,
            as in the DINOv2 paper (Oquab et al., 2023): the side that is rarer on the border of the images than
            elsewhere is the foreground, and a second PCA is made of the foreground only. A boolean array
            (batch, height, width) or (batch, patches) gives the foreground instead. The background is black.
        percentiles: the values that become 0 and 255.

    Returns:
        (batch, height, width, 3) uint8.

    Raises:
        ValueError: a wrong rank or grid, fewer than 3 dimensions, fewer than 4 (foreground) patches, NaN or infinity.
    """
    basis = PcaBasis.fit(features, grid, foreground=foreground, percentiles=percentiles)
    return basis.rgb(features, grid, foreground=None if isinstance(foreground, str) else foreground)


@dataclass(frozen=True, eq=False)
class Components:
    """Principal components: the `mean` (dim,) of the samples, and `directions` (dim, count), 0 without variance."""

    mean: Array
    directions: Array

    @classmethod
    def of(cls, samples: Array, count: int) -> Components:
        """The `count` leading components of samples (samples, dim)."""
        mean = samples.mean(axis=0)
        centred = samples - mean
        values, vectors = np.linalg.eigh(centred.T @ centred)  # ascending
        values, vectors = values[::-1][:count], vectors[:, ::-1][:, :count]
        largest = np.abs(vectors).argmax(axis=0)
        vectors = vectors * np.sign(vectors[largest, np.arange(count)])
        noise = _FLAT * max(float(values[0]), _FLAT * float((samples**2).sum()))
        return cls(mean, np.where(values > noise, vectors, 0.0))

    def scores(self, samples: Array) -> Array:
        """The coordinates of samples (samples, dim), as (samples, count)."""
        return (samples - self.mean) @ self.directions


@dataclass(frozen=True, eq=False)
class PcaBasis:
    """A PCA of patch features, which gives other images the same colours.

    ::

        basis = PcaBasis.fit(patches, grid)
        rgb = basis.rgb(patches_of_another_image, grid)
        basis.save("basis.safetensors")

    `about` says where the features came from: `dinov2-fast show` writes "model", "weights" (their SHA-256) and "block"
    (0 is the first), and compares the last two.
    """

    components: Components  # three
    low: Array  # (3,), the scores that become 0
    high: Array  # (3,), the scores that become 255
    foreground: Components | None = None  # one, positive on the foreground; None if all patches are foreground
    about: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        features: Any,
        grid: tuple[int, int] | None = None,
        *,
        foreground: Any = None,
        percentiles: tuple[float, float] = PERCENTILES,
        about: Mapping[str, str] | None = None,
    ) -> PcaBasis:
        """The basis that `pca_rgb` uses for these features; arguments and errors are the same."""
        tokens = _tokens(features, grid)
        if isinstance(foreground, str):
            foreground = _threshold(tokens, foreground)
        samples = tokens[_shown(tokens, foreground)]
        if len(samples) < 4:
            raise InvalidValueError(f"A PCA needs at least 4 patches, got {len(samples)} in the foreground.")
        components = Components.of(samples, 3)
        low, high = np.percentile(components.scores(samples), percentiles, axis=0)
        separates = foreground if isinstance(foreground, Components) else None
        return cls(components, low, high, separates, dict(about or {}))

    def rgb(self, features: Any, grid: tuple[int, int] | None = None, *, foreground: Any = None) -> NDArray[np.uint8]:
        """The colours of patch features; equal features have equal colours.

        Arguments, result and errors are those of `pca_rgb`, for any number of patches with the basis's number of
        dimensions. A boolean array `foreground` replaces the foreground of the basis.
        """
        tokens = _tokens(features, grid)
        if tokens.shape[-1] != len(self.components.mean):
            raise InvalidValueError(
                f"The basis is of features with {len(self.components.mean)} dimensions, and these have "
                f"{tokens.shape[-1]}. Give features of the model and block that the basis was made of."
            )
        shown = _shown(tokens, self.foreground if foreground is None else foreground)
        scores, spread = self.components.scores(tokens[shown]), self.high - self.low
        unit = np.where(spread > 0, (scores - self.low) / np.where(spread > 0, spread, 1.0), 0.5)
        rgb = np.zeros((*shown.shape, 3), np.uint8)
        rgb[shown] = np.rint(np.clip(unit, 0.0, 1.0) * 255).astype(np.uint8)
        return rgb

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a new safetensors file, and makes its folder; `FileExistsError` if there is a file already."""
        arrays = {"mean": self.components.mean, "directions": self.components.directions}
        arrays |= {"low": self.low, "high": self.high}
        if self.foreground is not None:
            arrays |= {"foreground.mean": self.foreground.mean, "foreground.directions": self.foreground.directions}
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        content = save(contiguous, {**self.about, "format": _FORMAT})
        path = check_new(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PcaBasis:
        """Reads a file that `save` wrote; `FileNotFoundError`, or `ValueError` if the file is not a basis."""
        arrays: dict[str, Array] = {}
        with suppress(SafetensorError), safe_open(path, "numpy") as file:
            about, names = file.metadata() or {}, file.keys()
            if about.pop("format", None) == _FORMAT:
                arrays = {name: file.get_tensor(name) for name in names}
        if not arrays:
            raise InvalidValueError(
                f"{os.fspath(path)!r} is not a PCA basis; `dinov2-fast show --save-basis` writes one."
            )
        components = Components(arrays["mean"], arrays["directions"])
        foreground = None
        if "foreground.mean" in arrays:
            foreground = Components(arrays["foreground.mean"], arrays["foreground.directions"])
        return cls(components, arrays["low"], arrays["high"], foreground, about)


def check_new(path: str | os.PathLike[str]) -> Path:
    """The path, or `FileExistsError` if there is a file already."""
    if os.path.lexists(path):
        raise FileExistsError(f"{os.fspath(path)!r} exists already; choose another name for the basis.")
    return Path(path)


def as_array(values: Any) -> Array:
    """A tensor or an array as an array in float64."""
    return np.asarray(values.detach().cpu().double() if hasattr(values, "detach") else values, np.float64)


def _tokens(features: Any, grid: tuple[int, int] | None) -> Array:
    tokens = as_array(features)
    if tokens.ndim not in (2, 3, 4):
        raise InvalidValueError(
            "Features must be (patches, dim), (batch, patches, dim) or (batch, height, width, dim), "
            f"got shape {tokens.shape}."
        )
    if tokens.ndim < 4:
        tokens = tokens.reshape(-1, *patch_grid(tokens.shape[-2], grid), tokens.shape[-1])
    if tokens.shape[-1] < 3:
        raise InvalidValueError(f"Three colours need features of at least 3 dimensions, got {tokens.shape[-1]}.")
    broken = np.flatnonzero(~np.isfinite(tokens).all(axis=(1, 2, 3)))
    if len(broken):
        raise InvalidValueError(f"The features of image {broken[0]} of the batch contain NaN or infinity.")
    return tokens


def patch_grid(patches: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """The grid, or that of a square image; raises `ValueError` if it does not hold the patches."""
    if grid is None:
        side = round(patches**0.5)
        if side * side != patches:
            raise InvalidValueError(f"{patches} patches do not form a square; pass grid=(height, width).")
        return side, side
    if grid[0] * grid[1] != patches:
        raise InvalidValueError(f"A grid of {grid[0]} x {grid[1]} does not hold {patches} patches.")
    return grid


def _shown(tokens: Array, foreground: Any) -> NDArray[np.bool_]:
    """Which patches are foreground, (batch, height, width): by a component, a boolean array, or None for all."""
    shape = tokens.shape[:3]
    if foreground is None:
        return np.ones(shape, bool)
    if isinstance(foreground, Components):
        return foreground.scores(tokens.reshape(-1, tokens.shape[-1])).reshape(shape) > 0
    mask = np.asarray(foreground)
    if mask.ndim < 3 and mask.size == np.prod(shape):
        mask = mask.reshape(shape)
    if mask.dtype != bool or mask.shape != shape:
        raise InvalidValueError(
            f"The foreground must be boolean of shape {shape}, got {mask.dtype} of shape {mask.shape}."
        )
    return mask


def _threshold(tokens: Array, way: str) -> Components:
    """The first component of a PCA of all patches, with the sign that is positive on the foreground."""
    if way != "threshold":
        raise InvalidValueError(f'foreground must be None, "threshold" or a boolean array, got {way!r}.')
    if tokens[..., 0].size < 4:
        raise InvalidValueError(f"A PCA needs at least 4 patches, got {tokens[..., 0].size}.")
    first = Components.of(tokens.reshape(-1, tokens.shape[-1]), 1)
    positive = _shown(tokens, first)
    border = np.ones(tokens.shape[1:3], bool)
    border[1:-1, 1:-1] = False
    touching = positive[:, border].mean()
    return first if touching <= positive.mean() else Components(first.mean, -first.directions)
