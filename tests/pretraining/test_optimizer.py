"""AdamW of pretraining: which multipliers a parameter has, what a step does, and clipping."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dinov2_fast.configs import BACKBONES
from dinov2_fast.pretraining.config import PretrainingConfig
from dinov2_fast.pretraining.optimizer import clip_gradients, make_optimizer, parameter_groups, set_rates
from dinov2_fast.pretraining.schedules import Rates
from tests.helpers import reference_functions as reference

RATES = Rates(learning_rate=0.1, last_layer_learning_rate=0.05, weight_decay=0.5, momentum=0.9, temperature=0.07)


def config(depth: int, layer_decay: float = reference.LAYER_DECAY) -> PretrainingConfig:
    optimizer = {"layer_decay": layer_decay, "patch_embed_multiplier": reference.PATCH_EMBED_MULTIPLIER}
    return PretrainingConfig().updated({"model": {"depth": depth}, "optimizer": optimizer})


def multipliers(network: nn.Module, settings: PretrainingConfig) -> dict[str, list[Any]]:
    names = {parameter: name for name, parameter in network.named_parameters()}
    keys = ("learning_rate_multiplier", "weight_decay_multiplier", "is_last_layer")
    return {
        names[parameter]: [group[key] for key in keys]
        for group in parameter_groups(network, settings)
        for parameter in group["params"]
    }


def test_multipliers() -> None:
    """With three blocks and a layer decay of a half."""
    found = multipliers(reference.network(), config(reference.DEPTH, layer_decay=0.5))
    expected = {
        "backbone.cls_token": [1 / 16, 1, False],
        "backbone.pos_embed": [1 / 16, 1, False],
        "backbone.register_tokens": [1 / 16, 1, False],
        "backbone.mask_token": [1 / 16, 1, False],
        "backbone.patch_embed.proj.weight": [0.2 / 16, 1, False],
        "backbone.patch_embed.proj.bias": [0.2 / 16, 0, False],
        "backbone.blocks.0.norm1.weight": [1 / 8, 0, False],
        "backbone.blocks.0.attn.qkv.weight": [1 / 8, 1, False],
        "backbone.blocks.2.ls1.gamma": [1 / 2, 0, False],
        "backbone.blocks.2.mlp.fc1.bias": [1 / 2, 0, False],
        "backbone.norm.weight": [1, 0, False],
        "dino_head.mlp.0.weight": [1, 1, False],
        "ibot_head.mlp.0.bias": [1, 0, False],
        "dino_head.last_layer.weight_g": [1, 1, True],
        "ibot_head.last_layer.weight_v": [1, 1, True],
    }
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("chunks", reference.CHUNKS)
def test_multipliers_of_the_reference(chunks: int) -> None:
    found = multipliers(reference.network(block_chunks=chunks), config(reference.DEPTH))
    assert found == reference.load_golden()["multipliers"][str(chunks)]


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("chunks", [0, 4])
def test_multipliers_of_the_reference_beside_ours(name: str, chunks: int, request: pytest.FixtureRequest) -> None:
    param_groups = reference.reference_file(request, "utils/param_groups.py")
    arguments = {**BACKBONES[name].constructor_arguments(), "block_chunks": chunks}
    network = reference.network(**arguments)
    expected = reference.multipliers(param_groups, network)
    assert multipliers(network, config(arguments["depth"])) == expected


def test_groups_hold_each_trainable_parameter_once() -> None:
    network = reference.network()
    network["backbone"].norm.requires_grad_(False)
    groups = parameter_groups(network, config(reference.DEPTH))
    held = [parameter for group in groups for parameter in group["params"]]
    assert sorted(map(id, held)) == sorted(id(each) for each in network.parameters() if each.requires_grad)
    in_backbone = {id(parameter) for group in groups if group["is_backbone"] for parameter in group["params"]}
    assert in_backbone == {id(each) for each in network["backbone"].parameters() if each.requires_grad}


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(2, 2, dtype=torch.float64)
        self.last_layer = nn.Linear(2, 3, bias=False, dtype=torch.float64)


def small_network() -> nn.ModuleDict:
    """With a gradient of 2 everywhere: of 8 values in the backbone, of 12 in the head."""
    network = nn.ModuleDict({"backbone": nn.ModuleDict({"blocks": nn.ModuleList([Head()])}), "dino_head": Head()})
    del network["backbone"].blocks[0].mlp.bias
    network["backbone"].blocks[0].mlp.bias = None
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    return network


def values(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def test_steps_of_adamw() -> None:
    """Two steps of the formula of Loshchilov and Hutter, arXiv:1711.05101, with each group's own rates."""
    network, settings = (
        small_network(),
        config(depth=1, layer_decay=0.5).updated({"optimizer": {"beta1": 0.8, "beta2": 0.6}}),
    )
    optimizer, expected = make_optimizer(network, settings), values(network)
    first, second = 0.0, 0.0
    for step in (1, 2):
        set_rates(optimizer, RATES, freeze_backbone=False)
        for parameter in network.parameters():
            parameter.grad = torch.full_like(parameter, 2.0 * step)
        optimizer.step()
        first, second = 0.8 * first + 0.2 * 2.0 * step, 0.6 * second + 0.4 * (2.0 * step) ** 2
        update = first / (1 - 0.8**step) / (math.sqrt(second / (1 - 0.6**step)) + 1e-8)
        for name in expected:
            rate = (0.05 if "last_layer" in name else 0.1) * (0.5 if "backbone" in name else 1)
            decay = 0 if name.endswith("bias") else 0.5
            expected[name] = expected[name] * (1 - rate * decay) - rate * update
    found = values(network)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=0)


