"""Images that fail in an extraction: what is said of them, and how they are tried again."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dinov2_fast
from dinov2_fast.data.batches import Failures, NothingReadError
from dinov2_fast.data.workers import decode_all
from tests.helpers.extraction import MeanColour, contents, extract_files


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of nine images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(9):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 50 + index, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def files_in(photos: Path) -> list[str]:
    return [str(photos / f"{index}.png") for index in range(9)]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_images_that_come_back_are_retried_with_the_bits_of_a_run_without_failures(
    photos: Path, tmp_path: Path, format: str, workers: int
) -> None:
    """The images of the middle shard are missing for a while; the last shard has a file that stays damaged."""
    (photos / "8.png").write_bytes((photos / "8.png").read_bytes()[:500])
    files, options = files_in(photos), {"shard_size": 3, "format": format, "workers": workers}
    whole = extract_files(files, MeanColour(), tmp_path / "whole", **options)
    missing = [Path(file).rename(f"{file}.missing") for file in files[3:6]]
    out = tmp_path / "out"
    assert extract_files(files, MeanColour(), out, **options).failures == 4
    assert [digest is None for digest in dinov2_fast.load_features(out).sha256] == [3 <= row < 6 for row in range(9)]
    before, model = contents(out), MeanColour()
    assert extract_files(files, model, out, retry_failed=True, **options).failures == 4
    assert (model.batches, contents(out)) == ([], before)
    for path in missing:
        path.rename(path.with_suffix(""))
    again = extract_files(files, MeanColour(), out, **options)
    assert (again.failures, again.resumed) == (4, 9)
    retried = extract_files(files, model, out, retry_failed=True, **options)
    assert (retried.failures, retried.resumed, model.batches) == (1, 6, [3])
    assert contents(out) == contents(whole.folder)


def test_a_damaged_file_that_was_replaced_is_retried(photos: Path, tmp_path: Path) -> None:
    good = (photos / "4.png").read_bytes()
    (photos / "4.png").write_bytes(good[:100])
    assert extract_files(files_in(photos), MeanColour(), tmp_path / "out", shard_size=3).failures == 1
    (photos / "4.png").write_bytes(good)
    retried = extract_files(files_in(photos), MeanColour(), tmp_path / "out", shard_size=3, retry_failed=True)
    assert (retried.failures, retried.resumed) == (0, 6)


@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_transient_errors_have_no_sha256(
    photos: Path, tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the bytes were read and memory ran out later."""

    def short_of_memory(*arguments: Any, **options: Any) -> Any:
        for row, image in enumerate(decode_all(*arguments, **options)):
            yield replace(image, pixels=None, error="out of memory", transient=True) if row == 2 else image

    monkeypatch.setattr("dinov2_fast.data.batches.decode_all", short_of_memory)
    (photos / "1.png").write_text("<html>")
    found = dinov2_fast.load_features(
        extract_files(files_in(photos), MeanColour(), tmp_path / "out", format=format).folder
    )
    assert [error is None for error in found.error[:3]] == [True, False, False]
    assert [digest is None for digest in found.sha256[:3]] == [False, False, True]


@pytest.mark.parametrize("workers", [0, 1])
def test_no_shard_is_written_if_no_image_can_be_read(photos: Path, tmp_path: Path, workers: int) -> None:
    photos.rename(tmp_path / "unmounted")
    out, options = tmp_path / "out", {"shard_size": 3, "workers": workers}
    with pytest.raises(
        NothingReadError, match=r"None of the first 3 images(.|\n)*No such file or directory(.|\n)*run this again"
    ):
        extract_files(files_in(photos), MeanColour(), out, **options)
    assert os.listdir(out) == ["_manifest.json"]
    (tmp_path / "unmounted").rename(photos)
    assert extract_files(files_in(photos), MeanColour(), out, **options).failures == 0


def test_damaged_files_are_not_mistaken_for_a_missing_disk(photos: Path, tmp_path: Path) -> None:
    for index in range(9):
        (photos / f"{index}.png").write_text("<html>")
    assert extract_files(files_in(photos), MeanColour(), tmp_path / "out", shard_size=3).failures == 9


def test_the_result_has_the_reasons_of_this_run_only(photos: Path, tmp_path: Path) -> None:
    files = [*files_in(photos), *(f"missing{index}" for index in range(4))]
    (photos / "0.png").write_text("")
    summary = extract_files(files, MeanColour(), tmp_path / "out")
    assert summary.reasons.reasons == {"No such file or directory": 4, "empty file": 1}
    assert str(summary.reasons).splitlines() == [
        f"  {files[0]!r}: empty file",
        "  'missing0': No such file or directory",
        "  'missing1': No such file or directory",
        "  in all 4 x No such file or directory; 1 x empty file",
    ]
    assert len(extract_files(files, MeanColour(), tmp_path / "out").reasons) == 0


def test_endless_different_reasons_take_bounded_memory() -> None:
    failures = Failures()
    for index in range(3000):
        failures.add(f"{index}", f"too large: {index}")
    assert (len(failures), len(failures.reasons)) == (3000, 1001)
    assert str(failures).count("other reasons") == str(failures).count("2995 x other reasons") == 1
    few = Failures()
    few.add("a\x1b[31m", "empty file")
    few.add("https://user:SECRET@host/b?token=SECRET", "Not Found")
    assert str(few) == "  'a\\x1b[31m': empty file\n  'https://host/b': Not Found"
