"""Batches of decoded images: fixed ranges, rows for what cannot be read, and smaller parts where memory runs out."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dinov2_fast.data.batches import read_batches, run_in_parts
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.data.sources import ImageSource
from dinov2_fast.errors import InvalidValueError

PROCESSOR = Dinov2ImageProcessor.for_size((14, 28))


@pytest.fixture
def sources(tmp_path: Path) -> list[ImageSource]:
    """Seven images, each of its own width and colour; the one at 2 is damaged."""
    for index in range(7):
        path = tmp_path / f"{index}.png"
        Image.new("RGB", (40 + index, 30), (30 * index, 0, 255)).save(path)
    (tmp_path / "2.png").write_bytes(b"no image")
    return [ImageSource(str(tmp_path / f"{index}.png")) for index in range(7)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_is_a_fixed_range_and_an_unreadable_image_is_a_row_without_pixels(
    sources: list[ImageSource], workers: int
) -> None:
    batches = list(read_batches(sources, PROCESSOR, batch_size=3, workers=workers))
    assert [len(batch.images) for batch in batches] == [3, 3, 1]
    assert [batch.rows for batch in batches] == [[0, 1], [0, 1, 2], [0]]
    images = [image for batch in batches for image in batch.images]
    assert [image.width for image in images] == [40, 41, None, 43, 44, 45, 46]
    assert [image.error is None for image in images] == [index != 2 for index in range(7)]
    assert all(image.sha256 and image.pixels is None for image in images)
    readable = [Image.open(source.path) for source in sources if not source.path.endswith("2.png")]
    assert torch.equal(torch.cat([batch.pixels for batch in batches]), PROCESSOR(readable).pixel_values)


def test_batches_begin_anew_with_each_group(sources: list[ImageSource]) -> None:
    batches = read_batches(sources, PROCESSOR, batch_size=2, group_size=3)
    assert [[image.width for image in batch.images] for batch in batches] == [[40, 41], [None], [43, 44], [45], [46]]


def test_a_batch_without_a_readable_image_has_no_pixels(sources: list[ImageSource]) -> None:
    (batch,) = read_batches(sources[2:3], PROCESSOR)
    assert (batch.rows, batch.pixels.shape, batch.pixels.dtype) == ([], (0, 3, 14, 28), torch.float32)
    assert list(read_batches([], PROCESSOR)) == []


def test_images_are_read_when_their_batch_is_asked_for(sources: list[ImageSource]) -> None:
    with closing(read_batches(iter(sources), PROCESSOR, batch_size=2)) as batches:
        next(batches)
        Path(sources[3].path).unlink()
        assert next(batches).images[1].transient


def test_pixels_are_bytes_where_the_model_normalizes(sources: list[ImageSource]) -> None:
    processor = Dinov2ImageProcessor(size=14, crop_size=14, do_rescale=False, do_normalize=False)
    assert {batch.pixels.dtype for batch in read_batches(sources, processor, batch_size=1)} == {torch.uint8}


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"group_size": 0}])
def test_sizes_below_one_are_refused(options: dict[str, int], sources: list[ImageSource]) -> None:
    with pytest.raises(InvalidValueError, match="at least 1"):
        next(read_batches(sources, PROCESSOR, **options))  # type: ignore[arg-type]


def test_a_processor_without_a_fixed_size_is_refused(sources: list[ImageSource]) -> None:
    with pytest.raises(InvalidValueError, match="differ in size"):
        next(read_batches(sources, Dinov2ImageProcessor(do_center_crop=False)))


class Memory:
    """Takes at most `most` images at a time; `calls` are the sizes it was given."""

    def __init__(self, most: int) -> None:
        self.most, self.calls = most, list[int]()

    def __call__(self, pixels: Tensor) -> list[float]:
        self.calls.append(len(pixels))
        if len(pixels) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pixels.flatten().tolist()


def test_parts_are_halved_until_memory_suffices() -> None:
    memory = Memory(3)
    parts, size = run_in_parts(memory, torch.arange(10.0), 32)
    assert (memory.calls, size) == ([10, 5, 2, 2, 2, 2, 2], 2)
    assert np.concatenate(parts).tolist() == list(range(10))
    assert run_in_parts(memory, torch.arange(0.0), 4) == ([], 4)


def test_memory_that_does_not_suffice_for_one_image_is_an_error() -> None:
    memory = Memory(0)
    with pytest.raises(torch.OutOfMemoryError):
        run_in_parts(memory, torch.arange(4.0), 2)
    assert memory.calls == [2, 1]


def test_other_errors_are_not_retried() -> None:
    def fail(pixels: Tensor) -> None:
        calls.append(len(pixels))
        raise RuntimeError("an illegal access")

    calls: list[int] = []
    with pytest.raises(RuntimeError, match="illegal"):
        run_in_parts(fail, torch.arange(4.0), 2)
    assert calls == [2]
