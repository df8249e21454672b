"""`PretrainingConfig`: all settings of a pretraining run, as plain values in groups. Each is checked by its name.

Defaults are the reference's short recipe (facebookresearch/dinov2, dinov2/configs/train/vitl16_short.yaml), but for a
ViT-S with patches of 14 px. Lengths are in steps: the recipe's "epochs" are 1250 steps each, whatever the images.
:mod:`dinov2_fast.pretraining.presets` has configurations by name, and reads them from files.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_type_hints

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.pretraining.values import (
    Areas,
    Count,
    Factor,
    Number,
    Positive,
    Share,
    ShareBelow1,
    Shares,
    ThreeShares,
    check_value,
)


@dataclass(frozen=True)
class ModelConfig:
    """The backbone, of the student and of the teacher."""

    hidden_size: Count = 384  # channels of a token
    depth: Count = 12  # blocks
    num_heads: Count = 6
    mlp_ratio: Positive = 4.0  # channels inside the feed-forward of a block, divided by hidden_size
    ffn: Literal["mlp", "swiglufused"] = "mlp"
    patch_size: Count = 14  # pixels
    num_register_tokens: Number = 0
    layer_scale: Positive = 1e-5  # of each block at the start
    drop_path: ShareBelow1 = 0.3  # share of the crops that skip a branch of a block, the same in all blocks
    position_interpolation: Literal["offset", "size", "antialias"] = "offset"
    gradient_checkpointing: bool = False  # less memory: the backward pass computes each block again


@dataclass(frozen=True)
class CropsConfig:
    """The crops of an image: two global ones and several smaller local ones."""

    global_size: Count = 224  # pixels, a multiple of the patch size
    local_size: Count = 98
    n_local: Number = 8  # local crops of an image
    global_scale: Areas = (0.32, 1.0)  # area of a crop, as a share of the image's
    local_scale: Areas = (0.05, 0.32)
    # Probability of blur for the first global crop, the second, and local crops. The reference's code says 1.0, 0.1 and
    # 0.5, but its blur runs with one minus that; all published models were trained so.
    blur: ThreeShares = (0.0, 0.9, 0.5)
    solarize: Share = 0.2  # probability, for the second global crop alone


@dataclass(frozen=True)
class MasksConfig:
    """The masked patches of the student's global crops."""

    probability: Share = 0.5  # share of the crops that have masked patches
    ratio: Shares = (0.1, 0.5)  # share of the patches that are masked there, lowest and highest


@dataclass(frozen=True)
class HeadConfig:
    """A projection head."""

    prototypes: Count = 65536
    hidden_size: Count = 2048  # channels of the inner layers
    bottleneck_size: Count = 256  # channels of a prototype
    layers: Count = 3  # linear layers before the prototypes


@dataclass(frozen=True)
class LossesConfig:
    """The losses and the teacher's targets."""

    dino: Factor = 1.0  # weight
    ibot: Factor = 1.0  # weight
    koleo: Factor = 0.1  # weight
    koleo_group: Number = 0  # images that KoLeo compares; 0 means the largest divisor of the micro-batch up to 64
    centering: Literal["centering", "sinkhorn_knopp"] = "centering"
    center_momentum: Share = 0.9  # of the centre, with "centering"
    student_temperature: Positive = 0.1


