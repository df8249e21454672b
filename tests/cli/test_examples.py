"""Every documented `show`, `search`, `convert` and `verify`, and those in the help, run with a small model."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import dinov2_fast
from dinov2_fast.cli import EPILOG, convert, main, search, show, verify
from dinov2_fast.pretraining.config import PretrainingConfig
from dinov2_fast.pretraining.log import MANIFEST, METRICS
from tests.helpers.documents import TEXT, example

MODEL = re.compile(r"\bdinov2_vit[sblg]14(_reg)?\b")


def commands(text: str) -> list[str]:
    """The indented lines of a text that call `dinov2-fast`, with the file of the small model as the model."""
    lines = re.findall(r"^ +dinov2-fast ((?:show|search|convert|verify) .*)$", text, re.M)
    return [MODEL.sub("stand-in.safetensors", line) for line in lines]


EXAMPLES = [*commands(TEXT), *commands(EPILOG)]
EXAMPLES += [line for command in (show, search, convert, verify) for line in commands(command.EPILOG)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the images, features and checkpoints that the examples name."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    model = dinov2_fast.DinoVisionTransformer(
        img_size=56, patch_size=14, embed_dim=256, depth=12, num_heads=4, init_values=1.0, block_chunks=0
    )
    checkpoint = folder / "stand-in.safetensors"
    save_file(model.state_dict(), checkpoint)
    (folder / "photos").mkdir()
    for i in range(3):
        image = Image.fromarray(np.random.default_rng(i).integers(0, 256, (60, 80, 3), np.uint8))
        image.save(folder / "photos" / f"{i}.jpg")
        image.save(folder / ("cat.jpg" if i else "photo.jpg"))
    for name in ("original.pth", "teacher_checkpoint.pth"):
        torch.save(model.state_dict(), folder / name)
    for name in ("converted.safetensors", "small.safetensors"):
        shutil.copy(checkpoint, folder / name)
    for name in ("my-finetuned", "facebook/dinov2-base"):
        assert main(["convert", str(checkpoint), str(folder / name), "--to", "huggingface"]) == 0
    arguments = ["extract", str(folder / "photos"), "--model", str(checkpoint), "--size", "28", "--workers", "0"]
    assert main([*arguments, "--out", str(folder / "features")]) == 0
    shutil.copytree(folder / "photos", folder / "queries")
    shutil.copy(folder / "cat.jpg", folder / "dog.jpg")
    arguments = ["show", str(folder / "photos"), "--model", str(checkpoint), "--size", "28", "--out", str(folder)]
    assert main([*arguments, "--save-basis", str(folder / "colours.safetensors")]) == 0
    (folder / "runs" / "a").mkdir(parents=True)
    (folder / "runs" / "a" / MANIFEST).write_text(json.dumps({"config": PretrainingConfig().to_dict()}))
    (folder / "runs" / "a" / METRICS).write_text('{"step": 10, "loss": 9.5}\n')
    return folder


def test_every_command_has_an_example() -> None:
    for text in (TEXT, EPILOG):
        assert {line.split()[0] for line in commands(text)} == {"show", "search", "convert", "verify"}


@pytest.mark.parametrize("line", sorted({*EXAMPLES}))
def test_an_example_runs(
    line: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    if "transformers" in line:
        pytest.importorskip("transformers")
    if "runs/a" in line:
        pytest.importorskip("matplotlib")
    arguments = shlex.split(line, comments=True)
    sizes = [] if "--size" in arguments or arguments[0] == "convert" or "features/" in arguments else ["--size", "56"]
    overwrite = ["--overwrite"] if arguments[0] == "convert" else []
    if "--save-basis" in arguments:
        Path(arguments[arguments.index("--save-basis") + 1]).unlink()
    code = main([*arguments, *sizes, *overwrite])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert "error" not in captured.err


def test_the_documented_search_in_python_finds_what_the_command_finds(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    names: dict[str, Any] = {}
    exec(example('search("features/"'), names)
    assert main(["search", "features/", "cat.jpg"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]] == names["found"].paths[0]
