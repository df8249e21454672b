"""PCA colours, attention maps and sheets show what was planted in their inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from dinov2_fast import extract, visualize
from dinov2_fast.visualize import PcaBasis, Tile, attention_rgb, pca_rgb, save_sheet
from dinov2_fast.visualize.drawable import read_stored
from dinov2_fast.visualize.sheet import pca_strips
from dinov2_fast.visualize.show import show
from tests.helpers.extraction import MeanColour
from tests.helpers.small_models import small

PHOTOGRAPHS = sorted(map(str, (Path(__file__).parents[2] / "examples" / "images").glob("*.jpg")))


def planted(batch: int = 2, height: int = 6, width: int = 8, dim: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Features made of three independent maps along orthogonal directions, of falling variance; and the maps."""
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
    rounding = 1e-12 * np.random.default_rng(0).standard_normal((1, 4, 4, 5))
    assert (pca_rgb(0.1 + rounding) == 128).all()


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


def test_a_foreground_that_fills_most_of_the_border_is_the_side_that_is_rarer_there() -> None:
    inside = np.ones((1, 9, 9), bool)
    inside[0, 0, :7] = inside[0, 8, :5] = False  # 12 of the 32 patches of the border
    features = np.random.default_rng(5).standard_normal((1, 9, 9, 12))
    features[..., 3] += 40 * inside
    rgb = pca_rgb(features, foreground="threshold")
    assert np.array_equal(rgb.any(axis=-1), inside)


@pytest.mark.parametrize("foreground", [None, "threshold"])
def test_the_colour_of_a_patch_does_not_depend_on_other_patches(foreground: str | None, tmp_path: Path) -> None:
    features, _ = planted(batch=6)
    features[:, 2:4, 2:6] += 8
    basis = PcaBasis.fit(features[:4], foreground=foreground, about={"model": "m"})
    basis.save(tmp_path / "new" / "basis.safetensors")
    loaded = PcaBasis.load(tmp_path / "new" / "basis.safetensors")
    assert loaded.about == {"model": "m"}
    made_of = pca_rgb(features[:4], foreground=foreground)
    assert (made_of == 0).all(axis=-1).any() == (foreground is not None)
    together = loaded.rgb(features)
    assert np.array_equal(together[:4], made_of)
    for i, image in enumerate(features):
        assert np.array_equal(loaded.rgb(image[None])[0], together[i])
    assert np.array_equal(loaded.rgb(features[5, 3, 4].reshape(1, 1, 1, -1))[0, 0, 0], together[5, 3, 4])
    assert not np.array_equal(pca_rgb(features[4:], foreground=foreground), together[4:])  # a PCA of their own


def test_a_basis_refuses_other_features_and_files(tmp_path: Path) -> None:
    path = tmp_path / "basis.safetensors"
    basis = PcaBasis.fit(planted()[0])
    basis.save(path)
    content = path.read_bytes()
    with pytest.raises(FileExistsError, match="exists already; choose another name"):
        PcaBasis.fit(planted()[0] + 1).save(path)
    assert path.read_bytes() == content
    with pytest.raises(ValueError, match="of features with 16 dimensions, and these have 8"):
        PcaBasis.load(path).rgb(np.ones((4, 8)))
    with pytest.raises(FileNotFoundError):
        PcaBasis.load(tmp_path / "none")
    save_file({"mean": np.ones(3)}, tmp_path / "weights.safetensors")
    (tmp_path / "cut").write_bytes(content[:-40])
    (tmp_path / "text").write_text("<html>")
    for name in ("weights.safetensors", "cut", "text"):
        with pytest.raises(ValueError, match=f"{name}' is not a PCA basis; `dinov2-fast show --save-basis` writes one"):
            PcaBasis.load(tmp_path / name)


BROKEN = np.random.default_rng(0).standard_normal((3, 4, 8))
BROKEN[1, 2, 3] = np.nan


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        (BROKEN, {}, "image 1 of the batch contain NaN"),
        (np.ones((1, 8)), {}, "at least 4 patches, got 1"),
        (np.ones((1, 8)), {"foreground": "threshold"}, "at least 4 patches, got 1"),
        (np.ones((16, 2)), {}, "at least 3 dimensions, got 2"),
        (np.ones((15, 8)), {}, r"15 patches do not form a square; pass grid=\(height, width\)"),
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


