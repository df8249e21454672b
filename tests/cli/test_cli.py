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
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dinov2_fast
from dinov2_fast.cli import main
from dinov2_fast.cli.extract import ProgressReport
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.extraction.run import Progress
from dinov2_fast.features.manifest import read_manifest
from dinov2_fast.inference import Engine
from tests.helpers.images import read_image

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "examples" / "images"
CONTROL_CHARACTERS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dinov2_fast", *arguments], cwd=ROOT, capture_output=True, text=True)


COMMANDS = ("extract", "show", "knn", "linear", "pretrain", "convert", "verify", "export", "info")


@pytest.mark.parametrize("arguments", [["--help"], *([command, "--help"] for command in COMMANDS)])
def test_every_command_prints_its_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: dinov2-fast")
    assert not CONTROL_CHARACTERS.search(text)


@pytest.mark.parametrize("command", ["extract", "pretrain"])
def test_help_is_quick_and_imports_nothing_heavy(command: str) -> None:
    code = (
        "import sys\nfrom dinov2_fast.cli import main\n"
        f"try: main(['{command}', '--help'])\n"
        "except SystemExit: sys.exit(bool({'torch', 'pyarrow', 'transformers', 'triton'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
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
        ([*EXTRACT, "--format", "csv"], "invalid choice: 'csv'"),
        ([*EXTRACT, "--dtype", "bf16"], "invalid choice: 'bf16'"),
        ([*EXTRACT, "--shard-size", "0"], "must be at least 1, got 0"),
        ([*EXTRACT, "--max-seconds", "0"], "must be at least 1, got 0"),
        ([*EXTRACT, "--part", "0/4"], "'0/4' is not I/N with I from 1 to N, such as 1/4"),
        ([*EXTRACT, "--part", "5/4"], "'5/4' is not I/N"),
        ([*EXTRACT, "--part", "2"], "'2' is not I/N"),
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
        str(IMAGES),
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
    assert (done.returncode, done.stderr.splitlines()[-1][:20]) == (0, "5/5 images, 0 failed"), done.stderr
    assert not CONTROL_CHARACTERS.search(done.stdout + done.stderr)

    summary, where, how = done.stdout.splitlines()
    assert re.fullmatch(r"5 images, 0 failed, \d+\.\d s, \d+\.\d images/s, model busy \d+%", summary)
    assert where == f"Features: {out}"
    code = how.removeprefix("Read it:  ")
    names: dict[str, Any] = {}
    exec(code, names)
    found = names["features"]

    files = sorted(IMAGES.glob("*.jpg"))
    assert found.path == [str(file) for file in files]
    model = dinov2_fast.load("dinov2_vits14", weights="random:0")
    with torch.inference_mode():
        features = model.forward_features(Dinov2ImageProcessor()([read_image(file) for file in files]).pixel_values)
    for name, expected in (
        ("cls", features["x_norm_clstoken"]),
        ("patch_mean", features["x_norm_patchtokens"].mean(dim=1)),
    ):
        np.testing.assert_allclose(found[name], expected.numpy(), atol=1e-4)
    manifest = found.manifest
    assert (manifest["about"]["model"], manifest["about"]["weights"]) == ("dinov2_vits14", "random:0")
    assert manifest["position_interpolation"] == "offset"
    assert (manifest["dtype"], manifest["precision"], bool(manifest["engine"])) == ("float32", "fp32", True)
    left_out, announced, *_ = done.stderr.splitlines()
    assert left_out == "1 file with another ending was left out (.md 1)."
    assert announced.startswith("5 images, 15.4 kB of features in 1 shard (")


def test_transparent_pixels_are_composited_on_the_background(checkpoint: str, tmp_path: Path) -> None:
    Image.new("RGBA", (28, 28)).save(tmp_path / "clear.png")
    for colour in ("white", "black"):
        Image.new("RGB", (28, 28), colour).save(tmp_path / f"{colour}.png")
    paths = [str(tmp_path / f"{name}.png") for name in ("clear", "white", "black")]
    for engine in ([], ["--no-engine"]):
        arguments = ["extract", *paths, "--model", checkpoint, "--size", "28", "--device", "cpu", *engine]
        found = {}
        for options in ([], ["--background", "white"]):
            out = tmp_path / f"{len(engine)}{len(options)}"
            assert main([*arguments, "--workers", str(len(options) // 2), "--out", str(out), *options]) == 0
            features = dinov2_fast.load_features(out)
            found[len(options)] = features["cls"]
            assert features.manifest["processor"].get("background") == (options[1] if options else None)
        np.testing.assert_array_equal(found[0][0], found[0][2])
        np.testing.assert_array_equal(found[2][0], found[2][1])
        assert np.abs(found[2][1] - found[2][2]).max() > 0.01


def test_a_bad_image_exits_with_3(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_text("<html>")
    arguments = ["extract", str(bad), str(IMAGES / "coffee.jpg"), "--model", checkpoint, "--workers", "0"]
    options = ["--size", "28x42", "--precision", "bf16", "--no-engine"]
    assert main([*arguments, "--out", str(tmp_path / "a"), *options]) == 3
    assert "2 images, 1 failed" in capsys.readouterr().out
    manifest = read_manifest(tmp_path / "a")
    assert (manifest["dtype"], manifest["precision"], manifest["engine"]) == ("bfloat16", "bf16", None)
    assert manifest["processor"]["crop_size"] == {"height": 28, "width": 42}
    found = dinov2_fast.load_features(tmp_path / "a")
    assert found.error[1] is None
    assert str(found.error[0]).startswith("not an image")
    assert main([*arguments, "--out", str(tmp_path / "a"), *options]) == 3
    captured = capsys.readouterr()
    assert "2 images, 1 failed, 2 were there already, 0.0 s, nothing to do" in captured.out
    assert captured.err.startswith("2 images, 2 of them there already, ")


@pytest.mark.parametrize("engine", [True, False])
def test_the_engine_and_its_precision_are_chosen(
    checkpoint: str, tmp_path: Path, engine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a mean and a std of its own, which the engine takes over."""
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True})  # or the engine refuses bf16
    dtypes, forward_features = [], Engine.forward_features
    monkeypatch.setattr(Engine, "forward_features", lambda self, x: dtypes.append(x.dtype) or forward_features(self, x))
    folder = tmp_path / "model"
    processor = Dinov2ImageProcessor(size=56, crop_size=42, image_mean=(0.7, 0.2, 0.4), image_std=(0.5, 0.3, 0.1))
    processor.save_pretrained(folder)
    os.link(checkpoint, folder / "model.safetensors")
    arguments = ["extract", str(IMAGES / "coffee.jpg"), "--model", str(folder), "--workers", "0", "--device", "cpu"]
    arguments += [] if engine else ["--no-engine"]
    pixels = processor(read_image(IMAGES / "coffee.jpg")).pixel_values
    with torch.inference_mode():
        expected = dinov2_fast.load(str(folder)).forward_features(pixels)["x_norm_clstoken"].numpy()
    for precision, bound in (("auto", 1e-4), ("bf16", 0.1)):
        out = tmp_path / precision
        assert main([*arguments, "--precision", precision, "--out", str(out)]) == 0
        found = dinov2_fast.load_features(out)
        np.testing.assert_allclose(found["cls"], expected, atol=bound)
        assert found.manifest["precision"] == precision.replace("auto", "fp32")
        assert bool(found.manifest["engine"]) == engine
        assert found.manifest["processor"] == processor.to_dict()
    assert dtypes == ([torch.uint8] * 2 if engine else [])


def test_other_settings_need_overwrite(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["extract", str(IMAGES / "coffee.jpg"), "--model", checkpoint, "--out", str(tmp_path)]
    arguments += ["--workers", "0", "--size", "14"]
    assert main(arguments) == 0
    arguments[-1] = "28"
    assert main(arguments) == 1
    assert "were made otherwise: processor.size.shortest_edge is 14 there and 28 here" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


def test_every_option_reaches_the_extraction(checkpoint: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{IMAGES / 'coffee.jpg'}\nmissing.jpg\n")
    arguments = [
        "extract",
        str(tmp_path / "list.txt"),
        str(IMAGES / "c*.jpg"),
        "--model",
        checkpoint,
        "--size",
        "28x42",
    ]
    arguments += ["--no-crop", "--features", "cls@0,patches", "--dtype", "fp16", "--format", "npy", "--shard-size", "2"]
    arguments += ["--max-pixels", "200000", "--max-seconds", "30", "--batch-size", "3", "--workers", "1"]
    for part, code in (("1/2", 3), ("2/2", 3)):
        assert main([*arguments, "--part", part, "--out", str(tmp_path / "out")]) == code
    found = dinov2_fast.load_features(tmp_path / "out")
    assert [Path(path).name for path in found.path] == ["coffee.jpg", "missing.jpg", "chelsea.jpg", "coffee.jpg"]
    errors = ["too large: 600 x 400 pixels, the limit is 200000", "No such file or directory", None]
    assert found.error == [*errors, errors[0]]
    assert {name: (found[name].shape, str(found[name].dtype)) for name in found} == {
        "cls@0": ((4, 64), "float16"),
        "patches": ((4, 6, 64), "float16"),
    }
    assert (tmp_path / "out" / "features-00001.patches.npy").is_file()
    manifest = found.manifest
    assert (manifest["batch_size"], manifest["shard_size"], manifest["processor"]["do_center_crop"]) == (3, 2, False)


def test_failures_are_printed_and_retried_on_request(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join([str(IMAGES / "coffee.jpg"), *(str(tmp_path / f"{n}.jpg") for n in range(4))]))
    arguments = ["extract", str(listed), "--model", checkpoint, "--size", "14", "--workers", "0"]
    arguments += ["--out", str(tmp_path / "out"), "--features", "cls, patches"]
    assert main(arguments) == 3
    failed = capsys.readouterr().err.partition("Failed:\n")[2].splitlines()
    assert failed == [
        *(f"  {str(tmp_path / f'{n}.jpg')!r}: No such file or directory" for n in range(3)),
        "  in all 4 x No such file or directory",
        "Run the same command with --retry-failed to try the failed images again.",
    ]
    assert list(dinov2_fast.load_features(tmp_path / "out")) == ["cls", "patches"]
    for number in range(4):
        os.link(IMAGES / "coffee.jpg", tmp_path / f"{number}.jpg")
    assert main(arguments) == 3
    said = capsys.readouterr()
    assert said.out.startswith("5 images, 4 failed, 5 were there already, 0.0 s, nothing to do")
    assert said.err.endswith("Run the same command with --retry-failed to try the failed images again.\n")
    assert main([*arguments, "--retry-failed"]) == 0


def test_new_images_are_added_on_request(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    os.link(IMAGES / "coffee.jpg", photos / "b.jpg")
    arguments = ["extract", str(photos), "--model", checkpoint, "--size", "14", "--workers", "0"]
    arguments += ["--out", str(tmp_path / "out")]
    assert main([*arguments, "--add"]) == 0
    os.link(IMAGES / "chelsea.jpg", photos / "a.jpg")
    assert main(arguments) == 1
    assert (
        "add the images that are new with --add (add=True), or begin anew with --overwrite" in capsys.readouterr().err
    )
    assert main([*arguments, "--add"]) == 0
    assert capsys.readouterr().out.startswith("1 images, 0 failed")
    assert [Path(path).name for path in dinov2_fast.load_features(tmp_path / "out").path] == ["b.jpg", "a.jpg"]
    assert main([*arguments, "--add"]) == 0


def test_settings_beside_the_model_are_used(checkpoint: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    processor = Dinov2ImageProcessor(size=56, crop_size=28)
    processor.save_pretrained(folder)
    os.link(checkpoint, folder / "model.safetensors")
    arguments = ["extract", str(IMAGES / "coffee.jpg"), "--model", str(folder), "--workers", "0"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert read_manifest(tmp_path)["processor"] == processor.to_dict()


@pytest.mark.parametrize(
    ("path", "model", "options", "message"),
    [
        (str(IMAGES), "dinov2_vits4", [], "no DINOv2 backbone called 'dinov2_vits4'. Did you mean dinov2_vits14"),
        ("missing\x1b[31m", "dinov2_vits14", [], r"no file or folder 'missing\x1b[31m'"),
        (str(ROOT / "kernels"), "dinov2_vits14", [], "There are no images in"),
        (str(IMAGES), "dinov2_vits14", ["--weights", str(IMAGES / "README.md")], "README.md"),
        (str(IMAGES), "dinov2_vits14", ["--weights", "random:x"], "random:SEED"),
        (str(IMAGES), "dinov2_vits14", ["--weights", "random:0", "--device", "abacus"], "abacus"),
        (str(IMAGES), "dinov2_vits14", ["--precision", "fp8", "--no-engine"], "fp8 exists in the engine only"),
        (str(IMAGES), "dinov2_vits14", ["--no-crop"], "--no-crop needs --size"),
        (str(IMAGES), "dinov2_vits14", ["--weights", "random:0", "--features", "tokens"], "no feature 'tokens'"),
        ("s3x://bucket/", "dinov2_vits14", [], "'s3x://bucket/' cannot be opened: Protocol not known: s3x"),
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


@pytest.mark.parametrize(("workers", "name"), [("0", "SIGINT"), ("1", "SIGINT"), ("1", "SIGTERM")])
def test_control_c_and_sigterm_exit_with_130(checkpoint: str, tmp_path: Path, workers: str, name: str) -> None:
    out, images = tmp_path / "out", [str(IMAGES / "coffee.jpg")] * 3000
    command = [sys.executable, "-m", "dinov2_fast", "extract", *images, "--model", checkpoint, "--size", "14"]
    command += ["--out", str(out), "--workers", workers, "--shard-size", "8", "--batch-size", "4"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("3000 images, 1.5 MB of features in 375 shards (")
        while not list(out.glob("features-*.parquet")):
            time.sleep(0.05)
        os.killpg(process.pid, signal.Signals[name])  # a terminal sends it to the whole group
        rest = process.stderr.read()
    assert process.returncode == 130, rest
    assert rest == "dinov2-fast: interrupted\n"
    assert {path.suffix for path in out.iterdir()} == {".parquet", ".json"}
    part = dinov2_fast.load_features(out, partial=True)
    assert len(part) % 8 == 0
    assert part.error == [None] * len(part)


def test_info_prints_versions_backends_and_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINOV2_FAST_CACHE", str(tmp_path))
    monkeypatch.setenv("DINOV2_FAST_BACKEND", "layer_norm=torch")
    (tmp_path / "dinov2_vitb14_reg4_pretrain.pth").touch()
    assert main(["info", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for pattern in (
        rf"  dinov2_fast +{re.escape(dinov2_fast.__version__)}",
        rf"  torch +{re.escape(importlib.metadata.version('torch'))}",
        r"What runs on cpu \(float32, inference\)",
        r"  layer_norm +torch +(the others need a GPU|was asked for)",
        r"  activation +torch +the others need a GPU",
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


def progress(**values: Any) -> Progress:
    return Progress(folder=Path("out"), shards=1, nbytes=0, free=0, **values)


def test_progress_rewrites_its_line_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, rewrites in ((Terminal(), 2), (io.StringIO(), 0)):
        monkeypatch.setattr("sys.stderr", stream)
        report = ProgressReport()
        report(progress(done=50, failures=1, images=100, resumed=20, seconds=6.0, busy=0.256))
        report(progress(done=100, failures=2, images=100, resumed=20, seconds=16.0, busy=0.5))
        report.end()
        text = stream.getvalue()
        assert text.count("\r") == rewrites
        assert text.endswith("\n")
        assert "100/100 images, 2 failed, 5.0 images/s, 0:00:00 left, model busy 50%" in text
        assert ("50/100 images, 1 failed, 5.0 images/s, 0:00:10 left, model busy 26%" in text) == bool(rewrites)


def test_without_a_terminal_a_line_comes_every_30_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stream = [100.0], io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    report = ProgressReport()
    for second in range(1, 100):
        clock[0] += 1
        report(progress(done=second, failures=0, images=1000, resumed=0, seconds=float(second), busy=1.0))
    assert [line.split("/")[0] for line in stream.getvalue().splitlines()] == ["30", "60", "90"]


@pytest.mark.parametrize(("given", "arguments", "policy"), [
    (None, [], "PASSIVE"), ("active", [], "active"), (None, ["--workers", "0"], None),
])  # fmt: skip
def test_openmp_threads_are_passive_if_workers_decode(
    given: str | None, arguments: list[str], policy: str | None, tmp_path: Path
) -> None:
    script = (
        "import os, sys; from dinov2_fast.cli import main; main(sys.argv[1:]); print(os.environ.get('OMP_WAIT_POLICY'))"
    )
    variables = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-c", script, "extract", str(tmp_path / "none"), "--model", "m", "--out", "o"]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=variables | ({"OMP_WAIT_POLICY": given} if given else {}),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == [str(policy)]
