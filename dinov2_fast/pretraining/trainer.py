"""`Trainer`: the state of a run, and one step: targets, losses, gradients, optimizer, teacher.

A step depends on the state before it, the images of its positions and (seed, step) alone. So a run that is resumed has
the bits of one that was not, and the number of processes changes nothing but the order of sums.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2_fast.errors import Dinov2FastError
from dinov2_fast.inference.plan import PRECISIONS
from dinov2_fast.pretraining import checkpoint
from dinov2_fast.pretraining.batches import CropBatch
from dinov2_fast.pretraining.colours import apply_colours
from dinov2_fast.pretraining.config import PretrainingConfig
from dinov2_fast.pretraining.masks import batch_masks, masked_patches
from dinov2_fast.pretraining.networks import Pretraining, StepTargets, Views
from dinov2_fast.pretraining.optimizer import clip_gradients, make_optimizer, set_rates
from dinov2_fast.pretraining.order import mix
from dinov2_fast.pretraining.parallel import World, shard
from dinov2_fast.pretraining.schedules import rates_at
from dinov2_fast.pretraining.start import make_networks
from dinov2_fast.pretraining.targets import target_entropies

SKIPPED_TO_STOP = 3  # steps in a row


class DivergedError(Dinov2FastError, RuntimeError):
    """The loss or a gradient was not finite in several steps in a row."""


class Trainer:
    """Networks, optimizer and the number of steps that are done.

    Args:
        folder: of the checkpoints.
        newest: the one to continue from, if there is one.
        config, world: of the run.
        start_from: see :func:`.run.pretrain`.
    """

    def __init__(
        self,
        folder: Path,
        newest: Path | None,
        config: PretrainingConfig,
        world: World,
        start_from: str | os.PathLike[str] | None = None,
    ) -> None:
        self.folder, self.config, self.world = folder, config, world
        student, teacher = make_networks(config, start_from if newest is None else None)
        for network in (student, teacher):
            network.to(world.device)
            shard(network, config, world, trainable=network is student)
        self.method = Pretraining(student, teacher, config, world)
        self.optimizer = make_optimizer(student, config)
        self.step = 0
        self.skipped = 0  # steps in a row that were skipped
        if newest is not None:
            self.step, centers = checkpoint.restore(newest, student, teacher, self.optimizer, world)
            self.method.centers = [centers["dino"], centers["ibot"]]

    def save(self) -> Path:
        """Writes a checkpoint of the steps that are done."""
        method, centers = self.method, dict(zip(("dino", "ibot"), self.method.centers, strict=True))
        return checkpoint.save(
            self.folder, self.step, method.student, method.teacher, self.optimizer, centers, self.config, self.world
        )

    def do_step(
        self, batch: CropBatch, *, with_entropies: bool = False, stop: Callable[[], bool] | None = None
    ) -> dict[str, float]:
        """Does one step on this process's part of the batch.

        A step whose loss or gradient is not finite in any process is skipped by all: student, teacher, moments and
        centres stay as they are.

        Args:
            with_entropies: add the entropies of the targets, which cost a product of all tokens and prototypes.
            stop: asked when the gradients are there; whether this process wishes to stop.

        Returns:
            The same in all processes: the mean losses, the norms of the gradients before clipping, the rates, and the
            numbers of processes with the wish ("stop"), images that were skipped ("skipped_images") and steps that were
            skipped ("skipped_steps", 0 or 1).

        Raises:
            DivergedError: it is the third step in a row that is not finite.
        """
        config, method = self.config, self.method
        rates = rates_at(config, self.step)
        set_rates(self.optimizer, rates, freeze_backbone=self.step < config.optimizer.freeze_backbone_steps)
        views = self._views(batch)
        targets, centers = method.targets(views, rates.temperature)
        entropies = self._entropies(targets) if with_entropies else {}
        losses = self._backward(views, targets)
        norms = clip_gradients(method.student, config.optimizer.clip_norm)
        counts = {"stop": int(stop is not None and stop()), "skipped_images": len(batch.failures)}
        metrics = self._agree(losses, counts, norms, entropies)
        if metrics["skipped_steps"]:
            self.skipped += 1
        else:
            self.skipped = 0
            self.optimizer.step()
            method.update_teacher(rates.momentum)
            method.centers = centers
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.skipped == SKIPPED_TO_STOP:
            raise DivergedError(
                f"The loss or a gradient was not finite in steps {self.step - SKIPPED_TO_STOP + 1} to {self.step}. "
                "Begin a new run with a lower optimizer.learning_rate or with run.precision=fp32. If this one has a "
                "checkpoint, it is good: start_from takes its weights."
            )
        return metrics | rates.to_dict()

    def _views(self, batch: CropBatch) -> list[Views]:
        """What is seen of the images, in parts of `micro_batch` images."""
        run, device = self.config.run, self.world.device
        dtype = PRECISIONS[run.precision]
        global_crops = apply_colours(batch.global_crops.to(device, non_blocking=True), batch.global_colours, dtype)
        local_crops = apply_colours(batch.local_crops.to(device, non_blocking=True), batch.local_colours, dtype)
        count = global_crops.shape[1]
        first = self.world.rank * count
        masks = torch.from_numpy(
            batch_masks(self.config, run.seed, self.step, batch_size=run.batch_size, first=first, count=count)
        )
        views = []
        for start in range(0, count, run.micro_batch):
            part = slice(start, start + run.micro_batch)
            own = masks[:, part]
            on_device = [each.to(device, non_blocking=True) for each in (own, *masked_patches(own))]
            views.append(Views(global_crops[:, part], local_crops[:, part], *on_device))
        return views

    def _backward(self, views: list[Views], targets: StepTargets) -> dict[str, Tensor]:
        """Adds up the gradients of all parts, and returns their mean losses."""
        run = self.config.run
        student: Any = self.method.student  # that it is sharded (an `FSDPModule`), its class does not say
        means: dict[str, Tensor] = {}
        first = self.world.rank * sum(each.n_images for each in views)
        for number, (view, target) in enumerate(zip(views, targets.split(views), strict=True)):
            student.set_requires_gradient_sync(number == len(views) - 1)
            torch.manual_seed(mix(run.seed, self.step, first + number * run.micro_batch))  # of stochastic depth
            losses = {name: loss / len(views) for name, loss in self.method.losses(view, target).items()}
            losses["loss"].backward()
            for name, loss in losses.items():
                means[name] = means.get(name, 0) + loss.detach()
        return means

    def _entropies(self, targets: StepTargets) -> dict[str, Tensor]:
        found = {}
        for name, part in (("dino", targets.cls), ("ibot", targets.patches)):
            found[f"{name}_entropy"], found[f"{name}_mean_entropy"] = target_entropies(part, self.world.sum)
        return found

    def _agree(
        self, losses: dict[str, Tensor], counts: dict[str, int], norms: dict[str, Tensor], entropies: dict[str, Tensor]
    ) -> dict[str, float]:
        """All metrics as numbers, the same in all processes. Only here does a step wait for the device."""
        means = torch.stack([*losses.values()])
        is_bad = ~torch.isfinite(torch.cat((means, torch.stack([*norms.values()])))).all()
        own = torch.cat((means / self.world.size, means.new_tensor([*counts.values()]), is_bad.to(means.dtype)[None]))
        same = {**{f"gradient_norm/{name}": norm for name, norm in norms.items()}, **entropies}
        values = torch.cat((self.world.sum(own), torch.stack([*same.values()]).to(own.dtype))).tolist()
        metrics = dict(zip((*losses, *counts, "skipped_steps", *same), values, strict=True))
        return metrics | {"skipped_steps": float(metrics["skipped_steps"] > 0)}
