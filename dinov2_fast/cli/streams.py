"""What the command line says where it may not be heard: a stream may be closed, its disk full, its reader gone."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


@contextmanager
def usable_streams() -> Iterator[None]:
    """Inside, standard error takes everything, and no file that is opened gets the number of a standard stream."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    before = sys.stderr
    sys.stderr = _Losable(before) if before else open(os.devnull, "w")  # noqa: SIM115
    try:
        yield
    finally:
        sys.stderr = before


@contextmanager
def losable_output() -> Iterator[None]:
    """What is printed inside may be lost: the work that it is about is done."""
    try:
        yield
        if sys.stdout:
            sys.stdout.flush()
    except OSError:
        silence(sys.stdout)


def silence(stream: TextIO) -> None:
    """Drops what the stream still holds, which the interpreter would try to write at its end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Losable:
    """A stream that drops what cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes as much as can be written."""
        try:
            return self._stream.write(text)
        except OSError:
            silence(self._stream)
            return len(text)

    def flush(self) -> None:
        """As the stream's."""
        try:
            self._stream.flush()
        except OSError:
            silence(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
