"""Decoding images in order, here or in worker processes that may die or hang.

Each worker is a process with a pipe for tasks and answers; pixels come back through shared memory, in slots. A worker
has several tasks waiting, so that all of them go on while the model runs and nobody reads answers. It does them in
order: when it dies, or takes too long, the first unanswered one is the cause. The worker that takes its place tries
that one once more, since the machine may have been the cause (memory ran out, the job was stopped), and does the
others.

Time counts while this process waits for a worker. When it does something else, or the whole job is stopped, the limits
stand still.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dinov2_fast.data.decoding import Decoded, decode
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.data.images import MAX_PIXELS, own_process
from dinov2_fast.data.sources import ImageSource
from dinov2_fast.errors import InvalidStateError

MAX_SECONDS = 60.0
SECONDS_TO_START = 60.0  # where many processes import at once from a slow disk, some take tens
SHARED_BYTES = 1 << 28  # of pixels on their way, as long as each worker has two images
SECONDS_TO_DIE = 5.0  # one that waits for a disk that does not answer is left to the system
TASKS = 64  # that a worker may have: with as many answers unread, its pipe is not full
TASK_BYTES = 1 << 15  # of the names of these tasks, for the same reason: sending must never wait
STARTS = 3  # that a worker may need, where the system ends it before it begins
STEP = 1.0  # seconds of one wait; where it took longer the job was stopped, and no more than these count

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_context = multiprocessing.get_context("spawn")


def decode_all(
    images: Iterable[ImageSource],
    processor: Dinov2ImageProcessor,
    *,
    max_pixels: int = MAX_PIXELS,
    max_seconds: float = MAX_SECONDS,
    workers: int = 0,
    ahead: int = 64,
) -> Generator[Decoded, None, None]:
    """Decodes in the order of `images`; with `workers` processes, about `ahead` images before they are asked for.

    The processes are spawned: a script that calls this needs the usual ``if __name__ == "__main__":``. Close the
    iterator to stop them early. An image at which a worker dies, or for which this process would wait more than
    `max_seconds`, is tried once more, and then gets an error. Without workers there is no limit of time.

    Args:
        images: where they are.
        processor: its outputs must have one size.

    Raises:
        RuntimeError: a worker cannot start.
    """
    if not workers:
        for image in images:
            yield decode(image, processor, max_pixels)
        return
    pool = _Pool(workers, processor, max_pixels, max_seconds, ahead)
    try:
        yield from pool.decode(iter(images))
    finally:
        pool.close()


class _Pool:
    """Workers, the slots they write to, and the answers that have come."""

    def __init__(
        self, workers: int, processor: Dinov2ImageProcessor, max_pixels: int, max_seconds: float, ahead: int
    ) -> None:
        height, width = processor.output_size or (0, 0)
        dtype = pixel_dtype(processor)
        size = 3 * height * width * dtype.itemsize
        slots = max(min(ahead, TASKS * workers, SHARED_BYTES // size), 2 * workers)
        memory: Any = _context.RawArray(ctypes.c_uint8, slots * size)
        self._pixels = np.frombuffer(memory, dtype).reshape(slots, 3, height, width)
        self._arguments = memory, processor, max_pixels
        self._seconds = max_seconds
        self._answers: dict[int, Decoded] = {}
        self._workers: list[_Worker] = []
        for _ in range(workers):
            self._workers.append(_Worker(self._arguments))

    def decode(self, images: Iterator[ImageSource]) -> Generator[Decoded, None, None]:
        """The images' answers, in order."""
        sent = taken = 0
        while True:
            while sent - taken < len(self._pixels) and (worker := self._free_worker()):
                if (image := next(images, None)) is None:
                    break
                worker.send(_Task(sent, sent % len(self._pixels), image))
                sent += 1
            if taken == sent:
                return
            while taken not in self._answers:
                self._receive()
            answer = self._answers.pop(taken)
            if answer.error is None:
                answer = replace(answer, pixels=self._pixels[taken % len(self._pixels)].copy())
            taken += 1
            yield answer

    def _free_worker(self) -> _Worker | None:
        """The one with the fewest tasks, if it may have one more."""
        worker = min(self._workers, key=lambda worker: len(worker.tasks))
        return worker if worker.has_room() else None

    def _receive(self) -> None:
        """Waits for answers, takes all that have come, and replaces workers that are gone or overdue."""
        begin = time.monotonic()
        wait([worker.connection for worker in self._workers], STEP)
        waited = min(time.monotonic() - begin, STEP)
        for place, worker in enumerate(self._workers):
            worker.add_time(waited)
            try:
                self._answers.update(worker.answers())
            except (EOFError, OSError):
                self._replace(place, f"the process that decoded it ended ({worker.end(patience=1)})")
            else:
                if worker.is_overdue(self._seconds):
                    worker.end()
                    self._replace(place, f"not decoded within {self._seconds:g} s")

    def _replace(self, place: int, error: str) -> None:
        """Puts a worker in the place of one that has ended; `error` is that of the task it was at."""
        old = self._workers[place]
        tasks = list(old.tasks)
        if not old.has_begun and (old.exit_code >= 0 or old.starts == STARTS):
            raise InvalidStateError(
                f"A process for decoding ended before it could begin ({old.how_it_ended}). A script needs `if __name__ "
                "== '__main__':` around what it does; otherwise see what the process printed and whether memory "
                "suffices, or use workers=0."
            )
        if old.has_begun and tasks:  # otherwise no task is the cause
            if tasks[0].again:
                self._answers[tasks.pop(0).number] = Decoded(error=error, transient=True)
            else:
                tasks[0] = tasks[0]._replace(again=True)
        self._workers[place] = _Worker(self._arguments, starts=1 if old.has_begun else old.starts + 1)
        for task in tasks:
            self._workers[place].send(task)

    def close(self) -> None:
        """Ends the processes; what they are at is lost."""
        for worker in self._workers:
            worker.end()


