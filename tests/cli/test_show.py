"""`dinov2-fast show`: the sheets show what the model computes, from images and from stored features."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import dinov2_fast
from dinov2_fast.cli import main
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.visualize import Tile, attention_rgb, pca_rgb, save_sheet
from tests.helpers import golden

NAMES = ["a", "b", "copy_of_a", "d"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small DINOv2: 3 blocks, 2 heads, a register."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(golden.load_case("facebook_reg4")[1], path)
    return str(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of four images; the third is a copy of the first."""
    folder = tmp_path_factory.mktemp("images")
    for i, name in enumerate(NAMES):
        small = np.random.default_rng(i).integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(small).resize((160, 120)).save(folder / f"{name}.png")
    shutil.copy(folder / "a.png", folder / "copy_of_a.png")
    return str(folder)


class Drawn:
    """The sheets of a run as they were given to `save_sheet`, by the names of their files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.strips: dict[str, list[list[Tile]]] = {}
        self.titles: dict[str, str] = {}
        monkeypatch.setattr("dinov2_fast.visualize.show.save_sheet", self._save)

    def _save(self, path: Path, strips: Sequence[Sequence[Tile]], **layout: Any) -> Path:
        self.strips[path.name] = [list(strip) for strip in strips]
        self.titles[path.name] = f"{layout['title']} {layout['note']}"
        return save_sheet(path, strips, **layout)

    def texts(self, name: str) -> list[list[str]]:
        return [[tile.text for tile in strip] for strip in self.strips[name]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    return Drawn(monkeypatch)


def pixels_of(tile: Tile) -> np.ndarray:
    return np.asarray(tile.image)


def seen_by_the_model(images: str, size: tuple[int, int]) -> torch.Tensor:
    opened = [Image.open(Path(images) / f"{name}.png") for name in NAMES]
    return Dinov2ImageProcessor.for_size(size)(opened).pixel_values


def test_everything_is_drawn_by_default(
    checkpoint: str, images: str, tmp_path: Path, drawn: Drawn, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", images, "--model", checkpoint, "--out", str(tmp_path / "new"), "--size", "70x98"]) == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"pca.png", "attention.png", "neighbours.png"}
    printed = capsys.readouterr().out
    for kind in ("pca", "attention", "neighbours"):
        assert f"{kind}:" in printed
        with Image.open(tmp_path / "new" / f"{kind}.png") as sheet:
            assert sheet.size[0] > 400
    assert drawn.texts("pca.png") == [[name, ""] for name in NAMES]
    assert drawn.texts("attention.png") == [[name, "mean of all heads", "head 0", "head 1"] for name in NAMES]

    x = seen_by_the_model(images, (70, 98))
    with torch.inference_mode():
        tokens = dinov2_fast.load(checkpoint).forward_features(x)["x_norm_patchtokens"]
    expected = pca_rgb(tokens, (5, 7))
    for strip, rgb, name in zip(drawn.strips["pca.png"], expected, NAMES, strict=True):
        assert np.abs(pixels_of(strip[1]).astype(int) - rgb).max() <= 2, name
        assert strip[0].image.size == (98, 70)


def test_attention_maps_are_of_the_requested_blocks_and_heads(
    checkpoint: str, images: str, tmp_path: Path, drawn: Drawn
) -> None:
    arguments = ["show", images, "--model", checkpoint, "--out", str(tmp_path), "--size", "56"]
    assert main([*arguments, "--attention", "--layer", "0,-1", "--head", "1"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"attention.png"}
    assert drawn.texts("attention.png")[:2] == [
        ["a, block 0", "mean of all heads", "head 1"],
        ["a, block 2", "mean of all heads", "head 1"],
    ]
    assert main(["convert", checkpoint, str(tmp_path / "model"), "--to", "huggingface"]) == 0
    model = dinov2_fast.Dinov2WithRegistersModel.from_pretrained(tmp_path / "model")
    with torch.inference_mode():
        attentions = model(seen_by_the_model(images, (56, 56)), output_attentions=True).attentions
    for i in range(len(NAMES)):
        for strip, block in zip(drawn.strips["attention.png"][2 * i :], (0, 2), strict=False):
            row = attentions[block][i, :, 0, 5:]  # after CLS and 4 registers
            for tile, weights in ((strip[1], row.mean(dim=0)), (strip[2], row[1])):
                assert np.abs(pixels_of(tile).astype(int) - attention_rgb(weights, (4, 4))).max() <= 2


def test_pca_of_several_blocks_stands_side_by_side(checkpoint: str, images: str, tmp_path: Path, drawn: Drawn) -> None:
    arguments = ["show", images, "--model", checkpoint, "--out", str(tmp_path), "--size", "56", "--pca"]
    assert main([*arguments, "--layer", "all"]) == 0
    assert drawn.texts("pca.png")[0] == ["a", "block 0", "block 1", "block 2"]
    with torch.inference_mode():
        layers = dinov2_fast.load(checkpoint).get_intermediate_layers(seen_by_the_model(images, (56, 56)), n=3)
    for block, patches in enumerate(layers):
        expected = pca_rgb(patches)
        for strip, rgb in zip(drawn.strips["pca.png"], expected, strict=True):
            assert np.abs(pixels_of(strip[1 + block]).astype(int) - rgb).max() <= 2


def test_foreground_makes_the_background_black(checkpoint: str, images: str, tmp_path: Path, drawn: Drawn) -> None:
    arguments = ["show", images, "--model", checkpoint, "--out", str(tmp_path), "--size", "70", "--pca"]
    assert main([*arguments, "--foreground"]) == 0
    black = np.array([(pixels_of(strip[1]) == 0).all(axis=-1).mean() for strip in drawn.strips["pca.png"]])
    assert 0 < black.mean() < 1
    assert "background is black" in drawn.titles["pca.png"]
    assert main(arguments) == 0
    assert not any((pixels_of(strip[1]) == 0).all(axis=-1).mean() > 0.2 for strip in drawn.strips["pca.png"])


def colours_of(drawn: Drawn) -> dict[str, np.ndarray]:
    """The colours on `pca.png`, by the names of the images."""
    return {strip[0].text: pixels_of(strip[1]) for strip in drawn.strips["pca.png"]}


@pytest.mark.parametrize("options", [[], ["--foreground"]], ids=["all", "foreground"])
def test_a_saved_basis_gives_other_runs_the_same_colours(
    options: list[str], checkpoint: str, images: str, features: str, tmp_path: Path, drawn: Drawn
) -> None:
    basis = str(tmp_path / "basis.safetensors")
    arguments = ["--model", checkpoint, "--size", "70x98", "--out", str(tmp_path / "out")]
    made_of = [f"{images}/a.png", f"{images}/b.png"]
    assert main(["show", *made_of, *arguments, "--save-basis", basis, *options]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"pca.png"}
    first = colours_of(drawn)
    assert main(["show", *made_of, *arguments, "--pca", *options]) == 0
    for name, colours in colours_of(drawn).items():
        assert np.array_equal(colours, first[name])  # keeping the PCA changes no colour
    assert main(["show", f"{images}/d.png", f"{images}/b.png", *arguments, "--basis", basis]) == 0
    other = colours_of(drawn)
    assert np.array_equal(other["b"], first["b"])
    assert "The PCA is that of" in drawn.titles["pca.png"]
    assert ("background is black" in drawn.titles["pca.png"]) == bool(options)
    assert main(["show", features, "--basis", basis, "--out", str(tmp_path / "out")]) == 0
    for name, colours in colours_of(drawn).items():
        assert name not in first | other or np.abs(colours.astype(int) - (first | other)[name]).max() <= 2


def test_a_basis_is_for_its_model_and_block_alone(
    checkpoint: str, images: str, features: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    basis, out = str(tmp_path / "basis.safetensors"), tmp_path / "out"
    arguments = ["--size", "56", "--out", str(out)]
    ours, others = ["--model", checkpoint], ["--model", "dinov2_vits14", "--weights", "random:0"]
    assert main(["show", images, *ours, *arguments, "--save-basis", basis, "--layer", "1"]) == 0
    content = Path(basis).read_bytes()
    shutil.rmtree(out)
    capsys.readouterr()
    for options, message in (
        ([images, *ours, "--save-basis", basis], "basis.safetensors' exists already; choose another name"),
        ([images, *ours, "--basis", basis], "is of block 1, and these are the features of block 2: choose the block"),
        ([features, "--basis", basis], "is of block 1, and these are the features of block 2"),
        ([images, *ours, "--basis", basis, "--layer", "0,1"], "A basis is of one block: choose one with --layer"),
        ([images, *ours, "--save-basis", f"{basis}2", "--layer", "all"], "A basis is of one block"),
        ([images, *ours, "--basis", basis, "--layer", "1", "--foreground"], "has no foreground: make one with"),
        ([images, *others, "--basis", basis, "--layer", "1"], "and 'dinov2_vits14' has other weights: make one of"),
        ([images, *ours, "--basis", f"{basis}3"], "No such file"),
        ([images, *ours, "--basis", checkpoint], "is not a PCA basis; `dinov2-fast show --save-basis` writes one"),
    ):
        assert main(["show", *options, *arguments]) == 1
        err = capsys.readouterr().err
        assert message in err
        if "exists" in message or "No such file" in message or "not a PCA basis" in message:
            assert "Running" not in err  # it is refused before a model runs
        assert not out.exists()
    assert Path(basis).read_bytes() == content
    assert main(["show", images, *ours, *arguments, "--basis", basis, "--layer", "1"]) == 0


def test_the_copy_of_an_image_is_its_nearest_neighbour(
    checkpoint: str, images: str, tmp_path: Path, drawn: Drawn
) -> None:
    options = ["--model", checkpoint, "--size", "56", "--neighbours", "--count", "2"]
    assert main(["show", images, *options, "--out", str(tmp_path)]) == 0
    texts = drawn.texts("neighbours.png")
    assert (texts[0][0], texts[0][1]) == ("a", "1.000 copy_of_a")
    assert (texts[2][0], texts[2][1]) == ("copy_of_a", "1.000 a")
    assert all(len(strip) == 3 for strip in texts)
    strips = drawn.strips["neighbours.png"]
    assert np.array_equal(pixels_of(strips[0][0]), pixels_of(strips[0][1]))
    assert not np.array_equal(pixels_of(strips[0][0]), pixels_of(strips[0][2]))


def test_random_weights_are_marked(images: str, tmp_path: Path, drawn: Drawn) -> None:
    arguments = ["show", images, "--model", "dinov2_vits14", "--size", "28", "--out", str(tmp_path)]
    assert main([*arguments, "--weights", "random:3"]) == 0
    names = {f"{kind}-random-weights.png" for kind in ("pca", "attention", "neighbours")}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert all(title.startswith("RANDOM WEIGHTS (random:3): dinov2_vits14, ") for title in drawn.titles.values())


def test_an_image_that_cannot_be_read_is_left_out(
    checkpoint: str, images: str, tmp_path: Path, drawn: Drawn, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_text("<html>")
    arguments = ["--model", checkpoint, "--size", "28", "--out", str(tmp_path / "out")]
    assert main(["show", str(bad), images, *arguments]) == 3
    assert "Left out:\n  '" in (err := capsys.readouterr().err)
    assert "bad.jpg': not an image" in err
    assert [strip[0] for strip in drawn.texts("pca.png")] == NAMES
    assert main(["show", str(bad), *arguments]) == 1
    assert "None of the images can be read" in capsys.readouterr().err


def test_one_image_has_no_neighbours(
    checkpoint: str, images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["show", f"{images}/a.png", "--model", checkpoint, "--size", "28", "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"pca.png", "attention.png"}
    assert main([*arguments, "--neighbours"]) == 1
    assert "two images or more" in capsys.readouterr().err


def test_limit_is_the_number_of_images_that_are_drawn(
    checkpoint: str, images: str, tmp_path: Path, drawn: Drawn, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["show", images, "--model", checkpoint, "--size", "28", "--out", str(tmp_path), "--pca"]
    assert main([*arguments, "--limit", "2"]) == 0
    assert [strip[0] for strip in drawn.texts("pca.png")] == NAMES[:2]
    assert "The first 2 images are shown" in capsys.readouterr().err
    assert main([*arguments, "--limit", "4"]) == 0
    assert "The first" not in capsys.readouterr().err


@pytest.fixture(scope="module")
def features(checkpoint: str, images: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of features of the images and of one that cannot be read, in shards of two."""
    folder = tmp_path_factory.mktemp("features")
    (folder / "0.jpg").write_text("<html>")
    arguments = ["extract", str(folder / "0.jpg"), images, "--model", checkpoint, "--size", "70x98"]
    arguments += ["--features", "cls,patches", "--dtype", "fp32", "--shard-size", "2", "--batch-size", "2"]
    assert main([*arguments, "--workers", "0", "--out", str(folder / "out"), "--device", "cpu"]) == 3
    return str(folder / "out")


