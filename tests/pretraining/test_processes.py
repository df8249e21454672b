"""Runs of several processes on gloo: the result does not depend on their number."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.pretraining import trainer
from dinov2_fast.pretraining.config import PretrainingConfig
from dinov2_fast.pretraining.log import read_metrics
from dinov2_fast.pretraining.optimizer import clip_gradients
from dinov2_fast.pretraining.parallel import World
from dinov2_fast.pretraining.run import check_batch, pretrain
from tests.helpers.pretraining import make_images, small_config, stored_tensors
from tests.helpers.processes import run_processes

LOSSES = ("loss", "dino_global", "dino_local", "ibot", "koleo", "dino_entropy", "ibot_mean_entropy")
RUN = {"batch_size": 24, "micro_batch": 2, "steps": 3, "save_every": 3}


def config(**run: Any) -> PretrainingConfig:
    """The teacher is a copy of the student, so that a checkpoint's whole teacher shows the student."""
    return small_config(
        run={**RUN, **run}, teacher={"momentum": 0.0, "final_momentum": 0.0}, optimizer={"warmup_steps": 0}
    )


def one_process(world: World, out: Path, images: Path, settings: PretrainingConfig) -> None:
    pretrain(images, out=out, config=settings, device="cpu")


def run(size: int, images: Path, out: Path, settings: PretrainingConfig) -> None:
    out.mkdir(exist_ok=True)
    run_processes(size, out, one_process, images, settings)


def result(out: Path) -> dict[str, torch.Tensor]:
    newest = max(out.glob("checkpoint-*"))
    whole = ("teacher.safetensors", "heads.safetensors")
    return {name: tensor for name, tensor in stored_tensors(newest).items() if name.startswith(whole)}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def alone(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    pretrain(images, out=out, config=config(), device="cpu")
    return out


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_number_of_processes_gives_the_same_run(size: int, images: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(size, images, out, config())
    for one, other in zip(read_metrics(alone), read_metrics(out), strict=True):
        assert [other[name] for name in LOSSES] == pytest.approx([one[name] for name in LOSSES], rel=2e-6)
    assert largest_difference(result(alone), result(out)) <= 1e-5


@pytest.mark.slow
def test_a_run_of_two_processes_continues_in_one_and_in_three(images: Path, alone: Path, tmp_path: Path) -> None:
    for size in (1, 3):
        out = tmp_path / f"out-{size}"
        run(2, images, out, config(steps=3, save_every=2))
        shutil.rmtree(out / "checkpoint-00000003")
        run(size, images, out, config(save_every=2))
        assert largest_difference(result(alone), result(out)) <= 1e-5


@pytest.mark.parametrize("size", [5, 7])
def test_a_batch_that_cannot_be_shared_evenly_is_refused(size: int) -> None:
    with pytest.raises(InvalidValueError, match=f"multiple of {2 * size}"):
        check_batch(config(), size)


def test_parts_of_any_size_give_the_same_gradients(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients: list[dict[str, torch.Tensor]] = []

    def keep(network: torch.nn.Module, max_norm: float) -> dict[str, torch.Tensor]:
        named = network.named_parameters()
        gradients.append({name: each.grad.full_tensor().clone() for name, each in named if each.grad is not None})
        return clip_gradients(network, max_norm)

    monkeypatch.setattr(trainer, "clip_gradients", keep)
    for micro_batch in (8, 4, 2):
        settings = config(batch_size=8, micro_batch=micro_batch, steps=1, save_every=1)
        settings = settings.updated({"model": {"drop_path": 0.0}, "losses": {"koleo_group": 2}})
        pretrain(images, out=tmp_path / str(micro_batch), config=settings, device="cpu")
    whole, *parts = gradients
    for part in parts:
        assert part.keys() == whole.keys()
        for name, gradient in whole.items():
            assert float((part[name] - gradient).abs().max()) <= 2e-6 * float(gradient.abs().max()), name
