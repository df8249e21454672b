"""Whole runs of `pretrain`: the same bits however often they stop, and clear ends when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dinov2_fast
from dinov2_fast.errors import InvalidValueError
from dinov2_fast.pretraining import run, trainer
from dinov2_fast.pretraining.config import PretrainingConfig
from dinov2_fast.pretraining.log import StepReport, is_evaluation, read_metrics
from dinov2_fast.pretraining.run import End, pretrain
from dinov2_fast.pretraining.trainer import DivergedError
from tests.helpers.pretraining import computed_metrics, make_images, small_config, stored_tensors


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


def stop_after(steps: int) -> Any:
    asked = iter(range(10**6))
    return lambda: next(asked) >= steps - 1


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> End:
    """A run without interruption."""
    return pretrain(images, out=tmp_path_factory.mktemp("whole"), config=small_config(), device="cpu")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("first", [2, 3])
def test_a_run_that_stops_and_continues_has_the_bits_of_one_that_does_not(
    first: int, workers: int, images: Path, whole: End, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"out": tmp_path, "config": small_config(), "device": "cpu", "workers": workers}
    begun = pretrain(images, **settings, stop=stop_after(first))
    assert (begun.first_step, begun.step) == (0, first)
    end = pretrain(images, **settings)
    assert (end.first_step, end.step) == (first, 6)
    expected, found = stored_tensors(whole.checkpoint), stored_tensors(end.checkpoint)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert computed_metrics(tmp_path) == computed_metrics(whole.folder)


def test_a_step_changes_student_teacher_and_moments(whole: End) -> None:
    first, last = (stored_tensors(whole.folder / f"checkpoint-{step:08}") for step in (3, 6))
    changed = {name.split("-")[0] for name in first if not torch.equal(first[name], last[name])}
    assert changed >= {"student", "teacher", "optimizer"}


def test_a_complete_run_has_nothing_left_to_do(images: Path, whole: End) -> None:
    reports: list[StepReport] = []
    end = pretrain(images, out=whole.folder, config=small_config(), device="cpu", progress=reports.append)
    assert (end.first_step, end.step, end.checkpoint, reports) == (6, 6, whole.checkpoint, [])


def test_the_result_is_a_model(whole: End) -> None:
    model = dinov2_fast.load(whole.folder)
    assert model.num_heads == 2
    assert model(torch.zeros(1, 3, 42, 42)).shape == (1, 32)


def test_progress_reports_finite_metrics_of_every_step(images: Path, tmp_path: Path) -> None:
    reports: list[StepReport] = []
    pretrain(images, out=tmp_path, config=small_config(), device="cpu", progress=reports.append)
    assert [report.step for report in reports] == [1, 2, 3, 4, 5, 6]
    names = {"loss", "dino_global", "dino_local", "ibot", "koleo", "dino_entropy", "ibot_entropy", "learning_rate"}
    assert all(names <= report.metrics.keys() for report in reports)
    assert all(torch.tensor(list(report.metrics.values())).isfinite().all() for report in reports)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"run": {"seed": 1}}, "run.seed"),
        ({"optimizer": {"learning_rate": 0.5}}, "optimizer.learning_rate"),
        ({"ibot_head": None}, "ibot_head"),
    ],
)
def test_another_configuration_is_refused_with_the_setting_that_differs(
    changes: dict[str, Any], named: str, images: Path, whole: End
) -> None:
    with pytest.raises(InvalidValueError, match=named):
        pretrain(images, out=whole.folder, config=small_config(**changes), device="cpu")


def test_other_images_are_refused(whole: End, tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match="images"):
        pretrain(make_images(tmp_path, 3), out=whole.folder, config=small_config(), device="cpu")


def test_how_often_a_run_logs_and_saves_may_change(images: Path, tmp_path: Path) -> None:
    pretrain(images, out=tmp_path, config=small_config(), device="cpu", stop=stop_after(2))
    config = small_config(run={"log_every": 2, "save_every": 1, "evaluate_every": 5})
    assert pretrain(images, out=tmp_path, config=config, device="cpu").step == 6


def interrupt(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Ends the run as Ctrl-C does, after so many calls of a function."""
    real, calls = getattr(owner, name), iter(range(1, 10**6))

    def mortal(*args: Any, **options: Any) -> Any:
        found = real(*args, **options)
        if next(calls) == call:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(owner, name, mortal)