def test_a_heat_map_is_brightest_where_the_weights_are() -> None:
    weights = np.zeros((2, 3, 300))
    weights[:, :, 47:52] = 0.1
    weights[1] *= 0.01
    weights[:, 1] = 0
    rgb = attention_rgb(torch.from_numpy(weights), (15, 20))
    assert rgb.shape == (2, 3, 15, 20, 3)
    assert rgb.dtype == np.uint8
    assert np.array_equal(rgb[0], rgb[1])  # each map is scaled on its own
    bright = rgb[0, 0].astype(int).sum(axis=-1) > 0
    assert np.array_equal(np.flatnonzero(bright), np.arange(47, 52))
    assert (rgb[:, 1] == 0).all()


def test_brighter_is_more() -> None:
    rgb = attention_rgb(np.arange(256.0)).reshape(-1, 3).astype(int)
    brightness = rgb @ [299, 587, 114]
    assert (np.diff(brightness) >= 0).all()
    assert (np.diff(brightness) > 0).mean() > 0.9
    assert rgb[0].tolist() == [0, 0, 0]
    assert rgb[-1].min() > 150


def test_a_map_with_one_weight_shows_it() -> None:
    weights = np.zeros(400)
    weights[47] = 0.1
    rgb = attention_rgb(weights).reshape(400, 3)
    assert np.array_equal(rgb[47], attention_rgb(np.ones(1)).ravel())
    assert np.flatnonzero(rgb.any(axis=-1)).tolist() == [47]


def test_one_patch_that_takes_nearly_all_does_not_hide_the_rest() -> None:
    weights = np.full(1369, 1e-4)
    weights[5] = 0.9
    assert attention_rgb(weights)[0, 6].max() > 200


@pytest.mark.parametrize(
    "weights", [np.array([0.1, -0.1]), np.array([np.nan, 1]), np.array([np.inf, 1]), np.array(1.0), np.ones((2, 0))]
)
def test_values_that_are_not_attention_weights_are_refused(weights: Any) -> None:
    with pytest.raises(ValueError, match="finite and not negative"):
        attention_rgb(weights, (1, 2))


def test_the_sheet_shows_images_and_maps(tmp_path: Path) -> None:
    patches = np.zeros((3, 4, 3), np.uint8)
    patches[0, 0] = 255
    colours = Image.fromarray(patches)
    strips = [
        [Tile(Image.new("RGB", (80, 60), colour), name), Tile(colours, smooth=False)]
        for colour, name in (("red", "a"), ("blue", "b\nc"), ("lime", "d" * 300))
    ]
    path = save_sheet(tmp_path / "new" / "sheet.png", strips, columns=2, height=60)
    sheet = np.asarray(Image.open(path))
    assert path == tmp_path / "new" / "sheet.png"
    assert sheet.shape == (16 + 2 * (60 + 24 + 16), 16 + 2 * (80 + 4 + 80 + 16), 3)
    left = 16 + 80 + 4
    assert (sheet[16:76, 16:96] == [255, 0, 0]).all()
    assert (sheet[16:36, left : left + 20] == 255).all()  # a patch, enlarged without smoothing
    assert (sheet[36:76, left : left + 80] == 0).all()
    assert (sheet[16:76, 196:276] == [0, 0, 255]).all()
    assert (sheet[:, -16:] == 255).all()  # the long name does not run out of its cell
    narrow = save_sheet(path, strips[:1], columns=2, height=60)
    assert np.asarray(Image.open(narrow)).shape[1] == 16 + 80 + 4 + 80 + 16  # one strip is one column


def test_photographs_are_smoothed_and_maps_of_patches_are_not(tmp_path: Path) -> None:
    halves = Image.fromarray(np.array([[0, 255]], np.uint8))
    sheet = np.asarray(
        Image.open(save_sheet(tmp_path / "s.png", [[Tile(halves), Tile(halves, smooth=False)]], height=20))
    )
    smooth, sharp = (sheet[16, left : left + 40, 0] for left in (16, 16 + 40 + 4))
    assert set(sharp.tolist()) == {0, 255}
    assert len(set(smooth.tolist())) > 2


def dark(sheet: np.ndarray, rows: slice, columns: slice) -> bool:
    return bool((sheet[rows, columns] < 128).any())


def test_text_runs_on_under_tiles_without_one_and_stops_before_the_next(tmp_path: Path) -> None:
    white = Image.new("RGB", (50, 50), "white")
    for second, runs_on in (("", True), (".", False)):
        strip = [Tile(white, "W" * 20), Tile(white, second), Tile(white)]
        sheet = np.asarray(Image.open(save_sheet(tmp_path / "s.png", [strip], height=50)))
        under = slice(16 + 50, 16 + 50 + 24)
        assert dark(sheet, under, slice(16, 66))
        assert dark(sheet, under, slice(66 + 20, 66 + 104)) == runs_on


