"""Worker processes that decode: a death or a delay costs one image, signals do not reach them, memory is bounded."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Container, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov2_fast.data import workers as pool
from dinov2_fast.data.decoding import Decoded, decode
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.data.sources import ImageSource
from dinov2_fast.data.workers import decode_all, prepare_all

ROOT = Path(__file__).parents[2]


@pytest.fixture
def images(tmp_path: Path) -> list[ImageSource]:
    """Twelve images, each of one colour and of its own width."""
    found = []
    for index in range(12):
        path = tmp_path / f"{index}.png"
        Image.new("RGB", (20 + index, 30), (20 * index, 0, 255)).save(path)
        found.append(ImageSource(str(path)))
    return found


class Sabotaged(Dinov2ImageProcessor):
    """A processor that does something else in the worker, for images of the widths in `at`."""

    def __init__(self, what: str, at: Container[int], once: Path | None = None) -> None:
        super().__init__(size=14, crop_size=14, do_rescale=False, do_normalize=False)
        self.what, self.at, self.once = what, at, once

    def _process(self, image: Any, data_format: str | None) -> Any:
        if image.width in self.at and not self._was_done(image.width):
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
            time.sleep(0.3 if self.what == "slow" else 1000)
        return super()._process(image, data_format)

    def _was_done(self, width: int) -> bool:
        """Whether it was done for this width, where it is to be done once."""
        if self.once is None:
            return False
        done = self.once / "done" / str(width)
        done.parent.mkdir(exist_ok=True)
        found = done.exists()
        done.touch()
        return found


class Numbers:
    """Makes an array of the number of the task and the width of the image; ends the worker once at the number 1003."""

    background, output_shape, output_dtype = None, (2,), np.dtype(np.int64)

    def __init__(self, folder: Path) -> None:
        self.done = folder / "done"

    def prepare(self, image: Image.Image, number: int) -> Any:
        if number == 1003 and not self.done.exists():
            self.done.touch()
            os._exit(9)
        return np.array([number, image.width])


def check(found: list[Decoded], images: list[ImageSource], bad: dict[int, str]) -> None:
    assert len(found) == len(images)
    for index, (image, decoded) in enumerate(zip(images, found, strict=True)):
        if index in bad:
            assert (decoded.error, decoded.transient) == (bad[index], "ended" in bad[index] or "within" in bad[index])
            continue
        expected = decode(image, Sabotaged("", ()))
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
def test_a_worker_that_dies_costs_one_image(images: list[ImageSource], what: str, error: str) -> None:
    workers = 1 if what == "die" else 2
    found = list(decode_all(images, Sabotaged(what, (20, 24, 25, 31)), workers=workers, ahead=5))
    check(found, images, dict.fromkeys((0, 4, 5, 11), error))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_exception_in_the_decoder_costs_one_image(images: list[ImageSource], workers: int) -> None:
    found = list(decode_all(images, Sabotaged("raise", (21,)), workers=workers))
    check(found, images, {1: "cannot be processed: a fault of the decoder"})


def test_workers_do_not_apply_pillows_own_limit(images: list[ImageSource]) -> None:
    found = list(decode_all(images, Sabotaged("limit", at=(20,)), workers=1))
    assert found[0].error == "cannot be processed: Pillow's limit is None"


def test_an_image_that_takes_too_long_gets_an_error(images: list[ImageSource]) -> None:
    found = list(decode_all(images, Sabotaged("hang", (22, 23)), workers=2, ahead=6, max_seconds=1.5))
    check(found, images, dict.fromkeys((2, 3), "not decoded within 1.5 s"))


def test_time_in_which_no_image_is_asked_for_does_not_count(images: list[ImageSource]) -> None:
    decoded = decode_all(images, Sabotaged("", ()), workers=1, ahead=2, max_seconds=0.5)
    found = []
    for image in decoded:
        found.append(image)
        if len(found) in (2, 5):
            time.sleep(1)
    check(found, images, {})


def test_the_death_of_an_idle_worker_costs_no_image(images: list[ImageSource]) -> None:
    decoded = decode_all(images, Sabotaged("", ()), workers=1, ahead=2)
    found = [next(decoded)]
    time.sleep(0.5)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    worker.join()
    check([*found, *decoded], images, {})


@pytest.mark.parametrize("what", ["die", "hang"])
def test_a_failure_that_happens_once_costs_no_image(images: list[ImageSource], tmp_path: Path, what: str) -> None:
    """The machine was the cause, as where memory ran out: the image is tried once more."""
    processor = Sabotaged(what, (20, 25), once=tmp_path)
    check(list(decode_all(images, processor, workers=2, max_seconds=1.5)), images, {})
    assert sorted(os.listdir(tmp_path / "done")) == ["20", "25"]


def test_each_task_has_its_number_also_after_a_death(images: list[ImageSource], tmp_path: Path) -> None:
    tasks = [(image, 1000 + index) for index, image in enumerate(images)]
    found = list(prepare_all(tasks, Numbers(tmp_path), workers=1, ahead=5))
    assert [image.error for image in found] == [None] * 12
    assert np.array_equal(
        np.stack([image.pixels for image in found if image.pixels is not None]),
        [(1000 + index, 20 + index) for index in range(12)],
    )
    assert (tmp_path / "done").exists()


def test_time_in_which_the_job_was_stopped_does_not_count(
    images: list[ImageSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the process that waits, a stop is a wait that took far longer than it asked for."""
    hours = itertools.count(0, 3600)
    monkeypatch.setattr(pool, "time", SimpleNamespace(monotonic=lambda: float(next(hours))))
    check(list(decode_all(images[:3], Sabotaged("slow", (20, 21, 22)), workers=1, max_seconds=30)), images[:3], {})


