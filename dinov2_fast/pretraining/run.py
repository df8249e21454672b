"""`pretrain`: trains a backbone on images without labels, from the first step or from the newest checkpoint."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dinov2_fast.data.batches import Failures
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.data.images import MAX_PIXELS
from dinov2_fast.data.sources import Images, require_images
from dinov2_fast.data.workers import MAX_SECONDS
from dinov2_fast.errors import InvalidValueError
from dinov2_fast.evaluation.evaluate import evaluate_knn
from dinov2_fast.evaluation.labelled import ModelOptions, check_labelled
from dinov2_fast.features.lock import lock
from dinov2_fast.features.whole_files import whole_file
from dinov2_fast.pretraining import checkpoint
from dinov2_fast.pretraining.batches import CropLoader
from dinov2_fast.pretraining.config import PretrainingConfig, difference, find_problems
from dinov2_fast.pretraining.log import (
    MANIFEST,
    CollapseWatch,
    MetricsFile,
    StepReport,
    is_evaluation,
    read_metrics,
)
from dinov2_fast.pretraining.parallel import start_processes
from dinov2_fast.pretraining.presets import read_config
from dinov2_fast.pretraining.sources import ImageTable
from dinov2_fast.pretraining.trainer import Trainer

logger = logging.getLogger("dinov2_fast")
CHANGEABLE = ("save_every", "log_every", "evaluate_every")  # settings of `run` that may change when it continues


@dataclass(frozen=True)
class End:
    """How a call of `pretrain` ended.

    Attributes:
        folder: the output folder, which :func:`dinov2_fast.load` takes.
        checkpoint: the newest checkpoint.
        first_step, step: the steps that were done before this call, and in all.
        steps: of the whole run.
        images: from which the run draws.
        batch_size: images in a step.
        failures: the images that this process could not read; others took their place.
        skipped: the number of such images in all processes.
        seconds: of the steps of this call, without saves and evaluations.
        processes: that made the run.
        is_main: whether this process is the one that reports.
    """

    folder: Path
    checkpoint: Path
    first_step: int
    step: int
    steps: int
    images: int
    batch_size: int
    failures: Failures
    skipped: int
    seconds: float
    processes: int
    is_main: bool


def pretrain(
    images: Images,
    *,
    out: str | os.PathLike[str],
    config: str | os.PathLike[str] | PretrainingConfig = "small",
    overrides: Sequence[str] = (),
    start_from: str | os.PathLike[str] | None = None,
    evaluate: tuple[str, str] | None = None,
    device: str | None = None,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
    max_seconds: float = MAX_SECONDS,
    progress: Callable[[StepReport], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> End:
    """Trains a backbone on images without labels, as DINOv2 was trained (:mod:`dinov2_fast.pretraining.networks`).

    The same call continues from the newest checkpoint in `out`; the result has the bits of a run without interruption.
    Under torchrun each process calls it and takes a part of each batch.

    Args:
        images: see :mod:`dinov2_fast.data.sources`.
        out: the folder of checkpoints and metrics. It is made if it does not exist.
        config: "tiny", "small", "base", "vitl14", "vitl14-518", a .toml file, a .yaml file of the reference, or an
            object.
        overrides: "group.field=value", which change the configuration.
        start_from: initial weights: the folder of another run, of which the teacher and its heads are taken, or what
            :func:`dinov2_fast.load` takes, with new heads. Positions are resampled to the size of the global crops.
        evaluate: images in class folders, (train, val). Every ``run.evaluate_every`` steps the teacher's class tokens
            are evaluated by k-NN.
        device: by default the GPU of the process where there is one, else the CPU.
        workers: processes that decode and crop images, for each process of the run; 0 for none.
        max_pixels, max_seconds: limits of an image, as for :func:`dinov2_fast.extract`.
        progress: called by the main process every ``run.log_every`` steps.
        stop: asked in each step. When it is true in any process, all save a checkpoint after the step and return.

    Raises:
        InvalidValueError: a setting that does not exist or cannot work; no images; `out` holds a run with other
            settings or images, and the message names the first that differs.
        DivergedError: the loss was not finite in three steps in a row. The last checkpoint is kept.
        LockedError: another run writes to `out`.
        WeightsError: the weights of `start_from` cannot be had.
    """
    folder = Path(out)
    with start_processes(device) as world, ExitStack() as stack:
        settings = read_config(config, overrides, n_processes=world.size)
        check_batch(settings, world.size)
        table = ImageTable(require_images(images))
        if not world.is_same(int(table.sha256[:12], 16)):
            raise InvalidValueError(
                "The processes of the run found different images. Give them the same files, which must not change "
                "while they are listed."
            )
        if evaluate is not None:
            check_labelled(evaluate)
            Dinov2ImageProcessor.for_size(settings.crops.global_size)
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(folder, (1, 1)))
            for sentence in find_problems(settings, len(table)):
                logger.warning(sentence)
        newest = checkpoint.agree_on_newest(folder, world)
        if world.is_main:
            _claim(folder, newest, settings, table, start_from)
        if start_from is not None and newest is None:  # the run that is there may go on while this one begins
            start_from = checkpoint.agree_on_newest(Path(start_from), world) or start_from
        stack.enter_context(torch.random.fork_rng([world.device] if world.device.type == "cuda" else []))
        trainer = Trainer(folder, newest, settings, world, start_from)
        loader = CropLoader(
            table,
            settings,
            first_step=trainer.step,
            rank=world.rank,
            size=world.size,
            workers=workers,
            max_pixels=max_pixels,
            max_seconds=max_seconds,
        )
        stack.enter_context(closing(loader))
        evaluation = None if evaluate is None else _Evaluation(evaluate, trainer, workers)
        return _train(trainer, newest, loader, len(table), evaluation, progress, stop)


def _train(
    trainer: Trainer,
    newest: Path | None,
    batches: CropLoader,
    n_images: int,
    evaluation: _Evaluation | None,
    progress: Callable[[StepReport], None] | None,
    stop: Callable[[], bool] | None,
) -> End:
    """Does the steps that are left, and an evaluation that an earlier call was too short for."""
    run, world, first_step = trainer.config.run, trainer.world, trainer.step
    failures, begin = Failures(), time.perf_counter()
    with _Reporter(trainer, progress) as reporter:
        if newest is not None and evaluation is not None and evaluation.is_missing():
            reporter.evaluate(evaluation, newest)
        while trainer.step < run.steps:
            waits = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - waits
            for path, reason in batch.failures:
                failures.add(path, reason)
            is_last = trainer.step + 1 == run.steps
            is_logged = is_last or (trainer.step + 1) % run.log_every == 0
            metrics = trainer.do_step(batch, with_entropies=is_logged, stop=stop)
            reporter.add(metrics, waited)
            if is_logged:  # before the checkpoint, so that none is without the reports of its steps
                reporter.report(metrics)
            is_evaluated = evaluation is not None and evaluation.is_due()
            if is_last or is_evaluated or metrics["stop"] or trainer.step % run.save_every == 0:
                with reporter.pause():
                    newest = trainer.save()
            if metrics["stop"]:
                break
            if is_evaluated and evaluation is not None and newest is not None:
                reporter.evaluate(evaluation, newest)
        seconds = time.perf_counter() - begin - reporter.paused
    assert newest is not None  # a run has one step at least, and its last is saved
    return End(
        folder=trainer.folder,
        checkpoint=newest,
        first_step=first_step,
        step=trainer.step,
        steps=run.steps,
        images=n_images,
        batch_size=run.batch_size,
        failures=failures,
        skipped=reporter.skipped_images,
        seconds=seconds,
        processes=world.size,
        is_main=world.is_main,
    )


class _Evaluation:
    """k-NN on the teacher of a checkpoint, in the main process; the others wait.

    Args:
        sets: images in class folders, train and val.
        trainer: of the run.
        workers: processes that decode images.
    """

    def __init__(self, sets: tuple[str, str], trainer: Trainer, workers: int) -> None:
        self._sets, self._trainer, self._workers = sets, trainer, workers

    def is_due(self) -> bool:
        """Whether a checkpoint of the steps that are done is to be evaluated."""
        step, run = self._trainer.step, self._trainer.config.run
        return step == run.steps or (step > 0 and step % run.evaluate_every == 0)

    def is_missing(self) -> bool:
        """Whether the checkpoint that the run goes on from should have been evaluated, and was not."""
        step, world, is_missing = self._trainer.step, self._trainer.world, False
        if world.is_main and self.is_due():
            lines = read_metrics(self._trainer.folder)
            is_missing = not any(line["step"] == step and is_evaluation(line) for line in lines)
        return world.agree(is_missing)

    def measure(self, folder: Path) -> dict[str, float]:
        """The accuracies, "knn/10", …; nothing in other processes than the main one."""
        found, world = {}, self._trainer.world
        if world.is_main:
            size = self._trainer.config.crops.global_size
            options = ModelOptions(model=str(folder), size=size, device=str(world.device), workers=self._workers)
            _, accuracies = evaluate_knn(*self._sets, options=options)
            found = {f"knn/{k}": accuracy.top1 for k, accuracy in accuracies[None].items()}
        world.wait()
        return found


class _Reporter:
    """Adds up what happens between two reports. The main process writes the reports and passes them on.

    Attributes:
        paused: seconds of saves and evaluations.
        skipped_images: of all steps.
    """

    COUNTS = ("skipped_images", "skipped_steps")

    def __init__(self, trainer: Trainer, progress: Callable[[StepReport], None] | None) -> None:
        self._trainer, self._progress = trainer, progress
        self._file = MetricsFile(trainer.folder, trainer.step) if trainer.world.is_main else None
        self._watch = CollapseWatch(trainer.config)
        self.paused, self.skipped_images, self._seconds_left = 0.0, 0, 0.0
        self._start()

    def _start(self) -> None:
        self._begin, self._first_step, self._waited = time.perf_counter(), self._trainer.step, 0.0
        self._counts = dict.fromkeys(self.COUNTS, 0.0)

    def __enter__(self) -> _Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves what is done inside out of the speed."""
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self.paused += seconds
        self._begin += seconds

    def add(self, metrics: dict[str, float], waited: float) -> None:
        """Counts a step that waited so many seconds for its images."""
        self._waited += waited
        self.skipped_images += int(metrics["skipped_images"])
        for name in self.COUNTS:
            self._counts[name] += metrics[name]

    def report(self, metrics: dict[str, float]) -> None:
        """Reports the metrics of the last step, the counts, and the speed since the last report."""
        step, run, seconds = self._trainer.step, self._trainer.config.run, time.perf_counter() - self._begin
        per_step = seconds / (step - self._first_step)
        speed = {"images_per_second": run.batch_size / per_step, "data_wait": self._waited / seconds}
        metrics = {name: value for name, value in metrics.items() if name != "stop"} | self._counts | speed
        self._seconds_left = (run.steps - step) * per_step
        self._start()
        report = self._write(metrics)
        if report is not None and (message := self._watch.message(report)):
            logger.warning(message)

    def evaluate(self, evaluation: _Evaluation, checkpoint: Path) -> None:
        """Reports the accuracies of the last step, in a report of their own."""
        with self.pause():
            self._write(evaluation.measure(checkpoint))

    def _write(self, metrics: dict[str, float]) -> StepReport | None:
        if self._file is None:
            return None
        report = StepReport(self._trainer.step, self._trainer.config.run.steps, metrics, self._seconds_left)
        self._file.write(report)
        if self._progress:
            self._progress(report)
        return report


