"""The teacher's targets: for each token a distribution over the prototypes, in the form of `Targets`.

    y_ik = z_i w_k / T                      logits of token i and prototype k at temperature T
    t_ik = exp(y_ik - a_k - b_i)            target; it sums to 1 over k

Targets are kept as the vectors a and b, not as a matrix. Both ways to make them differ in a, which balances the use of
the prototypes: by Sinkhorn-Knopp over all tokens of the batch, or by a centre, the mean logits of earlier batches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dinov2_fast import ops
from dinov2_fast.ops.prototype_loss import Targets

CHUNK_ELEMENTS = 1 << 24  # of targets that are in memory at once

Reduce = Callable[[Tensor], Tensor]  # combines the tensors of all processes


def sinkhorn_targets(z: Tensor, prototypes: Tensor, temperature: float, log_sum_exp: Reduce) -> Targets:
    """Targets of which each prototype gets nearly the same share: three iterations of Sinkhorn-Knopp in the log domain.

    Source: Caron et al., arXiv:2006.09882 (SwAV); facebookresearch/dinov2, dinov2/loss/dino_clstoken_loss.py.

    Args:
        z: (crops, tokens, bottleneck), the teacher's, of this process; there may be none.
        prototypes: (K, bottleneck), the teacher's.
        temperature: of the teacher.
        log_sum_exp: log(sum over processes of exp(x)), elementwise.
    """
    a, b = ops.sinkhorn(z.flatten(0, 1), prototypes, temperature, reduce=log_sum_exp)
    return Targets(z, prototypes, a, b.view(z.shape[:2]), temperature)


def centered_targets(z: Tensor, prototypes: Tensor, temperature: float, center: Tensor) -> Targets:
    """The softmax of (logits - center) / temperature.

    Source: Caron et al., arXiv:2104.14294 (DINO), section 3.1.

    Args:
        z, prototypes, temperature: as for `sinkhorn_targets`.
        center: (K,) fp32, of `updated_center`.
    """
    a = center / temperature
    _, b = ops.sinkhorn(z.flatten(0, 1), prototypes, temperature, a=a)
    return Targets(z, prototypes, a, b.view(z.shape[:2]), temperature)


def updated_center(center: Tensor, z: Tensor, prototypes: Tensor, momentum: float, total: Reduce) -> Tensor:
    """The centre after a batch: momentum * center + (1 - momentum) * mean logits, without temperature.

    The mean of z w^T is the mean of z times w^T, so the logits are not computed. The mean is over the tokens of all
    processes; without any token the centre stays as it is.

    Args:
        center: (K,) fp32, before the batch.
        z, prototypes: as for `sinkhorn_targets`.
        total: the sum over processes, elementwise.
    """
    tokens = z.flatten(0, 1).float()
    sums = total(torch.cat((tokens.sum(dim=0), tokens.new_full((1,), tokens.shape[0]))))
    mean = sums[:-1] / sums[-1].clamp(min=1)
    moved = center * momentum + (prototypes.float() @ mean) * (1 - momentum)
    return torch.where(sums[-1] > 0, moved, center)


def target_entropies(targets: Targets, total: Reduce) -> tuple[Tensor, Tensor]:
    """How sharp targets are, and how evenly they use the prototypes.

    Args:
        targets: of this process.
        total: the sum over processes, elementwise.

    Returns:
        Two scalars in nats: the mean entropy of a token's target, and the entropy of the mean target. The second is
        ln K if all prototypes are used alike, and 0 if all tokens have the same one.
    """
    prototypes = targets.prototypes.float()
    entropy, mean, count = prototypes.new_zeros(1), prototypes.new_zeros(len(prototypes)), prototypes.new_zeros(1)
    chunk = max(CHUNK_ELEMENTS // len(prototypes), 1)  # tokens
    for z, b in zip(targets.z.flatten(0, 1).split(chunk), targets.b.flatten().split(chunk), strict=True):
        log_target = z.float() @ prototypes.T / targets.temperature - targets.a - b[:, None]
        target = log_target.exp()
        entropy -= (target * log_target).sum()
        mean += target.sum(dim=0)
        count += len(z)
    entropy, count, mean = total(torch.cat((entropy, count, mean))).split([1, 1, len(mean)])
    mean = mean / count.clamp(min=1)
    return entropy[0] / count[0].clamp(min=1), -(mean * mean.clamp(min=1e-30).log()).sum()
