"""Configurations of pretraining by name, and from files: this package's TOML and the reference's YAML."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dinov2_fast.configs import BACKBONES
from dinov2_fast.errors import InvalidValueError
from dinov2_fast.pretraining.config import PretrainingConfig
from dinov2_fast.pretraining.reference_config import from_reference

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def _backbone(name: str) -> dict[str, Any]:
    backbone = BACKBONES[name]
    return {"hidden_size": backbone.embed_dim, "depth": backbone.depth, "num_heads": backbone.num_heads}


# A model that two CPU cores train within an hour. So few steps learn most from small images and few blocks, since a
# step is then cheap; from large crops without blur, which show the student much of what the teacher sees; and with
# LayerScale 1, few prototypes, a low temperature and a teacher that follows fast, which leave uniform outputs soon. The
# trials are in bench/results/NOTES.md.
_TINY = PretrainingConfig().updated(
    {
        "model": {"hidden_size": 192, "depth": 4, "num_heads": 3, "layer_scale": 1.0, "drop_path": 0.0},
        "crops": {
            "global_size": 70,
            "local_size": 28,
            "n_local": 4,
            "global_scale": (0.5, 1.0),
            "local_scale": (0.15, 0.5),
            "blur": (0.0, 0.0, 0.0),  # a kernel of 9 pixels would leave little of so small a crop
            "solarize": 0.0,
        },
        "dino_head": {"prototypes": 256, "hidden_size": 512, "bottleneck_size": 128},
        "ibot_head": {"prototypes": 256, "hidden_size": 512, "bottleneck_size": 128},
        "losses": {"centering": "sinkhorn_knopp"},
        "teacher": {
            "momentum": 0.98,
            "start_temperature": 0.02,
            "temperature": 0.04,
            "temperature_warmup_steps": 2000,
        },
        "optimizer": {
            "learning_rate": 0.004,  # 0.001 at this batch
            "warmup_steps": 200,
            "final_weight_decay": 0.2,
            "freeze_last_layer_steps": 60,
            "layer_decay": 1.0,
            "patch_embed_multiplier": 1.0,
        },
        "run": {
            "steps": 4000,
            "batch_size": 64,
            "micro_batch": 64,
            "precision": "fp32",
            "save_every": 500,
            "evaluate_every": 1000,
        },
    }
)

# The reference's vitl14.yaml on the 12 nodes of 8 GPUs that its README names: 96 times 32 images, 500 times 1250 steps.
# The file says "swiglufused" for the feed-forward. Here it is "mlp", as in the published ViT-L/14, so that the result
# loads wherever that one does.
_VITL14 = PretrainingConfig().updated(
    {
        "model": {**_backbone("dinov2_vitl14"), "drop_path": 0.4},
        "dino_head": {"prototypes": 131_072, "bottleneck_size": 384},
        "ibot_head": {"prototypes": 131_072},
        "losses": {"centering": "sinkhorn_knopp"},
        "teacher": {"momentum": 0.994},
        "optimizer": {
            "learning_rate": 2e-4,
            "warmup_steps": 100_000,
            "final_weight_decay": 0.2,
            "layer_decay": 1.0,
        },
        "run": {"steps": 625_000, "batch_size": 3072, "micro_batch": 32},
    }
)

# The phase at high resolution. Known (arXiv:2304.07193, section 4 and appendix B.2): global crops of 518 px, 10,000
# steps, all schedules compressed to that length, a lower learning rate, all other settings kept. Chosen here: the rate,
# a quarter of the first phase's; local crops that keep their size relative to the global ones; and a micro-batch with
# about as many tokens as in the first phase.
_VITL14_518 = _VITL14.updated(
    {
        "crops": {"global_size": 518, "local_size": 224},
        "teacher": {"temperature_warmup_steps": 600},
        "optimizer": {"learning_rate": 5e-5, "warmup_steps": 1600, "freeze_last_layer_steps": 20},
        "run": {"steps": 10_000, "micro_batch": 8, "save_every": 500, "evaluate_every": 1000},
    }
)

PRESETS = {
    "tiny": _TINY,
    "small": PretrainingConfig(),  # the reference's vitl16_short.yaml with a smaller model; one to eight GPUs
    "base": PretrainingConfig().updated({"model": _backbone("dinov2_vitb14")}),
    "vitl14": _VITL14,
    "vitl14-518": _VITL14_518,
}


def read_config(
    config: str | os.PathLike[str] | PretrainingConfig, overrides: Sequence[str] = (), *, n_processes: int = 1
) -> PretrainingConfig:
    """The configuration that is named, with some settings changed.

    Args:
        config: a name in `PRESETS`; a .toml file with the groups and settings of `PretrainingConfig`, which change
            those of the preset that its first line may name (`base = "tiny"`), else the defaults; a .yaml or .yml file
            of facebookresearch/dinov2; or a configuration.
        overrides: such as "optimizer.learning_rate=1e-3". The value is TOML; a word without quotes is a string.
        n_processes: of the run. A file of the reference says the batch of one process.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidValueError: no such preset or setting, with the nearest one; a damaged file; or a value that cannot be
            used.
    """
    if not isinstance(config, PretrainingConfig):
        config = _read(os.fspath(config), n_processes)
    changes: dict[str, Any] = {}
    for override in overrides:  # together, because some settings must fit each other
        name, value = _parse_override(override)
        group, dot, field = name.partition(".")
        if not dot:
            changes[group] = value
        elif isinstance(changes.get(group), dict):
            changes[group][field] = value
        else:
            changes[group] = {field: value}
    return config.updated(changes)


def _read(name: str, n_processes: int) -> PretrainingConfig:
    if name in PRESETS:
        return PRESETS[name]
    ending = Path(name).suffix.lower()
    if ending == ".toml":
        return _read_toml(Path(name))
    if ending in (".yaml", ".yml"):
        return from_reference(_read_yaml(Path(name)), n_processes=n_processes)
    near = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"The presets are {', '.join(PRESETS)}."
    raise InvalidValueError(f"There is no preset {name!r}, and files end in .toml, .yaml or .yml. {hint}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidValueError(f"{str(path)!r} is no YAML file: {error}") from None
    if not isinstance(values, dict):
        raise InvalidValueError(f"{str(path)!r} holds no settings.")
    return values


def _read_toml(path: Path) -> PretrainingConfig:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidValueError(f"{str(path)!r} is no TOML file: {error}.") from None
    base = values.pop("base", "small")
    if base not in [*PRESETS]:
        raise InvalidValueError(f"base must be one of {', '.join(PRESETS)}, got {base!r}.")
    return PRESETS[base].updated(values)


def _parse_override(override: str) -> tuple[str, Any]:
    name, equals, text = override.partition("=")
    if not equals:
        raise InvalidValueError(f"An override is a setting and its value, such as run.steps=1000, got {override!r}.")
    try:
        return name.strip(), tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), text.strip()
