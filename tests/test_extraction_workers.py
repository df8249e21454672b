"""Worker processes that decode: a death or a delay costs one picture, signals are not theirs, memory is bounded."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov2_fast.extraction import workers as pool
from dinov2_fast.extraction.decoding import Decoded, decode
from dinov2_fast.extraction.inputs import Picture
from dinov2_fast.extraction.workers import decode_all
from dinov2_fast.image_processor import Dinov2ImageProcessor

ROOT = Path(__file__).parents[1]


@pytest.fixture
def pictures(tmp_path: Path) -> list[Picture]:
    """Twelve pictures, each of one colour and of its own width."""
    found = []
    for index in range(12):
        path = tmp_path / f"{index}.png"
        Image.new("RGB", (20 + index, 30), (20 * index, 0, 255)).save(path)
        found.append(Picture(str(path)))
    return found


class Sabotaged(Dinov2ImageProcessor):
    """A processor that does something else in the worker, for pictures of the widths in `at`."""

    def __init__(self, what: str, at: tuple[int, ...]) -> None:
        super().__init__(size=14, crop_size=14, do_rescale=False, do_normalize=False)
        self.what, self.at = what, at

    def _process(self, image: Any, data_format: str | None) -> Any:
        if image.width in self.at:
            if self.what == "die":
                os._exit(9)
            if self.what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.what == "quit":
                sys.exit(7)
            if self.what == "raise":
                raise RuntimeError("a fault of the decoder")
            if self.what == "limit":
                raise RuntimeError(f"Pillow's limit is {Image.MAX_IMAGE_PIXELS}")
            time.sleep(1000)
        return super()._process(image, data_format)


def check(found: list[Decoded], pictures: list[Picture], bad: dict[int, str]) -> None:
    assert len(found) == len(pictures)
    for index, (picture, decoded) in enumerate(zip(pictures, found, strict=True)):
        if index in bad:
            assert decoded.error == bad[index], index
            continue
        expected = decode(picture, Sabotaged("", ()))
        assert (decoded.error, decoded.width, decoded.sha256) == (None, 20 + index, expected.sha256)
        assert decoded.pixels is not None
        np.testing.assert_array_equal(decoded.pixels, expected.pixels)


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("die", "the process that decoded it ended (exit code 9)"),
        ("killed", "the process that decoded it ended (SIGKILL)"),
        ("quit", "the process that decoded it ended (exit code 7)"),
    ],
)
def test_a_worker_that_dies_costs_one_picture(pictures: list[Picture], what: str, error: str) -> None:
    workers = 1 if what == "die" else 2
    found = list(decode_all(pictures, Sabotaged(what, (20, 24, 25, 31)), workers=workers, ahead=5))
    check(found, pictures, dict.fromkeys((0, 4, 5, 11), error))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_of_the_decoder_costs_one_picture(pictures: list[Picture], workers: int) -> None:
    found = list(decode_all(pictures, Sabotaged("raise", (21,)), workers=workers))
    check(found, pictures, {1: "cannot be processed: a fault of the decoder"})


def test_pillows_own_limit_is_out_of_use(pictures: list[Picture]) -> None:
    found = list(decode_all(pictures, Sabotaged("limit", at=(20,)), workers=1))
    assert found[0].error == "cannot be processed: Pillow's limit is None"


def test_a_picture_that_takes_too_long_is_given_up(pictures: list[Picture]) -> None:
    found = list(decode_all(pictures, Sabotaged("hang", (22, 23)), workers=2, ahead=6, max_seconds=1.5))
    check(found, pictures, dict.fromkeys((2, 3), "not decoded within 1.5 s"))


def test_waiting_for_work_is_not_taking_long(pictures: list[Picture]) -> None:
    """What counts is the time since a worker got a task, not since its last answer, and answers that wait count."""
    decoded = decode_all(pictures, Sabotaged("", ()), workers=1, ahead=2, max_seconds=0.5)
    found = []
    for picture in decoded:
        found.append(picture)
        if len(found) in (2, 5):
            time.sleep(1)
    check(found, pictures, {})


def test_a_worker_that_dies_while_it_waits_costs_nothing(pictures: list[Picture]) -> None:
    decoded = decode_all(pictures, Sabotaged("", ()), workers=1, ahead=2)
    found = [next(decoded)]
    time.sleep(0.5)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    worker.join()
    check([*found, *decoded], pictures, {2: "the process that decoded it ended (SIGKILL)"})


def test_a_worker_that_cannot_start_is_an_error(pictures: list[Picture], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_work", time.sleep)  # fails on its arguments
    with pytest.raises(RuntimeError, match="ended before it could begin"):
        list(decode_all(pictures, Sabotaged("", ()), workers=1))
    assert multiprocessing.active_children() == []


def test_decoding_ahead_is_bounded(pictures: list[Picture]) -> None:
    taken = 0

    def endless() -> Iterator[Picture]:
        nonlocal taken
        while True:
            taken += 1
            yield pictures[0]

    decoded = decode_all(endless(), Sabotaged("", ()), workers=1, ahead=4)
    for _ in range(3):
        next(decoded)
    decoded.close()
    assert taken == 4 + 2
    assert multiprocessing.active_children() == []


def test_pixels_on_their_way_are_bounded_in_bytes(pictures: list[Picture], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "SHARED_BYTES", 5 * 3 * 14 * 14)
    processor = Sabotaged("", ())
    for workers, slots in ((1, 5), (4, 8)):
        some = pool._Pool(workers, processor, 10**6, 60, ahead=40)
        assert some._pixels.shape == (slots, 3, 14, 14)
        check(list(some.decode(iter(pictures))), pictures, {})
        some.close()


def test_workers_go_on_while_nobody_asks(pictures: list[Picture]) -> None:
    decoded = decode_all(pictures * 4, Sabotaged("", ()), workers=1, ahead=40)
    next(decoded)
    time.sleep(1)
    begin = time.perf_counter()
    for _ in range(39):
        next(decoded)
    assert time.perf_counter() - begin < 0.1  # all were there
    decoded.close()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signals_to_the_group_do_not_reach_the_workers(pictures: list[Picture], name: str) -> None:
    decoded = decode_all(pictures, Sabotaged("", ()), workers=1, ahead=2)
    found = [next(decoded)]
    time.sleep(0.5)  # until the worker waits for work, where the interrupt would end it
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.Signals[name])
    check([*found, *decoded], pictures, {})


def test_signals_do_not_reach_the_first_worker_of_a_program(pictures: list[Picture]) -> None:
    """It starts when multiprocessing has started nothing else yet."""
    code = (
        "import multiprocessing, os, signal, time\n"
        "from dinov2_fast.extraction.inputs import Picture\n"
        "from dinov2_fast.extraction.workers import decode_all\n"
        "from dinov2_fast.image_processor import Dinov2ImageProcessor\n"
        "if __name__ == '__main__':\n"
        f"    decoded = decode_all([Picture({pictures[0].path!r})] * 9, Dinov2ImageProcessor(), workers=1, ahead=2)\n"
        "    found = [next(decoded)]\n"
        "    for name in ('SIGINT', 'SIGTERM'):\n"
        "        os.kill(multiprocessing.active_children()[0].pid, signal.Signals[name])\n"
        "    time.sleep(0.5)\n"
        "    print([picture.error for picture in [*found, *decoded]] == [None] * 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_workers_end_with_a_process_that_is_killed(pictures: list[Picture]) -> None:
    code = (
        "import multiprocessing, sys, time\n"
        "from dinov2_fast.extraction.inputs import Picture\n"
        "from dinov2_fast.extraction.workers import decode_all\n"
        "from dinov2_fast.image_processor import Dinov2ImageProcessor\n"
        "if __name__ == '__main__':\n"
        f"    decoded = decode_all([Picture({pictures[0].path!r})] * 99, Dinov2ImageProcessor(), workers=1, ahead=4)\n"
        "    next(decoded)\n"
        "    print(multiprocessing.active_children()[0].pid, flush=True)\n"
        "    time.sleep(1000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        process.kill()
    for _ in range(100):
        if not running(worker):
            return
        time.sleep(0.1)
    pytest.fail("the worker outlives its parent")


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_decoding_needs_no_torch_and_no_pyarrow() -> None:
    code = "import sys, dinov2_fast.extraction.workers; sys.exit(bool({'torch', 'pyarrow'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
