"""Ctrl-C and SIGTERM: the first signal ends a command in order; those that follow are ignored."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SignalHandler:
    """Raises KeyboardInterrupt at the first signal, and ignores the signals after it."""

    received = False

    def __call__(self, *_: Any) -> None:
        for name in SIGNALS:
            signal.signal(name, signal.SIG_IGN)
        self.received = True
        raise KeyboardInterrupt


@contextmanager
def one_interrupt(until_exit: bool) -> Iterator[SignalHandler]:
    """Inside, the first signal raises KeyboardInterrupt; with `until_exit` the others are ignored until the exit too.

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
