"""Extraction: as many rows out as pictures in, in order, each with its own features or its own error."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

import dinov2_fast
from dinov2_fast.extraction import list_images, read_image
from dinov2_fast.extraction.decoding import decode_all
from dinov2_fast.extraction.extract import Summary, extract
from dinov2_fast.extraction.features_file import read_metadata
from dinov2_fast.image_processor import Dinov2ImageProcessor
from dinov2_fast.inference import optimize_for_inference
from tests.test_model import small

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "examples" / "pictures"


class MeanColour(nn.Module):
    """The model's interface on features that can be computed by hand: colours, averaged over picture and patches."""

    patch_size, embed_dim, position_dialect = 14, 3, "offset"

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.batches: list[int] = []
        self.eval()

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        self.batches.append(len(x))
        patches = avg_pool2d(x * self.scale, 14).flatten(2).transpose(1, 2)
        return {"x_norm_clstoken": 2 * patches[:, 0], "x_norm_patchtokens": patches}


def expected_features(path: str) -> tuple[np.ndarray, np.ndarray]:
    pixels = Dinov2ImageProcessor()(read_image(path), "np").pixel_values[0]
    return 2 * pixels[:, :14, :14].mean((1, 2)), pixels.mean((1, 2))


def assert_rows(path: Path, files: list[str], bad: set[int]) -> None:
    table = pq.read_table(path)
    assert table.column_names == ["id", "path", "width", "height", "error", "cls", "patch_mean"]
    rows = table.to_pylist()
    assert [row["id"] for row in rows] == list(range(len(files)))
    assert [row["path"] for row in rows] == files
    for index, (row, file) in enumerate(zip(rows, files, strict=True)):
        if index in bad:
            assert row["error"]
            assert {row[name] for name in ("width", "height", "cls", "patch_mean")} == {None}
            continue
        assert row["error"] is None
        assert (row["width"], row["height"]) == read_image(file).size
        cls, patch_mean = expected_features(file)
        np.testing.assert_allclose(row["cls"], cls, atol=1e-5)
        np.testing.assert_allclose(row["patch_mean"], patch_mean, atol=1e-5)


@pytest.fixture
def plain(tmp_path: Path) -> list[str]:
    """Seven pictures of different size and colour."""
    random = np.random.default_rng(0)
    files = []
    for index in range(7):
        pixels = random.integers(0, 30 * (index + 2), (40 + 9 * index, 90 - 7 * index, 3), dtype=np.uint8)
        files.append(str(tmp_path / f"picture_{index}.png"))
        Image.fromarray(pixels).save(files[-1])
    return files