class _Task(NamedTuple):
    number: int
    slot: int
    image: ImageSource
    again: bool = False  # a worker has died of it, or was ended

    @property
    def nbytes(self) -> int:
        """About what it takes in a pipe."""
        return len(self.image.path) + len(self.image.archive or "")


class _Worker:
    """A process that decodes, and the tasks that it has not answered; `starts` - 1 before it could not begin."""

    def __init__(self, arguments: tuple[Any, ...], starts: int = 1) -> None:
        self.connection, theirs = _context.Pipe()
        self._process = _context.Process(target=_work, args=(theirs, *arguments), daemon=True)
        with _signals_blocked():
            self._process.start()
        theirs.close()
        self.tasks: deque[_Task] = deque()
        self.starts, self.has_begun = starts, False
        self._waited = 0.0  # seconds for its present task, or for its start

    def has_room(self) -> bool:
        """Whether one more task can be sent without waiting for the process."""
        return len(self.tasks) < TASKS and sum(task.nbytes for task in self.tasks) < TASK_BYTES

    def send(self, task: _Task) -> None:
        """Gives it one more task."""
        self.tasks.append(task)
        with suppress(OSError):  # it has ended, which is noticed when its answers are read
            self.connection.send((task.slot, task.image))

    def answers(self) -> dict[int, Decoded]:
        """The answers that have come, without pixels, by the number of their task.

        Raises:
            EOFError, OSError: the process has ended, and all its answers were taken before.
        """
        found: dict[int, Decoded] = {}
        while self.connection.poll():
            try:
                answer = self.connection.recv()
            except (EOFError, OSError):
                if found:
                    break
                raise
            self._waited = 0.0
            if self.has_begun:
                found[self.tasks.popleft().number] = answer
            self.has_begun = True
        return found

    def add_time(self, seconds: float) -> None:
        """Counts the time that was waited for its present task, or for its start."""
        if self.tasks or not self.has_begun:
            self._waited += seconds

    def is_overdue(self, seconds: float) -> bool:
        """Whether more was waited for its present task than `seconds`, or too long for its start."""
        return self._waited > (seconds if self.has_begun else SECONDS_TO_START)

    def end(self, patience: float = 0) -> str:
        """Ends the process, if it does not within `patience` seconds by itself; says how it ended."""
        self.connection.close()
        self._process.join(patience)
        self._process.kill()
        self._process.join(SECONDS_TO_DIE)
        return self.how_it_ended

    @property
    def exit_code(self) -> int:
        """Of a process that has ended, negative where a signal ended it."""
        return self._process.exitcode or 0

    @property
    def how_it_ended(self) -> str:
        """The exit code, or the signal, in words."""
        code = self.exit_code
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _work(connection: Connection, memory: Any, processor: Dinov2ImageProcessor, max_pixels: int) -> None:
    """What a worker does until its pipe is closed."""
    own_process()
    height, width = processor.output_size or (0, 0)
    pixels: NDArray[Any] = np.frombuffer(memory, pixel_dtype(processor)).reshape(-1, 3, height, width)
    answer: Decoded | None = None  # the first says that it has begun
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        while True:
            connection.send(answer)
            slot, image = connection.recv()
            answer = decode(image, processor, max_pixels)
            if answer.pixels is not None:
                pixels[slot] = answer.pixels
                answer = replace(answer, pixels=None)
    except (EOFError, OSError):
        return  # whom it works for has ended


def _end_with_parent() -> None:
    """Ends this process at once when its parent is gone, also in the middle of an image.

    Linux could send a signal then, but does so when the parent's thread ends.
    """
    parent = parent_process()
    while parent is not None and parent.is_alive() and os.getppid() == parent.pid:
        parent.join(1)
    os._exit(1)


def pixel_dtype(processor: Dinov2ImageProcessor) -> np.dtype[Any]:
    """Of the processor's outputs for images of 8 bits."""
    return np.dtype(np.float32 if processor.do_rescale or processor.do_normalize else np.uint8)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started inside never see Ctrl-C and SIGTERM, which are for this one; here they are only delayed.

    The mask is for them. It does not suffice here: another thread of this process may take a signal, for which Python
    then interrupts the main one, in the middle of a start.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # or the first process starts it, which unblocks the signals
    came: list[int] = []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    handlers: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.signal(number, lambda number, _: came.append(number)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for each in came:
            signal.raise_signal(each)
