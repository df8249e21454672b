"""The progress of a command on standard error."""

from __future__ import annotations

import os
import sys
import time

from dinov2_fast.cli.process import SECONDS_BETWEEN_LINES


class ProgressLine:
    """Prints progress to stderr: on a terminal one line that is rewritten, otherwise a line now and then.

    On a terminal the cursor stays at the beginning of the line, so that a warning of the library does not end up behind
    the progress.
    """

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._last_line = time.perf_counter()
        self._width = 0

    def show(self, text: str, *, last: bool) -> None:
        """Prints the progress; where there is no terminal, only the last and those at least 30 seconds apart."""
        now = time.perf_counter()
        if self._terminal:
            columns = _columns() - 1  # what is longer than the line could not be rewritten
            print(f"{text.ljust(self._width)[:columns]}\r", end="", file=sys.stderr, flush=True)
            self._width = len(text)
        elif last or now - self._last_line >= SECONDS_BETWEEN_LINES:
            print(text, file=sys.stderr, flush=True)
            self._last_line = now

    def end(self) -> None:
        """Moves the cursor to a new line."""
        if self._width:
            print(file=sys.stderr)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, such as 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        return 80