def test_stored_features_give_the_same_sheets(
    checkpoint: str, images: str, features: str, tmp_path: Path, drawn: Drawn
) -> None:
    options = ["--size", "70x98", "--pca", "--neighbours", "--count", "3"]
    assert main(["show", images, "--model", checkpoint, "--out", str(tmp_path), *options]) == 0
    ran, drawn.strips = drawn.strips, {}
    assert main(["show", features, "--out", str(tmp_path), "--count", "3"]) == 0
    assert drawn.strips.keys() == ran.keys() == {"pca.png", "neighbours.png"}
    for name, strips in ran.items():
        assert drawn.texts(name) == [[tile.text for tile in strip] for strip in strips]
        for strip, stored in zip(strips, drawn.strips[name], strict=True):
            for tile, other in zip(strip, stored, strict=True):
                assert np.abs(pixels_of(tile).astype(int) - pixels_of(other)).max() <= 2
    assert checkpoint in drawn.titles["pca.png"]


def test_neighbours_are_looked_for_beyond_the_limit(features: str, tmp_path: Path, drawn: Drawn) -> None:
    assert main(["show", features, "--neighbours", "--limit", "1", "--count", "1", "--out", str(tmp_path)]) == 0
    assert drawn.texts("neighbours.png") == [["a", "1.000 copy_of_a"]]
    assert "among 4" in drawn.titles["neighbours.png"]


