"""What all implementations of bench.pretraining are given: a configuration, weights, and the images of a step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from bench.tasks import Scenario
from dinov2_fast.data.sources import require_images
from dinov2_fast.pretraining.batches import CropBatch, CropLoader
from dinov2_fast.pretraining.colours import apply_colours
from dinov2_fast.pretraining.config import (
    CropsConfig,
    HeadConfig,
    LossesConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainingConfig,
    RunConfig,
)
from dinov2_fast.pretraining.masks import batch_masks, masked_patches
from dinov2_fast.pretraining.schedules import Rates, rates_at
from dinov2_fast.pretraining.sources import ImageTable


class Recipe(NamedTuple):
    """The settings of a run that change how long a step takes, beside those of the backbone and the crops."""

    dino_head: HeadConfig
    ibot_head: HeadConfig | None  # None: shared with DINO
    centering: str
    drop_path: float


RECIPES = {
    "tiny-4096": Recipe(HeadConfig(4096, 512, 128), HeadConfig(4096, 512, 128), "sinkhorn_knopp", 0.0),
    # Of facebookresearch/dinov2, dinov2/configs/train.
    "vitl16_short": Recipe(HeadConfig(65536, 2048, 256), None, "centering", 0.3),
    "vitl14": Recipe(HeadConfig(131072, 2048, 384), HeadConfig(131072, 2048, 256), "sinkhorn_knopp", 0.4),
    "test": Recipe(HeadConfig(64, 32, 16), HeadConfig(48, 32, 16), "sinkhorn_knopp", 0.3),
}


def parse_crops(text: str) -> CropsConfig:
    """The crops that are written "224+8x98": global size, number of local crops, local size, in pixels."""
    global_size, plus, local = text.partition("+")
    number, times, local_size = local.partition("x")
    if not (plus and times and global_size.isdecimal() and number.isdecimal() and local_size.isdecimal()):
        raise ValueError(f"{text!r} does not name crops such as 224+8x98")
    return CropsConfig(global_size=int(global_size), local_size=int(local_size), n_local=int(number))


def crops_text(crops: CropsConfig) -> str:
    """What `parse_crops` reads."""
    return f"{crops.global_size}+{crops.n_local}x{crops.local_size}"


def pretraining_config(scenario: Scenario) -> PretrainingConfig:
    """The configuration of a scenario; its `resolution` names the crops, its `output` the recipe.

    LayerScale begins with 1, where runs begin with 1e-5: with that, losses and gradients would hardly depend on the
    blocks, and their check would see no mistake there. There is no warm-up, since the rate of its first step is 0. The
    rate is so low that all weights stay near their initial values.
    """
    recipe, sizes = RECIPES[scenario.output], scenario.config
    return PretrainingConfig(
        model=ModelConfig(
            hidden_size=sizes.embed_dim,
            depth=sizes.depth,
            num_heads=sizes.num_heads,
            layer_scale=1.0,
            drop_path=recipe.drop_path,
        ),
        crops=parse_crops(str(scenario.resolution)),
        dino_head=recipe.dino_head,
        ibot_head=recipe.ibot_head,
        losses=LossesConfig(centering=recipe.centering, koleo_group=scenario.batch),  # type: ignore[arg-type]
        optimizer=OptimizerConfig(
            learning_rate=1e-5, min_learning_rate=1e-6, warmup_steps=0, freeze_last_layer_steps=0
        ),
        run=RunConfig(
            steps=1000,
            batch_size=scenario.batch,
            micro_batch=scenario.batch,
            precision=scenario.precision,  # type: ignore[arg-type]
        ),
    )


@dataclass(frozen=True)
class Batch:
    """The images of a step, on the device.

    `crops` are what our loader makes: uint8, with the parameters of the colours. The others begin with `global_crops`
    and `local_crops`, fp32, which their loaders make on the CPU: the same crops with the same colours. `masked` and
    `mask_weights` are those of :class:`dinov2_fast.pretraining.networks.Views`.
    """

    crops: CropBatch
    global_crops: Tensor
    local_crops: Tensor
    masks: Tensor
    masked: Tensor
    mask_weights: Tensor
    rates: Rates

    @property
    def device(self) -> torch.device:
        return self.masks.device


Crops = TypeVar("Crops", Batch, CropBatch)


def with_own_crops(crops: Crops) -> Crops:
    """The same with crops of its own: the fp32 ones of a `Batch`, or the uint8 ones of a `CropBatch`."""
    return replace(crops, global_crops=crops.global_crops.clone(), local_crops=crops.local_crops.clone())


def make_loader(config: PretrainingConfig, files: Sequence[str]) -> CropLoader:
    """Our loader of these files, without worker processes."""
    return CropLoader(ImageTable(require_images(list(files))), config)


def make_batch(config: PretrainingConfig, files: Sequence[str], device: torch.device) -> Batch:
    """The images of the first step."""
    run = config.run
    with closing(make_loader(config, files)) as loader:
        crops = next(loader)
    crops = replace(crops, global_crops=crops.global_crops.to(device), local_crops=crops.local_crops.to(device))
    masks = torch.from_numpy(batch_masks(config, run.seed, 0, batch_size=run.batch_size, first=0, count=run.batch_size))
    masked, weights = masked_patches(masks)
    return Batch(
        crops,
        apply_colours(crops.global_crops, crops.global_colours, torch.float32),
        apply_colours(crops.local_crops, crops.local_colours, torch.float32),
        masks.to(device),
        masked.to(device),
        weights.to(device),
        rates_at(config, 0),
    )
