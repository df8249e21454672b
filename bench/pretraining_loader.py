"""How many images a core cuts into crops in a second: rows of bench.pretraining with the unit images/core-s.

The same JPEG files of 500 x 375 px are read, decoded and made into batches by one process with one thread. Time is that
of its CPU, so other load matters little.

- dinov2_fast, crops: what our loader does, uint8 crops; a GPU adds the colours;
- dinov2_fast, crops+colours: with the colours on the CPU too, by batches: finished fp32 crops;
- reference: its `DataAugmentationDINO` (torchvision on PIL images) and its collate function: finished fp16 crops, and
  the masks, which we draw in the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from PIL import Image

from bench import harness, records
from bench.pretraining_batch import crops_text, make_loader
from bench.records import Row
from dinov2_fast.pretraining.colours import apply_colours
from dinov2_fast.pretraining.config import PretrainingConfig

IMAGES = 16  # of a batch
PASSES = 5
UNIT = "images/core-s"


def measure_loaders(
    config: PretrainingConfig, files: Sequence[str], reference: ModuleType | None, why: str | None
) -> list[Row]:
    """A row for each loader. They take turns, and a row has the median of its passes over the files.

    Args:
        config: with batches of as many images as there are files.
        reference: its module `dinov2.train.train`; without it `why` says why there is none.
    """
    runs: dict[tuple[str, str], Callable[[], Any] | None] = {
        ("dinov2_fast", "crops"): our_run(config, files, colours=False),
        ("dinov2_fast", "crops+colours"): our_run(config, files, colours=True),
        ("reference", "crops+colours"): reference_run(reference, config, files) if reference else None,
    }
    keys = {"model": "loader", "resolution": crops_text(config.crops), "batch": len(files), "mode": "eager"}
    rows = {run: keys | {"implementation": run[0], "output": run[1]} for run in runs}
    times = cpu_times({name: run for name, run in runs.items() if run})
    for name, row in rows.items():
        if name in times:
            row |= harness.speed(times[name], "images/s", len(files)) | {"unit": UNIT}
        else:
            row |= records.missing(why or "")
    return list(rows.values())


def cpu_times(runs: dict[Any, Callable[[], Any]]) -> dict[Any, list[float]]:
    """The seconds of a core that each run takes, PASSES times in turn, after a first time that is not counted."""
    times: dict[Any, list[float]] = {name: [] for name in runs}
    names, threads = list(runs), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for turn in range(PASSES + 1):
            for name in (names[(turn + place) % len(names)] for place in range(len(names))):
                begin = time.process_time()
                runs[name]()
                times[name].append(time.process_time() - begin)
    finally:
        torch.set_num_threads(threads)
    return {name: taken[1:] for name, taken in times.items()}


def of_images(config: PretrainingConfig, count: int) -> PretrainingConfig:
    """The configuration with batches of another size."""
    run = replace(config.run, batch_size=count, micro_batch=count)
    return replace(config, run=run, losses=replace(config.losses, koleo_group=count))


def our_run(config: PretrainingConfig, files: Sequence[str], *, colours: bool) -> Callable[[], Any]:
    """Makes the next batch of our loader."""
    batches = make_loader(config, files)

    def run() -> Any:
        crops = next(batches)
        if not colours:
            return crops
        return [
            apply_colours(crops.global_crops, crops.global_colours, torch.float32),
            apply_colours(crops.local_crops, crops.local_colours, torch.float32),
        ]

    return run


def reference_run(reference: ModuleType, config: PretrainingConfig, files: Sequence[str]) -> Callable[[], Any]:
    """Makes a batch as the reference's workers do: all crops of each image, then the collate function with masks."""
    crops, masks, side = config.crops, config.masks, config.grid
    augment = reference.DataAugmentationDINO(
        crops.global_scale,
        crops.local_scale,
        crops.n_local,
        global_crops_size=crops.global_size,
        local_crops_size=crops.local_size,
    )
    generate_mask = reference.MaskingGenerator(input_size=(side, side), max_num_patches=0.5 * side * side)

    def run() -> Any:
        samples = [(augment(Image.open(path).convert("RGB")), ()) for path in files]
        return reference.collate_data_and_cast(
            samples, masks.ratio, masks.probability, torch.half, side * side, generate_mask
        )

    return run
