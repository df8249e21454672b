"""Small runs of pretraining: a configuration that takes milliseconds a step, and images for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from dinov2_fast.pretraining.config import PretrainingConfig
from dinov2_fast.pretraining.log import read_metrics

SETTINGS: dict[str, dict[str, Any]] = {
    "model": {"hidden_size": 32, "depth": 2, "num_heads": 2, "layer_scale": 0.1, "drop_path": 0.3},
    "crops": {"global_size": 42, "local_size": 28, "n_local": 2},
    "dino_head": {"prototypes": 24, "hidden_size": 16, "bottleneck_size": 8},
    "ibot_head": {"prototypes": 20, "hidden_size": 16, "bottleneck_size": 8},
    "losses": {"centering": "sinkhorn_knopp"},
    "teacher": {"temperature_warmup_steps": 2},
    "optimizer": {"warmup_steps": 1, "freeze_last_layer_steps": 1, "learning_rate": 0.02},
    "run": {
        "steps": 6,
        "batch_size": 4,
        "micro_batch": 2,
        "precision": "fp32",
        "save_every": 3,
        "log_every": 1,
        "evaluate_every": 3,
    },
}


def small_config(**changes: dict[str, Any]) -> PretrainingConfig:
    """The configuration of `SETTINGS`, with other values for some settings of its groups."""
    return PretrainingConfig.from_dict(SETTINGS).updated(changes)


def make_images(folder: Path, count: int = 10, size: int = 48) -> Path:
    """Writes images of noise on colours, image-00.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        pixels = generator.integers(0, 60, (size, size, 3)) + generator.integers(0, 190, 3)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"image-{number:02}.png")
    return folder


def computed_metrics(run: Path) -> list[dict[str, float]]:
    """The reports of a run without what depends on the clock."""
    measured = ("images_per_second", "data_wait")
    return [{name: value for name, value in line.items() if name not in measured} for line in read_metrics(run)]


def stored_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by file and name."""
    files = sorted(checkpoint.glob("*.safetensors"))
    return {f"{file.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}
