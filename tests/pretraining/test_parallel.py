"""Processes of a run: what they compute together, and that a sharded network trains as a whole one does."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dinov2_fast.errors import InvalidStateError, InvalidValueError
from dinov2_fast.pretraining.config import PretrainingConfig
from dinov2_fast.pretraining.networks import Network
from dinov2_fast.pretraining.parallel import World, shard, sharded_parameters, start_processes
from tests.helpers.pretraining import small_config
from tests.helpers.processes import run_processes

IMAGES = 12


def config(**changes: Any) -> PretrainingConfig:
    """2 and 4 processes do not divide the prototypes."""
    heads = {"dino_head": {"prototypes": 13}, "ibot_head": {"prototypes": 11}}
    return small_config(model={"drop_path": 0.0, **changes.pop("model", {})}, **heads, **changes)


def make_network(settings: PretrainingConfig) -> Network:
    torch.manual_seed(0)
    network = Network(settings)
    with torch.no_grad():
        for parameter in network.parameters():  # so that each has a gradient that matters
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def loss_of(network: Network, first: int, last: int) -> Tensor:
    """A sum over the images `first` to `last` of functions of all that the network returns."""
    generator = torch.Generator().manual_seed(1)
    global_crops = torch.randn(2, IMAGES, 3, 42, 42, generator=generator)[:, first:last]
    local_crops = torch.randn(2, IMAGES, 3, 28, 28, generator=generator)[:, first:last]
    masks = (torch.rand(2, IMAGES, 9, generator=generator) < 0.4)[:, first:last]
    said = network(global_crops, local_crops, masks, masks.flatten().nonzero()[:, 0])
    logits = (said.cls.float() @ said.cls_prototypes.float().T, said.patches.float() @ said.patch_prototypes.float().T)
    return -sum(each.mul(10).log_softmax(dim=-1)[..., 1].sum() for each in logits) / IMAGES


def gradients(network: Network) -> dict[str, Tensor]:
    named = sharded_parameters(network).items()
    return {name: parameter.grad.full_tensor().clone() for name, parameter in named if parameter.grad is not None}


def accumulate(network: Any, world: World, micro_batch: int) -> dict[str, Tensor]:
    """The gradients of the images of all processes, in parts of `micro_batch` images."""
    own = IMAGES // world.size
    begin, end = own * world.rank, own * (world.rank + 1)
    for first in range(begin, end, micro_batch):
        network.set_requires_gradient_sync(first + micro_batch >= end)
        (world.size * loss_of(network, first, first + micro_batch)).backward()
    return gradients(network)


def expected_gradients(settings: PretrainingConfig) -> dict[str, Tensor]:
    network = make_network(settings).train()
    loss_of(network, 0, IMAGES).backward()
    return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    differences = {name: float((found[name] - expected[name]).abs().max()) for name in found}
    bounds = {name: 1e-6 * max(float(expected[name].abs().max()), 1e-3) for name in found}
    assert {name: value for name, value in differences.items() if value > bounds[name]} == {}


@pytest.fixture(scope="module")
def alone() -> Iterator[World]:
    with start_processes("cpu") as world:
        yield world


@pytest.mark.parametrize("reshard", [False, True])
@pytest.mark.parametrize("micro_batch", [IMAGES, 4])
@pytest.mark.parametrize("is_shared", [False, True])
def test_a_network_sharded_over_one_process_has_the_gradients_of_a_whole_one(
    micro_batch: int, reshard: bool, is_shared: bool, alone: World
) -> None:
    settings = config(run={"reshard_after_forward": reshard}, model={"gradient_checkpointing": reshard})
    if is_shared:
        settings = settings.updated({"ibot_head": None})
    network = make_network(settings).train()
    shard(network, settings, alone, trainable=True)
    found = accumulate(network, alone, micro_batch)
    assert len(found) == len(list(network.parameters()))
    assert_close(found, expected_gradients(settings))


def follow(network: Network, source: Network) -> None:
    """What the teacher's update does: it changes the rows of this process."""
    pairs = zip(network.parameters(), source.parameters(), strict=True)
    with torch.no_grad():
        for own, other in pairs:
            own.to_local().lerp_(other.to_local(), 0.5)  # type: ignore[attr-defined]


def test_the_next_forward_pass_of_the_teacher_sees_its_update(alone: World) -> None:
    settings = config()
    teacher, student = make_network(settings).eval(), make_network(settings)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.5)
    shard(student, settings, alone, trainable=True)
    shard(teacher, settings, alone, trainable=False)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    whole = make_network(settings).eval()
    with torch.no_grad():
        loss_of(teacher, 0, 2)
        follow(teacher, student)
        for parameter in whole.parameters():
            parameter.lerp_(0.5 * parameter, 0.5)
        assert torch.equal(loss_of(teacher, 0, 2), loss_of(whole, 0, 2))


