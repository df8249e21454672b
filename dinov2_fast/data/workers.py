"""Decoding images in order, in this process or in worker processes that may die or hang.

A worker is a process with a pipe for tasks and answers; it writes pixels to slots of shared memory. Each worker has a
queue of tasks, so that all workers continue while this process runs the model and reads no answers. A worker does its
tasks in order: if it dies or takes too long, the first task without an answer is the cause. The next worker tries that
task once more, because the machine may have been at fault (memory ran out, the job was stopped), and does the others.

Only the time in which this process waits for a worker counts towards the limits; they pause while it does something
else, or while the whole job is stopped.
"""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dinov2_fast.data.decoding import Decoded, Preparation, decode
from dinov2_fast.data.images import MAX_PIXELS, disable_pillow_limits
from dinov2_fast.data.sources import ImageSource
from dinov2_fast.errors import InvalidStateError

MAX_SECONDS = 60.0
SECONDS_TO_START = 60.0  # many processes that import from a slow disk at once may take tens of seconds
SECONDS_TO_DIE = 5.0  # a process that waits for a dead disk cannot be killed, and is left to the system
SHARED_BYTES = 1 << 28  # limit of all slots; but each worker has at least two
TASKS = 64  # limit of a worker's queue: so many unread answers fit in a pipe
TASK_BYTES = 1 << 15  # limit of the names in a worker's queue, so that sending a task never blocks
STARTS = 3  # tries to start a worker that is killed, or takes too long, before it is ready
STEP = 1.0  # seconds of one wait; if it took longer, the job was stopped, and only this much counts

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_context = multiprocessing.get_context("spawn")


Task: TypeAlias = tuple[ImageSource, int]  # an image, and the number that its preparation gets


def decode_all(
    images: Iterable[ImageSource],
    preparation: Preparation,
    *,
    max_pixels: int = MAX_PIXELS,
    max_seconds: float = MAX_SECONDS,
    workers: int = 0,
    ahead: int = 64,
) -> Generator[Decoded, None, None]:
    """`prepare_all` for images whose preparation needs no number."""
    tasks = ((image, 0) for image in images)
    return prepare_all(tasks, preparation, max_pixels=max_pixels, max_seconds=max_seconds, workers=workers, ahead=ahead)


def prepare_all(
    tasks: Iterable[Task],
    preparation: Preparation,
    *,
    max_pixels: int = MAX_PIXELS,
    max_seconds: float = MAX_SECONDS,
    workers: int = 0,
    ahead: int = 64,
) -> Generator[Decoded, None, None]:
    """Decodes and prepares images in order; with `workers` processes, about `ahead` of them before they are asked for.

    The processes are spawned: a script that calls this needs the usual ``if __name__ == "__main__":``. Close the
    iterator to stop them early. An image of more than `max_pixels` gets an error. An image on which a worker dies, or
    for which this process waits more than `max_seconds`, is tried once more, and then gets an error. Without workers
    there is no limit of time.

    Raises:
        InvalidValueError: the outputs of the preparation differ in size, with `workers`.
        InvalidStateError: a worker cannot start.
    """
    if not workers:
        for image, number in tasks:
            yield decode(image, preparation, max_pixels, number=number)
        return
    pool = _Pool(workers, preparation, max_pixels, max_seconds, ahead)
    try:
        yield from pool.decode(iter(tasks))
    finally:
        pool.close()


