"""Patch features as colours: the principal components of the patch tokens, as the DINOv2 paper shows them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_FLAT = 1e-9  # a component with a smaller share of the variance than this is rounding noise


def pca_rgb(
    features: Any,
    grid: tuple[int, int] | None = None,
    *,
    foreground: Any = None,
    percentiles: tuple[float, float] = (1.0, 99.0),
) -> NDArray[np.uint8]:
    """The first three principal components of patch features as red, green and blue.

    One PCA serves the whole batch, so equal colours mean equal features across its pictures. The sign of a component is
    fixed by its largest loading, which is positive. Each component is stretched between two percentiles of its values,
    so that a few outliers (high-norm patches) do not decide the colours; one without variance is mid-grey.

    Args:
        features: patch tokens, a tensor or array (patches, dim), (batch, patches, dim) or (batch, height, width, dim);
            channels are last (permute the maps of ``get_intermediate_layers(reshape=True)``).
        grid: (height, width) in patches where the tokens are flat and the picture is not square.
        foreground: ``"threshold"`` separates foreground from background by the sign of a first PCA's first component,
            as in the DINOv2 paper (Oquab et al., 2023): the side that is rarer on the border of the pictures than
            elsewhere is the foreground, and a second PCA sees it alone. A boolean array (batch, height, width) or
            (batch, patches) names the foreground instead. The background is black.
        percentiles: the values that become 0 and 255.

    Returns:
        (batch, height, width, 3) uint8.

    Raises:
        ValueError: a wrong rank or grid, fewer than 3 dimensions, fewer than 4 (foreground) patches, NaN or infinity.
    """
    tokens = _tokens(features, grid)  # (batch, height, width, dim)
    shown = _foreground(tokens, foreground)  # (batch, height, width)
    if np.count_nonzero(shown) < 4:
        raise ValueError(f"A PCA needs at least 4 patches, got {np.count_nonzero(shown)} in the foreground.")
    scores = _principal_scores(tokens[shown], 3)
    low, high = np.percentile(scores, percentiles, axis=0)
    spread = high - low
    unit = np.where(spread > 0, (scores - low) / np.where(spread > 0, spread, 1.0), 0.5)
    rgb = np.zeros((*shown.shape, 3), np.uint8)
    rgb[shown] = np.rint(np.clip(unit, 0.0, 1.0) * 255).astype(np.uint8)
    return rgb


def _tokens(features: Any, grid: tuple[int, int] | None) -> Array:
    if hasattr(features, "detach"):
        features = features.detach().cpu().double().numpy()
    tokens = np.asarray(features, np.float64)
    if tokens.ndim not in (2, 3, 4):
        raise ValueError(
            "Features must be (patches, dim), (batch, patches, dim) or (batch, height, width, dim), "
            f"got shape {tokens.shape}."
        )
    if tokens.ndim < 4:
        tokens = tokens.reshape(-1, *patch_grid(tokens.shape[-2], grid), tokens.shape[-1])
    if tokens.shape[-1] < 3:
        raise ValueError(f"Three colours need features of at least 3 dimensions, got {tokens.shape[-1]}.")
    broken = np.flatnonzero(~np.isfinite(tokens).all(axis=(1, 2, 3)))
    if len(broken):
        raise ValueError(f"The features of picture {broken[0]} of the batch contain NaN or infinity.")
    return tokens


def patch_grid(patches: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    if grid is None:
        side = round(patches**0.5)
        if side * side != patches:
            raise ValueError(f"{patches} patches are no square; pass grid=(height, width).")
        return side, side
    if grid[0] * grid[1] != patches:
        raise ValueError(f"A grid of {grid[0]} x {grid[1]} does not hold {patches} patches.")
    return grid


def _foreground(tokens: Array, foreground: Any) -> NDArray[np.bool_]:
    shape = tokens.shape[:3]
    if foreground is None:
        return np.ones(shape, bool)
    if isinstance(foreground, str):
        if foreground != "threshold":
            raise ValueError(f'foreground must be None, "threshold" or a boolean array, got {foreground!r}.')
        return _threshold(tokens)
    mask = np.asarray(foreground)
    if mask.ndim < 3 and mask.size == np.prod(shape):
        mask = mask.reshape(shape)
    if mask.dtype != bool or mask.shape != shape:
        raise ValueError(f"The foreground must be boolean of shape {shape}, got {mask.dtype} of shape {mask.shape}.")
    return mask


def _threshold(tokens: Array) -> NDArray[np.bool_]:
    if tokens[..., 0].size < 4:
        raise ValueError(f"A PCA needs at least 4 patches, got {tokens[..., 0].size}.")
    positive = _principal_scores(tokens.reshape(-1, tokens.shape[-1]), 1).reshape(tokens.shape[:3]) > 0
    border = np.ones(tokens.shape[1:3], bool)
    border[1:-1, 1:-1] = False
    touching = positive[:, border].mean()
    return positive if touching <= positive.mean() else ~positive


def _principal_scores(samples: Array, count: int) -> Array:
    """Scores (samples, count) on the leading components; zeros for components without variance."""
    centred = samples - samples.mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred)  # ascending
    values, vectors = values[::-1][:count], vectors[:, ::-1][:, :count]
    largest = np.abs(vectors).argmax(axis=0)
    vectors = vectors * np.sign(vectors[largest, np.arange(count)])
    noise = _FLAT * max(float(values[0]), _FLAT * float((samples**2).sum()))
    return np.where(values > noise, centred @ vectors, 0.0)