def test_random_weights_of_stored_features_are_marked(images: str, tmp_path: Path, drawn: Drawn) -> None:
    out = str(tmp_path / "features")
    arguments = ["extract", images, "--model", "dinov2_vits14", "--weights", "random:0", "--size", "28"]
    assert main([*arguments, "--workers", "0", "--out", out, "--device", "cpu"]) == 0
    assert main(["show", out, "--out", str(tmp_path / "sheets")]) == 0
    assert [path.name for path in (tmp_path / "sheets").iterdir()] == ["neighbours-random-weights.png"]
    assert drawn.titles["neighbours-random-weights.png"].startswith("RANDOM WEIGHTS (random:0): dinov2_vits14")


def test_an_image_that_is_gone_is_grey(
    checkpoint: str, images: str, tmp_path: Path, drawn: Drawn, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(images, tmp_path / "images")
    arguments = ["extract", str(folder), "--model", checkpoint, "--size", "28", "--workers", "0", "--device", "cpu"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    (folder / "b.png").unlink()
    assert main(["show", str(tmp_path / "out"), "--out", str(tmp_path / "sheets")]) == 0
    assert "These images cannot be read any more and are grey:\n  '" in (err := capsys.readouterr().err)
    assert "b.png': No such file" in err
    assert (pixels_of(drawn.strips["neighbours.png"][1][0]) == 211).all()
    assert not (pixels_of(drawn.strips["neighbours.png"][0][0]) == 211).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["FEATURES", "--attention"], "Features hold no attention maps"),
        (["FEATURES", "--model", "x"], "A folder of features needs no --model"),
        (["CLS", "--pca"], "--pca needs the feature 'patches'; stored are cls"),
        (["IMAGES"], "--model is missing"),
        (["EMPTY", "--model", "MODEL"], "There are no images in"),
        (["IMAGES", "--model", "MODEL", "--neighbours", "--limit", "1"], "Neighbours need two images or more"),
        (
            ["IMAGES", "--model", "MODEL", "--size", "28", "--layer", "3"],
            "There is no block 3; the blocks of this model",
        ),
        (
            ["IMAGES", "--model", "MODEL", "--size", "28", "--head", "0,2"],
            "There is no head 2; the heads of this model",
        ),
        (["IMAGES", "--model", "MODEL", "--size", "28", "--device", "abacus"], "There is no device 'abacus'"),
    ],
)
def test_what_cannot_be_shown_is_an_error(
    options: list[str],
    message: str,
    checkpoint: str,
    images: str,
    features: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"FEATURES": features, "IMAGES": images, "MODEL": checkpoint, "EMPTY": str(tmp_path / "empty")}
    if "CLS" in options:
        places["CLS"] = str(tmp_path / "cls")
        arguments = ["extract", images, "--model", checkpoint, "--size", "28", "--workers", "0", "--features", "cls"]
        assert main([*arguments, "--out", places["CLS"], "--device", "cpu"]) == 0
    out = tmp_path / "out"
    assert main(["show", *(places.get(word, word) for word in options), "--out", str(out)]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert not out.exists()


def test_what_is_wrong_is_said_before_the_weights_are_read(
    images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The order of checks: the output folder, the device, the first image, the weights."""
    file, out = tmp_path / "file", tmp_path / "out"
    file.write_text("")
    for path, options, message in (
        ("nowhere", ["--out", str(file), "--device", "abacus"], "The output folder "),
        ("nowhere", ["--out", str(out), "--device", "abacus"], "There is no device 'abacus'"),
        ("nowhere", ["--out", str(out), "--device", "cpu"], "There is no file or folder 'nowhere'"),
        (images, ["--out", str(out), "--device", "cpu"], "missing.pth"),
    ):
        assert main(["show", path, "--model", "dinov2_vits14", "--weights", "missing.pth", *options]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layer", "last"], "'last' is neither 'all' nor numbers such as 2,5,11"),
        (["--count", "0"], "must be at least 1, got 0"),
        (["--size", "500"], "nearest: 490 or 504"),
    ],
)
def test_wrong_usage_exits_with_2(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["show", "x.jpg", "--model", "m", "--out", "o", *options])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
