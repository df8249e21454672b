"""The losses of DINOv2, as functions of tokens and targets (Oquab et al., arXiv:2304.07193, section 4).

They equal those of the reference (facebookresearch/dinov2, dinov2/loss and dinov2/train/ssl_meta_arch.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_fast import ops
from dinov2_fast.ops.prototype_loss import Targets


def dino_losses(cls: Tensor, prototypes: Tensor, targets: Targets, temperature: float) -> tuple[Tensor, Tensor]:
    """DINO's loss of the global crops, and of the local crops: the image's class token predicts that of another crop.

        global = (CE(t_B, A) + CE(t_A, B)) / n         A and B are the two global crops, t_A and t_B their targets
        local  = sum over local crops l of (CE(t_A, l) + CE(t_B, l)) / n
        n = 2 + 2 n_local, the number of terms; as in the reference 3 if there are no local crops

    Args:
        cls: (2 + n_local, images, bottleneck), the student's: A, B, then the local crops.
        prototypes: (K, bottleneck), the student's.
        targets: of A and B.
        temperature: of the student.

    Returns:
        Two scalars in fp32, means over the images. At uniform outputs their sum is ln K, or two thirds of it if there
        are no local crops.
    """
    pairing = torch.ones(cls.shape[0], 2, device=cls.device)
    pairing[:2].fill_diagonal_(0)  # A learns from B, and B from A
    losses = ops.prototype_loss(cls, prototypes, targets, pairing, temperature=temperature).mean(dim=1)
    terms = 2 + max(2 * (cls.shape[0] - 2), 1)
    return losses[:2].sum() / terms, losses[2:].sum() / terms


def ibot_loss(
    patches: Tensor, prototypes: Tensor, targets: Targets, weights: Tensor, n_crops: int, temperature: float
) -> Tensor:
    """iBOT's loss: the masked patches of a crop predict what the teacher sees in their place.

        loss = 1 / n_crops sum over crops of the mean of CE over the masked patches of the crop

    As in the reference, crops without a mask count in `n_crops`: if half of the crops are masked, the weight is half.

    Args:
        patches: (masked, bottleneck), the student's masked patches of all crops.
        prototypes: (K, bottleneck), the student's.
        targets: of the same patches, (1, masked, …).
        weights: (masked,), 1 / the number of masked patches of the patch's crop.
        n_crops: the number of global crops, both of each image.
        temperature: of the student.

    Returns:
        A scalar in fp32. It is 0 if nothing is masked.
    """
    pairing = torch.ones(1, 1, device=patches.device)
    losses = ops.prototype_loss(patches[None], prototypes, targets, pairing, temperature=temperature)
    return (losses[0] * weights).sum() / n_crops


def koleo_loss(cls: Tensor) -> Tensor:
    """KoLeo: pushes each image away from the image that is nearest to it.

        loss = -mean_i log(|x_i - x_j(i)| + eps)       x is normalised, j(i) is the nearest neighbour of i

    Computed in fp32, because duplicates give infinite gradients in fp16. A single image has no neighbour and a loss of
    0. Source: Sablayrolles et al., arXiv:1806.03198.

    Args:
        cls: (crops, images, hidden), class tokens before the head. Images are compared within a crop.

    Returns:
        A scalar in fp32, the sum over the crops.
    """
    if cls.shape[1] < 2:
        return cls.new_zeros((), dtype=torch.float32)
    with torch.autocast(cls.device.type, enabled=False):
        x = F.normalize(cls.float(), dim=-1, eps=1e-8)
        with torch.no_grad():
            similarity = x @ x.mT
            similarity.diagonal(dim1=1, dim2=2).fill_(-1)
            nearest = similarity.argmax(dim=2, keepdim=True)
        neighbour = x.gather(1, nearest.expand_as(x))
        distance = F.pairwise_distance(x, neighbour, eps=1e-8)
        return -(distance + 1e-8).log().mean(dim=1).sum()
