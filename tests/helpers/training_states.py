"""Student, teacher and optimizer of a run, with weights and moments that a test can tell apart."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dinov2_fast.pretraining.config import PretrainingConfig
from dinov2_fast.pretraining.networks import Network
from dinov2_fast.pretraining.parallel import World, shard, sharded_parameters


class TrainingState(NamedTuple):
    """What a checkpoint holds."""

    student: Network
    teacher: Network
    optimizer: torch.optim.AdamW
    centers: dict[str, Tensor]

    def whole(self) -> dict[str, Tensor]:
        """All tensors by kind and name. All processes take part."""
        parameters = sharded_parameters(self.student)
        found = {f"student/{name}": parameter.full_tensor() for name, parameter in parameters.items()}
        teacher = sharded_parameters(self.teacher)
        found |= {f"teacher/{name}": parameter.full_tensor() for name, parameter in teacher.items()}
        found |= {f"centers/{name}": center for name, center in self.centers.items()}
        for name, parameter in parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"optimizer/{name}.{key}"] = value.full_tensor() if value.ndim else value
        return {name: tensor.detach().clone() for name, tensor in found.items()}

    def step(self) -> None:
        """A step of the optimizer, with gradients that depend on the parameters, and one of the teacher."""
        for name, parameter in self.student.named_parameters():
            if name != "backbone.mask_token":  # so that the optimizer knows nothing of one parameter
                parameter.grad = parameter.detach().sin()
        self.optimizer.step()
        with torch.no_grad():
            for own, other in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                own.to_local().lerp_(other.to_local(), 0.3)  # type: ignore[attr-defined]


def make_state(
    config: PretrainingConfig, world: World, *, seed: int, steps: int, is_reversed: bool = False
) -> TrainingState:
    """A state after some steps. `is_reversed`: the optimizer has the parameters in the opposite order."""
    torch.manual_seed(seed)
    student, teacher = Network(config), Network(config)
    with torch.no_grad():
        for network in (student, teacher):
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            shard(network.eval(), config, world, trainable=network is student)
    parameters = list(student.parameters())
    optimizer = torch.optim.AdamW(parameters[::-1] if is_reversed else parameters, lr=0.01)
    centers = {
        "dino": torch.randn(config.dino_head.prototypes),
        "ibot": torch.randn((config.ibot_head or config.dino_head).prototypes),
    }
    state = TrainingState(student, teacher, optimizer, centers)
    for _ in range(steps):
        state.step()
    return state