class _Pool:
    """Workers, the slots that they write to, and the answers that have arrived."""

    def __init__(self, workers: int, preparation: Preparation, max_pixels: int, max_seconds: float, ahead: int) -> None:
        size = math.prod(preparation.output_shape) * preparation.output_dtype.itemsize
        slots = max(min(ahead, TASKS * workers, SHARED_BYTES // size), 2 * workers)
        memory: Any = _context.RawArray(ctypes.c_uint8, slots * size)
        self._pixels = _slots(memory, preparation)
        self._arguments = memory, preparation, max_pixels
        self._seconds = max_seconds
        self._answers: dict[int, Decoded] = {}  # by the place of the task among all
        self._suspects: set[int] = set()  # tasks at which a worker has died
        self._workers = [_Worker(self._arguments) for _ in range(workers)]

    def decode(self, tasks: Iterator[Task]) -> Generator[Decoded, None, None]:
        """The answers for the tasks, in order."""
        sent = taken = 0
        while True:
            while sent - taken < len(self._pixels) and (worker := self._free_worker()):
                if (task := next(tasks, None)) is None:
                    break
                worker.send(sent, sent % len(self._pixels), task)
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
        """The worker with the fewest tasks, if it has room for one more."""
        worker = min(self._workers, key=lambda worker: len(worker.tasks))
        return worker if worker.has_room() else None

    def _receive(self) -> None:
        """Waits for answers, takes all that have arrived, and replaces workers that have ended or are overdue."""
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
        """Replaces a worker that has ended; `error` is for the task that it was doing."""
        old = self._workers[place]
        if not old.is_ready and (old.exit_code >= 0 or old.starts == STARTS):
            how = f"not ready in {SECONDS_TO_START:g} s" if old.is_overdue(self._seconds) else old.how_it_ended
            raise InvalidStateError(
                f"A process for decoding ended before it could begin ({how}). A script needs `if __name__ "
                "== '__main__':` around what it does; otherwise see what the process printed and whether memory "
                "suffices, or use workers=0."
            )
        if old.is_ready and old.tasks:  # otherwise no task is the cause
            cause = next(iter(old.tasks))
            if cause in self._suspects:
                del old.tasks[cause]
                self._suspects.remove(cause)
                self._answers[cause] = Decoded(error=error, transient=True)
            else:
                self._suspects.add(cause)
        self._workers[place] = _Worker(self._arguments, starts=1 if old.is_ready else old.starts + 1)
        for task_place, task in old.tasks.items():
            self._workers[place].send(task_place, task_place % len(self._pixels), task)

    def close(self) -> None:
        """Ends the processes and drops their tasks."""
        for worker in self._workers:
            worker.end()


class _Worker:
    """A process that decodes images.

    Attributes:
        tasks: those without an answer, by their place among all tasks, in the order in which they were sent.
        starts: the number of processes, this one included, that were started before one was ready.
        is_ready: the process has sent its first message.
    """

    def __init__(self, arguments: tuple[Any, ...], starts: int = 1) -> None:
        self.connection, theirs = _context.Pipe()
        self._process = _context.Process(target=_work, args=(theirs, *arguments), daemon=True)
        with _signals_blocked():
            self._process.start()
        theirs.close()
        self.tasks: dict[int, Task] = {}
        self.starts, self.is_ready = starts, False
        self._waited = 0.0  # seconds for its first task, or for its start

    def has_room(self) -> bool:
        """Whether one more task can be sent without blocking."""
        nbytes = sum(len(image.path) + len(image.archive or "") for image, _ in self.tasks.values())
        return len(self.tasks) < TASKS and nbytes < TASK_BYTES

    def send(self, place: int, slot: int, task: Task) -> None:
        """Adds a task: decode the image, and write its pixels to the slot."""
        self.tasks[place] = task
        with suppress(OSError):  # the process has ended; `answers` reports it
            self.connection.send((slot, *task))

    def answers(self) -> dict[int, Decoded]:
        """The answers that have arrived, without pixels, by the place of their task.

        Raises:
            EOFError, OSError: the process has ended, and earlier calls have returned all its answers.
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
            if self.is_ready:
                place = next(iter(self.tasks))
                del self.tasks[place]
                found[place] = answer
            self.is_ready = True
        return found

    def add_time(self, seconds: float) -> None:
        """Adds to the time that this process has waited for its first task, or for its start."""
        if self.tasks or not self.is_ready:
            self._waited += seconds

    def is_overdue(self, seconds: float) -> bool:
        """Whether its first task takes more than `seconds`, or its start too long."""
        return self._waited > (seconds if self.is_ready else SECONDS_TO_START)

    def end(self, patience: float = 0) -> str:
        """Kills the process if it does not end by itself within `patience` seconds; returns how it ended."""
        self.connection.close()
        self._process.join(patience)
        self._process.kill()
        self._process.join(SECONDS_TO_DIE)
        return self.how_it_ended

    @property
    def exit_code(self) -> int:
        """The exit code of the ended process; negative if a signal ended it."""
        return self._process.exitcode or 0

    @property
    def how_it_ended(self) -> str:
        """The exit code or the signal, in words."""
        code = self.exit_code
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _work(connection: Connection, memory: Any, preparation: Preparation, max_pixels: int) -> None:
    """The main function of a worker: decodes until its pipe is closed."""
    disable_pillow_limits()
    pixels = _slots(memory, preparation)
    answer: Decoded | None = None  # the first message says that the worker is ready
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        while True:
            connection.send(answer)
            slot, image, number = connection.recv()
            answer = decode(image, preparation, max_pixels, number=number)
            if answer.pixels is not None:
                pixels[slot] = answer.pixels
                answer = replace(answer, pixels=None)
    except (EOFError, OSError):
        return  # the parent has closed the pipe or ended


def _end_with_parent() -> None:
    """Ends this process as soon as its parent has ended, even in the middle of an image.

    Linux can send a signal instead, but sends it when the parent's thread ends, not its process.
    """
    parent = parent_process()
    while parent is not None and parent.is_alive() and os.getppid() == parent.pid:
        parent.join(1)
    os._exit(1)


def _slots(memory: Any, preparation: Preparation) -> NDArray[Any]:
    """Shared memory as an array (slots, …) of the preparation's outputs."""
    return np.frombuffer(memory, preparation.output_dtype).reshape(-1, *preparation.output_shape)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes that are started inside ignore Ctrl-C and SIGTERM; in this process the signals are delayed.

    The child inherits the signal mask. In this process the mask is not enough: another thread may receive the signal,
    and Python then interrupts the main thread in the middle of a start. So handlers collect the signals, too.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # otherwise the first process starts it, which unblocks the signals
    received: list[int] = []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    handlers: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.signal(number, lambda number, _: received.append(number)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for each in received:
            signal.raise_signal(each)