def test_bf16_is_used_inside_forward_alone_and_not_for_prototypes(alone: World) -> None:
    settings = config(run={"precision": "bf16"})
    network: Any = make_network(settings)
    shard(network, settings, alone, trainable=True)
    seen = {}

    def note(name: str, dtype: torch.dtype) -> None:
        seen[name] = dtype

    network.backbone.blocks[0].mlp.register_forward_pre_hook(lambda m, x: note("block", m.fc1.weight.dtype))
    network.dino_head.mlp.register_forward_pre_hook(lambda m, x: note("head", m[0].weight.dtype))
    network.dino_head.last_layer.register_forward_pre_hook(lambda m, x: note("prototypes", m.weight_v.dtype))
    found = accumulate(network, alone, 4)
    assert seen == {"block": torch.bfloat16, "head": torch.bfloat16, "prototypes": torch.float32}
    assert {tensor.dtype for tensor in (*found.values(), *network.parameters())} == {torch.float32}
    expected = expected_gradients(settings)
    errors = {name: float((found[name] - expected[name]).norm() / expected[name].norm()) for name in found}
    # The bias of keys has no gradient but rounding errors.
    assert max(error for name, error in errors.items() if not name.endswith("qkv.bias")) < 0.1


def in_several(world: World, folder: Path) -> None:
    settings = config()
    student, teacher = make_network(settings).train(), make_network(settings).eval()
    shard(student, settings, world, trainable=True)
    shard(teacher, settings, world, trainable=False)
    results = {f"gradient/{name}": value for name, value in accumulate(student, world, 1).items()}
    with torch.no_grad():
        loss_of(teacher, 0, 2)
        for parameter in student.parameters():
            parameter.mul_(0.5)
        follow(teacher, student)
        results["teacher"] = loss_of(teacher, 0, 2)
    lowest = -math.inf
    mixed = torch.tensor([lowest, 1000.0 + world.rank, 2.0 if world.is_main else lowest, -1000.0, math.nan])
    results["logsumexp"] = world.logsumexp(mixed)
    results["sum"] = world.sum(torch.tensor([[1.0], [world.rank]]))
    assert world.sum(torch.tensor([2**40])).tolist() == [world.size * 2**40]
    assert [world.agree(False), world.agree(True), world.agree(world.rank == world.size - 1)] == [False, True, True]
    assert [world.is_same(2**40), world.is_same(world.rank)] == [True, False]
    if world.is_main:
        save_file(results, folder / "results.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_any_number_of_processes_has_the_gradients_and_sums_of_one(size: int, tmp_path: Path) -> None:
    run_processes(size, tmp_path, in_several)
    results = load_file(tmp_path / "results.safetensors")
    found = {name.removeprefix("gradient/"): value for name, value in results.items() if name.startswith("gradient/")}
    assert_close(found, expected_gradients(config()))
    whole = make_network(config()).eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.lerp_(0.5 * parameter, 0.5)
        torch.testing.assert_close(results["teacher"], loss_of(whole, 0, 2), rtol=1e-6, atol=0)
    largest = 1000 + math.log(sum(math.exp(rank) for rank in range(size)))
    expected = torch.tensor([-math.inf, largest, 2.0, -1000 + math.log(size), math.nan])
    torch.testing.assert_close(results["logsumexp"], expected, rtol=1e-6, atol=0, equal_nan=True)
    assert results["sum"].tolist() == [[size], [sum(range(size))]]


def test_one_process_sums_to_the_same_bits(alone: World) -> None:
    values = torch.tensor([-math.inf, -1000.0, 0.1, 1000.0, math.inf])
    assert torch.equal(alone.logsumexp(values), values)
    assert torch.equal(alone.sum(values), values)
    assert (alone.rank, alone.size, alone.is_main, alone.device) == (0, 1, True, torch.device("cpu"))


def test_a_sum_leaves_the_tensor_of_the_process_and_has_no_gradient(alone: World) -> None:
    tensor = torch.ones(3, requires_grad=True)
    for result in (alone.sum(tensor), alone.logsumexp(tensor)):
        assert result.data_ptr() != tensor.data_ptr()
        assert not result.requires_grad


@pytest.mark.slow
def test_a_group_of_our_own_ends_with_the_block_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    script = """
import torch.distributed as dist
from dinov2_fast.pretraining.parallel import start_processes
for _ in range(2):
    with start_processes("cpu"):
        assert dist.is_initialized()
    assert not dist.is_initialized()
try:
    with start_processes("cpu"):
        raise KeyError
except KeyError:
    assert not dist.is_initialized()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
with start_processes("cpu") as world:
    assert world.size == 1
assert dist.is_initialized()
"""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(("number", "gpus"), [("2", 2), (None, 0)])
def test_a_process_without_a_gpu_of_its_own_is_told_so(
    number: str | None, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if number is not None:
        monkeypatch.setenv("LOCAL_RANK", number)
    expected = f"needs the GPU {number or 0}, counted from 0, and this machine has {gpus}"
    with pytest.raises(InvalidStateError, match=expected), start_processes("cuda"):
        pass


def test_a_device_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidValueError, match="no device 'gpu'"), start_processes("gpu"):
        pass
