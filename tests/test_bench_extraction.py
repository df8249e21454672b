"""The benchmark of extraction: pictures by a seed, right features in order, the device's share of the time."""

from __future__ import annotations

import dataclasses
import multiprocessing.spawn
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from bench import decoding as pipeline
from bench import extraction, records
from bench import model as bench
from bench.peers import OURS, TRANSFORMERS, Peer
from dinov2_fast.configs import BACKBONES
from dinov2_fast.extraction import decoding
from dinov2_fast.model import DinoVisionTransformer

CPU = torch.device("cpu")
CONFIG = dataclasses.replace(BACKBONES["dinov2_vits14"], embed_dim=64, depth=1, num_heads=2)
TIMM, FACEBOOK = (dataclasses.replace(OURS, name=name) for name in ("timm", "facebook"))  # their pictures, our model
COUNT = 9


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return extraction.make_pictures(tmp_path_factory.mktemp("pictures"), COUNT)


def _setting(**changes) -> bench.Setting:
    return dataclasses.replace(bench.Setting("extraction", CONFIG, 224, 4, "cls", "fp32"), **changes)


def _models() -> bench.Models:
    torch.manual_seed(0)
    model = DinoVisionTransformer(**CONFIG.constructor_arguments())
    for parameter in model.parameters():  # as if trained: with what it starts from, all class tokens are nearly equal
        torch.nn.init.normal_(parameter, std=0.2)
    return bench.Models(CONFIG, model.eval())


def _rows(peers: list[Peer], files: list[str], workers: int = 0, **changes) -> dict[str, dict]:
    rows = extraction.measure(_setting(**changes), peers, _models(), files, workers, 3)
    assert [row["implementation"] for row in rows] == [peer.name for peer in peers]
    return {row["implementation"]: row for row in rows}


def _reason(rows: dict[str, dict], name: str = "timm") -> str:
    assert rows[name]["value"] is None
    assert rows[name].get("floor_share") is None
    return records.reason(rows[name]) or ""


def _changed(monkeypatch: pytest.MonkeyPatch, change, only: int | None = None) -> None:
    """Changes the features that timm's pipeline returns; `only` those of so many pictures."""
    right = extraction.Theirs.features

    def wrong(self, paths):
        features = right(self, paths)
        named = self._peer.name == "timm" and only in (None, len(paths))
        return change(features) if named else features

    monkeypatch.setattr(extraction.Theirs, "features", wrong)


