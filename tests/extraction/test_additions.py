"""`add`: new images into a folder of features, whose shards stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dinov2_fast
from dinov2_fast.data.batches import NothingReadError
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.features.manifest import ManifestError, read_manifest
from tests.helpers.extraction import MeanColour, Stopping, contents, extract_files

FORMATS = pytest.mark.parametrize("format", ["parquet", "npy"])


def cls_by_path(folder: Path) -> dict[str, list[float]]:
    features = dinov2_fast.load_features(folder)
    return dict(zip(features.path, features["cls"].tolist(), strict=True))


@FORMATS
def test_new_images_follow_the_old_ones_which_do_not_change(plain: list[str], tmp_path: Path, format: str) -> None:
    options: Any = {"batch_size": 2, "shard_size": 4, "format": format}
    out = extract_files([*plain[2:6], "missing"], MeanColour(), tmp_path / "out", **options).folder
    before, model = contents(out), MeanColour()
    summary = extract_files([*plain, "missing"], model, out, add=True, **options)
    assert (summary.images, summary.failures, summary.resumed) == (5, 0, 0)
    assert model.batches == [2, 2, 1]
    after = contents(out)
    assert all(after[name] == content for name, content in before.items() if name != "_manifest.json")
    features = dinov2_fast.load_features(out)
    assert features.path == [*plain[2:6], "missing", *plain[:2], *plain[6:]]
    assert features.id.tolist() == [0, 1, 2, 3, 4, 8, 9, 10, 11, 12]
    assert [len(shard) for shard in features.shards()] == [4, 1, 4, 1]
    assert len(features["cls"]) == len(features) == 10
    extract_files([*plain, "missing"], MeanColour(), tmp_path / "whole", **options)
    found, expected = cls_by_path(out), cls_by_path(tmp_path / "whole")
    np.testing.assert_array_equal([found[path] for path in plain], [expected[path] for path in plain])
    again = extract_files([*plain, "missing"], MeanColour(), out, add=True, **options)
    assert again.images == 0
    assert contents(out) == after


def test_images_can_be_added_several_times(plain: list[str], tmp_path: Path) -> None:
    """The first time to a folder that is not there; images that are gone stay in the features."""
    for count in range(1, 9, 2):
        extract_files(plain[count - 1 : count + 1], MeanColour(), tmp_path / "out", shard_size=3, add=True)
    assert dinov2_fast.load_features(tmp_path / "out").path == plain[:8]
    assert [each["first_shard"] for each in read_manifest(tmp_path / "out")["added"]] == [1, 2, 3]
    assert extract_files(plain[:2], MeanColour(), tmp_path / "out", shard_size=3).resumed == 2


@FORMATS
def test_an_interrupted_addition_is_continued(plain: list[str], tmp_path: Path, format: str) -> None:
    options: Any = {"batch_size": 2, "shard_size": 2, "format": format, "add": True}
    for name, models in (("whole", [MeanColour()]), ("out", [Stopping(), MeanColour()])):
        extract_files(plain[:1], MeanColour(), tmp_path / name, **options)
        for model in models:
            if isinstance(model, Stopping):
                with pytest.raises(KeyboardInterrupt):
                    extract_files(plain, model, tmp_path / name, **options)
                with pytest.raises(ValueError, match=r"2 of the 5 shards in .* are missing"):
                    dinov2_fast.load_features(tmp_path / name)
            else:
                extract_files(plain, model, tmp_path / name, **options)
    assert models[-1].batches == [2, 2]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@FORMATS
@pytest.mark.parametrize("lost", [[2], [0, 1], [1, 3]])
def test_after_an_interruption_other_images_may_be_added(
    plain: list[str], tmp_path: Path, format: str, lost: list[int]
) -> None:
    """Some shards were not made, and an image is gone: those that are there are kept, all else is new."""
    options: Any = {"shard_size": 2, "format": format}
    out = extract_files(plain[:8], MeanColour(), tmp_path / "out", **options).folder
    for shard in lost:
        for path in out.glob(f"features-0000{shard}.*"):
            path.unlink()
    before = contents(out)
    given = [path for path in plain if path != plain[2 * lost[0]]]
    extract_files(given, MeanColour(), out, add=True, **options)
    after = contents(out)
    assert all(after[name] == content for name, content in before.items() if name != "_manifest.json")
    features = dinov2_fast.load_features(out)
    assert sorted(features.path) == given
    assert len(set(features.id.tolist())) == len(features) == 8
    expected = cls_by_path(extract_files(given, MeanColour(), tmp_path / "whole").folder)
    assert cls_by_path(out) == expected
    assert extract_files(given, MeanColour(), out, add=True, **options).images == 0


def test_images_of_lost_shards_are_added_again(plain: list[str], tmp_path: Path) -> None:
    """Of a section that had been finished, in front of others; what is there in a row stays one section."""
    out = extract_files(plain[:7], MeanColour(), tmp_path / "out", shard_size=2).folder
    extract_files(plain[:8], MeanColour(), out, shard_size=2, add=True)
    (out / "features-00002.parquet").unlink()
    extract_files(plain, MeanColour(), out, shard_size=2, add=True)
    assert dinov2_fast.load_features(out).path == [*plain[:4], plain[6], plain[7], plain[4], plain[5], plain[8]]
    manifest = read_manifest(out)
    assert (manifest["inputs"]["images"], [each["first_shard"] for each in manifest["added"]]) == (4, [3, 4, 5])


def test_with_retry_failed_images_that_failed_count_as_new(plain: list[str], tmp_path: Path) -> None:
    out, given = tmp_path / "out", [*plain[:2], str(tmp_path / "late.png"), *plain[3:]]
    extract_files(given[:5], MeanColour(), out, shard_size=2)
    before = contents(out)
    Path(plain[2]).rename(given[2])
    assert extract_files(given[:5], MeanColour(), out, shard_size=2, add=True).images == 0
    summary = extract_files(given, MeanColour(), out, shard_size=2, add=True, retry_failed=True)
    assert (summary.images, summary.failures) == (5, 0)
    assert before.items() - contents(out).items() == {("_manifest.json", before["_manifest.json"])}
    features = dinov2_fast.load_features(out)
    assert features.path == [*given[:5], given[2], *given[5:]]
    assert [row for row, error in enumerate(features.error) if error] == [2]
    assert extract_files(given, MeanColour(), out, shard_size=2, add=True, retry_failed=True).images == 0


def test_an_addition_without_a_readable_image_changes_nothing(plain: list[str], tmp_path: Path) -> None:
    out = extract_files(plain[:3], MeanColour(), tmp_path / "out", shard_size=2).folder
    extract_files(plain[:4], MeanColour(), out, shard_size=2, add=True)
    before = contents(out)
    with pytest.raises(NothingReadError):
        extract_files([*plain[:4], "missing"], MeanColour(), out, shard_size=2, add=True)
    assert contents(out) == before


def test_other_settings_are_refused(plain: list[str], tmp_path: Path) -> None:
    out = extract_files(plain[:3], MeanColour(), tmp_path / "out").folder
    with pytest.raises(ManifestError, match=r"inputs.images is 3 there and 9 here.*--add .*--overwrite"):
        extract_files(plain, MeanColour(), out)
    with pytest.raises(ManifestError, match="processor") as caught:
        extract_files(plain, MeanColour(), out, add=True, processor=Dinov2ImageProcessor.for_size(28))
    assert "--add" not in str(caught.value)
    for options in ({"overwrite": True}, {"part": (1, 2)}):
        with pytest.raises(ValueError, match="leave out overwrite and part"):
            extract_files(plain, MeanColour(), out, add=True, **options)
