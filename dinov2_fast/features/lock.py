"""One writer for each part of an output folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dinov2_fast.errors import Dinov2FastError

logger = logging.getLogger("dinov2_fast")


class LockedError(Dinov2FastError, RuntimeError):
    """Another process writes to the folder."""


@contextmanager
def lock(folder: Path, part: tuple[int, int]) -> Iterator[None]:
    """Holds the part (index from 0, count) of a folder while the ``with`` block runs.

    It is a lock of the system (flock) on a file, which ends with the process however that ends. Other parts of the same
    count may be held by others; parts of another count would overlap and are refused.

    On network file systems these locks hold between machines where the server has them (NFS 4, or 3 with lockd; Lustre
    mounted with flock). Where the system says that it has none, extraction goes on with a warning: two processes then
    do the same work, and neither damages a shard, since each is written elsewhere and renamed when it is whole. Where a
    file system takes locks and keeps them to one machine, nobody can tell: do not start a part twice there.

    Raises:
        LockedError: another process holds this part, or one of another count.
    """
    index, count = part
    path = folder / f".lock-{index + 1}-of-{count}"
    file = _acquire(path)
    if file is None:
        raise LockedError(f"Another process is writing {_words(part)} {str(folder)!r}. Wait for it, or end it.")
    try:
        for other in folder.glob(".lock-*-of-*"):
            if not other.name.endswith(f"-of-{count}") and _is_held(other):
                what = other.name.removeprefix(".lock-").replace("-of-", "/")
                raise LockedError(
                    f"Another process is writing the part {what} of {str(folder)!r}: all parts must be of one number."
                )
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _words(part: tuple[int, int]) -> str:
    return "to" if part[1] == 1 else f"the part {part[0] + 1}/{part[1]} of"


def _acquire(path: Path) -> IO[bytes] | None:
    """The file, locked; None if another process holds it."""
    while True:
        file = open(path, "ab")  # noqa: SIM115  # closing it ends the lock
        if not _flock(file):
            file.close()
            return None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            return file
        file.close()  # its holder deleted it in between


def _is_held(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return not _flock(file)
    except FileNotFoundError:
        return False


def _flock(file: IO[bytes]) -> bool:
    """Whether the lock could be had, or the system has none."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning("%s cannot be locked (%s): start no second process for this folder.", file.name, error)
    return True
