"""PCA colours: planted structure comes back, the batch shares one PCA, signs are fixed, errors are clear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_fast.visualize import pca_rgb, save_pca_png


def planted(batch: int = 2, height: int = 6, width: int = 8, dim: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Features that are three independent maps along orthogonal directions, of falling variance, and the maps."""
    random = np.random.default_rng(0)
    maps = random.uniform(-1, 1, (batch, height, width, 3))
    directions = np.linalg.qr(random.standard_normal((dim, 3)))[0].T
    return (maps * [9.0, 3.0, 1.0]) @ directions + 5.0, maps


def test_planted_maps_are_red_green_and_blue() -> None:
    features, maps = planted()
    rgb = pca_rgb(features)
    assert rgb.shape == maps.shape
    assert rgb.dtype == np.uint8
    for channel in range(3):
        correlation = np.corrcoef(rgb[..., channel].ravel(), maps[..., channel].ravel())[0, 1]
        assert abs(correlation) > 0.97
    assert rgb.min() == 0
    assert rgb.max() == 255


def test_the_layouts_of_tokens_agree() -> None:
    features, _ = planted()
    expected = pca_rgb(features)
    flat = features.reshape(2, 48, 16)
    assert np.array_equal(pca_rgb(flat, (6, 8)), expected)
    assert np.array_equal(pca_rgb(torch.from_numpy(flat).requires_grad_(), (6, 8)), expected)
    assert pca_rgb(torch.from_numpy(flat).bfloat16(), (6, 8)).shape == expected.shape
    assert pca_rgb(flat[0], (6, 8)).shape == (1, 6, 8, 3)
    assert pca_rgb(flat[:, :36]).shape == (2, 6, 6, 3)


def test_signs_do_not_depend_on_the_order_of_the_patches() -> None:
    features, _ = planted()
    flat = features.reshape(1, 96, 16)
    order = np.random.default_rng(1).permutation(96)
    difference = pca_rgb(flat[:, order], (1, 96)).astype(int) - pca_rgb(flat, (1, 96))[:, :, order]
    assert np.abs(difference).max() <= 1
    assert np.array_equal(pca_rgb(features), pca_rgb(features.copy()))


def test_the_largest_loading_points_up() -> None:
    features = np.zeros((1, 2, 4, 5))
    ramp = np.arange(8.0).reshape(2, 4)
    features[0, ..., 2], features[0, ..., 4] = -3 * ramp, ramp
    red = pca_rgb(features)[0, ..., 0].ravel()
    assert (np.diff(red.astype(int)) < 0).all()  # the loading of channel 2 is the largest and its values fall


def test_one_pca_for_the_whole_batch() -> None:
    features, _ = planted()
    features[1] = features[0] * 0.5 + features[0].mean()
    features[1, 0] = features[0, 0]
    rgb = pca_rgb(features)
    assert np.array_equal(rgb[0, 0], rgb[1, 0])
    assert not np.array_equal(rgb[0, 1:], rgb[1, 1:])


def test_outliers_do_not_decide_the_colours() -> None:
    features, _ = planted(batch=4, height=16, width=16)
    maps_without = pca_rgb(features)
    direction = (features - features.mean((0, 1, 2))).reshape(-1, 16)
    direction = np.linalg.svd(direction, full_matrices=False)[2][0]
    features[0, 0, 0] += 300 * direction
    rgb = pca_rgb(features)
    red, red_without = (x[..., 0].astype(int).ravel()[1:] for x in (rgb, maps_without))
    assert abs(np.corrcoef(red, red_without)[0, 1]) > 0.99
    assert red.std() > 0.8 * red_without.std()


