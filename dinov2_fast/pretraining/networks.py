"""What one step of DINOv2's pretraining computes (Oquab et al., arXiv:2304.07193, section 4).

An image is cut into two global crops A and B and several local crops. The teacher sees A and B whole. The student sees
all crops, and half of its global crops have masked patches. A head turns a token into a distribution over prototypes:

    DINO    the class token of each crop predicts the teacher's distribution for the class token of A, and of B, but
            not that of its own crop
    iBOT    a masked patch predicts the teacher's distribution for the same patch
    KoLeo   the class tokens of different images keep a distance

The teacher's distributions, the targets, are balanced over the batch. Gradients train the student, and the teacher is
the exponential moving average of the student.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dinov2_fast.ops.prototype_loss import Targets
from dinov2_fast.pretraining.backbone import make_backbone
from dinov2_fast.pretraining.config import PretrainingConfig
from dinov2_fast.pretraining.heads import DinoHead
from dinov2_fast.pretraining.losses import dino_losses, ibot_loss, koleo_loss
from dinov2_fast.pretraining.parallel import World
from dinov2_fast.pretraining.targets import centered_targets, sinkhorn_targets, updated_center


@dataclass(frozen=True)
class Views:
    """What is seen of some images. Crops are normalised, in the precision of the run.

    Attributes:
        global_crops: (2, images, 3, size, size).
        local_crops: (n_local, images, 3, smaller size, smaller size).
        masks: (2, images, patches) bool, the masked patches of the global crops.
        masked: (masked,) int64, the indices of the masked patches in the flattened `masks`.
        mask_weights: (masked,) fp32, 1 / the number of masked patches of the patch's crop.
    """

    global_crops: Tensor
    local_crops: Tensor
    masks: Tensor
    masked: Tensor
    mask_weights: Tensor

    @property
    def n_images(self) -> int:
        return self.global_crops.shape[1]


class Projections(NamedTuple):
    """The outputs of a network for some images: tokens after the heads, and the prototypes of the heads."""

    cls_before_head: Tensor  # (2, images, hidden), of the global crops
    cls: Tensor  # (crops, images, bottleneck): the global crops, then the local ones
    cls_prototypes: Tensor  # (K, bottleneck)
    patches: Tensor  # (masked, bottleneck)
    patch_prototypes: Tensor


class StepTargets(NamedTuple):
    """The targets of some images."""

    cls: Targets  # (2, images)
    patches: Targets  # (1, masked)

    def split(self, views: list[Views]) -> list[StepTargets]:
        """The targets of each part of the images."""
        cls = _split(self.cls, [each.n_images for each in views])
        patches = _split(self.patches, [len(each.masked) for each in views])
        return [StepTargets(*both) for both in zip(cls, patches, strict=True)]


class Network(nn.Module):
    """A backbone with its heads: the student or the teacher. Without `ibot_head` both losses share `dino_head`."""

    def __init__(self, config: PretrainingConfig) -> None:
        super().__init__()
        self.backbone = make_backbone(config)
        self.dino_head = DinoHead(config.model.hidden_size, config.dino_head)
        self.ibot_head = None if config.ibot_head is None else DinoHead(config.model.hidden_size, config.ibot_head)

    def forward(
        self, global_crops: Tensor, local_crops: Tensor | None, masks: Tensor | None, masked: Tensor
    ) -> Projections:
        """All crops in one packed pass. See `Views` for the shapes; `masks` hides patches, `masked` chooses them."""
        crops, hidden = [global_crops.flatten(0, 1)], [None if masks is None else masks.flatten(0, 1)]
        if local_crops is not None and local_crops.shape[0]:
            crops, hidden = [*crops, local_crops.flatten(0, 1)], [*hidden, None]
        features = self.backbone.forward_features(crops, hidden)
        cls = torch.cat([each["x_norm_clstoken"] for each in features])
        patches = features[0]["x_norm_patchtokens"].flatten(0, 1).index_select(0, masked)
        if self.ibot_head is None:
            tokens, cls_prototypes = self.dino_head(torch.cat((cls, patches)))
            cls_tokens, patch_tokens = tokens.split([len(cls), len(patches)])
            patch_prototypes = cls_prototypes
        else:
            cls_tokens, cls_prototypes = self.dino_head(cls)
            patch_tokens, patch_prototypes = self.ibot_head(patches)
        n_images = global_crops.shape[1]
        return Projections(
            cls[: 2 * n_images].unflatten(0, (2, n_images)),
            cls_tokens.unflatten(0, (-1, n_images)),
            cls_prototypes,
            patch_tokens,
            patch_prototypes,
        )


class Pretraining:
    """Student, teacher and what they compute in a step. `world` combines what the processes compute."""

    def __init__(self, student: Network, teacher: Network, config: PretrainingConfig, world: World) -> None:
        self.student, self.teacher, self.config, self.world = student.train(), teacher.eval(), config, world
        heads = (config.dino_head, config.ibot_head or config.dino_head)
        self.centers = [torch.zeros(head.prototypes, device=world.device) for head in heads]

    @torch.no_grad()
    def targets(self, views: list[Views], temperature: float) -> tuple[StepTargets, list[Tensor]]:
        """The targets of a whole batch, which is given in parts, and the centres for the next step."""
        parts = [self.teacher(each.global_crops, None, None, each.masked) for each in views]
        cls = torch.cat([each.cls for each in parts], dim=1)
        patches = torch.cat([each.patches for each in parts])[None]
        cls_targets, cls_center = self._balance(cls, parts[0].cls_prototypes, temperature, self.centers[0])
        patch_targets, patch_center = self._balance(patches, parts[0].patch_prototypes, temperature, self.centers[1])
        return StepTargets(cls_targets, patch_targets), [cls_center, patch_center]

    def _balance(self, z: Tensor, prototypes: Tensor, temperature: float, center: Tensor) -> tuple[Targets, Tensor]:
        """The targets of tokens, and the centre for the next step."""
        if self.config.losses.centering == "sinkhorn_knopp":
            return sinkhorn_targets(z, prototypes, temperature, self.world.logsumexp), center
        targets = centered_targets(z, prototypes, temperature, center)
        momentum = self.config.losses.center_momentum
        return targets, updated_center(center, z, prototypes, momentum, self.world.sum)

    def losses(self, views: Views, targets: StepTargets) -> dict[str, Tensor]:
        """The losses of a part of the batch: "loss", which is trained, and the unweighted parts that it is made of."""
        weights, temperature = self.config.losses, self.config.losses.student_temperature
        outputs = self.student(views.global_crops, views.local_crops, views.masks, views.masked)
        dino_global, dino_local = dino_losses(outputs.cls, outputs.cls_prototypes, targets.cls, temperature)
        ibot = ibot_loss(
            outputs.patches,
            outputs.patch_prototypes,
            targets.patches,
            views.mask_weights,
            2 * views.n_images,
            temperature,
        )
        group = self.config.koleo_group
        koleo = koleo_loss(outputs.cls_before_head.unflatten(1, (-1, group)).flatten(0, 1)) * group / views.n_images
        loss = weights.dino * (dino_global + dino_local) + weights.ibot * ibot + weights.koleo * koleo
        return {"loss": loss, "dino_global": dino_global, "dino_local": dino_local, "ibot": ibot, "koleo": koleo}

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student, for each parameter."""
        average = get_ema_multi_avg_fn(momentum)
        average(_own_parts(self.teacher), _own_parts(self.student), None)


def _split(targets: Targets, sizes: list[int]) -> list[Targets]:
    parts = zip(targets.z.split(sizes, dim=1), targets.b.split(sizes, dim=1), strict=True)
    return [targets._replace(z=z, b=b) for z, b in parts]


def _own_parts(network: Network) -> list[Tensor]:
    """The parameters, or of sharded ones the part of this process."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in network.parameters()]