def test_the_same_seed_makes_the_same_pictures(tmp_path: Path) -> None:
    made = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        made.append([Path(path).read_bytes() for path in extraction.make_pictures(tmp_path / name, 7, seed)])
    assert made[0] == made[1]
    assert len({*made[0], *made[2]}) == 14
    with Image.open(tmp_path / "a" / "000006.jpg") as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (500, 375), "RGB")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_implementation_has_a_row(files: list[str], tmp_path: Path, precision: str) -> None:
    for package in ("timm", "torchvision", "transformers"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    rows = _rows([OURS, TRANSFORMERS, TIMM, FACEBOOK], files, precision=precision)
    for row in rows.values():
        assert row["value"], records.reason(row)
        assert 0 < row["p20"] <= row["value"] <= row["p80"]
        assert 0 < row["floor_share"] < 1
        assert row["outputs_max_error"] < (1e-4 if precision == "fp32" else 0.1)
        assert (row["unit"], row["resolution"], row["output"]) == ("images/s", 224, "cls")
        assert row["mode"] == ("engine" if row["implementation"] == OURS.name else "eager")
        assert (row["versions"]["workers"], row["versions"]["pictures"]) == (0, COUNT)
    common = dict.fromkeys(records.KEYS) | records.environment(CPU, "a" * 40)
    records.write(tmp_path / "extraction.jsonl", [common | row for row in rows.values()])


def test_workers_change_no_feature(files: list[str]) -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    models, setting = _models(), _setting()
    ours = models.get(OURS, torch.float32)
    with torch.inference_mode():
        for make in (extraction.Ours, lambda *rest: extraction.Theirs(FACEBOOK, *rest)):
            alone, helped = (make(setting, ours, workers).features(files) for workers in (0, 2))
            assert alone.shape == (COUNT, CONFIG.embed_dim)
            assert np.array_equal(alone, helped)


def test_workers_of_ours_start_as_under_the_command() -> None:
    main = sys.modules["__main__"]
    with pipeline.as_the_command():
        started = multiprocessing.spawn.get_preparation_data("a worker")
        assert started["init_main_from_name"] == "dinov2_fast.__main__"
    assert sys.modules["__main__"] is main


ORDERS = {
    "shuffled": lambda features: features[::-1].copy(),
    "shifted": lambda features: np.roll(features, 1, axis=0),
    "two exchanged": lambda features: features[[1, 0, *range(2, len(features))]],
    "one lost, one twice": lambda features: features[[0, *range(len(features) - 1)]],
}
SHAPES = {
    "one lost": lambda features: features[:-1],
    "one more": lambda features: features[[0, *range(len(features))]],
    "other dtype": lambda features: features.astype(np.float64),
}


@pytest.mark.parametrize("change", ORDERS.values(), ids=ORDERS)
def test_another_order_is_refused(files: list[str], monkeypatch: pytest.MonkeyPatch, change) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    _changed(monkeypatch, change)
    rows = _rows([OURS, TIMM], files)
    assert _reason(rows).startswith("refused: the order is wrong")
    assert rows["dinov2_fast"]["value"]


@pytest.mark.parametrize("change", SHAPES.values(), ids=SHAPES)
def test_too_few_or_too_many_are_refused(files: list[str], monkeypatch: pytest.MonkeyPatch, change) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    _changed(monkeypatch, change)
    assert _reason(_rows([OURS, TIMM], files)).startswith("refused: the features are (")


def test_what_is_not_finite_or_slightly_wrong_is_refused(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    for change, reason in (
        (
            lambda features: np.where(features == features.max(), np.nan, features),
            "refused: the features are not finite",
        ),
        (lambda features: features * np.float32(1 + 1e-4), "refused: an element is"),
    ):
        with monkeypatch.context() as patch:
            _changed(patch, change)
            assert _reason(_rows([OURS, TIMM], files)).startswith(reason)


@pytest.mark.parametrize("change", [ORDERS["shifted"], SHAPES["one lost"]], ids=["shifted", "one lost"])
def test_a_timed_pass_is_looked_at_as_well(files: list[str], monkeypatch: pytest.MonkeyPatch, change) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    _changed(monkeypatch, change, only=COUNT)
    rows = _rows([OURS, TIMM], files)
    assert _reason(rows).startswith("refused: ")
    assert rows["timm"]["outputs_max_error"] is None
    assert rows["dinov2_fast"]["value"]


def test_preprocessing_of_other_pictures_is_refused(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    rotated = [files[-1], *files[:-1]]

    class Others(extraction.Files):
        def __init__(self, paths, transform) -> None:
            super().__init__([rotated[files.index(path)] for path in paths], transform)

    monkeypatch.setattr(extraction, "Files", Others)  # the features are right for the pixels
    reason = _reason(_rows([OURS, FACEBOOK], files), "facebook")
    assert reason.startswith("refused: other pixels"), reason


def test_a_picture_that_ours_cannot_read_is_refused(files: list[str], tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(Path(files[0]).read_bytes()[:2000])
    ours = extraction.Ours(_setting(), _models().ours, 0)
    with torch.inference_mode(), pytest.raises(ValueError, match="1 pictures have no features"):
        ours.features([*files[:2], str(broken)])


def test_what_is_missing_or_fails_stops_no_other(files: list[str]) -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")

    def failing(*arguments):
        raise RuntimeError("no such layer")

    missing = dataclasses.replace(TIMM, missing="timm is not installed")
    broken = dataclasses.replace(TRANSFORMERS, build=failing, missing=None)
    rows = _rows([OURS, broken, missing, FACEBOOK], files)
    assert _reason(rows) == "missing: timm is not installed"
    assert _reason(rows, "transformers") == "failed: no such layer"
    assert rows["dinov2_fast"]["value"]
    assert rows["facebook"]["value"]


def test_passes_take_turns(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    right, taken = extraction.run_pass, []

    def watched(pipeline, *rest):
        taken.append(pipeline._peer.name if isinstance(pipeline, extraction.Theirs) else "ours")
        return right(pipeline, *rest)

    monkeypatch.setattr(extraction, "run_pass", watched)
    _rows([OURS, TIMM, FACEBOOK], files)
    assert taken == ["ours", "timm", "facebook", "timm", "facebook", "ours", "facebook", "ours", "timm"]


def test_the_share_is_the_time_of_the_model(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that takes long has nearly all of the pass, in ours and in a peer; decoding that takes long, little."""
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    models, setting = _models(), _setting()
    ours = models.ours

    def pipelines() -> list[extraction.Pipeline]:
        return [extraction.Ours(setting, ours, 0), extraction.Theirs(FACEBOOK, setting, ours, 0)]

    def slow(function, seconds):
        return lambda *arguments, **keywords: (time.sleep(seconds), function(*arguments, **keywords))[1]

    with torch.inference_mode():
        for pipeline in pipelines():
            pipeline.features(files[:4])  # imports what it needs
        with monkeypatch.context() as patch:
            patch.setattr(ours, "prepare_tokens_with_masks", slow(ours.prepare_tokens_with_masks, 0.5))
            for pipeline in pipelines():
                took, _ = extraction.run_pass(pipeline, files[:4], CPU)
                assert took.seconds > 0.5
                assert took.share > 0.7
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, "convert", slow(Image.Image.convert, 0.2))
            patch.setattr(decoding, "decode_image", slow(decoding.decode_image, 0.2))
            for pipeline in pipelines():
                took, _ = extraction.run_pass(pipeline, files[:4], CPU)
                assert took.seconds > 0.8
                assert took.share < 0.3
    assert "forward" not in vars(ours)
    assert "forward_features" not in vars(ours)


def test_on_a_gpu_the_events_around_each_call_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = next(clock)

        def elapsed_time(self, later: Event) -> float:
            return 1000.0 * (later.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    busy = extraction.Busy(lambda steps: [next(clock) for _ in range(steps)], SimpleNamespace(type="cuda"))
    assert busy(2) == [1, 2]
    next(clock)  # between the calls
    busy(1)
    assert busy.seconds() == 3 + 2


def test_values_are_medians_of_passes() -> None:
    taken = [extraction.Pass(seconds, share) for seconds, share in ((1.0, 0.5), (4.0, 0.1), (2.0, 0.2))]
    row = extraction.values(8, taken)
    assert (row["value"], row["floor_share"], row["unit"]) == (4.0, 0.2, "images/s")
    assert row["p20"] < 4.0 < row["p80"]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = _models().ours
    monkeypatch.setattr(extraction.dinov2_fast, "load", lambda *names, **options: model)
    monkeypatch.setitem(extraction.shared.MODELS, "S", CONFIG)
    monkeypatch.setattr(extraction, "peers", lambda path: [OURS, dataclasses.replace(TIMM, missing="not here")])
    monkeypatch.setattr(pipeline, "PICTURES", 20)
    command = ["--device", "cpu", "--pictures", "5", "--workers", "0", "--batch", "2", "--write", "--resume"]
    command += ["--results", str(tmp_path), "--commit", "a" * 40]
    assert extraction.main(command) == 0
    assert "5 JPEG files, 0 workers" in capsys.readouterr().out
    rows = records.read(tmp_path / "cpu" / "extraction.jsonl")
    assert [(row["model"], row["implementation"], records.reason(row)) for row in rows] == [
        (CONFIG.name, "dinov2_fast", None),
        (CONFIG.name, "timm", "missing: not here"),
        ("tiny", "dinov2_fast", None),
        ("tiny", "decoding alone", None),
    ]
    assert all(row["value"] > 0 for row in rows if row["model"] == "tiny")
    for module in (extraction, pipeline):
        monkeypatch.setattr(module, "measure", lambda *arguments: pytest.fail("measured again"))
    assert extraction.main(command) == 0


def test_the_command_says_that_something_was_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _models().ours
    monkeypatch.setattr(extraction.dinov2_fast, "load", lambda *names, **options: model)
    monkeypatch.setitem(extraction.shared.MODELS, "S", CONFIG)
    monkeypatch.setattr(extraction, "peers", lambda path: [OURS])
    monkeypatch.setattr(extraction.Ours, "features", lambda self, paths: np.zeros((1, 1), np.float32))
    monkeypatch.setattr(pipeline, "PICTURES", 20)
    assert extraction.main(["--device", "cpu", "--pictures", "2", "--workers", "0", "--results", str(tmp_path)]) == 1


def test_the_rates_are_those_after_the_first_batches(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What an extraction adds to each batch counts."""
    model = _models().ours

    def slow(seconds):
        return lambda *arguments: (time.sleep(seconds), original(*arguments))[1]

    original = decoding.decode_image
    monkeypatch.setattr(decoding, "decode_image", slow(0.05))
    alone = pipeline.decoding_rate(files * 3, 9, 0)
    assert 10 < alone < 20
    with torch.inference_mode():
        assert 0.5 < pipeline.extraction_rate(model, files * 3, 9, 0) / alone < 1.2
        prepare = model.prepare_tokens_with_masks
        monkeypatch.setattr(model, "prepare_tokens_with_masks", lambda *rest: (time.sleep(0.9), prepare(*rest))[1])
        assert pipeline.extraction_rate(model, files * 3, 9, 0) / alone < 0.6


@pytest.mark.parametrize("wrong", [["--pictures", "0"], ["--batch", "x"], ["--workers", "-1"], ["--passes", "2"]])
def test_wrong_numbers_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        extraction._parse(["--device", "cpu", *wrong])
    assert "is wanted" in capsys.readouterr().err


@pytest.mark.parametrize("at", ["the first", "a timed pass"])
def test_a_lost_device_ends_the_command_and_the_others_run_next_time(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    broken: list[bool] = []
    model, right, calls = _models().ours, extraction.Theirs.features, []

    def features(self, paths):
        if self._peer.name == "timm":
            calls.append(len(paths))
            if len(calls) == (1 if at == "the first" else 2):
                broken.append(True)
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return right(self, paths)

    monkeypatch.setattr(extraction.Theirs, "features", features)
    monkeypatch.setattr(extraction.dinov2_fast, "load", lambda *names, **options: model)
    monkeypatch.setitem(extraction.shared.MODELS, "S", CONFIG)
    monkeypatch.setitem(extraction.TRANSFORMS, "timm", extraction.TRANSFORMS["facebook"])
    monkeypatch.setattr(extraction, "peers", lambda path: [OURS, TIMM, FACEBOOK])
    monkeypatch.setattr(pipeline, "PICTURES", 20)
    monkeypatch.setattr(records, "is_lost", lambda device: bool(broken))
    command = ["--device", "cpu", "--pictures", "5", "--workers", "0", "--batch", "2", "--write", "--resume"]
    command += ["--results", str(tmp_path), "--commit", "a" * 40]

    def kept() -> list[tuple[str, bool]]:
        rows = records.read(tmp_path / "cpu" / "extraction.jsonl")
        return [(row["implementation"], row["value"] is not None) for row in rows if row["model"] != "tiny"]

    assert extraction.main(command) == records.AGAIN
    assert kept() == [("timm", False)]
    broken.clear()
    assert extraction.main(command) == 0
    assert kept() == [("timm", False), ("dinov2_fast", True), ("facebook", True)]