@dataclass(frozen=True)
class TeacherConfig:
    """The teacher: the exponential moving average of the student."""

    momentum: Share = 0.992  # at the first step; rises as a cosine
    final_momentum: Share = 1.0  # after the last step
    start_temperature: Positive = 0.04  # at the first step; changes linearly
    temperature: Positive = 0.07  # after the warm-up
    temperature_warmup_steps: Number = 37_500


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, and what it is given in each step."""

    learning_rate: Positive = 0.004  # highest, at a batch of 1024 images; times sqrt(batch_size / 1024) at others
    min_learning_rate: Factor = 1e-6  # after the last step, at any batch size
    warmup_steps: Number = 12_500  # the learning rate rises from 0
    weight_decay: Factor = 0.04  # at the first step; changes as a cosine
    final_weight_decay: Factor = 0.4  # after the last step
    beta1: ShareBelow1 = 0.9
    beta2: ShareBelow1 = 0.999
    clip_norm: Factor = 3.0  # largest norm of the gradient of the backbone, and of each head; 0 means any
    freeze_last_layer_steps: Number = 1250  # steps in which the learning rate of the prototypes is 0
    freeze_backbone_steps: Number = 0  # steps in which the learning rate of the backbone is 0: new heads learn first
    layer_decay: Positive = 0.9  # the learning rate of a block, divided by that of the next
    patch_embed_multiplier: Factor = 0.2  # of the learning rate of the patch embedding


@dataclass(frozen=True)
class RunConfig:
    """The run."""

    steps: Count = 125_000
    batch_size: Count = 1024  # images of a step, of all processes together
    micro_batch: Count = 64  # images that run at once in a process; less needs less memory
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: Number = 0  # of everything that is random
    save_every: Count = 1250  # steps
    log_every: Count = 10  # steps
    evaluate_every: Count = 12_500  # steps
    reshard_after_forward: bool = False  # less memory: sharded parameters are gathered again for the backward pass


@dataclass(frozen=True)
class PretrainingConfig:
    """All settings of a run. Without `ibot_head`, iBOT shares the head of DINO.

    Raises:
        InvalidValueError: a setting cannot be used; the message names it, such as "optimizer.learning_rate".
    """

    model: ModelConfig = ModelConfig()
    crops: CropsConfig = CropsConfig()
    masks: MasksConfig = MasksConfig()
    dino_head: HeadConfig = HeadConfig()
    ibot_head: HeadConfig | None = None
    losses: LossesConfig = LossesConfig()
    teacher: TeacherConfig = TeacherConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self) -> None:
        for group in fields(self):
            settings = getattr(self, group.name)
            if settings is None and group.name == "ibot_head":
                continue
            for name, hint in get_type_hints(type(settings), include_extras=True).items():
                check_value(f"{group.name}.{name}", getattr(settings, name), hint)
        patch = self.model.patch_size
        _check_multiple("model.hidden_size", self.model.hidden_size, "model.num_heads", self.model.num_heads)
        _check_multiple("crops.global_size", self.crops.global_size, "model.patch_size", patch)
        _check_multiple("crops.local_size", self.crops.local_size, "model.patch_size", patch)
        _check_multiple("run.batch_size", self.run.batch_size, "run.micro_batch", self.run.micro_batch)
        _check_multiple("run.micro_batch", self.run.micro_batch, "losses.koleo_group", self.koleo_group)

    @property
    def koleo_group(self) -> int:
        """Images that KoLeo compares with each other."""
        micro_batch = self.run.micro_batch
        return self.losses.koleo_group or max(n for n in range(1, min(micro_batch, 64) + 1) if micro_batch % n == 0)

    @property
    def grid(self) -> int:
        """Rows, and columns, of the patches of a global crop."""
        return self.crops.global_size // self.model.patch_size

    def to_dict(self) -> dict[str, Any]:
        """The settings by group and name. JSON can hold them; `from_dict` reads them again."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PretrainingConfig:
        """The configuration of `to_dict`. What is missing has its default."""
        return cls().updated(values)

    def updated(self, changes: Mapping[str, Any]) -> PretrainingConfig:
        """This configuration with other values for some settings.

        Args:
            changes: groups, and in each its settings, as in `to_dict`. `ibot_head` may be None, or "shared" for files
                that cannot hold None.

        Raises:
            InvalidValueError: a name that does not exist, with the nearest ones; or a value that cannot be used.
        """
        groups: dict[str, Any] = {}
        for group, settings in changes.items():
            if group not in _GROUPS:
                raise InvalidValueError(_unknown("group of settings", group, list(_GROUPS)))
            if group == "ibot_head" and settings in (None, "shared"):
                groups[group] = None
                continue
            old = getattr(self, group) or HeadConfig()
            known = [f"{group}.{field.name}" for field in fields(old)]
            if not isinstance(settings, Mapping):
                raise InvalidValueError(f"{group} is a group of settings, {', '.join(known)}, got {settings!r}.")
            for name in settings:
                if f"{group}.{name}" not in known:
                    raise InvalidValueError(_unknown("setting", f"{group}.{name}", known))
            new = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
            groups[group] = replace(old, **new)
        return replace(self, **groups)


