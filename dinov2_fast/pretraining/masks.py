"""Block masks: which patches of the student's global crops are hidden.

Some of the crops of a batch have a mask. Their numbers of masked patches are spread evenly between the lowest and the
highest ratio: the range is cut into as many strata as there are such crops, and each crop draws from its own. A mask is
made of rectangles. Source: Bao et al., arXiv:2106.08254 (BEiT), section 2.3; facebookresearch/dinov2,
dinov2/data/masking.py and collate.py.

A mask depends on the seed, the step and the crop alone, so that each process makes those of its own images.
"""

from __future__ import annotations

import math
from random import Random

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dinov2_fast.pretraining.config import PretrainingConfig
from dinov2_fast.pretraining.order import mix

_MIN_AREA = 4  # patches of a rectangle
_MIN_ASPECT = 0.3  # of a rectangle, and 1 / the largest
_TRIES = 10  # to place a rectangle
_STREAM = 0x6D61736B  # keeps these random numbers apart from others that are keyed by a seed and a step


def batch_masks(
    config: PretrainingConfig, seed: int, step: int, *, batch_size: int, first: int, count: int
) -> NDArray[np.bool_]:
    """The masks of some images of a batch.

    Args:
        config: its groups `masks`, `crops` and `model` are used.
        seed, step: of the run, and of the batch.
        batch_size: images of the batch.
        first, count: the images, `first` to `first + count - 1` of the batch.

    Returns:
        bool (2, count, patches), True where a patch is masked: the first global crops, then the second.
    """
    patches = config.grid**2
    masked_crops = int(2 * batch_size * config.masks.probability)
    low, high = config.masks.ratio
    order = Random(mix(_STREAM, seed, step)).sample(range(2 * batch_size), masked_crops)
    masks = np.zeros((2, count, config.grid, config.grid), dtype=bool)
    for stratum, index in enumerate(order):
        crop, image = divmod(index, batch_size)
        if first <= image < first + count:
            rng = Random(mix(_STREAM, seed, step, index))
            ratio = low + (high - low) * (stratum + rng.random()) / masked_crops
            masks[crop, image - first] = block_mask(int(patches * ratio), config.grid, config.grid, rng)
    return masks.reshape(2, count, patches)


def masked_patches(masks: Tensor) -> tuple[Tensor, Tensor]:
    """The masked patches of crops.

    Args:
        masks: (crops, images, patches) bool, on the CPU: a GPU would have to be awaited.

    Returns:
        (masked,) int64, their indices in the flattened masks; and (masked,) fp32, 1 / the number of masked patches of
        the crop of each.
    """
    weights = 1 / masks.sum(dim=-1, keepdim=True).clamp(min=1)
    return masks.flatten().nonzero().flatten(), weights.expand_as(masks)[masks]


def block_mask(n_masked: int, rows: int, columns: int, rng: Random) -> NDArray[np.bool_]:
    """A mask of rectangles that overlap at most in part, drawn until enough patches are masked.

    It may have fewer than `n_masked` patches, never more: it is finished when no new rectangle was found in ten tries.
    With an equal random state it equals that of the reference's `MaskingGenerator`.

    Args:
        n_masked: patches to mask.
        rows, columns: of the grid of patches.
        rng: its state advances.

    Returns:
        bool (rows, columns), True where a patch is masked.
    """
    mask = np.zeros((rows, columns), dtype=bool)
    missing = n_masked
    while missing > 0:
        added = _add_rectangle(mask, min(missing, rows // 2 * columns), rng)
        if added == 0:
            break
        missing -= added
    return mask


def _add_rectangle(mask: NDArray[np.bool_], most: int, rng: Random) -> int:
    """Masks a rectangle with at most `most` patches that were not masked. Returns their number, 0 if none was found."""
    rows, columns = mask.shape
    for _ in range(_TRIES):
        area = rng.uniform(_MIN_AREA, most)  # in the reference too, `most` may be less than the smallest area
        aspect = math.exp(rng.uniform(math.log(_MIN_ASPECT), math.log(1 / _MIN_ASPECT)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= rows or width >= columns:
            continue
        top, left = rng.randint(0, rows - height), rng.randint(0, columns - width)
        rectangle = mask[top : top + height, left : left + width]
        added = height * width - int(np.count_nonzero(rectangle))
        if 0 < added <= most:
            rectangle[:] = True
            return added
    return 0
