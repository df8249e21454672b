"""What a pretraining run reports: to its caller, to ``metrics.jsonl`` and TensorBoard, and that it has collapsed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from dinov2_fast.pretraining.config import PretrainingConfig

MANIFEST = "pretraining.json"  # what the run is: its configuration, images and first weights
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"  # the folder of the event files
# A healthy loss is near ln K for a while in the warm-up, when the student knows that all prototypes are used alike, and
# nothing more. A collapsed one stays there.
TOLERANCE = 0.005  # relative; the loss is ln K within it
STAY = 100  # steps after the warm-up that a collapse must last to be named
LONG_STAY = 5000  # steps after which it is named in the warm-up too, which may take 100,000 steps
SMALL = 0.01  # of ln K: an entropy below it is that of one prototype
UNIFORM = (
    "The loss is ln K: the outputs are uniform (DINO's loss is {:.4f}), so nothing is learnt. Lower "
    "teacher.temperature, lengthen optimizer.warmup_steps or enlarge run.batch_size, and see that the images are what "
    "you expect."
)
SAME = (
    "All targets are the same prototype, so nothing is learnt. Raise teacher.start_temperature and "
    'teacher.temperature, or set losses.centering to "sinkhorn_knopp", which uses all prototypes.'
)


@dataclass(frozen=True)
class StepReport:
    """What the main process reports every ``run.log_every`` steps, at the last step, and after an evaluation.

    Attributes:
        step: steps that are done.
        steps: of the whole run.
        metrics: after an evaluation "knn/10", …, the accuracy of k-NN with k = 10, 0 to 1. Else "loss"; its parts
            without their weights, "dino_global", "dino_local", "ibot" and "koleo"; "dino_entropy" and "ibot_entropy",
            the mean entropy of a target, and "dino_mean_entropy" and "ibot_mean_entropy", the entropy of the mean
            target, in nats; "gradient_norm/backbone", …, before clipping; "learning_rate",
            "last_layer_learning_rate", "weight_decay", "momentum", "temperature"; and since the last report
            "images_per_second", "data_wait" (the share of time, 0 to 1), "skipped_images" and "skipped_steps". Saves
            and evaluations do not count as time.
        seconds_left: an estimate.
    """

    step: int
    steps: int
    metrics: dict[str, float]
    seconds_left: float


class MetricsFile:
    """Appends reports to ``metrics.jsonl`` and, where tensorboard is installed, to its event files.

    A line is a JSON object with "step" and the metrics; a number that is not finite is null. Each line is given to the
    system at once, so that a killed process leaves at most a torn last line. Reports after `step`, which a resumed run
    makes again, and a torn line are cut off first.

    Args:
        folder: the output folder, which exists.
        step: of the checkpoint that the run goes on from; 0 for a new run.
    """

    def __init__(self, folder: Path, step: int) -> None:
        path = folder / METRICS
        self._file = open(path, "ab")  # noqa: SIM115
        ends = [end for end, line in _lines(path) if line["step"] <= step]
        self._file.truncate(ends[-1] if ends else 0)
        self._tensorboard = _summary_writer(folder / TENSORBOARD, step)

    def write(self, report: StepReport) -> None:
        """Writes a report.

        Raises:
            OSError: it cannot be written.
        """
        values = {name: value if math.isfinite(value) else None for name, value in report.metrics.items()}
        self._file.write(json.dumps({"step": report.step, **values}).encode() + b"\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in report.metrics.items():
                self._tensorboard.add_scalar(name, value, report.step)

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def is_evaluation(metrics: Mapping[str, float]) -> bool:
    """Whether a report is that of an evaluation."""
    return any(name.startswith("knn/") for name in metrics)


def holds_metrics(folder: Path) -> bool:
    """Whether the folder is that of a run."""
    return (folder / METRICS).is_file()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The reports of a run in order: "step" and the metrics, NaN where a number is not finite. A torn line is left out.

    Raises:
        OSError: there is no ``metrics.jsonl``, or it cannot be read.
    """
    return [
        {name: math.nan if value is None else value for name, value in line.items()}
        for _, line in _lines(folder / METRICS)
    ]


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The position after each line, and its object, up to the first line that is torn."""
    end = 0
    with open(path, "rb") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                return
            if not text.endswith(b"\n"):
                return
            end += len(text)
            yield end, line


def _summary_writer(folder: Path, step: int) -> SummaryWriter | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)  # TensorBoard then hides what was written after the step


def uniform_losses(config: PretrainingConfig) -> dict[str, float]:
    """The parts of the loss where the student's outputs are uniform over the K prototypes.

    A cross-entropy is then ln K, whatever the target; the shares are those of :mod:`dinov2_fast.pretraining.losses`.
    """
    n_local = config.crops.n_local
    dino, ibot = (math.log(head.prototypes) for head in (config.dino_head, config.ibot_head or config.dino_head))
    terms = 2 + max(2 * n_local, 1)
    return {
        "dino_global": dino * 2 / terms,
        "dino_local": dino * 2 * n_local / terms,
        "ibot": ibot * config.masks.probability,
    }


class CollapseWatch:
    """Says once that the outputs of a run are uniform, and once that all its targets are the same prototype."""

    def __init__(self, config: PretrainingConfig) -> None:
        uniform = uniform_losses(config)
        self._uniform = {name: uniform[name] for name in ("dino_global", "dino_local")}
        self._log_prototypes = math.log(config.dino_head.prototypes)
        self._warmup_steps = config.optimizer.warmup_steps
        self._since: dict[str, int] = {}  # the first of the latest reports that all show a collapse, by its message
        self._said: set[str] = set()

    def message(self, report: StepReport) -> str | None:
        """What is wrong and what to do, if this report completes the evidence."""
        found = {
            UNIFORM.format(sum(self._uniform.values())): self._is_uniform(report.metrics),
            SAME: report.metrics["dino_mean_entropy"] < SMALL * self._log_prototypes,
        }
        for message, is_found in found.items():
            if not is_found:
                self._since.pop(message, None)
                continue
            since = self._since.setdefault(message, report.step)
            lasts = report.step - max(since, self._warmup_steps) >= STAY or report.step - since >= LONG_STAY
            if lasts and message not in self._said:
                self._said.add(message)
                return message
        return None

    def _is_uniform(self, metrics: Mapping[str, float]) -> bool:
        return all(abs(metrics[name] - value) <= TOLERANCE * value for name, value in self._uniform.items())
