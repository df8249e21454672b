"""Pretraining as people write it without a framework: timm's ViT, two forward passes, dense losses.

Global and local crops go through the student one after the other. A dropped image is computed and multiplied by zero.
Logits, targets and Sinkhorn-Knopp are matrices of tokens x prototypes. In bf16 everything runs under autocast.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import dinov2_fast
from bench.pretraining_batch import Batch
from bench.records import version
from dinov2_fast.pretraining.config import HeadConfig, PretrainingConfig

MISSING = None if version("timm") else "timm is not installed"


class PlainNetwork(nn.Module):
    """A backbone of timm with its heads."""

    def __init__(self, config: PretrainingConfig, drop_path: float) -> None:
        super().__init__()
        from timm.layers.drop import DropPath
        from timm.models.vision_transformer import VisionTransformer

        model = config.model
        self.backbone = VisionTransformer(
            img_size=config.crops.global_size,
            patch_size=model.patch_size,
            embed_dim=model.hidden_size,
            depth=model.depth,
            num_heads=model.num_heads,
            init_values=model.layer_scale,
            num_classes=0,
            global_pool="",
            dynamic_img_size=True,
        )
        for block in self.backbone.blocks:
            block.drop_path1, block.drop_path2 = DropPath(drop_path), DropPath(drop_path)
        self.backbone.mask_token = nn.Parameter(torch.zeros(1, model.hidden_size))
        self.dino_head = PlainHead(model.hidden_size, config.dino_head)
        self.ibot_head = PlainHead(model.hidden_size, config.ibot_head) if config.ibot_head else self.dino_head

    def forward(self, crops: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Class tokens and patch tokens of crops (crops, images, 3, size, size), before the heads."""
        vit: Any = self.backbone
        x = vit.patch_embed(crops.flatten(0, 1))  # (n, rows, columns, hidden)
        if masks is not None:
            x = torch.where(masks.view(*x.shape[:3], 1), vit.mask_token.to(x.dtype), x)
        x = vit.norm(vit.blocks(vit._pos_embed(x)))
        return x[:, 0], x[:, 1:]

    def load(self, weights: dict[str, Tensor]) -> None:
        """Takes the weights of our network."""
        own: dict[str, Tensor] = {}
        backbone = {key.removeprefix("backbone."): value for key, value in weights.items() if "_head." not in key}
        own |= {f"backbone.{k}": v for k, v in dinov2_fast.convert_state_dict(backbone, to="timm").items()}
        own["backbone.mask_token"] = backbone["mask_token"]
        for key, value in weights.items():
            if "_head." in key:
                for ours, theirs in (("weight_g", "original0"), ("weight_v", "original1")):
                    key = key.replace(f"last_layer.{ours}", f"last_layer.parametrizations.weight.{theirs}")
                own[key] = value
        if "ibot_head.mlp.0.weight" not in own:
            own |= {key.replace("dino_head.", "ibot_head."): v for key, v in own.items() if "dino_head." in key}
        self.load_state_dict(own)


