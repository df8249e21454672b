"""The stream of crops: the same for any number of workers and processes, whatever cannot be read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dinov2_fast.data.batches import NothingReadError
from dinov2_fast.data.sources import find_images
from dinov2_fast.pretraining import batches as module
from dinov2_fast.pretraining.batches import CropBatch, CropLoader
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
    at = [position for position in range(30) if module.image_at(0, position, len(table)) == number]
    assert changed == at
    failures = [failure for batch in replaced for failure in batch.failures]
    assert len(failures) >= 3
    assert all(path.endswith("4.png") and "truncated" in reason for path, reason in failures)


def test_one_image_fills_a_batch(table: ImageTable, tmp_path: Path) -> None:
    one = ImageTable(find_images(make_images(tmp_path, 1)))
    (batch,) = read(one, 1)
    assert len({batch.global_crops[0, row].numpy().tobytes() for row in range(6)}) == 6


def test_nothing_that_can_be_read_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(NothingReadError, match=r"100 images in a row(.|\n)*not an image of a known format"):
        read(ImageTable(find_images(tmp_path)), 1)


def test_closing_ends_the_workers(table: ImageTable) -> None:
    loader: Iterator[CropBatch] = CropLoader(table, CONFIG, workers=1)
    next(loader)
    loader.close()  # type: ignore[attr-defined]
    with pytest.raises(StopIteration):
        next(loader)
