"""What changes from step to step: learning rates, weight decay, the teacher's momentum and temperature.

All are functions of the step. They equal the reference's (facebookresearch/dinov2, dinov2/train/train.py and
`CosineScheduler` in dinov2/utils/utils.py), whose two habits they keep: a warm-up ends on its highest value, with which
the cosine begins again, and the value after the last step is not reached within the run.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from dinov2_fast.pretraining.config import PretrainingConfig


@dataclass(frozen=True)
class Rates:
    """The values of a step.

    Attributes:
        learning_rate: scaled to the batch.
        last_layer_learning_rate: of the prototypes; 0 while they are frozen.
        weight_decay: of AdamW.
        momentum: of the teacher.
        temperature: of the teacher.
    """

    learning_rate: float
    last_layer_learning_rate: float
    weight_decay: float
    momentum: float
    temperature: float

    def to_dict(self) -> dict[str, float]:
        """The values by name."""
        return asdict(self)


def rates_at(config: PretrainingConfig, step: int) -> Rates:
    """The values of step `step`; the first step of a run is 0. A run has `config.run.steps` of them."""
    optimizer, teacher, steps = config.optimizer, config.teacher, config.run.steps
    peak = optimizer.learning_rate * math.sqrt(config.run.batch_size / 1024)
    learning_rate = cosine(step, peak, optimizer.min_learning_rate, steps, warmup_steps=optimizer.warmup_steps)
    is_frozen = step < min(optimizer.freeze_last_layer_steps, steps)
    return Rates(
        learning_rate=learning_rate,
        last_layer_learning_rate=0.0 if is_frozen else learning_rate,
        weight_decay=cosine(step, optimizer.weight_decay, optimizer.final_weight_decay, steps),
        momentum=cosine(step, teacher.momentum, teacher.final_momentum, steps),
        temperature=linear(step, teacher.start_temperature, teacher.temperature, teacher.temperature_warmup_steps),
    )


def cosine(step: int, start: float, end: float, steps: int, *, warmup_steps: int = 0) -> float:
    """Half a cosine from `start` to `end`, after a linear rise from 0 to `start` in the first `warmup_steps` steps.

        end + (start - end) (1 + cos(pi i / n)) / 2        i steps after the warm-up, of n

    From step `steps` on it is `end`.
    """
    if step >= steps:
        return end
    if step < warmup_steps:
        return linear(step, 0.0, start, warmup_steps)
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))


def linear(step: int, start: float, end: float, steps: int) -> float:
    """`steps` values at equal distances, from `start` at step 0 to `end` at step `steps` - 1, and later `end`.

    A single value is `start`.
    """
    if step >= steps or 0 < step == steps - 1:
        return end
    return start + step * ((end - start) / max(steps - 1, 1))
