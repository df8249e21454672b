"""`evaluate_knn` and `evaluate_linear`: the evaluations of images in class folders, or of their stored features."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from dinov2_fast.errors import InvalidValueError
from dinov2_fast.evaluation.knn import NEIGHBOURS, TEMPERATURE, knn
from dinov2_fast.evaluation.labelled import (
    LabelledFeatures,
    ModelOptions,
    Progress,
    feature_names,
    number_classes,
    read_labelled,
)
from dinov2_fast.evaluation.linear import BATCH_SIZE, BLOCKS, LEARNING_RATES, STEPS, Probe, ProbeInputs, linear_probes
from dinov2_fast.evaluation.metrics import Accuracy
from dinov2_fast.inference.loading import find_device

logger = logging.getLogger("dinov2_fast")
_DEFAULT_OPTIONS = ModelOptions()


class LinearEvaluation(NamedTuple):
    """The features of train, val and test, and the linear classifiers."""

    sets: list[LabelledFeatures]
    probes: list[Probe]
    accuracies: list[Accuracy]  # of each probe on val
    best: int  # index of the probe that is best on val
    test: Accuracy | None  # of the best probe on test, if that was given


def evaluate_knn(
    train: str,
    val: str | None = None,
    *,
    options: ModelOptions = _DEFAULT_OPTIONS,
    neighbours: Sequence[int] | None = None,
    temperature: float = TEMPERATURE,
    n_per_class: Sequence[int | None] = (None,),
    n_tries: int = 1,
    progress: Progress | None = None,
) -> tuple[list[LabelledFeatures], dict[int | None, dict[int, Accuracy]]]:
    """Weighted k-NN by the class tokens of the last block: the features, and the accuracies by `n_per_class` and k.

    Args:
        train, val, options, progress: see `read_labelled`. Without `val`, the training images classify each other.
        neighbours: the values of k; by default 10, 20, 100 and 200 as far as images vote, or else their number.
        n_per_class: how many training images of each class vote, None for all; each number is evaluated.
        temperature, n_tries: see `knn`.

    Raises:
        ValueError, WeightsError, OSError: as `read_labelled` and `knn`.
    """
    if val is None and list(n_per_class) != [None]:
        raise InvalidValueError("n_per_class needs val: without it all training images but one vote.")
    sets = read_labelled([train] if val is None else [train, val], 1, options, progress)
    labels = number_classes([(each.source, each.classes) for each in sets])
    arrays = [array for each, numbers in zip(sets, labels, strict=True) for array in (each.tokens.cls[:, -1], numbers)]
    most = len(labels[0]) - (val is None)
    accuracies = {
        number: knn(
            *arrays,
            neighbours=neighbours or [k for k in NEIGHBOURS if k <= most] or [most],
            temperature=temperature,
            n_per_class=number,
            n_tries=n_tries,
            device=find_device(options.device),
        )
        for number in n_per_class
    }
    return sets, accuracies


def evaluate_linear(
    train: str,
    val: str,
    test: str | None = None,
    *,
    options: ModelOptions = _DEFAULT_OPTIONS,
    blocks: Sequence[int] | None = None,
    learning_rates: Sequence[float] | None = None,
    steps: int = STEPS,
    step_images: int = BATCH_SIZE,
    seed: int = 0,
    progress: Progress | None = None,
) -> LinearEvaluation:
    """Trains linear classifiers on `train`, chooses the best on `val`, and tests it on `test`.

    What stored features lack is logged as a warning, and the grid is smaller then.

    Args:
        train, val, test, options: see `read_labelled`.
        blocks: numbers of last blocks; by default 1 and 4, or 1 if the model or the stored features have fewer than 4.
        learning_rates: by default the reference's 13.
        steps, step_images, seed: the updates, the images in each, and the seed; see `linear_probes`.
        progress: called after each batch of images and each update.

    Raises:
        ValueError, WeightsError, OSError: as `read_labelled` and `linear_probes`, or for `blocks` that are not stored.
    """
    sets = read_labelled([train, val, *([test] if test else [])], max(blocks or BLOCKS), options, progress)
    labels = number_classes([(each.source, each.classes) for each in sets])
    probes = linear_probes(
        _common_inputs(sets),
        labels[0],
        blocks=_common_blocks(sets, blocks),
        learning_rates=learning_rates or LEARNING_RATES,
        steps=steps,
        batch_size=step_images,
        seed=seed,
        device=find_device(options.device),
        progress=(lambda done: progress("training", done, steps, "updates")) if progress else None,
    )
    accuracies = [probe.accuracy(sets[1].tokens, labels[1]) for probe in probes]
    best = max(range(len(probes)), key=lambda row: accuracies[row].top1)
    on_test = probes[best].accuracy(sets[2].tokens, labels[2]) if test else None
    return LinearEvaluation(sets, probes, accuracies, best, on_test)


def _common_blocks(sets: Sequence[LabelledFeatures], asked: Sequence[int] | None) -> list[int]:
    """The numbers of last blocks to try. One that stored features lack is an error if it was asked for, else logged."""
    fewest = min(sets, key=lambda each: each.tokens.cls.shape[1])
    available, depth = fewest.tokens.cls.shape[1], fewest.n_blocks
    wanted = asked or [n for n in BLOCKS if n <= depth]
    if max(wanted) > depth:
        raise InvalidValueError(f"The model has {depth} blocks; asked for {', '.join(map(str, wanted))}.")
    if max(wanted) > available:
        last = "the last block" if available == 1 else f"the last {available} blocks"
        held = f"{fewest.source!r} has the class tokens of {last} only"
        needed = f"dinov2-fast extract ... --features {','.join(feature_names(depth, max(wanted)))}"
        if asked:
            raise InvalidValueError(f"{held}; asked for {', '.join(map(str, asked))}. For more: {needed}")
        logger.warning("%s, so n = %d is not tried. For more: %s", held, max(wanted), needed)
    return [n for n in wanted if n <= available]


def _common_inputs(sets: Sequence[LabelledFeatures]) -> ProbeInputs:
    """The training tokens, without the mean of the patches if another set lacks it, which is logged."""
    for each in sets:
        if each.tokens.patch_mean is None:
            logger.warning("%r has no patch_mean, so only classifiers without it are tried.", each.source)
            return ProbeInputs(sets[0].tokens.cls)
    return sets[0].tokens