def test_a_job_that_is_stopped_and_continued_decodes_everything(images: list[ImageSource]) -> None:
    code = (
        "import os, signal, sys\n"
        "from dinov2_fast.data.sources import ImageSource\n"
        "from dinov2_fast.data.workers import decode_all\n"
        "from tests.data.test_workers import Sabotaged\n"
        "if __name__ == '__main__':\n"
        "    images = [ImageSource(path) for path in sys.argv[1:]] * 2\n"
        "    decoded = decode_all(images, Sabotaged('slow', range(99)), workers=1, max_seconds=1.5)\n"
        "    found = [next(decoded)]\n"
        "    print('begun', flush=True)\n"
        "    print([image.error for image in [*found, *decoded]] == [None] * 8)\n"
    )
    command = [sys.executable, "-c", code, *(image.path for image in images[:4])]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        for _ in range(2):  # of which the second would find the image that is tried once more
            os.killpg(process.pid, signal.SIGSTOP)
            time.sleep(2)
            os.killpg(process.pid, signal.SIGCONT)
            time.sleep(0.1)
        assert process.stdout.read() == "True\n"


def test_a_worker_that_cannot_start_is_an_error(images: list[ImageSource], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_work", time.sleep)  # fails on its arguments
    with pytest.raises(RuntimeError, match=r"ended before it could begin \(exit code 1\)"):
        list(decode_all(images, Sabotaged("", ()), workers=1))
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_a_worker_that_is_ended_or_stopped_while_it_starts_is_replaced(
    images: list[ImageSource], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "SECONDS_TO_START", 8)
    decoded = decode_all(interrupted_start(images, name), Sabotaged("", ()), workers=1, ahead=5)
    check(list(decoded), images, {})


def test_workers_that_are_ended_at_every_start_are_an_error(
    images: list[ImageSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = pool._Worker.__init__

    def killed(worker: Any, *arguments: Any, **options: Any) -> None:
        start(worker, *arguments, **options)
        worker._process.kill()

    monkeypatch.setattr(pool._Worker, "__init__", killed)
    with pytest.raises(RuntimeError, match=r"ended before it could begin \(SIGKILL\)"):
        list(decode_all(images, Sabotaged("", ()), workers=1))


def test_workers_that_are_never_ready_in_time_are_an_error(
    images: list[ImageSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "SECONDS_TO_START", 1e-6)
    monkeypatch.setattr(pool, "STEP", 1e-3)
    with pytest.raises(RuntimeError, match=r"ended before it could begin \(not ready in 1e-06 s\)"):
        list(decode_all(images, Sabotaged("", ()), workers=1))


def interrupted_start(images: list[ImageSource], name: str) -> Iterator[ImageSource]:
    """The images, for which a pool asks when its workers have only just been started."""
    for worker in multiprocessing.active_children():
        assert worker.pid is not None
        os.kill(worker.pid, signal.Signals[name])
    yield from images


def test_long_names_do_not_block_the_pipe_of_a_hanging_worker(images: list[ImageSource]) -> None:
    folder, name = os.path.split(images[0].path)
    long = ImageSource(f"{folder}/{'./' * 1800}{name}")
    slow = ImageSource(f"{folder}/{'./' * 1800}1.png")
    begin = time.monotonic()
    found = list(decode_all([slow, *[long] * 200], Sabotaged("hang", (21,)), workers=1, ahead=256, max_seconds=1))
    assert [image.error for image in found] == ["not decoded within 1 s", *[None] * 200]
    assert time.monotonic() - begin < 60


def test_decoding_ahead_is_bounded(images: list[ImageSource]) -> None:
    taken = 0

    def endless() -> Iterator[ImageSource]:
        nonlocal taken
        while True:
            taken += 1
            yield images[0]

    decoded = decode_all(endless(), Sabotaged("", ()), workers=1, ahead=4)
    for _ in range(3):
        next(decoded)
    decoded.close()
    assert taken == 4 + 2
    assert multiprocessing.active_children() == []


def test_shared_memory_is_bounded_in_bytes(images: list[ImageSource], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "SHARED_BYTES", 5 * 3 * 14 * 14)
    processor = Sabotaged("", ())
    for workers, slots in ((1, 5), (4, 8)):
        some = pool._Pool(workers, processor, 10**6, 60, ahead=40)
        assert some._pixels.shape == (slots, 3, 14, 14)
        check(list(some.decode((image, 0) for image in images)), images, {})
        some.close()


def test_workers_continue_while_no_image_is_asked_for(images: list[ImageSource]) -> None:
    decoded = decode_all(images * 4, Sabotaged("", ()), workers=1, ahead=40)
    next(decoded)
    time.sleep(1)
    begin = time.perf_counter()
    for _ in range(39):
        next(decoded)
    assert time.perf_counter() - begin < 0.1  # all were there
    decoded.close()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signals_to_the_group_do_not_reach_the_workers(images: list[ImageSource], name: str) -> None:
    decoded = decode_all(images, Sabotaged("", ()), workers=1, ahead=2)
    found = [next(decoded)]
    time.sleep(0.5)  # until the worker waits for work, where the interrupt would end it
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.Signals[name])
    check([*found, *decoded], images, {})


def test_a_signal_received_by_another_thread_does_not_interrupt_a_start() -> None:
    ended, done = threading.Event(), []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    other = threading.Thread(target=ended.wait)
    other.start()

    def start() -> None:
        with pool._signals_blocked():
            signal.pthread_kill(other.ident or 0, signal.SIGINT)
            time.sleep(0.2)
            done.append("started")

    try:
        with pytest.raises(KeyboardInterrupt):
            start()
    finally:
        ended.set()
        other.join()
        after = signal.signal(signal.SIGINT, before)
    assert done == ["started"]
    assert after is signal.default_int_handler


def test_signals_do_not_reach_the_first_worker_of_a_process(images: list[ImageSource]) -> None:
    """It starts when multiprocessing has started nothing else yet."""
    code = (
        "import multiprocessing, os, signal, time\n"
        "from dinov2_fast.data.sources import ImageSource\n"
        "from dinov2_fast.data.workers import decode_all\n"
        "from dinov2_fast.data.image_processor import Dinov2ImageProcessor\n"
        "if __name__ == '__main__':\n"
        f"    decoded = decode_all([ImageSource({images[0].path!r})] * 9, Dinov2ImageProcessor(), workers=1, ahead=2)\n"
        "    found = [next(decoded)]\n"
        "    for name in ('SIGINT', 'SIGTERM'):\n"
        "        os.kill(multiprocessing.active_children()[0].pid, signal.Signals[name])\n"
        "    time.sleep(0.5)\n"
        "    print([image.error for image in [*found, *decoded]] == [None] * 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_workers_end_with_a_process_that_is_killed(images: list[ImageSource]) -> None:
    code = (
        "import multiprocessing, sys, time\n"
        "from dinov2_fast.data.sources import ImageSource\n"
        "from dinov2_fast.data.workers import decode_all\n"
        "from dinov2_fast.data.image_processor import Dinov2ImageProcessor\n"
        "if __name__ == '__main__':\n"
        f"    found = [ImageSource({images[0].path!r})] * 99\n"
        "    decoded = decode_all(found, Dinov2ImageProcessor(), workers=1, ahead=4)\n"
        "    next(decoded)\n"
        "    print(multiprocessing.active_children()[0].pid, flush=True)\n"
        "    time.sleep(1000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        process.kill()
    assert_ends(worker)


def test_busy_workers_end_with_a_process_that_is_killed(images: list[ImageSource]) -> None:
    code = (
        "import multiprocessing, sys, time\n"
        "from dinov2_fast.data.sources import ImageSource\n"
        "from dinov2_fast.data.workers import decode_all\n"
        "from tests.data.test_workers import Sabotaged\n"
        "if __name__ == '__main__':\n"
        "    images = [ImageSource(path) for path in sys.argv[1:]]\n"
        "    decoded = decode_all(images, Sabotaged('hang', (21,)), workers=1)\n"
        "    next(decoded)\n"
        "    time.sleep(0.5)\n"
        "    print(multiprocessing.active_children()[0].pid, flush=True)\n"
        "    time.sleep(1000)\n"
    )
    command = [sys.executable, "-c", code, *(image.path for image in images)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        process.kill()
    assert_ends(worker)


def assert_ends(pid: int) -> None:
    for _ in range(100):
        if not running(pid):
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the worker outlives its parent")


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_decoding_needs_no_torch_and_no_pyarrow() -> None:
    code = "import sys, dinov2_fast.data.workers; sys.exit(bool({'torch', 'pyarrow'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
