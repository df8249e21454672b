"""A step of pretraining against the reference's: losses, every gradient, centres, and weights after three steps.

The reference's results are golden data. With ``--reference-path FOLDER`` the reference, a checkout of
facebookresearch/dinov2, also runs beside ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_fast.pretraining import trainer
from dinov2_fast.pretraining.batches import CropBatch
from dinov2_fast.pretraining.config import (
    CropsConfig,
    HeadConfig,
    LossesConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainingConfig,
    RunConfig,
    TeacherConfig,
)
from dinov2_fast.pretraining.networks import Network, Pretraining, Views
from dinov2_fast.pretraining.parallel import sharded_parameters, start_processes
from tests.helpers import golden_pretraining as golden
from tests.helpers import reference_pretraining as reference

# What is left is the order of sums in fp32. Measured on four combinations of instruction sets, libraries and threads:
LOSS_TOLERANCE = 1e-6  # of the loss; measured 2e-7
NORM_TOLERANCE = 4e-6  # of a gradient's norm; measured 8e-7
GRADIENT_TOLERANCE = 1e-5  # of the largest element of the same gradient; measured 1e-6
WEIGHT_TOLERANCE = 1e-6  # of the largest element of the same weight; measured 3e-7

PARTS = ("dino_local", "dino_global", "koleo", "ibot", "loss")


@pytest.fixture(params=["golden", "live"])
def results(request: pytest.FixtureRequest) -> Callable[[str], dict[str, Any]]:
    """What the reference computes in a case, or in the three "steps"."""
    if request.param == "golden":
        return golden.load_results
    path = request.config.getoption("--reference-path")
    if path is None:
        pytest.skip("no --reference-path was given")
    pytest.importorskip("torchvision")  # the reference imports it
    return partial(reference.run_reference, path)


@pytest.mark.golden
@pytest.mark.parametrize("case", golden.CASES)
def test_losses_and_gradients(results: Callable[[str], dict[str, Any]], case: str) -> None:
    theirs, method, views = results(case), make_method(case), load_views()
    targets, _ = method.targets([views], reference.TEACHER_TEMPERATURE)
    losses = method.losses(views, targets)
    losses["loss"].backward()
    ours = entering({name: loss.item() for name, loss in losses.items()})
    assert ours == pytest.approx(theirs["losses"], rel=LOSS_TOLERANCE)
    gradients = {name: parameter.grad for name, parameter in method.student.named_parameters()}
    assert_near(gradients, theirs["gradients"], GRADIENT_TOLERANCE)


@pytest.mark.golden
@pytest.mark.parametrize("case", [case for case in golden.CASES if case.startswith("centering")])
def test_next_centers(results: Callable[[str], dict[str, Any]], case: str) -> None:
    _, centers = make_method(case).targets([load_views()], reference.TEACHER_TEMPERATURE)
    theirs = {name: center.flatten() for name, center in results(case)["centers"].items()}
    assert_near(dict(zip(("dino", "ibot"), centers, strict=True)), theirs, WEIGHT_TOLERANCE)


def test_three_steps(results: Callable[[str], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = results("steps")
    networks = {name: load_network(name, golden.STEPS_CASE) for name in ("student", "teacher")}
    monkeypatch.setattr(trainer, "make_networks", lambda *_: networks.values())
    monkeypatch.setattr(trainer, "apply_colours", lambda crops, *_: crops)
    monkeypatch.setattr(trainer, "batch_masks", lambda _config, _seed, step, **_: load_views(step).masks.numpy())
    with start_processes("cpu") as world:
        ours = trainer.Trainer(tmp_path, None, make_config(golden.STEPS_CASE), world)
        for step, (losses, norms) in enumerate(zip(theirs["losses"], theirs["norms"], strict=True)):
            metrics = ours.do_step(load_batch(step))
            assert entering(metrics) == pytest.approx(losses, rel=LOSS_TOLERANCE)
            found = {name: metrics[f"gradient_norm/{name}"] for name in norms}
            assert found == pytest.approx(norms, rel=NORM_TOLERANCE)
        for name, network in networks.items():
            weights = {key: parameter.full_tensor() for key, parameter in sharded_parameters(network).items()}
            assert_near(without_key_bias(weights), without_key_bias(theirs[name]), WEIGHT_TOLERANCE)


def make_config(case: str) -> PretrainingConfig:
    """The settings of a golden case. What is not named has our default, which is the reference's."""
    centering, head = case.split("-")
    return PretrainingConfig(
        model=ModelConfig(hidden_size=64, depth=2, num_heads=2, mlp_ratio=1.0, layer_scale=0.1, drop_path=0.0),
        crops=CropsConfig(global_size=56, local_size=28, n_local=2),
        dino_head=HeadConfig(prototypes=48, hidden_size=32, bottleneck_size=16),
        ibot_head=HeadConfig(prototypes=40, hidden_size=32, bottleneck_size=16) if head == "separate" else None,
        losses=LossesConfig(centering=centering),  # type: ignore[arg-type]
        teacher=TeacherConfig(temperature_warmup_steps=2),
        optimizer=OptimizerConfig(warmup_steps=2, freeze_last_layer_steps=2, clip_norm=0.05),
        run=RunConfig(steps=6, batch_size=4, micro_batch=4, precision="fp32"),
    )


def load_network(name: str, case: str) -> Network:
    network = Network(make_config(case))
    network.load_state_dict(golden.load_weights(name, case))
    return network


def make_method(case: str) -> Pretraining:
    """Student and teacher of a golden case, in one process."""
    world: Any = SimpleNamespace(device=torch.device("cpu"), logsumexp=lambda x: x, sum=lambda x: x)
    method = Pretraining(load_network("student", case), load_network("teacher", case), make_config(case), world)
    if case.startswith("centering"):
        method.centers = [center.flatten() for center in golden.load_centers(case).values()]
    return method


def load_views(step: int = 0) -> Views:
    inputs = golden.load_inputs(step)
    return Views(
        inputs["collated_global_crops"].unflatten(0, (2, -1)),
        inputs["collated_local_crops"].unflatten(0, (2, -1)),
        inputs["collated_masks"].unflatten(0, (2, -1)),
        inputs["mask_indices_list"],
        inputs["masks_weight"],
    )


def load_batch(step: int) -> CropBatch:
    """The crops of `load_views`; they have their colours already."""
    views = load_views(step)
    return CropBatch(views.global_crops, views.local_crops, [], [], [])


def entering(losses: Mapping[str, float]) -> dict[str, float]:
    """Our losses as they enter the reference's sum: KoLeo's is already multiplied by its weight there."""
    return {name: losses[name] * (0.1 if name == "koleo" else 1) for name in PARTS}


def without_key_bias(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights without the bias of attention's keys.

    It adds the same to all logits of a query, so its gradient is 0. What AdamW makes of the rounding of 0 is noise.
    """
    changed = {name: torch.cat([w.chunk(3)[0], w.chunk(3)[2]]) for name, w in weights.items() if "qkv.bias" in name}
    return weights | changed


def assert_near(ours: Mapping[str, Any], theirs: Mapping[str, Tensor], tolerance: float) -> None:
    """No element differs by more than `tolerance` times the largest element of its tensor."""
    assert ours.keys() == theirs.keys()
    errors = {name: ((ours[name] - their).abs().max() / their.abs().max()).item() for name, their in theirs.items()}
    assert {name: error for name, error in errors.items() if not error <= tolerance} == {}