def difference(there: PretrainingConfig, here: PretrainingConfig) -> str | None:
    """The first setting that differs, such as "run.seed is 0 there and 1 here"; None if there is none."""
    old, new = dict(_settings(there)), dict(_settings(here))
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            return f"{name} is {old.get(name)} there and {new.get(name)} here"
    return None


def find_problems(config: PretrainingConfig, n_images: int) -> list[str]:
    """A sentence for each thing that will not work, or not as its user may think, on a set of `n_images` images."""
    losses, teacher, optimizer, run = config.losses, config.teacher, config.optimizer, config.run
    found = []
    if losses.koleo and config.koleo_group == 1:
        found.append(
            "KoLeo compares the images of a group with each other, and a group has one image here: raise "
            "run.micro_batch and losses.koleo_group, or set losses.koleo to 0."
        )
    if n_images < run.batch_size:
        found.append(
            f"There are fewer images ({n_images}) than a batch has ({run.batch_size}), so that a batch holds "
            "images twice: lower run.batch_size."
        )
    lengths = {
        "optimizer.warmup_steps": (optimizer.warmup_steps, "the learning rate never falls"),
        "optimizer.freeze_last_layer_steps": (optimizer.freeze_last_layer_steps, "the prototypes never learn"),
        "optimizer.freeze_backbone_steps": (optimizer.freeze_backbone_steps, "the backbone never learns"),
    }
    if teacher.start_temperature != teacher.temperature:
        lengths["teacher.temperature_warmup_steps"] = (
            teacher.temperature_warmup_steps,
            f"the teacher's temperature does not reach {teacher.temperature:g}",
        )
    for name, (steps, consequence) in lengths.items():
        if steps >= run.steps:
            found.append(
                f"{name} ({steps}) is not shorter than the run ({run.steps} steps), so {consequence}. Lower {name}."
            )
    if losses.ibot:
        crops = int(2 * run.batch_size * config.masks.probability)
        patches = int(config.grid**2 * config.masks.ratio[1])
        if not crops or not patches or config.grid < 2:
            found.append(
                f"No patch is ever masked ({crops} of {2 * run.batch_size} crops have a mask, of at most "
                f"{patches} of {config.grid**2} patches), so iBOT learns nothing: raise masks.probability, "
                "masks.ratio or crops.global_size, or set losses.ibot to 0."
            )
    return found


def _check_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value % divisor:
        raise InvalidValueError(f"{name} must be a multiple of {divisor_name}, {divisor}, got {value}.")


def _settings(config: PretrainingConfig) -> Iterator[tuple[str, Any]]:
    for group, settings in config.to_dict().items():
        if settings is None:
            yield group, settings
        else:
            yield from ((f"{group}.{name}", value) for name, value in settings.items())


_GROUPS = {field.name: getattr(PretrainingConfig, field.name) or HeadConfig() for field in fields(PretrainingConfig)}


def _unknown(kind: str, name: str, known: list[str]) -> str:
    """The message for a name that does not exist: with one that is like it, or that stands in another group."""
    last = name.rpartition(".")[2]
    elsewhere = [f"{group}.{last}" for group, settings in _GROUPS.items() if hasattr(settings, last)]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8 if "." in name else 0.6)
    hint = " or ".join([*elsewhere, *near])
    return f"There is no {kind} {name!r}. " + (f"Did you mean {hint}?" if hint else f"There are {', '.join(known)}.")
