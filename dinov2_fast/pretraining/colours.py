"""Colours: random changes of the colours of crops, in batches on the device, in fp32.

Each crop gets, as in the reference (facebookresearch/dinov2, dinov2/data/augmentations.py):

    with probability 0.8, in random order: brightness, contrast, saturation, hue
    with probability 0.2: grey
    blur and solarisation with the probabilities of its kind of crop
    always: normalisation with the mean and standard deviation of ImageNet

The operations are torchvision's on tensors. The reference applies them to images of 8 bits, which rounds after each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_fast.data.image_processor import IMAGENET_MEAN, IMAGENET_STD
from dinov2_fast.pretraining.config import CropsConfig
from dinov2_fast.pretraining.order import mix

_STREAM = 0x636F6C6F  # keeps these random numbers apart from others with the same seed
_GREY = (0.2989, 0.587, 0.114)  # weights of red, green and blue
_BLUR_RADIUS = 4  # pixels: a kernel of 9, whatever the size of the crop
_SIGMA = (0.1, 2.0)  # pixels
_SOLARIZE_FROM = 128 / 255
_JITTER = (0.4, 0.4, 0.2, 0.1)  # of brightness, contrast, saturation, hue


@dataclass(frozen=True)
class Colours:
    """What happens to the colours of one crop.

    Attributes:
        jitter: factors of brightness, contrast and saturation, and the shift of the hue in turns.
        order: in which these four are applied, by their places; empty for none.
        grey, solarize: whether they are applied.
        sigma: of the blur in pixels; 0 for none.
    """

    jitter: tuple[float, float, float, float]
    order: tuple[int, ...]
    grey: bool
    sigma: float
    solarize: bool


def draw_colours(seed: int, config: CropsConfig) -> list[Colours]:
    """The colours of the crops of an image: two global ones, then the local ones."""
    rng = Random(mix(_STREAM, seed))
    first, second, local = config.blur
    kinds = [(first, 0.0), (second, config.solarize), *[(local, 0.0)] * config.n_local]
    return [_draw(rng, blur, solarize) for blur, solarize in kinds]


def _draw(rng: Random, blur: float, solarize: float) -> Colours:
    *factors, hue = _JITTER
    brightness, contrast, saturation = (rng.uniform(1 - factor, 1 + factor) for factor in factors)
    jitter = (brightness, contrast, saturation, rng.uniform(-hue, hue))
    order = tuple(rng.sample(range(4), 4))
    is_jittered, is_grey, is_blurred, is_solarized = (rng.random() < p for p in (0.8, 0.2, blur, solarize))
    sigma = rng.uniform(*_SIGMA)
    return Colours(jitter, order if is_jittered else (), is_grey, sigma if is_blurred else 0.0, is_solarized)


def apply_colours(crops: Tensor, colours: Sequence[Colours], dtype: torch.dtype = torch.float32) -> Tensor:
    """Changes the colours of crops and normalises them.

    Args:
        crops: uint8 (crops, images, 3, size, size).
        colours: of each, (crops * images), the images of the first crop first.
        dtype: of the result.

    Returns:
        (crops, images, 3, size, size) on the device of `crops`.
    """
    x = crops.flatten(0, 1).float().div_(255)
    for turn in range(4):
        for place, change in enumerate(_CHANGES):
            rows = [row for row, each in enumerate(colours) if each.order and each.order[turn] == place]
            _change(x, rows, change, [colours[row].jitter[place] for row in rows])
    _change(x, [row for row, each in enumerate(colours) if each.grey], lambda y, _: to_grey(y).expand_as(y))
    blurred = [row for row, each in enumerate(colours) if each.sigma]
    _change(x, blurred, gaussian_blur, [colours[row].sigma for row in blurred])
    _change(x, [row for row, each in enumerate(colours) if each.solarize], solarize)
    mean, std = (torch.tensor(each, device=x.device).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    return x.sub_(mean).div_(std).to(dtype).view(crops.shape)


def _change(
    x: Tensor, rows: list[int], change: Callable[[Tensor, Tensor], Tensor], values: Sequence[float] = ()
) -> None:
    """Replaces rows of `x` by what `change` makes of them and their values, (rows, 1, 1, 1)."""
    if rows:
        index = torch.tensor(rows).to(x.device, non_blocking=True)
        factors = torch.tensor(values, dtype=x.dtype).view(-1, 1, 1, 1).to(x.device, non_blocking=True)
        x.index_copy_(0, index, change(x.index_select(0, index), factors))


def to_grey(x: Tensor) -> Tensor:
    """The luminance (images, 1, height, width) of RGB (images, 3, height, width)."""
    red, green, blue = x.unbind(dim=1)
    return (_GREY[0] * red).add_(green, alpha=_GREY[1]).add_(blue, alpha=_GREY[2]).unsqueeze(1)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Moves away from the mean of the grey image, or towards it."""
    mean = to_grey(x).mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean, x, factor).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Moves away from the grey image, or towards it."""
    return torch.lerp(to_grey(x), x, factor).clamp_(0, 1)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue by `shift` turns, with saturation and value of HSV as they are.

    With hue h in sixths of a turn, a channel of (value v, chroma c) is v - c * clamp(min(k, 4 - k), 0, 1), where
    k = (n + h) mod 6 and n = 5, 3, 1 for red, green and blue.
    """
    red, green, blue = x.unbind(dim=1)
    value, lowest = x.amax(dim=1), x.amin(dim=1)
    chroma = value - lowest
    divisor = torch.where(chroma == 0, 1.0, chroma)
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue += 6 * shift.squeeze(1)
    channels = []
    for offset in (5, 3, 1):
        k = (hue + offset).remainder_(6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(channels, dim=1)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blurs each image with a kernel of 9 x 9 of its own sigma, (images, 1, 1, 1) in pixels. Borders are reflected."""
    offsets = torch.arange(-_BLUR_RADIUS, _BLUR_RADIUS + 1, device=x.device)
    weights = torch.exp(-0.5 * (offsets / sigma.flatten(1)) ** 2)
    weights = (weights / weights.sum(dim=1, keepdim=True)).view(-1, 1, 1, 1, len(offsets))
    for dim in (2, 3):
        size, pad = x.shape[dim], [0, 0, 0, 0]
        pad[2 * (3 - dim) : 2 * (3 - dim) + 2] = [_BLUR_RADIUS, _BLUR_RADIUS]
        padded = F.pad(x, pad, mode="reflect")
        x = weights[..., 0] * padded.narrow(dim, 0, size)
        for place in range(1, len(offsets)):
            x.addcmul_(weights[..., place], padded.narrow(dim, place, size))
    return x


def solarize(x: Tensor, _: Tensor) -> Tensor:
    """Inverts the values from 128 / 255 on."""
    return torch.where(x >= _SOLARIZE_FROM, 1 - x, x)


_CHANGES = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
