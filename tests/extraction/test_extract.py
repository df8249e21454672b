"""Extraction: as many rows out as images in, in order, each with its own features or its own error."""

from __future__ import annotations

import hashlib
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import dinov2_fast
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.data.sources import find_images
from dinov2_fast.errors import InvalidValueError
from dinov2_fast.extraction.extract import extract
from dinov2_fast.extraction.run import Progress
from dinov2_fast.features.manifest import read_manifest
from dinov2_fast.features.schema import Feature, default_shard_size
from dinov2_fast.inference import optimize_for_inference
from tests.helpers.devices import on_gpu
from tests.helpers.extraction import MeanColour, assert_rows, expected_features, extract_files, rows_of, shard_tables
from tests.helpers.images import read_image
from tests.helpers.small_models import small

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "examples" / "images"


@pytest.fixture
def plain(tmp_path: Path) -> list[str]:
    """Seven images of different size and colour."""
    random = np.random.default_rng(0)
    files = []
    for index in range(7):
        pixels = random.integers(0, 30 * (index + 2), (40 + 9 * index, 90 - 7 * index, 3), dtype=np.uint8)
        files.append(str(tmp_path / f"image_{index}.png"))
        Image.fromarray(pixels).save(files[-1])
    return files


@pytest.fixture
def hostile(tmp_path: Path) -> tuple[list[str], set[int]]:
    """A folder of everything that goes wrong, good images in between; the files, and which of them are bad."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    rgb = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    jpeg = (IMAGES / "coffee.jpg").read_bytes()
    (folder / "a0_empty.jpg").write_bytes(b"")
    rgb.save(folder / "a1_good.png")
    (folder / "a2_ten_bytes.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (folder / "a3_half.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    rgb.convert("CMYK").save(folder / "b0_cmyk.jpg")
    values = np.linspace(0, 65535, 60 * 60).astype(np.uint16).reshape(60, 60)
    Image.fromarray(values).save(folder / "b1_grey16.png")
    rgb.quantize(16).save(folder / "b2_palette.png", transparency=bytes(range(0, 256, 16)))
    rgb.save(folder / "b3_animated.gif", save_all=True, append_images=[rgb.transpose(Image.Transpose.ROTATE_180)])
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(folder / "b4_turned.jpg", exif=exif)
    (folder / "c0_page.jpg").write_text("<html><body>404</body></html>")
    header = bytearray((folder / "a1_good.png").read_bytes())
    for name, side in (("c1_121_mpx.png", 11_000), ("c2_bomb.png", 20_000)):
        header[16:24] = side.to_bytes(4, "big") * 2
        header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
        (folder / name).write_bytes(header)
    (folder / "c3_loop.jpg").symlink_to("c3_loop.jpg")
    (folder / "c4_folder_loop").symlink_to(folder)
    (folder / "c5_nowhere.jpg").symlink_to("missing.jpg")
    rgb.save(folder / "d0_new\nline.png")
    rgb.save(folder / "d1_日本.png")
    rgb.resize((3, 100)).save(folder / "d2_narrow.png")
    files = [source.path for source in find_images(folder)]
    bad = {index for index, file in enumerate(files) if os.path.basename(file)[0] in "c"}
    return files, bad | {
        index for index, file in enumerate(files) if file.endswith(("empty.jpg", "bytes.png", "half.jpg"))
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_hostile_images_are_rows_in_order(hostile: tuple[list[str], set[int]], tmp_path: Path, workers: int) -> None:
    files, bad = hostile
    assert (len(files), len(bad)) == (17, 8)
    summary = extract_files(files, MeanColour(), tmp_path / "out", batch_size=4, workers=workers)
    assert (summary.images, summary.failures) == (17, 8)
    assert_rows(summary.folder, files, bad)
    errors = {os.path.basename(row["path"]): row["error"] for row in rows_of(summary.folder)}
    assert errors["a0_empty.jpg"] == "empty file"
    assert "truncated" in errors["a3_half.jpg"]
    assert "not an image" in errors["c0_page.jpg"]
    assert errors["c1_121_mpx.png"] == "too large: 11000 x 11000 pixels, the limit is 50000000"
    assert "symbolic links" in errors["c3_loop.jpg"]
    assert "No such file" in errors["c5_nowhere.jpg"]


def test_workers_batches_and_shards_change_no_row(plain: list[str], tmp_path: Path) -> None:
    found = []
    for workers, batch, shard, count in ((0, 1, 7, 1), (0, 7, 3, 3), (1, 3, 2, 4), (2, 32, None, 1)):
        out = tmp_path / f"{workers}_{batch}"
        extract_files(plain, MeanColour(), out, batch_size=batch, workers=workers, shard_size=shard)
        assert len(shard_tables(out)) == count
        found.append(rows_of(out))
    assert all(rows == found[0] for rows in found)
    assert_rows(tmp_path / "0_1", plain, set())


def test_a_folder_of_bad_images_gives_rows_with_errors(tmp_path: Path) -> None:
    files = [str(tmp_path / f"{index}.jpg") for index in range(5)]
    for file in files:
        Path(file).write_text("<html>")
    model = MeanColour()
    summary = extract_files(files, model, tmp_path, batch_size=2)
    assert (summary.images, summary.failures, model.batches) == (5, 5, [])
    assert_rows(summary.folder, files, set(range(5)))


def test_one_image_and_repeated_images_are_rows(plain: list[str], tmp_path: Path) -> None:
    assert_rows(extract_files(plain[:1], MeanColour(), tmp_path / "one").folder, plain[:1], set())
    repeated = [plain[0], plain[1], plain[0], plain[0]]
    assert_rows(extract_files(repeated, MeanColour(), tmp_path / "repeated").folder, repeated, set())


def test_a_batch_is_a_fixed_range_of_rows(plain: list[str], tmp_path: Path) -> None:
    model = MeanColour()
    calls: list[tuple[int, int]] = []
    files = [plain[0], "missing", *plain[1:]]

    def progress(status: Progress) -> None:
        calls.append((status.done, status.failures))
        assert (status.images, status.resumed) == (8, 0)
        assert 0 <= status.busy <= 1

    extract_files(files, model, tmp_path / "out", batch_size=3, progress=progress)
    assert model.batches == [2, 3, 2]
    assert calls == [(3, 1), (6, 1), (8, 1)]


def test_batches_begin_anew_with_each_shard(plain: list[str], tmp_path: Path) -> None:
    model = MeanColour()
    extract_files(plain, model, tmp_path / "out", batch_size=2, shard_size=3)
    assert model.batches == [2, 1, 2, 1, 1]


def test_a_shard_of_several_row_groups_is_read_as_one(
    plain: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinov2_fast.features.shards.ROW_GROUP_BYTES", 3 * 24)
    out = extract_files([*plain, "missing"], MeanColour(), tmp_path / "out", batch_size=2).folder
    assert pq.ParquetFile(out / "features-00000.parquet").num_row_groups == 3
    assert_rows(out, [*plain, "missing"], {7})
    assert extract_files([*plain, "missing"], MeanColour(), tmp_path / "out", batch_size=2).failures == 1


def test_a_shard_holds_whole_batches_up_to_a_limit() -> None:
    cls, patches = Feature("cls", (384,), "float32"), Feature("patches", (256, 384), "float16")
    assert default_shard_size([cls], 32) == 8192
    assert default_shard_size([cls], 100) == 8100
    assert default_shard_size([patches], 32) == (256 * 2**20 // (256 * 384 * 2)) // 32 * 32
    assert default_shard_size([patches], 4096) == 4096


def test_a_name_that_is_not_utf8_is_written_with_escapes(tmp_path: Path) -> None:
    names = [os.fsencode(tmp_path) + b"/caf\xe9.png", os.fsencode(tmp_path) + "/café.png".encode()]
    for name in names:
        Image.new("RGB", (30, 30), "red").save(os.fsdecode(name))
    (table,) = shard_tables(extract_files(names, MeanColour(), tmp_path / "out").folder)
    assert table["path"].to_pylist() == [f"{tmp_path}/caf\\xe9.png", f"{tmp_path}/café.png"]
    assert table["error"].to_pylist() == [None, None]


def test_an_image_that_cannot_be_resized_has_a_size_and_an_error(tmp_path: Path) -> None:
    Image.new("RGB", (1, 3000)).save(tmp_path / "narrow.png")
    row = rows_of(extract_files([str(tmp_path / "narrow.png")], MeanColour(), tmp_path).folder)[0]
    assert (row["width"], row["height"], row["cls"]) == (1, 3000, None)
    assert row["error"] == (
        "cannot be processed: Resizing this image of 1 x 3000 pixels would give 256 x 768000, more than 50000000 "
        "pixels. Choose a smaller size, or leave the image out."
    )


def test_features_that_are_not_finite_are_errors(plain: list[str], tmp_path: Path) -> None:
    class Overflowing(MeanColour):
        def forward_features(self, x: Tensor) -> dict[str, Tensor]:
            features = super().forward_features(x)
            features["x_norm_patchtokens"][1, 3, 2] = float("inf")
            features["x_norm_clstoken"][2, 0] = float("nan")
            return features

    rows = rows_of(extract_files(plain, Overflowing(), tmp_path / "out").folder)
    assert [row["error"] for row in rows] == [None, *["the model's features contain NaN or infinity"] * 2, *[None] * 4]
    assert [row["cls"] is None for row in rows] == [row["error"] is not None for row in rows]
    assert rows[1]["width"] == read_image(plain[1]).width


def test_the_models_dtype_is_used(plain: list[str], tmp_path: Path) -> None:
    summary = extract_files(plain, MeanColour().bfloat16(), tmp_path / "out")
    (table,) = shard_tables(summary.folder)
    assert str(table.schema.field("cls").type) == "fixed_size_list<element: float>[3]"
    assert read_manifest(summary.folder)["dtype"] == "bfloat16"
    expected = [expected_features(file)[1] for file in plain]
    np.testing.assert_allclose(np.array(table["patch_mean"].to_pylist()), expected, atol=0.02)


@pytest.mark.parametrize(
    ("processor", "workers", "uint8"),
    [
        (Dinov2ImageProcessor(), 0, True),
        (Dinov2ImageProcessor(), 1, True),
        (Dinov2ImageProcessor(size=20, crop_size=(42, 56)), 0, True),
        (Dinov2ImageProcessor(image_mean=0.5), 0, False),
        (Dinov2ImageProcessor(rescale_factor=1 / 127.5), 0, False),
        (Dinov2ImageProcessor(do_normalize=False), 0, False),
    ],
    ids=["default", "worker", "padded", "other mean", "other scale", "not normalised"],
)
def test_an_engine_gives_the_features_of_its_model(
    plain: list[str],
    tmp_path: Path,
    processor: Dinov2ImageProcessor,
    workers: int,
    uint8: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = small(embed_dim=64, num_register_tokens=2)
    engine, dtypes = optimize_for_inference(model, "fp32"), []
    forward_features = engine.forward_features
    monkeypatch.setattr(engine, "forward_features", lambda x: dtypes.append(x.dtype) or forward_features(x))
    files = [*plain[:3], "missing", *plain[3:]]
    rows = [
        rows_of(extract_files(files, runs, tmp_path / name, processor=processor, batch_size=3, workers=workers).folder)
        for name, runs in (("model", model), ("engine", engine))
    ]
    for name in ("cls", "patch_mean"):
        expected, found = (np.array([row[name] for row in part if row[name]]) for part in rows)
        assert len(found) == 7
        np.testing.assert_allclose(found, expected, atol=2e-5)
    assert set(dtypes) == {torch.uint8 if uint8 else torch.float32}
    of_model, of_engine = (read_manifest(tmp_path / name) for name in ("model", "engine"))
    assert of_model.pop("engine") is None
    assert of_engine.pop("engine") == {"residual_dtype": "float32", "skip_layers": [], "calibration": None}
    assert of_model.pop("backends")["attention.batch"] == of_engine.pop("backends")["attention.batch"]
    assert of_model["precision"] == "fp32"
    assert of_model == of_engine


def test_the_engine_s_precision_is_recorded(plain: list[str], tmp_path: Path) -> None:
    engine = optimize_for_inference(small(), "bf16", allow_slow=True)
    manifest = read_manifest(extract_files(plain, engine, tmp_path).folder)
    assert (manifest["dtype"], manifest["precision"], manifest["device"]) == ("bfloat16", "bf16", "cpu")


def test_backends_in_e4m3_are_recorded_with_the_others(plain: list[str], tmp_path: Path) -> None:
    engine = optimize_for_inference(small(), "fp8", allow_slow=True)
    recorded = read_manifest(extract_files(plain, engine, tmp_path).folder)["backends"]
    assert {"linear.gelu", "linear.gelu e4m3"} <= recorded.keys()
    assert len(recorded) == len(engine.backends())


def test_the_manifest_records_how_features_were_made(plain: list[str], tmp_path: Path) -> None:
    processor = Dinov2ImageProcessor.for_size(98)
    out = extract_files(plain, MeanColour(), tmp_path, processor=processor, batch_size=5).folder
    manifest = read_manifest(out)
    assert manifest["processor"] == processor.to_dict()
    assert (manifest["dtype"], manifest["device"], manifest["batch_size"]) == ("float32", "cpu", 5)
    assert manifest["features"] == {name: {"shape": [3], "dtype": "float32"} for name in ("cls", "patch_mean")}
    assert manifest["inputs"]["images"] == 7
    assert manifest["versions"]["dinov2_fast"] == dinov2_fast.__version__
    assert manifest["versions"]["torch"] == torch.__version__


def test_the_announcement_has_counts_and_bytes_before_the_first_image(plain: list[str], tmp_path: Path) -> None:
    said: list[Progress] = []
    options: Any = {"shard_size": 2, "features": ["cls", "patches"], "announce": said.append}
    extract_files(plain, MeanColour(), tmp_path, **options)
    extract_files(plain, MeanColour(), tmp_path, **options)
    first, second = said
    assert (first.images, first.shards, first.resumed) == (7, 4, 0)
    assert first.nbytes == 7 * (3 * 4 + 256 * 3 * 2)
    assert first.free > 0
    assert (second.resumed, second.done, second.failures) == (7, 7, 0)


class Training(MeanColour):
    def __init__(self) -> None:
        super().__init__()
        self.train()


@pytest.mark.parametrize(
    ("files", "model", "options", "message"),
    [
        ([], MeanColour, {}, "no images"),
        (["a"], Training, {}, r"call model.eval\(\)"),
        (["a"], MeanColour, {"batch_size": 0}, "batch_size and shard_size must be at least 1"),
        (["a"], MeanColour, {"shard_size": 0}, "batch_size and shard_size must be at least 1"),
        (["a"], MeanColour, {"part": (3, 2)}, "a number from 1 to count"),
        (["a"], MeanColour, {"part": (1, 2), "overwrite": True}, "delete what the other parts have written"),
        (["a"], MeanColour, {"format": "csv"}, "no format 'csv'; choose parquet or npy"),
        (["a"], MeanColour, {"dtype": "bf16"}, "no dtype 'bf16' for features; choose auto, fp32 or fp16"),
        (["a"], MeanColour, {"features": ["pooled"]}, "no feature 'pooled'; there are cls, patch_mean"),
        (["a"], MeanColour, {"features": ["registers@1"]}, "no feature 'registers@1'"),
        (["a"], MeanColour, {"features": []}, "No features were asked for"),
        (["a"], small, {"features": ["registers"]}, "has no registers"),
        (["a"], small, {"features": ["cls@3"]}, "no block 3; the blocks are 0 to 2"),
        (["a"], MeanColour, {"workers": -1}, "workers at least 0"),
        (["a"], MeanColour, {"processor": Dinov2ImageProcessor(crop_size=(224, 225))}, "224 x 225, not a multiple"),
        (["a"], MeanColour, {"processor": Dinov2ImageProcessor(do_center_crop=False)}, "differ in size"),
    ],
)
def test_bad_arguments_are_errors_before_anything_is_written(
    tmp_path: Path, files: list[str], model: type, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        extract_files(files, model(), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_file_as_output_folder_is_an_error(plain: list[str]) -> None:
    with pytest.raises(NotADirectoryError, match="is a file"):
        extract_files(plain, MeanColour(), plain[0])


def test_the_result_counts_images_failures_and_time(plain: list[str], tmp_path: Path) -> None:
    summary = extract_files([*plain, "missing"], MeanColour(), tmp_path / "out")
    assert summary.folder == tmp_path / "out"
    assert (summary.images, summary.failures, summary.resumed) == (8, 1, 0)
    assert 0 < summary.seconds < 60
    assert 0 < summary.busy < 1


NAMES = ["cls", "patch_mean", "patches", "registers", "cls@0", "patch_mean@1", "patches@0"]


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("names", [NAMES, [name for name in NAMES if name != "registers"], ["patches@1"]])
def test_features_are_those_of_the_model(plain: list[str], tmp_path: Path, engine: bool, names: list[str]) -> None:
    """In one pass where the last block and others are wanted, in two where registers are."""
    torch.manual_seed(0)
    model, processor = small(num_register_tokens=2), Dinov2ImageProcessor.for_size((28, 42))
    pixels = processor([read_image(file) for file in plain]).pixel_values
    with torch.inference_mode():
        output = model.forward_features(pixels)
        (first, first_cls), (second, _) = model.get_intermediate_layers(pixels, n=[0, 1], return_class_token=True)
    expected = {
        "cls": output["x_norm_clstoken"],
        "patch_mean": output["x_norm_patchtokens"].mean(dim=1),
        "patches": output["x_norm_patchtokens"],
        "registers": output["x_norm_regtokens"],
        "cls@0": first_cls,
        "patch_mean@1": second.mean(dim=1),
        "patches@0": first,
        "patches@1": second,
    }
    runs = optimize_for_inference(model, "fp32") if engine else model
    options: Any = {"processor": processor, "features": names, "dtype": "fp32", "batch_size": 3}
    found = dinov2_fast.load_features(extract_files(plain, runs, tmp_path, **options).folder)
    assert list(found) == names
    for name in names:
        assert found[name].shape == expected[name].shape
        np.testing.assert_allclose(found[name], expected[name], atol=2e-5, err_msg=name)


def test_tokens_are_stored_in_fp16_and_vectors_in_fp32_unless_asked(plain: list[str], tmp_path: Path) -> None:
    for dtype, expected in (("auto", ["float32", "float16"]), ("fp32", ["float32"] * 2), ("fp16", ["float16"] * 2)):
        options: Any = {"features": ["cls", "patches"], "dtype": dtype}
        found = dinov2_fast.load_features(extract_files(plain, MeanColour(), tmp_path / dtype, **options).folder)
        assert [found[name].dtype for name in found] == expected


def test_features_too_large_for_fp16_are_errors(plain: list[str], tmp_path: Path) -> None:
    model = MeanColour()
    with torch.no_grad():
        model.scale.fill_(1e8)
    assert extract_files(plain, model, tmp_path / "fp32").failures == 0
    summary = extract_files(plain, model, tmp_path / "fp16", dtype="fp16")
    assert summary.failures == 7
    assert (
        rows_of(summary.folder)[0]["error"] == "the model's features contain NaN or infinity, or are too large for fp16"
    )


@on_gpu
def test_on_a_gpu_the_features_are_those_of_the_cpu(plain: list[str], tmp_path: Path) -> None:
    """Batches overlap there, in pinned memory, and events measure."""
    torch.manual_seed(0)
    model, files = small(), [*plain, "missing", *plain] * 3
    options: Any = {"features": ["cls", "patches"], "dtype": "fp32", "batch_size": 4, "shard_size": 10, "workers": 2}
    expected = dinov2_fast.load_features(extract_files(files, model, tmp_path / "cpu", **options).folder)
    for name, runs in (("model", model.cuda()), ("engine", optimize_for_inference(model, "fp32"))):
        summary = extract_files(files, runs, tmp_path / name, **options)
        found = dinov2_fast.load_features(summary.folder)
        assert (summary.failures, found.error, 0 < summary.busy < 1) == (3, expected.error, True)
        for feature in expected:
            np.testing.assert_allclose(found[feature], expected[feature], atol=1e-3)


@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_load_features_returns_what_was_written(plain: list[str], tmp_path: Path, format: str) -> None:
    files = [plain[0], "missing", *plain[1:]]
    options: Any = {"features": ["cls", "patches"], "dtype": "fp32", "format": format}
    summary = extract_files(files, MeanColour(), tmp_path / "many", shard_size=3, **options)
    found = dinov2_fast.load_features(summary.folder)
    assert len(found) == 8
    assert found.path == files
    assert found.id.tolist() == list(range(8))
    assert [error is None for error in found.error] == [True, False, *[True] * 6]
    assert [found.width[1], found.height[1], found.sha256[1]] == [0, 0, None]
    assert (found.width[2], found.height[2]) == read_image(plain[1]).size
    assert found.sha256[2] == hashlib.sha256(Path(plain[1]).read_bytes()).hexdigest()
    for name in found:
        assert np.isnan(found[name][1]).all()
        assert np.isfinite(found[name][[0, *range(2, 8)]]).all()
    np.testing.assert_allclose(found["cls"][7], expected_features(plain[6])[0], atol=1e-5)
    np.testing.assert_allclose(found["patches"][7].mean(axis=0), expected_features(plain[6])[1], atol=1e-5)
    parts = list(found.shards())
    assert [len(part) for part in parts] == [3, 3, 2]
    np.testing.assert_array_equal(np.concatenate([part["patches"] for part in parts]), found["patches"])
    assert [path for part in parts for path in part.path] == files
    with pytest.raises(KeyError, match="no feature 'registers' was extracted; there are cls, patches"):
        found["registers"]
    one = dinov2_fast.load_features(extract_files(files, MeanColour(), tmp_path / "one", **options).folder)
    assert isinstance(one["cls"], np.memmap) == (format == "npy")
    np.testing.assert_array_equal(one["patches"], found["patches"])


@pytest.mark.parametrize("reader", ["pandas", "pyarrow.parquet", "pyarrow.dataset", "duckdb"])
def test_other_readers_read_the_folder_as_one_table(plain: list[str], tmp_path: Path, reader: str) -> None:
    module = pytest.importorskip(reader, reason=f"{reader} is not installed")
    read: dict[str, Any] = {
        "pandas": lambda folder: module.read_parquet(folder).to_dict("list"),
        "pyarrow.parquet": lambda folder: module.read_table(folder).to_pydict(),
        "pyarrow.dataset": lambda folder: module.dataset(folder).to_table().to_pydict(),
        "duckdb": lambda folder: module.sql(f"from read_parquet('{folder}') order by id").to_arrow_table().to_pydict(),
    }
    files = [plain[0], "missing", *plain[1:]]
    model = HalvedOnce()  # whose first shard has a note in its schema
    out = extract_files(files, model, tmp_path / "out", shard_size=3, features=["cls", "patches"], batch_size=3).folder
    found, expected = read[reader](f"{out}/"), dinov2_fast.load_features(out)
    assert list(found["path"]) == files
    assert [row is None for row in found["cls"]] == [error is not None for error in expected.error]
    good = [row for row, error in enumerate(expected.error) if error is None]
    for name in ("cls", "patches"):
        values = np.array([np.asarray(found[name][row], np.float32) for row in good])
        np.testing.assert_array_equal(values, expected[name][good].reshape(len(good), -1))


class HalvedOnce(MeanColour):
    """Memory ends at its first batch."""

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        found = super().forward_features(x)
        if len(self.batches) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found


def test_folders_without_features_or_with_missing_shards_are_errors(plain: list[str], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no features: there is no _manifest.json"):
        dinov2_fast.load_features(tmp_path)
    out = extract_files(plain, MeanColour(), tmp_path / "out", shard_size=2).folder
    (out / "features-00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"1 of the 4 shards in .* are missing: the extraction is not finished"):
        dinov2_fast.load_features(out)
    part = dinov2_fast.load_features(out, partial=True)
    assert part.id.tolist() == [0, 1, 4, 5, 6]
    assert len(part["cls"]) == len(part) == 5
    (out / "_manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="is no manifest of features"):
        dinov2_fast.load_features(out)


# The model and the images that a caller names


def test_a_named_model_is_loaded_and_recorded(plain: list[str], tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file(dict(small().state_dict()), weights)
    options: Any = {"size": 28, "device": "cpu", "precision": "fp32", "engine": False}
    named = extract(tmp_path / "*.png", weights, out=tmp_path / "named", **options)
    expected = extract(plain, dinov2_fast.load(weights), out=tmp_path / "given", size=28)
    assert (named.images, named.failures) == (expected.images, 0) == (7, 0)
    found = dinov2_fast.load_features(named.folder)
    assert found.path == plain
    assert found.manifest["about"]["model"] == str(weights)
    np.testing.assert_array_equal(found["cls"], dinov2_fast.load_features(expected.folder)["cls"])
    assert "model" not in dinov2_fast.load_features(expected.folder).manifest["about"]


@pytest.mark.parametrize(
    ("out", "device", "images", "message"),
    [
        ("image_0.png", "abacus", "missing", "The output folder .* is a file"),
        ("out", "abacus", "missing", "There is no device 'abacus'"),
        ("out", "cpu", "missing", "There is no file or folder"),
        ("out", "cpu", "empty", "There are no images in"),
        ("out", "cpu", "image_0.png", "the weights are read"),
    ],
)
def test_folder_device_and_images_are_checked_in_this_order_before_weights_are_read(
    out: str, device: str, images: str, message: str, plain: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise OSError("the weights are read")

    monkeypatch.setattr("dinov2_fast.extraction.extract.load_model", load)
    (tmp_path / "empty").mkdir()
    with pytest.raises((OSError, ValueError), match=message):
        extract(tmp_path / images, "dinov2_vitg14", out=tmp_path / out, device=device)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (MeanColour(), {"device": "cpu", "engine": False}, "loaded already, so leave out device, engine"),
        (MeanColour(), {"weights": "random:0"}, "loaded already, so leave out weights"),
        (MeanColour(), {"crop": False}, "crop=False needs size="),
        (MeanColour(), {"size": 28, "processor": Dinov2ImageProcessor()}, "not both"),
        ("dinov2_vits14", {"precision": "int8"}, "There is no precision 'int8'; choose auto, bf16"),
        ("dinov2_vits14", {"precision": "fp8", "engine": False}, "fp8 exists in the engine only"),
        ("dinov2_vits14", {"precision": "fp8", "device": "cpu"}, "fp8 would be slower than fp32 here"),
    ],
)
def test_settings_that_do_not_go_with_the_model_are_refused(
    model: Any, options: dict[str, Any], message: str, plain: list[str], tmp_path: Path
) -> None:
    with pytest.raises(InvalidValueError, match=message):
        extract(plain, model, out=tmp_path / "out", **options)


@pytest.mark.parametrize(
    "options", [{"format": "csv"}, {"dtype": "fp8"}, {"features": ["clss"]}, {"features": ["cls@x"]}, {"features": []}]
)
def test_settings_that_do_not_exist_are_refused_before_the_weights_are_read(
    options: dict[str, Any], plain: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinov2_fast.extraction.extract.load_model", None)
    with pytest.raises(InvalidValueError, match=r"There is no|No features were asked for"):
        extract(plain, "dinov2_vitg14", out=tmp_path / "out", **options)
