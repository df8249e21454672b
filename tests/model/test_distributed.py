"""DDP and FSDP2 on two processes (gloo, CPU): the gradients of one process, and a state dict that loads back."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.small_models import small

WORLD = 2


def _model(chunks: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return small(num_register_tokens=2, block_chunks=chunks).train()


def _batch() -> torch.Tensor:
    return torch.randn(WORLD, 3, 42, 56, generator=torch.Generator().manual_seed(1))


def _loss(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x, is_training=True)["x_norm_patchtokens"].pow(2).mean()


def _train(rank: int, kind: str, chunks: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    model = _model(chunks)
    if kind == "ddp":
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    else:
        mesh = init_device_mesh("cpu", (WORLD,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    _loss(wrapped, _batch()[rank : rank + 1]).backward()
    optimizer.step()
    if kind == "ddp":
        state = wrapped.state_dict()  # keys with "module.", as users save them
    else:
        state = get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save(state, f"{folder}/state.pth")
    # A process that leaves while the other is still in a collective aborts it, so both wait, by files, until both are
    # done. Then they leave without the interpreter's teardown, in which gloo's threads have aborted.
    store.set(f"done{rank}", "")
    store.wait([f"done{other}" for other in range(WORLD)])
    os._exit(0)


@pytest.mark.parametrize("chunks", [0, 3])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_step_on_two_processes_is_the_step_on_one(kind: str, chunks: int, tmp_path) -> None:
    mp.spawn(_train, (kind, chunks, str(tmp_path)), nprocs=WORLD)
    expected = _model(chunks)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    _loss(expected, _batch()).backward()
    optimizer.step()
    trained = _model(0 if chunks else 3)  # loads into a model chunked otherwise
    trained.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    for (name, ours), theirs in zip(trained.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
