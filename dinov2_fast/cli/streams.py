"""Standard streams that fail: one may be closed, its disk full, or the reader of its pipe gone."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


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
    """Inside, output that cannot be written is dropped. This is for reports on work that is already done."""
    try:
        yield
        if sys.stdout:
            sys.stdout.flush()
    except OSError:
        discard_output(sys.stdout)


def discard_output(stream: TextIO) -> None:
    """Drops what the stream still buffers; the interpreter would try to write it at exit, and fail."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _IgnoringErrors:
    """A stream that drops what cannot be written."""

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
