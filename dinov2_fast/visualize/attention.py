"""Attention weights as heat maps."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.visualize.pca import patch_grid

# The colours of values from 0 to the largest, as red, green and blue: black, violet, red, orange, pale yellow.
_RAMP = np.array([[0, 0, 0], [74, 18, 106], [188, 54, 84], [246, 136, 36], [252, 250, 190]], np.float64)
_TOP_PERCENTILE = 99.5  # is the brightest: single patches with nearly all the attention would hide the rest


def attention_rgb(weights: Any, grid: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Attention weights as a heat map, from black over violet, red and orange to pale yellow.

    Each map is scaled on its own: 0 is black and its 99.5th percentile the brightest colour. So brightness cannot be
    compared between maps.

    Args:
        weights: tensor or array (..., patches) without CLS token and registers; not negative.
        grid: (height, width) in patches where the image is not square.

    Returns:
        (..., height, width, 3) uint8.

    Raises:
        ValueError: a grid that does not hold the patches, or values that are negative, NaN or infinite.
    """
    if hasattr(weights, "detach"):
        weights = weights.detach().cpu().double().numpy()
    values = np.asarray(weights, np.float64)
    if values.ndim < 1 or not (np.isfinite(values) & (values >= 0)).all():
        raise InvalidValueError("Attention weights must be finite and not negative, and there must be some.")
    top = np.percentile(values, _TOP_PERCENTILE, axis=-1, keepdims=True)
    top = np.where(top > 0, top, values.max(axis=-1, keepdims=True))  # a map of a few patches
    unit = np.clip(values / np.where(top > 0, top, 1.0), 0.0, 1.0)
    stops = np.linspace(0.0, 1.0, len(_RAMP))
    rgb = np.stack([np.interp(unit, stops, channel) for channel in _RAMP.T], axis=-1)
    rows, columns = patch_grid(values.shape[-1], grid)
    return np.rint(rgb).astype(np.uint8).reshape(*values.shape[:-1], rows, columns, 3)
