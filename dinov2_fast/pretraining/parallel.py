"""The processes of a run: how they start, what they compute together, and how they share a network (FSDP2).

One process and many run the same code. A parameter that is sharded has its rows (dimension 0) spread over the
processes, in the order of their ranks, each part as long as `torch.chunk` makes it. It is whole only inside
``Network.forward``; everywhere else, a process has its own rows, as a ``DTensor``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from dinov2_fast.environment import local_rank
from dinov2_fast.errors import InvalidStateError
from dinov2_fast.inference.loading import find_device
from dinov2_fast.pretraining.config import PretrainingConfig

PATIENCE = timedelta(days=7)  # NCCL gives up after ten minutes, and an evaluation may take longer


@dataclass(frozen=True)
class World:
    """The processes of a run. Each of them must call the methods in the same order.

    Attributes:
        rank: the number of this process, from 0.
        size: the number of processes.
        device: of this process.
        mesh: all processes, in one dimension.
        patient: all processes, for waits of any length.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    patient: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes what there is one of."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The elementwise sum over the processes, as a new tensor without gradient. All give the same shape."""
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.mesh.get_group())
        return total

    def logsumexp(self, tensor: Tensor) -> Tensor:
        """The logarithm of the sum over the processes of exp(tensor), elementwise, as a new tensor without gradient.

        It is computed relative to the largest value, so it does not overflow. Where all are -inf, it is -inf.
        """
        largest = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.mesh.get_group())
        shift = torch.where(largest.isfinite(), largest, 0.0)
        return self.sum((tensor - shift).exp()).log() + shift

    def agree(self, flag: bool) -> bool:
        """Whether the flag is set in any process. Returns when all processes have called it."""
        return bool(self.sum(torch.tensor(int(flag), device=self.device)))

    def is_same(self, number: int) -> bool:
        """Whether all processes give the same number. All get the same answer."""
        of_main = self.sum(torch.tensor(number if self.is_main else 0, device=self.device))
        return not self.agree(int(of_main) != number)

    def wait(self) -> None:
        """Returns when all processes have called it, after hours too."""
        dist.barrier(self.patient)


@contextmanager
def start_processes(device: str | None = None) -> Iterator[World]:
    """The processes that torchrun started, or a world of one. They exchange data by NCCL on GPUs and gloo on CPUs.

    A process group of torch.distributed that exists already is used and left as it is. Otherwise one is made, and
    destroyed at the end of the ``with`` block.

    Args:
        device: "cuda", "cpu" or another name; by default the GPU, or the CPU where there is none. Under torchrun each
            process takes the GPU of its ``LOCAL_RANK``.

    Raises:
        InvalidValueError: torch knows no such device.
        InvalidStateError: there is no GPU for this process.
    """
    number = local_rank()
    own_device = _own_device(find_device(device), number)
    if own_device.type == "cuda":
        torch.cuda.set_device(own_device)
    is_ours = not dist.is_initialized()
    if is_ours:
        backend = "nccl" if own_device.type == "cuda" else "gloo"
        if number is None:
            store = dist.HashStore()  # type: ignore[attr-defined]  # torch documents it without exporting it
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        else:
            dist.init_process_group(backend)  # it reads torchrun's variables itself
    size = dist.get_world_size()
    try:
        mesh, patient = init_device_mesh(own_device.type, (size,)), dist.new_group(backend="gloo", timeout=PATIENCE)
        yield World(dist.get_rank(), size, own_device, mesh, patient)
    except BaseException:
        # To leave a group waits for the others, who may wait for this process. With its exit, torchrun ends them.
        if is_ours and size == 1:
            dist.destroy_process_group()
        raise
    if is_ours:
        dist.destroy_process_group()


def _own_device(device: torch.device, number: int | None) -> torch.device:
    """The device of this process, of which `number` is the ``LOCAL_RANK``."""
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    index = device.index if number is None else number
    if number is None and device == torch.device("cuda"):
        index = torch.cuda.current_device() if count else 0
    if index >= count:
        raise InvalidStateError(
            f"This process needs the GPU {index}, counted from 0, and this machine has {count}. Start one process for "
            "each GPU at most (torchrun --nproc-per-node), or use device='cpu'."
        )
    return torch.device("cuda", index)


def shard(network: nn.Module, config: PretrainingConfig, world: World, *, trainable: bool) -> None:
    """Shards a :class:`.networks.Network` in place: each block, each head's last layer, each head, and the rest.

    With precision "bf16" parameters are cast to bf16 inside ``forward``, and gradients are averaged in fp32; the last
    layers of the heads stay in fp32, since their rows are normalised. Every process must give the same weights.

    Args:
        trainable: the student, whose whole parameters stay in memory until the backward pass, unless
            ``config.run.reshard_after_forward`` is set; a forward pass without a backward pass must not be followed by
            a change of its parameters. False: the teacher, which has no gradients; its whole parameters are freed after
            each forward pass, so that the next one sees what was done to the shards.
    """
    network.requires_grad_(trainable)
    policy = MixedPrecisionPolicy()
    if config.run.precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    reshard = config.run.reshard_after_forward if trainable else True
    parts: Any = network
    heads = [head for head in (parts.dino_head, parts.ibot_head) if head is not None]
    for head in heads:
        fully_shard(head.last_layer, mesh=world.mesh, reshard_after_forward=reshard)
    for module in (*parts.backbone.blocks, *heads):
        fully_shard(module, mesh=world.mesh, reshard_after_forward=reshard, mp_policy=policy)
    # The backward pass begins with the student's root, so its parameters are never freed in between.
    fully_shard(network, mesh=world.mesh, reshard_after_forward=not trainable, mp_policy=policy)


def sharded_parameters(network: nn.Module) -> dict[str, Any]:
    """The parameters by name, each a ``DTensor`` with the rows of this process. Whole ones in memory are freed."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return dict(network.named_parameters())