def check_batch(config: PretrainingConfig, processes: int) -> None:
    """Raises InvalidValueError if the batch cannot be shared evenly."""
    run = config.run
    if run.batch_size % (processes * run.micro_batch):
        raise InvalidValueError(
            f"run.batch_size={run.batch_size} cannot be shared among {processes} processes in parts of "
            f"run.micro_batch={run.micro_batch} images: it must be a multiple of {processes * run.micro_batch}."
        )


def _claim(
    folder: Path,
    newest: Path | None,
    config: PretrainingConfig,
    table: ImageTable,
    start_from: str | os.PathLike[str] | None,
) -> None:
    """Writes what the run is to a folder without a checkpoint; a run that has one must be the same."""
    path = folder / MANIFEST
    own = {
        "config": config.to_dict(),
        "images": {"count": len(table), "sha256": table.sha256},
        "start_from": None if start_from is None else os.fspath(start_from),
    }
    if newest is None:
        with whole_file(path) as file:
            file.write(json.dumps(own, indent=1).encode())
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        other = PretrainingConfig.from_dict(there["config"])
        other = replace(other, run=replace(other.run, **{name: getattr(config.run, name) for name in CHANGEABLE}))
        differing = difference(other, config)
        names = [name for name in ("images", "start_from") if there[name] != own[name]]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidValueError(f"{str(path)!r} does not describe a run: {error!r}. Choose another folder.") from None
    if differing is None and names:
        differing = f"{names[0]}: {there[names[0]]} in the folder, {own[names[0]]} now"
    if differing is not None:
        raise InvalidValueError(
            f"{str(folder)!r} holds a run with other settings ({differing}). Continue it with its own, or choose "
            "another folder."
        )