def test_the_sheet_is_wide_enough_for_its_title_and_note(tmp_path: Path) -> None:
    strip = [Tile(Image.new("RGB", (9, 9)))]
    for heading in ({"title": "w" * 90}, {"note": "w" * 120}, {"title": "w" * 90, "note": "w" * 120}):
        sheet = np.asarray(Image.open(save_sheet(tmp_path / "s.png", [strip], height=9, **heading)))
        assert sheet.shape[1] > 800
        assert (sheet[:, -8:] == 255).all()
        assert dark(sheet, slice(0, 16 + 24 * len(heading)), slice(700, None))
        assert sheet.shape[0] == 16 + 24 * len(heading) + 8 + 9 + 24 + 16  # the image lies below


@pytest.mark.parametrize(("count", "feature"), [(2, "patch_mean"), (1, "cls")])
def test_stored_features_of_which_nothing_can_be_drawn_are_an_error(count: int, feature: str, tmp_path: Path) -> None:
    extract(PHOTOGRAPHS[:count], MeanColour(), out=tmp_path / "features", features=[feature])
    with pytest.raises(ValueError, match="features' holds neither patches, nor cls of two images: nothing to draw"):
        read_stored(tmp_path / "features", (), 24)


def test_the_stride_sets_the_grid_of_stored_features(tmp_path: Path) -> None:
    model = small(depth=1)
    model.stride = (7, 14)
    extract(PHOTOGRAPHS[:1], model, out=tmp_path / "features", size=(42, 28), features=["patches"])
    drawable = read_stored(tmp_path / "features", (), 24)
    assert drawable.grid == (5, 2)
    assert drawable.patches[0].shape == (1, 10, 32)


def test_stride_and_limit_apply_to_the_images_that_the_model_runs_on(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced: list[int] = []
    drawn: list[Any] = []
    monkeypatch.setattr("dinov2_fast.visualize.show.pca_strips", lambda *args: drawn.append(args) or pca_strips(*args))
    options: dict[str, Any] = {"model": checkpoint, "size": (42, 28), "device": "cpu", "announce": announced.append}
    shown = show(PHOTOGRAPHS[:3], tmp_path, kinds=["pca"], stride=7, limit=2, **options)
    ((names, _, colours),) = drawn
    assert (announced, len(names), shown.is_limited) == ([2], 2, True)
    assert colours[0].shape == (2, 5, 3, 3)


def test_one_readable_image_of_two_has_no_neighbours(checkpoint: str, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_text("<html>")
    paths, options = [*PHOTOGRAPHS[:1], str(tmp_path / "broken.jpg")], {"size": (28, 28), "device": "cpu"}
    with pytest.raises(ValueError, match="Neighbours need two images or more"):
        show(paths, tmp_path / "out", kinds=["pca", "neighbours"], model=checkpoint, **options)
    assert not (tmp_path / "out").exists()


def test_the_sheet_refuses_what_it_cannot_draw(tmp_path: Path) -> None:
    for strips in ([], [[]], [[Tile(Image.new("RGB", (9, 9)))], []]):
        with pytest.raises(ValueError, match="at least one strip"):
            save_sheet(tmp_path / "s.png", strips)


def test_strips_show_what_they_are_given() -> None:
    images = [Image.new("RGB", (28, 14), colour) for colour in ("red", "blue")]
    rgb = {2: np.full((2, 1, 2, 3), 7, np.uint8), 5: np.full((2, 1, 2, 3), 9, np.uint8)}
    strips = visualize.pca_strips("ab", images, rgb)
    assert [[tile.text for tile in strip] for strip in strips] == [
        ["a", "block 2", "block 5"],
        ["b", "block 2", "block 5"],
    ]
    assert np.asarray(strips[1][2].image).max() == 9

    weights = {4: [np.array([[1.0, 0], [0, 1], [1, 0]]) for _ in images]}
    strips = visualize.attention_strips("ab", images, weights, (1, 2), [2, 1])
    assert [tile.text for tile in strips[0]] == ["a", "mean of all heads", "head 2", "head 1"]
    brightest = [int(np.asarray(tile.image).sum(axis=-1).argmax()) for tile in strips[0][1:]]
    assert brightest == [0, 0, 1]
    both = visualize.attention_strips("ab", images, {4: weights[4], 5: weights[4]}, (1, 2), [0])
    assert [strip[0].text for strip in both] == ["a, block 4", "a, block 5", "b, block 4", "b, block 5"]

    found, cosines = np.array([[1]]), np.array([[0.25]], np.float32)
    ((tile, neighbour),) = visualize.neighbour_strips({0: "a", 1: "b"}, dict(enumerate(images)), [0], found, cosines)
    assert (tile.text, neighbour.text) == ("a", "0.250 b")
    assert neighbour.image is images[1]
