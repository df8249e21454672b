"""Ctrl-C and SIGTERM: the first one ends a command in order, and those after it change nothing about that."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Whether a signal has come."""

    has_come = False

    def __call__(self, *_: Any) -> None:
        for name in SIGNALS:
            signal.signal(name, signal.SIG_IGN)
        self.has_come = True
        raise KeyboardInterrupt


@contextmanager
def one_interrupt(until_exit: bool) -> Iterator[Interrupt]:
    """Raises KeyboardInterrupt inside for the first signal alone; `until_exit` ignores the others for good.

    Python handles signals in the main thread only; in another this does nothing.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = [signal.signal(name, interrupt) for name in SIGNALS]
    try:
        yield interrupt
    finally:
        if not (interrupt.has_come and until_exit):
            for name, handler in zip(SIGNALS, before, strict=True):
                signal.signal(name, handler)
