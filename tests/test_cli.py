"""The command line: help, usage errors, exit codes, a whole run, Ctrl-C, and no control characters."""

from __future__ import annotations

import importlib.metadata
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

import dinov2_fast
from dinov2_fast.cli import main
from dinov2_fast.cli.extract import Progress
from dinov2_fast.extraction import read_image
from dinov2_fast.extraction.features_file import read_metadata
from dinov2_fast.image_processor import Dinov2ImageProcessor
from dinov2_fast.inference import Engine

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "examples" / "pictures"
CONTROL_CHARACTERS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A very small DINOv2 in a file."""
    torch.manual_seed(0)
    model = dinov2_fast.DinoVisionTransformer(
        img_size=518, patch_size=14, embed_dim=64, depth=1, num_heads=1, init_values=1.0, block_chunks=0
    )
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(model.state_dict(), path)
    return str(path)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dinov2_fast", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [["--help"], ["extract", "--help"], ["info", "--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: dinov2-fast")
    assert not CONTROL_CHARACTERS.search(text)


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom dinov2_fast.cli import main\n"
        "try: main(['extract', '--help'])\n"
        "except SystemExit: sys.exit(bool({'torch', 'pyarrow', 'transformers', 'triton'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"dinov2_fast {dinov2_fast.__version__}\n"


EXTRACT = ["extract", "x.jpg", "--model", "dinov2_vits14", "--out", "out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["extrakt"], "invalid choice: 'extrakt'"),
        ([*EXTRACT, "--bach-size", "3"], "unrecognized arguments: --bach-size"),
        (EXTRACT[:4], "required: --out"),
        ([*EXTRACT, "--batch-size", "0"], "must be at least 1, got 0"),
        ([*EXTRACT, "--workers", "-1"], "must be at least 0, got -1"),
        ([*EXTRACT, "--workers", "many"], "invalid number value: 'many'"),
        ([*EXTRACT, "--size", "500"], "500 is not a multiple of the patch size 14; nearest: 490 or 504"),
        ([*EXTRACT, "--size", "14x14x3"], "neither a number of pixels nor HEIGHTxWIDTH"),
        ([*EXTRACT, "--precision", "int8"], "invalid choice: 'int8'"),
        ([*EXTRACT, "--engine", "fast"], "invalid choice: 'fast'"),
        (["info", "--verbose"], "unrecognized arguments: --verbose"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_extraction_as_a_user_runs_it(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    arguments = [
        "extract",
        str(PICTURES),
        "--model",
        "dinov2_vits14",
        "--weights",
        "random:0",
        "--out",
        out,
        "--device",
        "cpu",
    ]
    done = run(*arguments, "--batch-size", "2", "--workers", "1")
    assert (done.returncode, done.stderr.splitlines()[-1][:22]) == (0, "5/5 pictures, 0 failed"), done.stderr
    assert not CONTROL_CHARACTERS.search(done.stdout + done.stderr)

    summary, where, how = done.stdout.splitlines()
    assert re.fullmatch(r"5 pictures, 0 failed, \d+\.\d s, \d+\.\d pictures/s", summary)
    assert where == f"Features: {out}/features.parquet"
    code = how.removeprefix("Read it:  ")
    names: dict[str, object] = {}
    exec(code, names)
    table = names["table"]
    assert isinstance(table, pa.Table)

    files = sorted(PICTURES.glob("*.jpg"))
    assert table["path"].to_pylist() == [str(file) for file in files]
    model = dinov2_fast.load("dinov2_vits14", weights="random:0")
    with torch.inference_mode():
        features = model.forward_features(Dinov2ImageProcessor()([read_image(file) for file in files]).pixel_values)
    for name, expected in (
        ("cls", features["x_norm_clstoken"]),
        ("patch_mean", features["x_norm_patchtokens"].mean(dim=1)),
    ):
        np.testing.assert_allclose(np.array(table[name].to_pylist()), expected.numpy(), atol=1e-4)
    metadata = read_metadata(tmp_path / "out" / "features.parquet")
    assert (metadata["model"], metadata["weights"]) == ("dinov2_vits14", "random:0")
    assert metadata["position_dialect"] == "offset"
    assert (metadata["dtype"], metadata["precision"], metadata["engine"]) == ("float32", "fp32", True)


def test_a_bad_picture_exits_with_3(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_text("<html>")
    arguments = ["extract", str(bad), str(PICTURES / "coffee.jpg"), "--model", checkpoint, "--workers", "0"]
    options = ["--size", "28x42", "--precision", "bf16", "--engine", "off"]
    assert main([*arguments, "--out", str(tmp_path / "a"), *options]) == 3
    assert "2 pictures, 1 failed" in capsys.readouterr().out
    metadata = read_metadata(tmp_path / "a" / "features.parquet")
    assert (metadata["dtype"], metadata["precision"], metadata["engine"]) == ("bfloat16", "bf16", False)
    assert metadata["processor"]["crop_size"] == {"height": 28, "width": 42}
    table = pq.read_table(tmp_path / "a" / "features.parquet")
    assert table["error"].to_pylist()[1] is None
    assert table["error"].to_pylist()[0].startswith("not a picture")


@pytest.mark.parametrize("engine", ["on", "off"])
def test_the_engine_and_its_precision_are_chosen(
    checkpoint: str, tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a mean and a std of its own, which the engine takes over."""
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True})  # or the engine refuses bf16
    dtypes, forward_features = [], Engine.forward_features
    monkeypatch.setattr(Engine, "forward_features", lambda self, x: dtypes.append(x.dtype) or forward_features(self, x))
    folder = tmp_path / "model"
    processor = Dinov2ImageProcessor(size=56, crop_size=42, image_mean=(0.7, 0.2, 0.4), image_std=(0.5, 0.3, 0.1))
    processor.save_pretrained(folder)
    os.link(checkpoint, folder / "model.safetensors")
    arguments = ["extract", str(PICTURES / "coffee.jpg"), "--model", str(folder), "--workers", "0", "--device", "cpu"]
    pixels = processor(read_image(PICTURES / "coffee.jpg")).pixel_values
    with torch.inference_mode():
        expected = dinov2_fast.load(str(folder)).forward_features(pixels)["x_norm_clstoken"].numpy()
    for precision, bound in (("auto", 1e-4), ("bf16", 0.1)):
        out = tmp_path / precision
        assert main([*arguments, "--precision", precision, "--engine", engine, "--out", str(out)]) == 0
        table, metadata = pq.read_table(out / "features.parquet"), read_metadata(out / "features.parquet")
        np.testing.assert_allclose(np.array(table["cls"].to_pylist()), expected, atol=bound)
        assert metadata["precision"] == precision.replace("auto", "fp32")
        assert metadata["engine"] == (engine == "on")
        assert metadata["processor"] == processor.to_dict()
    assert dtypes == ([torch.uint8] * 2 if engine == "on" else [])


