"""`DinoHead`: the projection head of DINO and iBOT. Its last layer is a table of prototypes.

    z = normalize(mlp(x))                 (tokens, bottleneck)
    w_k = g_k v_k / |v_k|                 (prototypes, bottleneck)
    logits = z w^T                        (tokens, prototypes), never stored: losses and targets take z and w

The keys of the state dict are the reference's (facebookresearch/dinov2, dinov2/layers/dino_head.py).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_fast.layers import GELU
from dinov2_fast.pretraining.config import HeadConfig


class DinoHead(nn.Module):
    """A head for tokens of `hidden_size` channels."""

    def __init__(self, hidden_size: int, config: HeadConfig) -> None:
        super().__init__()
        self.mlp = _mlp(hidden_size, config)
        self.last_layer = Prototypes(config.bottleneck_size, config.prototypes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens z (tokens, bottleneck), and the prototypes w (prototypes, bottleneck), in the dtype of `x`."""
        z = F.normalize(self.mlp(x).float(), dim=-1, eps=1e-12)
        return z.to(x.dtype), self.last_layer().to(x.dtype)


class Prototypes(nn.Module):
    """The prototypes in the form of weight normalisation: a direction v and a length g, which is trained too."""

    def __init__(self, bottleneck_size: int, prototypes: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1))
        self.weight_v = nn.Parameter(nn.Linear(bottleneck_size, prototypes, bias=False).weight.detach())

    def forward(self) -> Tensor:
        """(prototypes, bottleneck), in the dtype of the parameters."""
        return self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))


def _mlp(hidden_size: int, config: HeadConfig) -> nn.Module:
    """Linears with a GELU between each two, from `hidden_size` channels to the bottleneck."""
    sizes = [hidden_size, *[config.hidden_size] * (config.layers - 1), config.bottleneck_size]
    linears = [nn.Linear(size, following) for size, following in pairwise(sizes)]
    for linear in linears:
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
    if len(linears) == 1:
        return linears[0]  # the reference's key is then mlp.weight
    return nn.Sequential(linears[0], *[module for linear in linears[1:] for module in (GELU(), linear)])
