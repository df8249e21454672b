"""`dinov2-fast search`: a query finds itself and its likes in a folder of features, by the model that made them."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import dinov2_fast
from dinov2_fast.cli import main
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from tests.helpers import golden


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small checkpoint, images of which one is broken and one a copy, and their features."""
    folder = tmp_path_factory.mktemp("place")
    save_file(golden.load_case("facebook_reg4")[1], folder / "tiny.safetensors")
    (folder / "photos").mkdir()
    for i, name in enumerate("abde"):
        small = np.random.default_rng(i).integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(small).resize((160, 120)).save(folder / "photos" / f"{name}.png")
    shutil.copy(folder / "photos" / "b.png", folder / "photos" / "copy_of_b.png")
    (folder / "photos" / "broken.jpg").write_text("<html>")
    arguments = ["extract", str(folder / "photos"), "--model", str(folder / "tiny.safetensors"), "--size", "56x70"]
    arguments += [
        "--features",
        "cls,patches,cls@0",
        "--position-interpolation",
        "size",
        "--shard-size",
        "2",
        "--batch-size",
        "2",
    ]
    assert main([*arguments, "--device", "cpu", "--workers", "0", "--out", str(folder / "features")]) == 3
    return folder


def searched(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    """What a search prints, and says beside."""
    capsys.readouterr()
    assert main(["search", *arguments]) == code
    captured = capsys.readouterr()
    return captured.out, captured.err


def cosines_by_hand(place: Path, query: str, layer: int) -> dict[str, float]:
    """The cosines of the CLS tokens of a query and of the images that can be read, by the model itself."""
    model = dinov2_fast.load(place / "tiny.safetensors", position_interpolation="size")
    processor = Dinov2ImageProcessor.for_size((56, 70))
    paths = [place / "photos" / f"{name}.png" for name in ("a", "b", "copy_of_b", "d", "e")]
    with torch.inference_mode():
        x = processor([Image.open(path) for path in [Path(query), *paths]]).pixel_values
        cls = model.get_intermediate_layers(x, n=[layer], return_class_token=True)[0][1].double()
    cosines = torch.nn.functional.cosine_similarity(cls[:1], cls[1:])
    return dict(zip(map(str, paths), cosines.tolist(), strict=True))


@pytest.mark.parametrize(("feature", "layer"), [("cls", 2), ("cls@0", 0)])
def test_the_nearest_come_first_with_their_cosines(
    feature: str, layer: int, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    query = str(shutil.copy(place / "photos" / "b.png", tmp_path / "query.png"))
    out, err = searched(capsys, str(place / "features"), query, "--feature", feature, "--k", "9", "--format", "json")
    (answer,) = json.loads(out)
    assert answer["query"] == query
    expected = cosines_by_hand(place, query, layer)
    found = {hit["path"]: hit["cosine"] for hit in answer["found"]}
    assert list(found)[:2] == [str(place / "photos" / f"{name}.png") for name in ("b", "copy_of_b")]
    assert list(found) == sorted(expected, key=lambda path: (-round(expected[path], 5), path))
    assert found == pytest.approx(expected, abs=1e-5)
    paths = dinov2_fast.load_features(place / "features").path
    assert [paths[hit["row"]] for hit in answer["found"]] == list(found)
    assert "5 images compared, 1 without features skipped" in err


def test_table_csv_and_json_have_the_same_content(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queries = [str(place / "photos" / f"{name}.png") for name in "ad"]
    arguments = [str(place / "features"), *queries, "--k", "2"]
    table = searched(capsys, *arguments)[0].splitlines()
    rows = list(csv.DictReader(io.StringIO(searched(capsys, *arguments, "--format", "csv")[0])))
    answers = json.loads(searched(capsys, *arguments, "--format", "json")[0])
    assert [row["query"] for row in rows] == [query for query in queries for _ in range(2)]
    for i, (query, answer) in enumerate(zip(queries, answers, strict=True)):
        assert table[3 * i] == query
        for j, hit in enumerate(answer["found"]):
            row = rows[2 * i + j]
            assert (row["path"], float(row["cosine"]), int(row["row"])) == tuple(hit.values())
            assert table[3 * i + 1 + j] == f"  {hit['cosine']:7.4f}  {hit['path']}"
        assert answer["found"][0]["path"] == query
        assert answer["found"][0]["cosine"] == pytest.approx(1, abs=1e-6)


def test_a_query_that_cannot_be_read_is_left_out(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = (str(place / "photos" / name) for name in ("a.png", "broken.jpg"))
    out, err = searched(capsys, str(place / "features"), bad, good, code=3)
    assert out.splitlines()[0] == good
    assert "broken.jpg' is left out: not" in err
    assert "None of the queries could be read" in searched(capsys, str(place / "features"), bad, code=1)[1]
    with pytest.raises(ValueError, match=r"broken.jpg' has no features: not"):
        dinov2_fast.search(place / "features", [good, bad])


def test_the_library_accepts_paths_models_and_vectors(place: Path) -> None:
    query = place / "photos" / "d.png"
    expected = dinov2_fast.search(place / "features", [query], k=3)
    assert expected.paths[0][0] == str(query)
    assert dinov2_fast.search(str(place / "features"), str(query), k=3).paths == expected.paths
    model = dinov2_fast.load(place / "tiny.safetensors", position_interpolation="size")
    for given in (model, dinov2_fast.optimize_for_inference(model)):
        found = dinov2_fast.search(place / "features", [query], k=3, model=given)
        assert found.paths == expected.paths
        np.testing.assert_allclose(found.cosines, expected.cosines, atol=1e-5)
    features = dinov2_fast.load_features(place / "features")
    row = features.path.index(str(query))
    assert dinov2_fast.search(features, features["cls"][row], k=3).paths == expected.paths
    for block in model.blocks:
        block.attn.num_heads = 1
    model.num_heads = 1  # which no weight shows
    with pytest.raises(ValueError, match=r"with .*'num_heads': 2.*, and this one has .*'num_heads': 1"):
        dinov2_fast.search(features, [query], model=model)
    model = dinov2_fast.load(place / "tiny.safetensors", position_interpolation="offset")
    with pytest.raises(
        ValueError, match="position_interpolation 'size', and this model has 'offset': set it on the model"
    ):
        dinov2_fast.search(features, [query], model=model)


def test_a_model_that_was_moved_can_be_named_anew(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(place / "features", tmp_path / "features")
    manifest = json.loads((folder / "_manifest.json").read_text())
    manifest["about"]["model"] = manifest["about"]["weights"] = str(tmp_path / "gone.safetensors")
    (folder / "_manifest.json").write_text(json.dumps(manifest))
    query = str(place / "photos" / "e.png")
    err = searched(capsys, str(folder), query, code=1)[1]
    assert f"for the features in '{folder}' cannot be had: There is no file" in err
    assert "Give the model that made them" in err
    out, _ = searched(capsys, str(folder), query, "--model", str(place / "tiny.safetensors"), "--k", "1")
    assert out.splitlines()[1].endswith("e.png")


def test_a_recorded_random_model_is_made_again(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["extract", str(place / "photos"), "--model", "dinov2_vits14", "--weights", "random:3", "--size", "28"]
    options = ["--precision", "bf16", "--no-engine", "--workers", "0", "--device", "cpu"]
    assert main([*arguments, *options, "--out", str(tmp_path / "out")]) == 3
    query = str(place / "photos" / "d.png")
    out, _ = searched(capsys, str(tmp_path / "out"), query, "--k", "1", "--device", "cpu")
    assert out.splitlines()[1] == f"   1.0000  {query}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "dinov2_vits14", "--weights", "random:0"], "and this model has other weights: features of two"),
        (["--weights", "random:0"], "--weights needs --model"),
        (["--feature", "patches"], "'patches' is 20 vectors per image; choose one that is a vector: cls, cls@0"),
        (["--feature", "patch_mean"], "There is no feature 'patch_mean'"),
        (["--device", "abacus"], "There is no device 'abacus'"),
    ],
)
def test_searches_that_are_impossible_exit_with_1_and_say_why(
    options: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = searched(capsys, str(place / "features"), str(place / "photos" / "a.png"), *options, code=1)
    assert message in err
    assert out == ""