def test_components_without_variance_are_mid_grey() -> None:
    ramp = np.arange(16.0).reshape(1, 4, 4, 1)
    rgb = pca_rgb(ramp * np.array([0.1, 0.7, 0.3, 0.2]))
    assert len(np.unique(rgb[..., 0])) > 10
    assert (rgb[..., 1:] == 128).all()
    assert (pca_rgb(np.full((1, 4, 4, 5), 0.1)) == 128).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_threshold_keeps_what_is_off_the_border(sign: int) -> None:
    random = np.random.default_rng(5)
    inside = np.zeros((2, 9, 9), bool)
    inside[0, 2:7, 3:8] = True
    inside[1, 3:9, 2:5] = True  # touches the border a little
    features = random.standard_normal((2, 9, 9, 12))
    features[..., 3] += sign * 40 * inside
    rgb = pca_rgb(features, foreground="threshold")
    assert (rgb[~inside] == 0).all()
    assert (rgb[inside].max(axis=1) > 0).all()
    assert np.array_equal(rgb, pca_rgb(features, foreground=inside))
    assert not np.array_equal(rgb, pca_rgb(features))


BROKEN = np.random.default_rng(0).standard_normal((3, 4, 8))
BROKEN[1, 2, 3] = np.nan


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        (BROKEN, {}, "picture 1 of the batch contain NaN"),
        (np.ones((1, 8)), {}, "at least 4 patches, got 1"),
        (np.ones((1, 8)), {"foreground": "threshold"}, "at least 4 patches, got 1"),
        (np.ones((16, 2)), {}, "at least 3 dimensions, got 2"),
        (np.ones((15, 8)), {}, r"15 patches are no square; pass grid=\(height, width\)"),
        (np.ones((16, 8)), {"grid": (3, 5)}, "3 x 5 does not hold 16 patches"),
        (np.ones(8), {}, "got shape"),
        (np.ones((4, 8)), {"foreground": "otsu"}, 'foreground must be None, "threshold" or a boolean array'),
        (np.ones((4, 8)), {"foreground": np.ones((1, 2, 2))}, "must be boolean of shape"),
        (np.ones((4, 8)), {"foreground": np.zeros((1, 2, 2), bool)}, "at least 4 patches, got 0"),
    ],
)
def test_bad_input_is_a_clear_error(features: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pca_rgb(features, **options)


def test_the_sheet_shows_picture_and_colours(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (80, 60), colour) for colour in ("red", "blue", "lime")]
    rgb = np.zeros((3, 3, 4, 3), np.uint8)
    rgb[:, 0, 0] = 255
    path = save_pca_png(tmp_path / "new" / "sheet.png", pictures, rgb, names=["a", "b\nc", "d" * 300], height=60)
    sheet = np.asarray(Image.open(path))
    assert path == tmp_path / "new" / "sheet.png"
    assert sheet.shape == (16 + 2 * (60 + 24 + 16), 16 + 2 * (80 + 4 + 80 + 16), 3)
    left = 16 + 80 + 4
    assert (sheet[16:76, 16:96] == [255, 0, 0]).all()
    assert (sheet[16:36, left : left + 20] == 255).all()  # a patch, enlarged without smoothing
    assert (sheet[36:76, left : left + 80] == 0).all()
    assert (sheet[16:76, 196:276] == [0, 0, 255]).all()
    assert (sheet[:, -16:] == 255).all()  # the long name does not run out of its cell


def test_the_sheet_is_wide_enough_for_its_title(tmp_path: Path) -> None:
    path = save_pca_png(
        tmp_path / "s.png", [Image.new("RGB", (9, 9))], np.zeros((1, 3, 3, 3), np.uint8), title="w" * 90
    )
    sheet = np.asarray(Image.open(path))
    assert sheet.shape[1] > 800
    assert (sheet[:, -8:] == 255).all()


def test_the_sheet_refuses_what_does_not_match(tmp_path: Path) -> None:
    picture, rgb = Image.new("RGB", (9, 9)), np.zeros((1, 3, 3, 3), np.uint8)
    with pytest.raises(ValueError, match="2 pictures, 1 PCAs and 2 names"):
        save_pca_png(tmp_path / "s.png", [picture, picture], rgb)
    with pytest.raises(ValueError, match="0 pictures"):
        save_pca_png(tmp_path / "s.png", [], rgb[:0])
