"""Crops against torchvision's."""

from __future__ import annotations

from collections import Counter
from random import Random

import numpy as np
import pytest
from PIL import Image
from scipy.stats import ks_2samp

from dinov2_fast.pretraining import crops as module
from dinov2_fast.pretraining.config import CropsConfig
from dinov2_fast.pretraining.crops import Crops, random_box

CONFIG = CropsConfig(global_size=56, local_size=28, n_local=3)


def photograph(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)


def test_crops_have_their_sizes_and_their_order() -> None:
    crops = Crops(CONFIG)
    values = crops.prepare(photograph(90, 70), 5)
    assert values.shape == crops.output_shape
    global_crops, local_crops = crops.split(values)
    assert global_crops.shape == (2, 3, 56, 56)
    assert local_crops.shape == (3, 3, 28, 28)
    assert np.array_equal(np.concatenate([global_crops.ravel(), local_crops.ravel()]), values)


def test_crops_depend_on_the_seed_alone() -> None:
    crops, image = Crops(CONFIG), photograph(90, 70)
    assert np.array_equal(crops.prepare(image, 5), crops.prepare(image, 5))
    assert not np.array_equal(crops.prepare(image, 5), crops.prepare(image, 6))


def test_a_crop_is_torchvisions_for_the_same_box(monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    mode = pytest.importorskip("torchvision.transforms").InterpolationMode.BICUBIC
    image, boxes = photograph(90, 70), [(3, 5, 60, 50), (0, 0, 90, 70), (40, 10, 47, 20)]
    remaining = iter(boxes * 2)
    monkeypatch.setattr(module, "random_box", lambda *_: next(remaining))
    found = Crops(CropsConfig(global_size=56, local_size=28, n_local=1)).prepare(image, 0)
    *global_crops, local = np.split(found, [3 * 56**2, 6 * 56**2])
    for values, size, (left, top, right, bottom) in zip((*global_crops, local), (56, 56, 28), boxes, strict=True):
        theirs = functional.resized_crop(image, top, left, bottom - top, right - left, [size, size], mode)
        ours, expected = values.reshape(3, size, size), np.asarray(theirs).transpose(2, 0, 1)
        assert np.array_equal(ours, expected) or np.array_equal(ours, expected[..., ::-1])


@pytest.mark.parametrize(("width", "height"), [(500, 375), (60, 400)])
@pytest.mark.parametrize("scale", [(0.32, 1.0), (0.05, 0.32)])
def test_boxes_are_distributed_as_torchvisions(width: int, height: int, scale: tuple[float, float]) -> None:
    torch = pytest.importorskip("torch")
    transforms = pytest.importorskip("torchvision.transforms")
    rng, image = Random(0), Image.new("RGB", (width, height))
    torch.manual_seed(0)
    ours = np.array([random_box(width, height, scale, rng) for _ in range(2000)])
    theirs = [transforms.RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(2000)]
    top, left, rows, columns = np.array(theirs).T
    expected = np.stack([left, top, left + columns, top + rows], axis=1)
    assert min(ks_2samp(ours[:, side], expected[:, side]).pvalue for side in range(4)) > 1e-3
    for size in (ours[:, 2] - ours[:, 0], ours[:, 3] - ours[:, 1]):
        assert size.min() > 0
    assert ks_2samp(ours[:, 2] - ours[:, 0], columns).pvalue > 1e-3


def test_half_of_the_crops_are_mirrored() -> None:
    image = Image.fromarray(np.tile(np.arange(96, dtype=np.uint8)[None, :, None], (96, 1, 3)))
    crops = Crops(CONFIG)
    is_mirrored = Counter(
        bool(crop[0, 0, 0] > crop[0, 0, -1])
        for seed in range(200)
        for crop in crops.split(crops.prepare(image, seed))[0]
    )
    assert 150 < is_mirrored[True] < 250


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3)])
def test_tiny_and_narrow_images_have_crops(size: tuple[int, int]) -> None:
    assert Crops(CONFIG).prepare(Image.new("RGB", size, "red"), 1).size == Crops(CONFIG).output_shape[0]