class PlainHead(nn.Module):
    """Tokens to logits."""

    def __init__(self, hidden: int, config: HeadConfig) -> None:
        super().__init__()
        sizes = [hidden, *[config.hidden_size] * (config.layers - 1), config.bottleneck_size]
        linears = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
        self.mlp = nn.Sequential(linears[0], *(module for linear in linears[1:] for module in (nn.GELU(), linear)))
        self.last_layer = weight_norm(nn.Linear(config.bottleneck_size, config.prototypes, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class PlainStep:
    """Steps on a batch. A call does one and returns its losses and the norms of its gradients."""

    def __init__(self, config: PretrainingConfig, weights: dict[str, Tensor], batch: Batch) -> None:
        self.config, self.batch, device = config, batch, batch.device
        self.student, self.teacher = PlainNetwork(config, config.model.drop_path), PlainNetwork(config, 0.0)
        for network in (self.student, self.teacher):
            network.load(weights)
            network.to(device)
        self.teacher.eval().requires_grad_(False)
        rates, parameters = batch.rates, list(self.student.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": rates.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=rates.learning_rate, fused=device.type == "cuda")
        self.centers = [torch.zeros(head.last_layer.out_features, device=device) for head in self._heads(self.teacher)]

    def __call__(self) -> dict[str, Any]:
        in_bf16 = self.config.run.precision == "bf16"
        with torch.autocast(self.batch.device.type, torch.bfloat16) if in_bf16 else contextlib.nullcontext():
            losses = self._losses()
        weights = self.config.losses
        loss = weights.dino * (losses["dino_global"] + losses["dino_local"])
        loss = loss + weights.ibot * losses["ibot"] + weights.koleo * losses["koleo"]
        loss.backward()
        for name, part in self.student.named_children():
            norm = nn.utils.clip_grad_norm_(part.parameters(), self.config.optimizer.clip_norm)
            losses[f"gradient_norm/{name}"] = norm
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            momentum = self.batch.rates.momentum
            for theirs, own in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                theirs.mul_(momentum).add_(own, alpha=1 - momentum)
        return {name: loss.item() for name, loss in losses.items()}

    def _losses(self) -> dict[str, Tensor]:
        batch, student = self.batch, self.student
        cls_targets, patch_targets = self._targets()
        cls, patches = student(batch.global_crops, batch.masks)
        cls_logits = student.dino_head(cls) / 0.1
        patch_logits = student.ibot_head(patches.flatten(0, 1)[batch.masked]) / 0.1
        local_cls, _ = student(batch.local_crops)
        local_logits = student.dino_head(local_cls) / 0.1
        n_local = len(batch.local_crops)
        terms = 2 + 2 * n_local
        targets, own = cls_targets.chunk(2), cls_logits.chunk(2)
        crossed = cross_entropy(targets[1], own[0]).mean() + cross_entropy(targets[0], own[1]).mean()
        local = [cross_entropy(t, s).mean() for s in local_logits.chunk(n_local) for t in targets]
        ibot = (cross_entropy(patch_targets, patch_logits) * batch.mask_weights).sum() / len(cls)
        return {
            "dino_global": crossed / terms,
            "dino_local": torch.stack(local).sum() / terms,
            "ibot": ibot,
            "koleo": sum((koleo(crop) for crop in cls.chunk(2)), torch.zeros((), device=cls.device)),
        }

    @torch.no_grad()
    def _targets(self) -> tuple[Tensor, Tensor]:
        cls, patches = self.teacher(self.batch.global_crops)
        heads = self._heads(self.teacher)
        inputs = (cls, patches.flatten(0, 1)[self.batch.masked])
        logits = [head(tokens).float() for head, tokens in zip(heads, inputs, strict=True)]
        temperature, losses = self.batch.rates.temperature, self.config.losses
        if losses.centering == "sinkhorn_knopp":
            return sinkhorn_knopp(logits[0], temperature), sinkhorn_knopp(logits[1], temperature)
        targets = [((y - c) / temperature).softmax(dim=-1) for y, c in zip(logits, self.centers, strict=True)]
        for center, y in zip(self.centers, logits, strict=True):
            center.lerp_(y.mean(dim=0), 1 - losses.center_momentum)
        return targets[0], targets[1]

    @staticmethod
    def _heads(network: PlainNetwork) -> tuple[PlainHead, PlainHead]:
        return network.dino_head, network.ibot_head


def cross_entropy(targets: Tensor, logits: Tensor) -> Tensor:
    """(tokens,) of targets and logits (tokens, prototypes)."""
    return -(targets * F.log_softmax(logits, dim=-1)).sum(dim=-1)


def sinkhorn_knopp(logits: Tensor, temperature: float) -> Tensor:
    """Three iterations of Sinkhorn-Knopp on a matrix of tokens x prototypes."""
    q = (logits / temperature).exp().T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(dim=1, keepdim=True) * len(q)
        q /= q.sum(dim=0, keepdim=True) * q.shape[1]
    return (q * q.shape[1]).T


def koleo(cls: Tensor) -> Tensor:
    """KoLeo of the class tokens of one crop."""
    with torch.autocast(cls.device.type, enabled=False):
        x = F.normalize(cls.float(), dim=-1)
        nearest = (x @ x.T).fill_diagonal_(-1).argmax(dim=1)
        return -(F.pairwise_distance(x, x[nearest], eps=1e-8) + 1e-8).log().mean()