def test_overwriting_is_asked_for(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["extract", str(PICTURES / "coffee.jpg"), "--model", checkpoint, "--out", str(tmp_path)]
    arguments += ["--workers", "0", "--size", "14"]
    assert main(arguments) == 0
    assert main(arguments) == 1
    assert "exists already" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


def test_settings_beside_the_model_are_used(checkpoint: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    processor = Dinov2ImageProcessor(size=56, crop_size=28)
    processor.save_pretrained(folder)
    os.link(checkpoint, folder / "model.safetensors")
    arguments = ["extract", str(PICTURES / "coffee.jpg"), "--model", str(folder), "--workers", "0"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert read_metadata(tmp_path / "features.parquet")["processor"] == processor.to_dict()


@pytest.mark.parametrize(
    ("path", "model", "options", "message"),
    [
        (str(PICTURES), "dinov2_vits4", [], "no DINOv2 backbone called 'dinov2_vits4'. Did you mean dinov2_vits14"),
        ("missing\x1b[31m", "dinov2_vits14", [], r"no file or folder 'missing\x1b[31m'"),
        (str(ROOT / "kernels"), "dinov2_vits14", [], "There are no pictures in"),
        (str(PICTURES), "dinov2_vits14", ["--weights", str(PICTURES / "README.md")], "README.md"),
        (str(PICTURES), "dinov2_vits14", ["--weights", "random:x"], "random:SEED"),
        (str(PICTURES), "dinov2_vits14", ["--weights", "random:0", "--device", "abacus"], "abacus"),
        (str(PICTURES), "dinov2_vits14", ["--precision", "fp8", "--engine", "off"], "fp8 exists in the engine only"),
    ],
)
def test_an_abort_exits_with_1_and_one_message(
    path: str, model: str, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["extract", path, "--model", model, "--out", str(out), "--workers", "0", *options]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("dinov2-fast: error: ")
    assert message in captured.err
    assert not CONTROL_CHARACTERS.search(captured.err)
    assert "Traceback" not in captured.err
    assert not out.exists()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_control_c_exits_with_130(checkpoint: str, tmp_path: Path, workers: str) -> None:
    pictures = [str(PICTURES / "coffee.jpg")] * 3000
    command = [sys.executable, "-m", "dinov2_fast", "extract", *pictures, "--model", checkpoint, "--size", "14"]
    command += ["--out", str(tmp_path / "out"), "--workers", workers]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "0/3000 pictures, 0 failed\n"
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
        rest = process.stderr.read()
    assert process.returncode == 130, rest
    assert rest == "dinov2-fast: interrupted\n"
    assert list((tmp_path / "out").iterdir()) == []


def test_info(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOV2_FAST_CACHE", str(tmp_path))
    monkeypatch.setenv("DINOV2_FAST_BACKEND", "layer_norm=torch")
    (tmp_path / "dinov2_vitb14_reg4_pretrain.pth").touch()
    assert main(["info", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for pattern in (
        rf"  dinov2_fast +{re.escape(dinov2_fast.__version__)}",
        rf"  torch +{re.escape(importlib.metadata.version('torch'))}",
        r"  layer_norm +torch +runs on cpu",
        r"  attention +torch +runs on cpu",
        r"  DINOV2_FAST_BACKEND +layer_norm=torch",
        rf"  DINOV2_FAST_CACHE +{tmp_path}",
        rf"  dinov2_vitb14_reg +{tmp_path}/dinov2_vitb14_reg4_pretrain\.pth",
    ):
        assert any(re.fullmatch(pattern, line) for line in lines), pattern
    assert not CONTROL_CHARACTERS.search("\n".join(lines))


def test_info_imports_no_kernel_library() -> None:
    code = (
        "import sys\nfrom dinov2_fast.cli import main\nmain(['info'])\n"
        "sys.exit(bool({'xformers', 'transformers', 'timm'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_rewrites_its_line_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, rewrites in ((Terminal(), 3), (io.StringIO(), 0)):
        monkeypatch.setattr("sys.stderr", stream)
        progress = Progress(100)
        progress(50, 1)
        progress(100, 2)
        progress.end()
        text = stream.getvalue()
        assert text.count("\r") == rewrites
        assert text.endswith("\n")
        assert "100/100 pictures, 2 failed" in text
        assert ("50/100" in text) == bool(rewrites)
