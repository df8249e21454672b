"""The process of a command: its exit codes, the signals that end it, and standard streams that fail."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

OK = 0
ABORTED = 1  # any error; also verify, if the features differ
SOME_FAILED = 3  # finished, but some images could not be read; argparse has 2 for wrong usage
INTERRUPTED = 130
STOPPED = 143  # as asked by SIGTERM or SIGUSR1, and a checkpoint was saved; only pretrain
SECONDS_BETWEEN_LINES = 30.0  # of progress, where it is not a terminal
SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOP_SIGNALS = (signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))  # Windows has no SIGUSR1


class SignalHandler:
    """Raises KeyboardInterrupt at the first signal, so that a command ends in order, and ignores those after it."""

    received = False

    def __call__(self, *_: Any) -> None:
        for name in SIGNALS:
            signal.signal(name, signal.SIG_IGN)
        self.received = True
        raise KeyboardInterrupt


@contextmanager
def one_interrupt(until_exit: bool) -> Iterator[SignalHandler]:
    """Inside, the first signal raises KeyboardInterrupt, and those after it are ignored.

    The handlers from before come back at the end. With `until_exit` and a signal they do not: signals stay ignored.
    Python handles signals in the main thread only; in another thread this does nothing.
    """
    handler = SignalHandler()
    if threading.current_thread() is not threading.main_thread():
        yield handler
        return
    before = [signal.signal(name, handler) for name in SIGNALS]
    try:
        yield handler
    finally:
        if not (handler.received and until_exit):
            for name, previous in zip(SIGNALS, before, strict=True):
                signal.signal(name, previous)


@contextmanager
def noted_stop() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM and SIGUSR1 end nothing. The function that it gives says whether one of them came.

    The handlers from before come back at the end, except where a Ctrl-C has replaced those of this function.
    """
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        received.append(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {name: signal.signal(name, note) for name in STOP_SIGNALS}
    try:
        yield lambda: bool(received)
    finally:
        for name, previous in before.items():
            if signal.getsignal(name) is note:
                signal.signal(name, previous)


@contextmanager
def usable_streams() -> Iterator[None]:
    """Inside, writing to standard error never fails, and no file gets the number of a closed standard stream."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    before = sys.stderr
    sys.stderr = _IgnoringErrors(before) if before else open(os.devnull, "w")  # noqa: SIM115
    try:
        yield
    finally:
        sys.stderr = before


@contextmanager
def ignored_output_errors() -> Iterator[None]:
    """Any OSError ends the block without an error, and later output is dropped. For reports on work that is done."""
    try:
        yield
        if sys.stdout:
            sys.stdout.flush()
    except OSError:
        discard_output(sys.stdout)


def discard_output(stream: TextIO) -> None:
    """Sends what the stream buffers, and all later output, to the null device: writing it at exit would fail."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _IgnoringErrors:
    """A stream that drops all output once some cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes the text, or drops it."""
        try:
            return self._stream.write(text)
        except OSError:
            discard_output(self._stream)
            return len(text)

    def flush(self) -> None:
        """Flushes the stream, or drops what it buffers."""
        try:
            self._stream.flush()
        except OSError:
            discard_output(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
