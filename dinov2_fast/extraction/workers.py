"""Decoding pictures in order, here or in worker processes that may die or hang.

Each worker is a process with a pipe for tasks and answers; pixels come back through shared memory, in slots. A worker
has several tasks waiting, so that all of them go on while the model runs and nobody reads answers. It does them in
order: when it dies, or takes too long, the first unanswered one is the cause, and the others go to the worker that
takes its place.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dinov2_fast.extraction.decoding import Decoded, decode
from dinov2_fast.extraction.images import MAX_PIXELS, own_process
from dinov2_fast.extraction.inputs import Picture
from dinov2_fast.image_processor import Dinov2ImageProcessor

MAX_SECONDS = 60.0
SHARED_BYTES = 1 << 28  # of pixels on their way, as long as each worker has two pictures
SECONDS_TO_DIE = 5.0  # one that waits for a disk that does not answer is left to the system
TASKS = 64  # that a worker may have: with as many answers unread, its pipe is not full

_context = multiprocessing.get_context("spawn")


def decode_all(
    pictures: Iterable[Picture],
    processor: Dinov2ImageProcessor,
    *,
    max_pixels: int = MAX_PIXELS,
    max_seconds: float = MAX_SECONDS,
    workers: int = 0,
    ahead: int = 64,
) -> Generator[Decoded, None, None]:
    """Decodes in the order of `pictures`; with `workers` processes, about `ahead` pictures before they are asked for.

    The processes are spawned: a script that calls this needs the usual ``if __name__ == "__main__":``. Close the
    iterator to stop them early. A worker that dies, or needs more than `max_seconds` for a picture, costs that picture,
    which gets an error. Without workers there is no limit of time.

    Args:
        pictures: where they are.
        processor: its outputs must have one size.

    Raises:
        RuntimeError: a worker cannot start.
    """
    if not workers:
        for picture in pictures:
            yield decode(picture, processor, max_pixels)
        return
    pool = _Pool(workers, processor, max_pixels, max_seconds, ahead)
    try:
        yield from pool.decode(iter(pictures))
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

    def decode(self, pictures: Iterator[Picture]) -> Generator[Decoded, None, None]:
        """The pictures' answers, in order."""
        sent = taken = 0
        while True:
            while sent - taken < len(self._pixels) and (picture := next(pictures, None)) is not None:
                min(self._workers, key=lambda worker: len(worker.tasks)).send(sent, sent % len(self._pixels), picture)
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

    def _receive(self) -> None:
        """Waits for answers, takes all that have come, and replaces workers that are gone or overdue."""
        deadline = min(worker.deadline(self._seconds) for worker in self._workers)
        timeout = None if deadline == float("inf") else max(deadline - time.monotonic(), 0)
        wait([worker.connection for worker in self._workers], timeout)
        for place, worker in enumerate(self._workers):
            try:
                self._answers.update(worker.answers())
            except (EOFError, OSError):
                self._replace(place, f"the process that decoded it ended ({worker.end(patience=1)})")
            else:
                if worker.deadline(self._seconds) <= time.monotonic():
                    worker.end()
                    self._replace(place, f"not decoded within {self._seconds:g} s")

    def _replace(self, place: int, error: str) -> None:
        """Puts a worker in the place of one that has ended; `error` is that of the task it was at."""
        old = self._workers[place]
        if old.since is None:
            raise RuntimeError(
                "A process for decoding ended before it could begin. A script needs `if __name__ == '__main__':` "
                "around what it does; otherwise see what the process printed, or use workers=0."
            )
        if old.tasks:
            self._answers[old.tasks.popleft().number] = Decoded(error=error)
        self._workers[place] = _Worker(self._arguments)
        for task in old.tasks:
            self._workers[place].send(task.number, task.slot, task.picture)

    def close(self) -> None:
        """Ends the processes; what they are at is lost."""
        for worker in self._workers:
            worker.end()


class _Task(NamedTuple):
    number: int
    slot: int
    picture: Picture
    sent: float  # by time.monotonic, which is the same clock in all processes


class _Worker:
    """A process that decodes, and the tasks that it has not answered."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.connection, theirs = _context.Pipe()
        self._process = _context.Process(target=_work, args=(theirs, *arguments), daemon=True)
        with _signals_blocked():
            self._process.start()
        theirs.close()
        self.tasks: deque[_Task] = deque()
        self.since: float | None = None  # when it was ready for its present task; None until it has started

    def send(self, number: int, slot: int, picture: Picture) -> None:
        """Gives it one more task."""
        self.tasks.append(_Task(number, slot, picture, time.monotonic()))
        with suppress(OSError):  # it has ended, which is noticed when its answers are read
            self.connection.send((slot, picture))

    def answers(self) -> dict[int, Decoded]:
        """The answers that have come, without pixels, by the number of their task.

        Raises:
            EOFError, OSError: the process has ended, and all its answers were taken before.
        """
        found: dict[int, Decoded] = {}
        while self.connection.poll():
            try:
                self.since, answer = self.connection.recv()
            except (EOFError, OSError):
                if found:
                    break
                raise
            if answer is not None:
                found[self.tasks.popleft().number] = answer
        return found

    def deadline(self, seconds: float) -> float:
        """When the task that it is at takes too long."""
        if self.since is None or not self.tasks:
            return float("inf")
        return max(self.since, self.tasks[0].sent) + seconds

    def end(self, patience: float = 0) -> str:
        """Ends the process, if it does not within `patience` seconds by itself; says how it ended."""
        self.connection.close()
        self._process.join(patience)
        self._process.kill()
        self._process.join(SECONDS_TO_DIE)
        code = self._process.exitcode or 0
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _work(connection: Connection, memory: Any, processor: Dinov2ImageProcessor, max_pixels: int) -> None:
    """What a worker does until its pipe is closed."""
    own_process()
    height, width = processor.output_size or (0, 0)
    pixels: NDArray[Any] = np.frombuffer(memory, pixel_dtype(processor)).reshape(-1, 3, height, width)
    answer: Decoded | None = None
    try:
        while True:
            connection.send((time.monotonic(), answer))
            slot, picture = connection.recv()
            answer = decode(picture, processor, max_pixels)
            if answer.pixels is not None:
                pixels[slot] = answer.pixels
                answer = replace(answer, pixels=None)
    except (EOFError, OSError):
        return  # whom it works for has ended


def pixel_dtype(processor: Dinov2ImageProcessor) -> np.dtype[Any]:
    """Of the processor's outputs for pictures of 8 bits."""
    return np.dtype(np.float32 if processor.do_rescale or processor.do_normalize else np.uint8)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started inside never see Ctrl-C and SIGTERM, which are for this one; here they are only delayed."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # or the first process starts it, which unblocks the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