@pytest.fixture
def hostile(tmp_path: Path) -> tuple[list[str], set[int]]:
    """A folder of everything that goes wrong, good pictures in between; the files, and which of them are bad."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    rgb = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    jpeg = (PICTURES / "coffee.jpg").read_bytes()
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
    files = list_images([folder])
    bad = {index for index, file in enumerate(files) if os.path.basename(file)[0] in "c"}
    return files, bad | {
        index for index, file in enumerate(files) if file.endswith(("empty.jpg", "bytes.png", "half.jpg"))
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_hostile_pictures_are_rows_in_order(hostile: tuple[list[str], set[int]], tmp_path: Path, workers: int) -> None:
    files, bad = hostile
    assert (len(files), len(bad)) == (17, 8)
    summary = extract(files, MeanColour(), tmp_path / "out", batch_size=4, workers=workers)
    assert (summary.pictures, summary.failures) == (17, 8)
    assert_rows(summary.path, files, bad)
    errors = {os.path.basename(row["path"]): row["error"] for row in pq.read_table(summary.path).to_pylist()}
    assert errors["a0_empty.jpg"] == "empty file"
    assert "truncated" in errors["a3_half.jpg"]
    assert "not a picture" in errors["c0_page.jpg"]
    assert errors["c1_121_mpx.png"] == "too large: 11000 x 11000 pixels, the limit is 50000000"
    assert "symbolic links" in errors["c3_loop.jpg"]
    assert "No such file" in errors["c5_nowhere.jpg"]


def test_workers_and_batch_size_change_nothing(plain: list[str], tmp_path: Path) -> None:
    tables = [
        pq.read_table(
            extract(plain, MeanColour(), tmp_path / f"{workers}_{batch}", batch_size=batch, workers=workers).path
        )
        for workers, batch in ((0, 1), (0, 7), (1, 3), (2, 32))
    ]
    for table in tables[1:]:
        assert table.equals(tables[0])
    assert_rows(tmp_path / "0_1" / "features.parquet", plain, set())


def test_only_bad_pictures(tmp_path: Path) -> None:
    files = [str(tmp_path / f"{index}.jpg") for index in range(5)]
    model = MeanColour()
    summary = extract(files, model, tmp_path, batch_size=2)
    assert (summary.pictures, summary.failures, model.batches) == (5, 5, [])
    assert_rows(summary.path, files, set(range(5)))


def test_one_picture_and_duplicates(plain: list[str], tmp_path: Path) -> None:
    assert_rows(extract(plain[:1], MeanColour(), tmp_path / "one").path, plain[:1], set())
    repeated = [plain[0], plain[1], plain[0], plain[0]]
    assert_rows(extract(repeated, MeanColour(), tmp_path / "repeated").path, repeated, set())


def test_a_batch_is_a_fixed_range_of_rows(plain: list[str], tmp_path: Path) -> None:
    model = MeanColour()
    calls: list[tuple[int, int]] = []
    files = [plain[0], "missing", *plain[1:]]
    extract(files, model, tmp_path / "out", batch_size=3, progress=lambda *counts: calls.append(counts))
    assert model.batches == [2, 3, 2]
    assert calls == [(3, 1), (6, 1), (8, 1)]


def test_row_groups_join_up(plain: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov2_fast.extraction.features_file.ROW_GROUP", 3)
    path = extract(plain, MeanColour(), tmp_path / "out", batch_size=2).path
    assert pq.ParquetFile(path).num_row_groups > 1
    assert_rows(path, plain, set())


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    names = [os.fsencode(tmp_path) + b"/caf\xe9.png", os.fsencode(tmp_path) + "/café.png".encode()]
    for name in names:
        Image.new("RGB", (30, 30), "red").save(os.fsdecode(name))
    table = pq.read_table(extract(list_images(names), MeanColour(), tmp_path / "out").path)
    assert table["path"].to_pylist() == [f"{tmp_path}/caf\\xe9.png", f"{tmp_path}/café.png"]
    assert table["error"].to_pylist() == [None, None]


def test_a_picture_that_cannot_be_resized_has_its_size_and_an_error(tmp_path: Path) -> None:
    Image.new("RGB", (1, 3000)).save(tmp_path / "narrow.png")
    row = pq.read_table(extract([str(tmp_path / "narrow.png")], MeanColour(), tmp_path).path).to_pylist()[0]
    assert (row["width"], row["height"], row["cls"]) == (1, 3000, None)
    assert row["error"] == (
        "cannot be processed: A picture of 1 x 3000 pixels is too long and narrow: resized it would have 256 x 768000."
    )


def test_features_that_are_not_finite_are_errors(plain: list[str], tmp_path: Path) -> None:
    class Overflowing(MeanColour):
        def forward_features(self, x: Tensor) -> dict[str, Tensor]:
            features = super().forward_features(x)
            features["x_norm_patchtokens"][1, 3, 2] = float("inf")
            features["x_norm_clstoken"][2, 0] = float("nan")
            return features

    rows = pq.read_table(extract(plain, Overflowing(), tmp_path / "out").path).to_pylist()
    assert [row["error"] for row in rows] == [None, *["the model's features are not finite"] * 2, *[None] * 4]
    assert [row["cls"] is None for row in rows] == [row["error"] is not None for row in rows]
    assert rows[1]["width"] == read_image(plain[1]).width


def test_the_models_dtype_is_used(plain: list[str], tmp_path: Path) -> None:
    summary = extract(plain, MeanColour().bfloat16(), tmp_path / "out")
    table = pq.read_table(summary.path)
    assert str(table.schema.field("cls").type) == "fixed_size_list<element: float>[3]"
    assert read_metadata(summary.path)["dtype"] == "bfloat16"
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
    tables = [
        pq.read_table(extract(files, runs, tmp_path / name, processor=processor, batch_size=3, workers=workers).path)
        for name, runs in (("model", model), ("engine", engine))
    ]
    for name in ("cls", "patch_mean"):
        expected, found = (np.array([row for row in table[name].to_pylist() if row]) for table in tables)
        assert len(found) == 7
        np.testing.assert_allclose(found, expected, atol=2e-5)
    assert set(dtypes) == {torch.uint8 if uint8 else torch.float32}
    metadata = [read_metadata(tmp_path / name / "features.parquet") for name in ("model", "engine")]
    assert [(found.pop("engine"), found["precision"]) for found in metadata] == [(False, "fp32"), (True, "fp32")]
    assert metadata[0] == metadata[1]


def test_the_engine_s_precision_is_recorded(plain: list[str], tmp_path: Path) -> None:
    engine = optimize_for_inference(small(), "bf16", allow_slow=True)
    metadata = read_metadata(extract(plain, engine, tmp_path).path)
    assert (metadata["dtype"], metadata["precision"], metadata["device"]) == ("bfloat16", "bf16", "cpu")


def test_the_file_says_how_it_was_made(plain: list[str], tmp_path: Path) -> None:
    processor = Dinov2ImageProcessor.for_size(98)
    path = extract(plain, MeanColour(), tmp_path, processor=processor, batch_size=5, metadata={"model": "m"}).path
    metadata = read_metadata(path)
    assert metadata["model"] == "m"
    assert metadata["processor"] == processor.to_dict()
    assert (metadata["dtype"], metadata["device"], metadata["batch_size"]) == ("float32", "cpu", 5)
    assert metadata["versions"]["dinov2_fast"] == dinov2_fast.__version__
    assert metadata["versions"]["torch"] == torch.__version__


def test_nothing_is_overwritten_unless_asked(plain: list[str], tmp_path: Path) -> None:
    path = extract(plain[:2], MeanColour(), tmp_path / "out").path
    before = path.read_bytes()
    model = MeanColour()
    with pytest.raises(FileExistsError, match="exists already"):
        extract(plain, model, tmp_path / "out")
    assert path.read_bytes() == before
    assert model.batches == []
    extract(plain, model, tmp_path / "out", overwrite=True)
    assert_rows(path, plain, set())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_abort_leaves_what_was_there(plain: list[str], tmp_path: Path, error: type, workers: int) -> None:
    class Failing(MeanColour):
        def forward_features(self, x: Tensor) -> dict[str, Tensor]:
            if len(self.batches) == 2:
                raise error("third batch")
            return super().forward_features(x)

    out = tmp_path / "out"
    with pytest.raises(error):
        extract(plain, Failing(), out, batch_size=2, workers=workers)
    assert list(out.iterdir()) == []
    path = extract(plain[:1], MeanColour(), out).path
    with pytest.raises(error):
        extract(plain, Failing(), out, batch_size=2, workers=workers, overwrite=True)
    assert list(out.iterdir()) == [path]
    assert_rows(path, plain[:1], set())


def test_the_file_appears_only_when_it_is_whole(plain: list[str], tmp_path: Path) -> None:
    seen: list[list[str]] = []
    out = tmp_path / "out"
    extract(plain, MeanColour(), out, batch_size=3, progress=lambda *_: seen.append(os.listdir(out)))
    assert len(seen) == 3
    assert all(name.endswith(".part") for names in seen for name in names)
    assert os.listdir(out) == ["features.parquet"]


def test_decoding_ahead_is_bounded(plain: list[str]) -> None:
    taken = 0

    def paths() -> Iterator[str]:
        nonlocal taken
        for _ in range(50):
            taken += 1
            yield plain[0]

    decoded = decode_all(paths(), Dinov2ImageProcessor(crop_size=14), workers=1, ahead=4)
    for _ in range(3):
        next(decoded)
    decoded.close()
    assert taken == 6


def test_control_c_does_not_reach_the_workers(plain: list[str]) -> None:
    decoded = decode_all(plain, Dinov2ImageProcessor(crop_size=14), workers=1, ahead=2)
    next(decoded)
    time.sleep(0.5)  # until the worker waits for work, where the interrupt would end it
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGINT)
    assert len(list(decoded)) == len(plain) - 1


def test_a_worker_that_dies_is_an_error(plain: list[str], tmp_path: Path) -> None:
    from concurrent.futures.process import BrokenProcessPool

    processor: Any = Dinov2ImageProcessor()
    processor._process = Killer()
    with pytest.raises(BrokenProcessPool):
        list(decode_all(plain, processor, workers=1))


class Killer:
    """Ends the process that calls it, as the system does when memory runs out."""

    def __call__(self, *args: Any) -> None:
        os._exit(9)


def test_decoding_needs_no_torch() -> None:
    code = "import sys, dinov2_fast.extraction.decoding; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


class Training(MeanColour):
    def __init__(self) -> None:
        super().__init__()
        self.train()


@pytest.mark.parametrize(
    ("files", "model", "options", "message"),
    [
        ([], MeanColour, {}, "no pictures"),
        (["a"], Training, {}, r"call model.eval\(\)"),
        (["a"], MeanColour, {"batch_size": 0}, "batch_size must be at least 1"),
        (["a"], MeanColour, {"workers": -1}, "workers at least 0"),
        (["a"], MeanColour, {"processor": Dinov2ImageProcessor(crop_size=(224, 225))}, "224 x 225, not a multiple"),
        (["a"], MeanColour, {"processor": Dinov2ImageProcessor(do_center_crop=False)}, "differ in size"),
    ],
)
def test_bad_arguments_are_errors_before_anything_is_written(
    tmp_path: Path, files: list[str], model: type, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        extract(files, model(), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_file_as_output_folder_is_an_error(plain: list[str]) -> None:
    with pytest.raises(NotADirectoryError, match="is a file"):
        extract(plain, MeanColour(), plain[0])


def test_the_summary(plain: list[str], tmp_path: Path) -> None:
    summary = extract(plain, MeanColour(), tmp_path / "out")
    assert isinstance(summary, Summary)
    assert summary.path == tmp_path / "out" / "features.parquet"
    assert 0 < summary.seconds < 60