def test_frozen_parts_keep_their_bits() -> None:
    network, settings = small_network(), config(depth=1)
    optimizer, before = make_optimizer(network, settings), values(network)
    set_rates(optimizer, Rates(0.1, 0.0, 0.5, 0.9, 0.07), freeze_backbone=True)
    optimizer.step()
    changed = {name for name, value in values(network).items() if not torch.equal(value, before[name])}
    assert changed == {"dino_head.mlp.weight", "dino_head.mlp.bias"}


def sharded(network: nn.ModuleDict) -> nn.ModuleDict:
    """The same with parameters and gradients as FSDP2 holds them, in a mesh of one process."""
    mesh = init_device_mesh("cpu", (1,))
    for module in list(network.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            replaced = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)]))
            assert parameter.grad is not None
            replaced.grad = distribute_tensor(parameter.grad, mesh, [Shard(0)])
            module.register_parameter(name, replaced)
    return network


@pytest.fixture(params=["plain", "sharded"])
def network(request: pytest.FixtureRequest) -> Iterator[nn.ModuleDict]:
    if request.param == "plain":
        yield small_network()
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield sharded(small_network())
    finally:
        dist.destroy_process_group()


def gradients(network: nn.Module) -> dict[str, float]:
    """The gradient of each parameter, whose elements are equal."""
    found = {}
    for name, parameter in network.named_parameters():
        gradient = parameter.grad
        assert gradient is not None
        whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        assert (whole == whole.flatten()[0]).all()
        found[name] = whole.flatten()[0].item()
    return found


def test_each_part_is_clipped_by_its_own_norm(network: nn.ModuleDict) -> None:
    """The backbone has 10 gradients of 2, the head 12."""
    norms = clip_gradients(network, 6.5)
    assert {name: float(norm) for name, norm in norms.items()} == pytest.approx(
        {"backbone": math.sqrt(40), "dino_head": math.sqrt(48)}
    )
    assert all(type(norm) is torch.Tensor and norm.shape == () for norm in norms.values())
    clipped = 2 * 6.5 / math.sqrt(48)  # the backbone's norm is below the limit
    expected = {name: 2.0 if name.startswith("backbone") else clipped for name in gradients(network)}
    assert gradients(network) == pytest.approx(expected, rel=1e-6)


def test_nothing_is_clipped_at_0(network: nn.ModuleDict) -> None:
    norms = clip_gradients(network, 0.0)
    assert float(norms["dino_head"]) == pytest.approx(math.sqrt(48))
    assert set(gradients(network).values()) == {2.0}


def test_a_step_on_sharded_parameters_equals_one_on_plain_ones(network: nn.ModuleDict) -> None:
    torch.manual_seed(1)
    for parameter in network.parameters():
        parameter.data.fill_(0.25)
    optimizer = make_optimizer(network, config(depth=1))
    set_rates(optimizer, RATES, freeze_backbone=False)
    optimizer.step()
    moved = network["dino_head"].mlp.weight.detach()
    moved = moved.full_tensor() if isinstance(moved, DTensor) else moved
    torch.testing.assert_close(moved, torch.full_like(moved, 0.25 * (1 - 0.1 * 0.5) - 0.1), rtol=1e-7, atol=0)
