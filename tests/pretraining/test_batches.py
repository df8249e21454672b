"""The stream of crops: the same for any number of workers and processes, whatever cannot be read."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields
from itertools import chain, count, islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_fast.data.batches import NothingReadError
from dinov2_fast.data.decoding import Decoded, Preparation, decode
from dinov2_fast.data.images import decode_image
from dinov2_fast.data.sources import find_images
from dinov2_fast.data.workers import Task
from dinov2_fast.pretraining import batches as module
from dinov2_fast.pretraining.batches import CropBatch, CropLoader
from dinov2_fast.pretraining.colours import draw_colours
from dinov2_fast.pretraining.crops import Crops
from dinov2_fast.pretraining.order import image_at, mix
from dinov2_fast.pretraining.sources import ImageTable
from tests.helpers.pretraining import make_images, small_config

CONFIG = small_config(run={"batch_size": 6, "micro_batch": 2})


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ImageTable:
    """Ten images, among them a grey, a CMYK and a tiny one."""
    folder = make_images(tmp_path_factory.mktemp("images"), 7)
    Image.new("L", (40, 30), 99).save(folder / "grey.png")
    Image.new("CMYK", (40, 30), (9, 99, 0, 50)).save(folder / "cmyk.jpg")
    Image.new("RGB", (1, 1), "blue").save(folder / "tiny.png")
    return ImageTable(find_images(folder))


@pytest.fixture(scope="module")
def damaged(table: ImageTable, tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageTable, int]:
    """The same images, of which one is truncated, and its number."""
    folder = tmp_path_factory.mktemp("damaged")
    for number in range(len(table)):
        content = Path(table[number].path).read_bytes()
        (folder / f"{number}.png").write_bytes(content[:60] if number == 4 else content)
    return ImageTable(find_images([folder / f"{number}.png" for number in range(len(table))])), 4


def read(table: ImageTable, count: int, **options: Any) -> list[CropBatch]:
    with closing(CropLoader(table, CONFIG, **options)) as loader:
        return list(islice(loader, count))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return bool(one == other)


def assert_same(ones: list[CropBatch], others: list[CropBatch]) -> None:
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        for field in fields(CropBatch):
            assert same(getattr(one, field.name), getattr(other, field.name)), field.name


def test_a_batch_has_the_crops_and_colours_of_its_images(table: ImageTable) -> None:
    (batch,) = read(table, 1)
    assert batch.global_crops.shape == (2, 6, 3, 42, 42)
    assert batch.local_crops.shape == (2, 6, 3, 28, 28)
    assert (len(batch.global_colours), len(batch.local_colours), batch.failures) == (12, 12, [])


@pytest.mark.parametrize(("n_images", "seed"), [(10, 0), (4, 0), (1, 0), (10, 1)])
def test_a_position_has_an_image_and_random_numbers_of_its_own(table: ImageTable, n_images: int, seed: int) -> None:
    """Also where there are fewer images than a batch has."""
    some, config = ImageTable(table[number] for number in range(n_images)), CONFIG.updated({"run": {"seed": seed}})
    crops = Crops(config.crops)
    with closing(CropLoader(some, config)) as loader:
        for step, batch in enumerate(islice(loader, 2)):
            for row in range(6):
                position = 6 * step + row
                path, own = some[image_at(seed, position, n_images)].path, mix(seed, position)
                expected = crops.split(crops.prepare(decode_image(Path(path).read_bytes()), own))
                assert np.array_equal(expected[0], batch.global_crops[:, row])
                assert np.array_equal(expected[1], batch.local_crops[:, row])
                colours = [*batch.global_colours[row::6], *batch.local_colours[row::6]]
                assert colours == draw_colours(own, config.crops)


def test_a_stream_that_begins_at_a_step_is_the_rest_of_the_whole(table: ImageTable) -> None:
    assert_same(read(table, 5)[3:], read(table, 2, first_step=3))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(damaged: tuple[ImageTable, int], workers: int) -> None:
    assert_same(read(damaged[0], 4), read(damaged[0], 4, workers=workers))


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_images_of_a_batch(table: ImageTable, size: int) -> None:
    whole = read(table, 3)
    for rank in range(size):
        part = slice(rank * 6 // size, (rank + 1) * 6 // size)
        for batch, own in zip(whole, read(table, 3, rank=rank, size=size), strict=True):
            assert torch.equal(batch.global_crops[:, part], own.global_crops)
            assert torch.equal(batch.local_crops[:, part], own.local_crops)
            assert [batch.global_colours[row] for row in range(*part.indices(6))] == own.global_colours[: 6 // size]


def test_an_image_that_cannot_be_read_is_replaced_and_no_other_position_changes(
    table: ImageTable, damaged: tuple[ImageTable, int]
) -> None:
    broken, number = damaged
    whole, replaced = read(table, 5), read(broken, 5)
    changed = [
        step * 6 + row
        for step, (one, other) in enumerate(zip(whole, replaced, strict=True))
        for row in range(6)
        if not torch.equal(one.global_crops[:, row], other.global_crops[:, row])
    ]
    at = [position for position in range(30) if image_at(0, position, len(table)) == number]
    assert changed == at
    failures = [failure for batch in replaced for failure in batch.failures]
    assert len(failures) >= 3
    assert all(path.endswith("4.png") and "truncated" in reason for path, reason in failures)


@pytest.mark.parametrize("ahead", [1, 5])
def test_workers_alone_touch_images_also_those_in_the_place_of_others(
    table: ImageTable, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So an image that ends a worker, or takes for ever, costs no more than one that cannot be read."""
    deadly = {table[number].path for number in (2, 4, 7)}
    expected: list[tuple[str, str]] = []

    def workers(tasks: Iterator[Task], preparation: Preparation, **_: Any) -> Iterator[Decoded]:
        asked = deque(islice(tasks, ahead))
        while True:
            image, number = asked.popleft()
            is_deadly = image.path in deadly
            yield Decoded(error="ended") if is_deadly else decode(image, preparation, number=number)
            asked.append(next(tasks))

    monkeypatch.setattr(module, "prepare_all", workers)
    found = read(table, 4)
    for position in range(24):
        attempts = (mix(0, position, attempt) % 10 for attempt in count(1))
        numbers = takewhile(lambda number: table[number].path in deadly, chain([image_at(0, position, 10)], attempts))
        expected += [(table[number].path, "ended") for number in numbers]
    assert [failure for batch in found for failure in batch.failures] == expected
    assert len(expected) > sum(image_at(0, position, 10) in (2, 4, 7) for position in range(24)) > 0


def test_a_worker_that_is_killed_changes_nothing(table: ImageTable) -> None:
    with closing(CropLoader(table, CONFIG, workers=2)) as loader:
        found = list(islice(loader, 1))
        for worker in multiprocessing.active_children():
            worker.kill()
        found += islice(loader, 3)
    assert_same(found, read(table, 4))


def test_nothing_that_can_be_read_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(NothingReadError, match=r"100 images in a row(.|\n)*not an image of a known format"):
        read(ImageTable(find_images(tmp_path)), 1)


def test_images_above_the_limit_cannot_be_read(table: ImageTable) -> None:
    with pytest.raises(NothingReadError, match="too large"):
        read(ImageTable([table[9]] * 2), 1, max_pixels=0)


def test_closing_ends_the_workers(table: ImageTable) -> None:
    loader = CropLoader(table, CONFIG, workers=1)
    next(loader)
    assert len(multiprocessing.active_children()) == 1
    loader.close()
    assert multiprocessing.active_children() == []
    with pytest.raises(StopIteration):
        next(loader)