def test_an_interrupted_step_or_evaluation_leaves_no_report_out(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for labelled in ("train/a", "train/b", "val/a", "val/b"):
        make_images(tmp_path / labelled, 4)
    sets = str(tmp_path / "train"), str(tmp_path / "val")
    settings: dict[str, Any] = {"config": small_config(run={"evaluate_every": 2}), "evaluate": sets, "device": "cpu"}
    pretrain(images, out=tmp_path / "whole", **settings)
    expected = computed_metrics(tmp_path / "whole")
    assert [line["step"] for line in expected if is_evaluation(line)] == [2, 4, 6]
    for owner, name, call in ((trainer.Trainer, "save", 2), (run, "evaluate_knn", 1), (run, "evaluate_knn", 3)):
        out = tmp_path / f"{name}-{call}"
        with monkeypatch.context() as patch:
            interrupt(patch, owner, name, call)
            with pytest.raises(KeyboardInterrupt):
                pretrain(images, out=out, **settings)
        pretrain(images, out=out, **settings)
        assert computed_metrics(out) == expected


def test_labelled_images_that_cannot_be_evaluated_are_refused_before_the_first_step(
    images: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidValueError, match="lies in no class folder"):
        pretrain(images, out=tmp_path / "run", config=small_config(), evaluate=(str(images), str(images)), device="cpu")
    assert not (tmp_path / "run").exists()


def plant_nan(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """The loss of the student is NaN in these steps."""
    real = trainer.Pretraining.losses
    calls = iter(range(10**6))

    def losses(self: Any, views: Any, targets: Any) -> Any:
        found = real(self, views, targets)
        return {**found, "loss": found["loss"] * float("nan")} if next(calls) // 2 in steps else found

    monkeypatch.setattr(trainer.Pretraining, "losses", losses)


def test_a_step_that_is_not_finite_is_skipped(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_nan(monkeypatch, {2})
    config = small_config(run={"save_every": 1})
    kept: dict[int, dict[str, torch.Tensor]] = {}

    def keep(report: StepReport) -> None:
        if report.step > 1:
            kept[report.step - 1] = stored_tensors(tmp_path / f"checkpoint-{report.step - 1:08}")

    end = pretrain(images, out=tmp_path, config=config, device="cpu", progress=keep)
    assert end.step == 6
    assert [line["skipped_steps"] for line in read_metrics(tmp_path)] == [0, 0, 1, 0, 0, 0]
    assert all(torch.equal(kept[2][name], kept[3][name]) for name in kept[2])
    assert all(tensor.isfinite().all() for tensor in stored_tensors(end.checkpoint).values())


def test_three_steps_that_are_not_finite_end_the_run_and_the_last_checkpoint_is_good(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_nan(monkeypatch, {2, 3, 4})
    with pytest.raises(DivergedError, match="steps 3 to 5"):
        pretrain(images, out=tmp_path, config=small_config(run={"save_every": 2}), device="cpu")
    model = dinov2_fast.load(tmp_path)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_high_resolution_phase_begins_with_the_weights_of_the_first(
    images: Path, whole: End, tmp_path: Path
) -> None:
    config = small_config(crops={"global_size": 70}, run={"steps": 1})
    end = pretrain(images, out=tmp_path / "high", config=config, start_from=whole.folder, device="cpu")
    before, after = dinov2_fast.load(whole.folder), dinov2_fast.load(end.folder)
    positions = before.interpolate_pos_encoding(torch.zeros(0), 70, 70)
    # The first step has a learning rate of 0, so the teacher is what it was.
    torch.testing.assert_close(after.pos_embed.data, positions, rtol=0, atol=1e-6)
    torch.testing.assert_close(after.blocks[0].attn.qkv.weight, before.blocks[0].attn.qkv.weight)


def test_the_architecture_of_the_start_must_be_the_configurations(images: Path, whole: End, tmp_path: Path) -> None:
    for changes in ({"model": {"depth": 1}}, {"model": {"num_heads": 4}}, {"dino_head": {"prototypes": 7}}):
        with pytest.raises(InvalidValueError, match=r"other sizes|another architecture|has 2 heads"):
            pretrain(images, out=tmp_path / "x", config=small_config(**changes), start_from=whole.folder, device="cpu")


def test_the_generators_of_torch_are_left_alone(images: Path, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    pretrain(images, out=tmp_path, config=small_config(run={"steps": 1}), device="cpu")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_folder_says_what_the_run_is(whole: End) -> None:
    there = json.loads((whole.folder / "pretraining.json").read_text())
    assert PretrainingConfig.from_dict(there["config"]) == small_config()
    assert there["images"]["count"] == 10
