"""The image processor against transformers' PIL processor, its settings files, and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from transformers import AutoImageProcessor, BitImageProcessorPil

from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.data.rgb import to_rgb
from dinov2_fast.errors import WeightsError
from tests.helpers.weight_folders import isolate, refuse_network

IMAGES = sorted((Path(__file__).parents[2] / "examples" / "images").glob("*.jpg"))
SETTINGS: dict[str, Any] = {
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8)


def assert_equal_to_transformers(images: Any, background: str | None = None, **settings: Any) -> None:
    expected = BitImageProcessorPil(**{**SETTINGS, **settings})(images, return_tensors="np").pixel_values
    ours = Dinov2ImageProcessor(**{**SETTINGS, **settings}, background=background)
    got = ours(images, return_tensors="np").pixel_values
    assert got.shape == expected.shape
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_equals_transformers_on_photographs(path: Path) -> None:
    assert_equal_to_transformers(Image.open(path))


def test_equals_transformers_on_images_of_several_sizes() -> None:
    assert len(IMAGES) == 5
    assert_equal_to_transformers([Image.open(path) for path in IMAGES])


@pytest.mark.parametrize("size", [(3, 700), (700, 3), (1, 1), (100, 101), (101, 100), (224, 224), (256, 300)])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_resize": False},
        {"do_resize": False, "crop_size": {"height": 301, "width": 150}},
        {"size": {"height": 98, "width": 143}},
        {"size": {"shortest_edge": 99}, "crop_size": {"height": 518, "width": 714}},
        {"do_center_crop": False, "size": {"height": 42, "width": 28}, "resample": 2},
        {"do_normalize": False},
        {"do_rescale": False, "image_mean": [10.0, 20.0, 30.0], "image_std": [2.0, 3.0, 4.0]},
    ],
    ids=str,
)
def test_equals_transformers_for_every_shape(size: tuple[int, int], settings: dict[str, Any]) -> None:
    assert_equal_to_transformers(Image.fromarray(noise(*size, 3)), **settings)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_equals_transformers_for_every_mode(mode: str) -> None:
    image = Image.open(IMAGES[1])
    if mode == "RGBA":
        image.putalpha(Image.fromarray(noise(*image.size[::-1])))
    else:
        image = image.convert(mode)
    on_white = Version(transformers.__version__) >= Version("5.23")  # and not yet in 5.17
    assert_equal_to_transformers(image, background="white" if on_white else None)


def test_equals_transformers_for_arrays_and_tensors() -> None:
    hwc = np.asarray(Image.open(IMAGES[0]))
    chw = np.ascontiguousarray(hwc.transpose(2, 0, 1))
    unit = (hwc / 255).astype(np.float32)
    batch = np.stack([chw, chw[:, ::-1]])
    for images in (hwc, chw, hwc.astype(np.float32), batch, [hwc, chw], torch.from_numpy(chw), torch.from_numpy(batch)):
        assert_equal_to_transformers(images)
    assert_equal_to_transformers(unit, do_rescale=False)
    assert_equal_to_transformers(np.random.default_rng(0).random((300, 400, 3), np.float32), do_rescale=False)


def test_the_same_image_in_different_types_gives_the_same_pixels() -> None:
    processor = Dinov2ImageProcessor()
    hwc = np.asarray(Image.open(IMAGES[2]))
    expected = processor(hwc).pixel_values
    tensor = torch.from_numpy(hwc.transpose(2, 0, 1).copy())
    assert torch.equal(processor(tensor.double()).pixel_values, expected)
    assert torch.equal(processor(tensor.bfloat16()).pixel_values, expected)
    unit = processor(tensor.float().div(255).requires_grad_(), do_rescale=False).pixel_values
    assert (unit - expected).abs().max() < 1e-5
    grey = hwc[..., 0]
    as_pil = processor(Image.fromarray(grey)).pixel_values
    assert torch.equal(processor(grey).pixel_values, as_pil)
    assert torch.equal(processor(grey[None]).pixel_values, as_pil)


def test_an_ambiguous_shape_is_read_channels_first_unless_specified() -> None:
    array = noise(3, 40, 3)
    processor = Dinov2ImageProcessor(do_resize=False, crop_size=(3, 3))
    first = processor(array, "np").pixel_values
    last = processor(array, "np", input_data_format="channels_last").pixel_values
    assert np.array_equal(
        first, processor(array.transpose(1, 2, 0), "np", input_data_format="channels_last").pixel_values
    )
    assert not np.array_equal(first, last)


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_16_bit_grey_is_scaled_not_clipped(mode: str) -> None:
    values = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    image = Image.fromarray(values if mode == "I;16" else values.astype(np.int32))
    assert image.mode == mode
    grey = np.asarray(to_rgb(image))
    assert len(np.unique(grey)) == 256
    assert np.abs(grey[..., 0] - values / 257).max() <= 0.5
    assert (grey == grey[..., :1]).all()


def test_alpha_is_dropped_and_palettes_are_resolved() -> None:
    rgba = Image.fromarray(noise(8, 8, 4), "RGBA")
    assert np.array_equal(np.asarray(to_rgb(rgba)), np.asarray(rgba)[..., :3])
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    palette.info["transparency"] = b"\x00\x80"
    assert np.asarray(to_rgb(palette)).tolist() == [[[255, 0, 0], [0, 255, 0]]]


def test_transparent_pixels_are_composited_on_the_background() -> None:
    rgba = Image.new("RGBA", (3, 1))
    for place, pixel in enumerate([(0, 0, 0, 0), (10, 20, 30, 255), (0, 100, 200, 51)]):
        rgba.putpixel((place, 0), pixel)
    assert np.asarray(to_rgb(rgba, "white")).tolist() == [[[255, 255, 255], [10, 20, 30], [204, 224, 244]]]
    assert np.asarray(to_rgb(rgba, "#ff0000")).tolist()[0][0] == [255, 0, 0]
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, 0, 255, 0])
    palette.putpixel((0, 0), 0)
    palette.info["transparency"] = 0
    keyed = Image.new("RGB", (2, 1), (0, 255, 0))
    keyed.putpixel((0, 0), (0, 0, 0))
    keyed.info["transparency"] = (0, 0, 0)
    for image in (palette, keyed):
        assert np.asarray(to_rgb(image, "white")).tolist() == [[[255, 255, 255], [0, 255, 0]]]
    grey = Image.fromarray(np.array([[0, 65535]], np.uint16))
    grey.info["transparency"] = 5
    assert np.asarray(to_rgb(grey, "white")).tolist() == [[[0] * 3, [255] * 3]]
    opaque = Image.fromarray(noise(8, 8, 3))
    assert to_rgb(opaque, "white") is opaque


def test_the_background_is_saved_and_loaded_as_a_setting(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (20, 20))
    processor = Dinov2ImageProcessor.for_size(14, background="white", do_rescale=False, do_normalize=False)
    processor.save_pretrained(tmp_path)
    for on_white in (processor, Dinov2ImageProcessor.from_pretrained(tmp_path)):
        assert (on_white(clear, "np").pixel_values == 255).all()
    assert (processor(clear, "np", background="black").pixel_values == 0).all()
    assert "background" not in Dinov2ImageProcessor().to_dict()
    with pytest.raises(ValueError, match="background must be a colour such as white or #ffffff, got 'whit'"):
        Dinov2ImageProcessor(background="whit")
    with pytest.raises(
        ValueError, match=r"Only PIL images can have a background; convert the array with Image\.fromarray"
    ):
        processor(np.zeros((20, 20, 4), np.uint8))


def test_the_output_has_pixel_values_by_key_and_attribute() -> None:
    output = Dinov2ImageProcessor()(noise(300, 300, 3))
    assert output.pixel_values is output["pixel_values"]
    assert output.pixel_values.shape == (1, 3, 224, 224)
    assert dict(**output).keys() == {"pixel_values"}
    assert output.to("cpu", torch.float16).pixel_values.dtype == torch.float16
    with pytest.raises(AttributeError, match="pixel_values"):
        output.pixels  # noqa: B018


def test_outputs_of_different_size_are_a_list_or_an_error() -> None:
    processor = Dinov2ImageProcessor(do_center_crop=False)
    images = [noise(300, 400, 3), noise(400, 300, 3)]
    assert [p.shape for p in processor(images, return_tensors=None).pixel_values] == [(3, 256, 341), (3, 341, 256)]
    with pytest.raises(ValueError, match=r"2 sizes \(256 x 341, 341 x 256\)"):
        processor(images)
    assert processor.output_size is None


def test_for_size_gives_that_size_without_padding() -> None:
    for image in (noise(100, 900, 3) | 1, noise(900, 100, 3) | 1, noise(50, 50, 3) | 1):
        assert Dinov2ImageProcessor.for_size(70)(image).pixel_values.shape == (1, 3, 70, 70)
        for crop in (True, False):
            processor = Dinov2ImageProcessor.for_size((42, 98), crop=crop, do_normalize=False, resample=0)
            pixels = processor(image).pixel_values
            assert pixels.shape == (1, 3, 42, 98)
            assert processor.output_size == (42, 98)
            assert pixels.min() > 0  # padding would be black


@pytest.mark.parametrize(
    ("size", "nearest"), [(500, "490 or 504"), ((518, 520), "518 or 532"), (13, "14"), (0, "14"), (20, "14 or 28")]
)
def test_for_size_names_the_nearest_multiples(size: Any, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"not a multiple of the patch size 14; nearest: {nearest}"):
        Dinov2ImageProcessor.for_size(size)


def test_settings_round_trip_and_transformers_reads_them(tmp_path: Path) -> None:
    processor = Dinov2ImageProcessor(size=300, crop_size=(238, 266), resample=2, image_mean=[0.1, 0.2, 0.3])
    path = processor.save_pretrained(tmp_path / "new")
    for source in (path, path.parent, str(path.parent)):
        assert Dinov2ImageProcessor.from_pretrained(source).to_dict() == processor.to_dict()
    pytest.importorskip("torchvision", reason="AutoImageProcessor needs torchvision, which is not installed")
    theirs = AutoImageProcessor.from_pretrained(path.parent, backend="pil")
    assert isinstance(theirs, BitImageProcessorPil)
    image = Image.open(IMAGES[3])
    np.testing.assert_allclose(
        processor(image, "np").pixel_values, theirs(image, return_tensors="np").pixel_values, rtol=0, atol=1e-6
    )
    theirs.save_pretrained(tmp_path / "theirs")
    assert Dinov2ImageProcessor.from_pretrained(tmp_path / "theirs").to_dict() == processor.to_dict()


def test_settings_missing_from_a_file_have_transformers_defaults(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "BitImageProcessor", "crop_size": 98}')
    image = Image.open(IMAGES[4])
    ours = Dinov2ImageProcessor.from_pretrained(tmp_path)(image, "np").pixel_values
    pytest.importorskip("torchvision", reason="AutoImageProcessor needs torchvision, which is not installed")
    theirs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(image, return_tensors="np").pixel_values
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_the_default_settings_equal_those_of_the_checkpoints(tmp_path: Path) -> None:
    stored = json.loads(Dinov2ImageProcessor().save_pretrained(tmp_path).read_text())
    assert stored == {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": 256},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 0.00392156862745098,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"image_processor_type": "DPTImageProcessor"}', "describes a DPTImageProcessor"),
        ('{"image_processor_type": "BitImageProcessor", "do_pad": true}', "pads"),
        ("{", "is not JSON"),
        ("[]", "does not hold the settings"),
        ('{"size": {"longest_edge": 3}}', "size must have the keys height and width or shortest_edge"),
    ],
)
def test_files_of_other_processors_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Dinov2ImageProcessor.from_pretrained(tmp_path)


def test_the_error_names_a_missing_file(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(WeightsError, match=r"No preprocessor_config\.json was found for"):
            Dinov2ImageProcessor.from_pretrained(source)
    with pytest.raises(WeightsError, match="nobody/nothing is not in the Hugging Face cache"):
        Dinov2ImageProcessor.from_pretrained("nobody/nothing", local_files_only=True)


def test_a_hub_repository_is_read_from_its_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache = isolate(monkeypatch, tmp_path).huggingface
    attempts = refuse_network(monkeypatch)
    commit, repository = "0" * 40, cache / "models--somebody--something"
    Dinov2ImageProcessor(crop_size=98).save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v2").write_text(commit)
    processor = Dinov2ImageProcessor.from_pretrained("somebody/something", revision="v2")
    assert processor.output_size == (98, 98)
    assert not attempts


def test_settings_of_a_file_can_be_overridden(tmp_path: Path) -> None:
    Dinov2ImageProcessor(crop_size=98).save_pretrained(tmp_path)
    processor = Dinov2ImageProcessor.from_pretrained(tmp_path, crop_size=56)
    assert processor.output_size == (56, 56)
    with pytest.raises(TypeError, match="no setting 'crop'"):
        Dinov2ImageProcessor.from_pretrained(tmp_path, crop=56)


def test_arguments_of_transformers_without_effect_are_accepted(tmp_path: Path) -> None:
    Dinov2ImageProcessor(crop_size=98).save_pretrained(tmp_path / "inner")
    processor = Dinov2ImageProcessor.from_pretrained(
        tmp_path, subfolder="inner", use_fast=True, backend="pil", cache_dir=None, token=None, trust_remote_code=False,
        do_pad=False,
    )  # fmt: skip
    assert processor.settings() == Dinov2ImageProcessor(crop_size=98).settings()
    expected = processor(GOOD).pixel_values
    assert torch.equal(processor(GOOD, do_pad=None, disable_grouping=None, do_resize=None).pixel_values, expected)
    for setting in ({"do_pad": True}, {"do_resizes": None}):
        with pytest.raises(TypeError, match="has no setting"):
            processor(GOOD, **setting)


def test_a_folder_of_the_hubs_cache_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    attempts = refuse_network(monkeypatch)
    repository = tmp_path / "models--somebody--something"
    Dinov2ImageProcessor(crop_size=98).save_pretrained(repository / "snapshots" / "v2" / "inner")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("v2")
    processor = Dinov2ImageProcessor.from_pretrained("somebody/something", cache_dir=tmp_path, subfolder="inner")
    assert processor.output_size == (98, 98)
    assert not attempts


@pytest.mark.parametrize("return_tensors", ["pt", "np", None])
def test_outputs_can_be_channels_last(return_tensors: str | None) -> None:
    process = Dinov2ImageProcessor()
    first = process([GOOD, GOOD + 40], return_tensors, data_format="channels_first").pixel_values
    last = process([GOOD, GOOD + 40], return_tensors, data_format="channels_last").pixel_values
    assert type(last) is type(first)
    assert np.array_equal(np.stack([*last]), np.stack([*first]).transpose(0, 2, 3, 1))


def test_tensors_go_to_a_device() -> None:
    assert Dinov2ImageProcessor()(GOOD, device="cpu").pixel_values.device.type == "cpu"
    assert Dinov2ImageProcessor()(GOOD, device=torch.device("meta")).pixel_values.is_meta
    with pytest.raises(ValueError, match='ask for return_tensors="pt"'):
        Dinov2ImageProcessor()(GOOD, "np", device="cpu")


GOOD = np.full((20, 20, 3), 9, np.uint8)


@pytest.mark.parametrize(
    ("images", "settings", "error", "message"),
    [
        ([], {}, ValueError, "list of images is empty"),
        (np.zeros((0, 3, 20, 20), np.uint8), {}, ValueError, "not empty"),
        (np.zeros((2, 2, 3, 20, 20), np.uint8), {}, ValueError, "got shape"),
        (np.zeros(5, np.uint8), {}, ValueError, "got shape"),
        (np.zeros((20, 20, 5), np.uint8), {}, ValueError, "1, 3 or 4 channels"),
        (torch.zeros(2, 20, 20, dtype=torch.uint8), {}, ValueError, "1, 3 or 4 channels"),
        (torch.zeros(3, 20, 20, dtype=torch.int64), {}, ValueError, "got int64; convert it to one of these"),
        (GOOD.astype(np.int16), {}, ValueError, "got int16"),
        (GOOD > 5, {}, ValueError, "got bool"),
        (np.full((20, 20, 3), np.nan), {}, ValueError, "values from nan"),
        (GOOD * 100.0, {}, ValueError, "between 0 and 255, got values from 900.0"),
        (GOOD * -1.0, {}, ValueError, "between 0 and 255"),
        (GOOD / 1.0, {"do_rescale": False}, ValueError, r"between 0 and 1 \(do_rescale=False\)"),
        (GOOD / 255, {}, ValueError, "looks scaled already; pass do_rescale=False"),
        ("image.jpg", {}, TypeError, "got str"),
        ([[GOOD]], {}, TypeError, "got list"),
        (GOOD, {"do_resized": True}, TypeError, "no setting 'do_resized'; did you mean do_resize"),
        (GOOD, {"return_tensors": "tf"}, ValueError, "return_tensors"),
        (GOOD, {"input_data_format": "last"}, ValueError, "input_data_format"),
        (GOOD, {"data_format": "last"}, ValueError, "^data_format must be"),
        (Image.new("RGB", (5, 0)), {}, ValueError, "image of 5 x 0 has no pixels"),
        (Image.new("P", (0, 5)), {"do_resize": False}, ValueError, "image of 0 x 5 has no pixels"),
        (GOOD, {"input_data_format": "channels_first"}, ValueError, "1, 3 or 4 channels"),
        (GOOD, {"size": 0}, ValueError, "size must be one or two .* positive whole numbers"),
        (GOOD, {"crop_size": {"shortest_edge": 3}}, ValueError, "crop_size must have the keys height and width,"),
        (GOOD, {"image_mean": [1, 2]}, ValueError, "image_mean"),
        (GOOD, {"image_std": 0.0}, ValueError, "image_std must not contain 0"),
        (GOOD, {"resample": 17}, ValueError, "17 is not a valid Resampling"),
        (GOOD[:, :, :1], {"do_convert_rgb": False}, ValueError, "set do_convert_rgb=True"),
        (Image.new("L", (9, 9)), {"do_convert_rgb": False}, ValueError, "set do_convert_rgb=True"),
        (Image.new("F", (9, 9)), {}, ValueError, "no agreed range"),
        (Image.new("I", (9, 9), 70000), {}, ValueError, "no agreed range"),
        (Image.new("RGB", (1, 40000)), {}, ValueError, "Resizing this image of [0-9]+ x [0-9]+ pixels would give"),
        (
            torch.zeros(3, 1, 400000, dtype=torch.uint8),
            {},
            ValueError,
            "Resizing this image of [0-9]+ x [0-9]+ pixels would give",
        ),
    ],
)
def test_bad_input_raises_an_error_that_names_it(
    images: Any, settings: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        Dinov2ImageProcessor()(images, **settings)


def test_rgba_and_16_bit_arrays_are_read_as_the_same_pil_images() -> None:
    rgba = np.random.default_rng(0).integers(0, 256, (260, 300, 4), np.uint8)
    processor = Dinov2ImageProcessor()
    expected = processor(Image.fromarray(rgba), "np").pixel_values
    np.testing.assert_array_equal(processor(rgba, "np").pixel_values, expected)
    np.testing.assert_array_equal(processor(rgba.transpose(2, 0, 1), "np").pixel_values, expected)
    grey = np.random.default_rng(0).integers(0, 65536, (260, 300)).astype(np.uint16)
    expected = processor(Image.fromarray(grey), "np").pixel_values
    np.testing.assert_array_equal(processor(grey, "np").pixel_values, expected)
    assert len(np.unique(expected)) > 100  # not clipped to black and white
    with pytest.raises(ValueError, match="4 channels, not 3"):
        processor(rgba, do_convert_rgb=False)
