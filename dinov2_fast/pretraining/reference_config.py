"""`from_reference`: a YAML file of facebookresearch/dinov2 (dinov2/configs/train) as a `PretrainingConfig`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.pretraining.config import PretrainingConfig

# The reference's settings with their defaults (dinov2/configs/ssl_default_config.yaml), over which a file is laid.
_DEFAULTS: dict[str, Any] = {
    "dino.loss_weight": 1.0,
    "dino.head_n_prototypes": 65536,
    "dino.head_bottleneck_dim": 256,
    "dino.head_nlayers": 3,
    "dino.head_hidden_dim": 2048,
    "dino.koleo_loss_weight": 0.1,
    "ibot.loss_weight": 1.0,
    "ibot.mask_sample_probability": 0.5,
    "ibot.mask_ratio_min_max": [0.1, 0.5],
    "ibot.separate_head": False,
    "ibot.head_n_prototypes": 65536,
    "ibot.head_bottleneck_dim": 256,
    "ibot.head_nlayers": 3,
    "ibot.head_hidden_dim": 2048,
    "train.batch_size_per_gpu": 64,
    "train.seed": 0,
    "train.OFFICIAL_EPOCH_LENGTH": 1250,
    "train.centering": "centering",
    "student.arch": "vit_large",
    "student.patch_size": 16,
    "student.drop_path_rate": 0.3,
    "student.layerscale": 1e-5,
    "student.drop_path_uniform": True,
    "student.pretrained_weights": "",
    "student.ffn_layer": "mlp",
    "student.qkv_bias": True,
    "student.proj_bias": True,
    "student.ffn_bias": True,
    "student.num_register_tokens": 0,
    "student.interpolate_antialias": False,
    "student.interpolate_offset": 0.1,
    "teacher.momentum_teacher": 0.992,
    "teacher.final_momentum_teacher": 1.0,
    "teacher.warmup_teacher_temp": 0.04,
    "teacher.teacher_temp": 0.07,
    "teacher.warmup_teacher_temp_epochs": 30,
    "optim.epochs": 100,
    "optim.weight_decay": 0.04,
    "optim.weight_decay_end": 0.4,
    "optim.base_lr": 0.004,
    "optim.warmup_epochs": 10,
    "optim.min_lr": 1e-6,
    "optim.clip_grad": 3.0,
    "optim.freeze_last_layer_epochs": 1,
    "optim.scaling_rule": "sqrt_wrt_1024",
    "optim.patch_embed_lr_mult": 0.2,
    "optim.layerwise_decay": 0.9,
    "optim.adamw_beta1": 0.9,
    "optim.adamw_beta2": 0.999,
    "crops.global_crops_scale": [0.32, 1.0],
    "crops.local_crops_number": 8,
    "crops.local_crops_scale": [0.05, 0.32],
    "crops.global_crops_size": 224,
    "crops.local_crops_size": 96,
}

# What is not read, because this package decides it otherwise.
_IGNORED = (
    "MODEL.WEIGHTS",  # pretrain(start_from=…)
    "compute_precision",  # run.precision: fp32, or bf16, which needs no scaling of gradients
    "train.dataset_path",  # pretrain(images)
    "train.output_dir",  # pretrain(out=…)
    "train.num_workers",  # pretrain(workers=…)
    "train.cache_dataset",  # each process lists the files once
    "train.saveckp_freq",  # the reference does not read it either
    "student.block_chunks",  # how blocks are grouped for FSDP; each is sharded by itself here
    "optim.lr",  # computed of base_lr
    "evaluation",  # run.evaluate_every
)

# hidden size, blocks and heads of the reference's architectures (dinov2/models/vision_transformer.py)
_ARCHITECTURES = {
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
    "vit_giant2": (1536, 40, 24),
}

# What only this value of the reference's settings gives, or these.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "student.arch": tuple(_ARCHITECTURES),
    "student.drop_path_uniform": (True,),
    "student.pretrained_weights": ("",),
    "student.qkv_bias": (True,),
    "student.proj_bias": (True,),
    "student.ffn_bias": (True,),
    "optim.scaling_rule": ("sqrt_wrt_1024",),
}

# interpolate_offset, interpolate_antialias
_INTERPOLATIONS = {(0.1, False): "offset", (0.0, False): "size", (0.0, True): "antialias"}


def from_reference(values: Mapping[str, Any], *, n_processes: int) -> PretrainingConfig:
    """The configuration of a file of the reference. What the file does not say has the reference's default.

    "Epochs" become steps. The batch is `batch_size_per_gpu` images for each process, and these run at once. Local crops
    whose size is no multiple of the patch size, such as the default of 96 px with patches of 14 px, are an error as
    they are in the reference.

    Args:
        values: the content of the YAML file.
        n_processes: of the run.

    Raises:
        InvalidValueError: a setting that the reference does not have, or one that cannot be used here.
    """
    given = dict(_flattened(values))
    for name in given:
        if name not in _DEFAULTS:
            near = difflib.get_close_matches(name, _DEFAULTS, n=1)
            hint = f"Did you mean {near[0]}?" if near else "Remove it."
            raise InvalidValueError(f"The reference has no setting {name!r}. {hint}")
    v = {name: _number(name, given.get(name, default)) for name, default in _DEFAULTS.items()}
    for name, allowed in _REQUIRED.items():
        if v[name] not in allowed:
            raise InvalidValueError(f"{name} must be {' or '.join(map(repr, allowed))} here, got {v[name]!r}.")
    interpolation = (v["student.interpolate_offset"], v["student.interpolate_antialias"])
    if interpolation not in _INTERPOLATIONS:
        raise InvalidValueError(
            f"student.interpolate_offset and interpolate_antialias must be one of {[*_INTERPOLATIONS]} here, got "
            f"{interpolation}."
        )
    hidden_size, depth, num_heads = _ARCHITECTURES[v["student.arch"]]
    batch = v["train.batch_size_per_gpu"]

    def steps(name: str) -> int:
        return round(v[name] * v["train.OFFICIAL_EPOCH_LENGTH"])

    def head(loss: str) -> dict[str, Any]:
        return {
            "prototypes": v[f"{loss}.head_n_prototypes"],
            "hidden_size": v[f"{loss}.head_hidden_dim"],
            "bottleneck_size": v[f"{loss}.head_bottleneck_dim"],
            "layers": v[f"{loss}.head_nlayers"],
        }

    return PretrainingConfig.from_dict(
        {
            "model": {
                "hidden_size": hidden_size,
                "depth": depth,
                "num_heads": num_heads,
                "ffn": v["student.ffn_layer"],
                "patch_size": v["student.patch_size"],
                "num_register_tokens": v["student.num_register_tokens"],
                "layer_scale": v["student.layerscale"],
                "drop_path": v["student.drop_path_rate"],
                "position_interpolation": _INTERPOLATIONS[interpolation],
            },
            "crops": {
                "global_size": v["crops.global_crops_size"],
                "local_size": v["crops.local_crops_size"],
                "n_local": v["crops.local_crops_number"],
                "global_scale": v["crops.global_crops_scale"],
                "local_scale": v["crops.local_crops_scale"],
            },
            "masks": {"probability": v["ibot.mask_sample_probability"], "ratio": v["ibot.mask_ratio_min_max"]},
            "dino_head": head("dino"),
            "ibot_head": head("ibot") if v["ibot.separate_head"] else None,
            "losses": {
                "dino": v["dino.loss_weight"],
                "ibot": v["ibot.loss_weight"],
                "koleo": v["dino.koleo_loss_weight"],
                "koleo_group": batch,  # the reference compares the images of a process
                "centering": v["train.centering"],
            },
            "teacher": {
                "momentum": v["teacher.momentum_teacher"],
                "final_momentum": v["teacher.final_momentum_teacher"],
                "start_temperature": v["teacher.warmup_teacher_temp"],
                "temperature": v["teacher.teacher_temp"],
                "temperature_warmup_steps": steps("teacher.warmup_teacher_temp_epochs"),
            },
            "optimizer": {
                "learning_rate": v["optim.base_lr"],
                "min_learning_rate": v["optim.min_lr"],
                "warmup_steps": steps("optim.warmup_epochs"),
                "weight_decay": v["optim.weight_decay"],
                "final_weight_decay": v["optim.weight_decay_end"],
                "beta1": v["optim.adamw_beta1"],
                "beta2": v["optim.adamw_beta2"],
                "clip_norm": v["optim.clip_grad"],
                "freeze_last_layer_steps": steps("optim.freeze_last_layer_epochs"),
                "layer_decay": v["optim.layerwise_decay"],
                "patch_embed_multiplier": v["optim.patch_embed_lr_mult"],
            },
            "run": {
                "steps": steps("optim.epochs"),
                "batch_size": batch * n_processes,
                "micro_batch": batch,
                "seed": v["train.seed"],
            },
        }
    )


def _flattened(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings by dotted name, without those that are ignored."""
    if prefix in _IGNORED:
        return
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from _flattened(value, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, values


def _number(name: str, value: Any) -> Any:
    """The value, where a number is wanted as a number: YAML 1.1 reads 1e-4, without a point, as a string."""
    wanted = _DEFAULTS[name]
    if isinstance(wanted, bool) or not isinstance(wanted, int | float):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise InvalidValueError(f"{name} must be a number, got {value!r}.")
    return number if isinstance(wanted, float) or not number.is_integer() else int(number)
