"""FSDP2 on two processes (gloo, CPU): the step of a sharded accelerated model is the untouched one's on one process."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dinov2_fast import accelerate, accelerated, restore
from tests.helpers.library_models import filled, images, timm_model

WORLD = 2


def _model() -> nn.Module:
    return filled(timm_model("vit_small_patch14_dinov2")).train()


def _step(model: nn.Module, x: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).pow(2).mean().backward()
    optimizer.step()


def _train(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    model = accelerate(_model())
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    _step(model, images(WORLD)[rank : rank + 1])
    try:
        restore(model)
    except ValueError as error:
        refusal = str(error)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save({"state": state, "report": str(accelerated(model)), "refusal": refusal}, f"{folder}/result.pth")
    # As in test_distributed: both wait until both are done, and leave without the interpreter's teardown.
    store.set(f"done{rank}", "")
    store.wait([f"done{other}" for other in range(WORLD)])
    os._exit(0)


def test_a_sharded_step_is_the_step_of_the_untouched_model(tmp_path) -> None:
    pytest.importorskip("timm")
    mp.spawn(_train, (str(tmp_path),), nprocs=WORLD)
    result = torch.load(tmp_path / "result.pth", weights_only=True)
    expected = _model()
    _step(expected, images(WORLD))
    assert list(result["state"]) == list(expected.state_dict())
    for name, wanted in expected.state_dict().items():
        torch.testing.assert_close(
            result["state"][name], wanted, atol=1e-6, rtol=1e-5, msg=lambda t, n=name: f"{n}: {t}"
        )
    assert result["report"].startswith("blocks: 2 of 2 ")
    assert "FSDPBlock was made of an accelerated class" in result["refusal"]
