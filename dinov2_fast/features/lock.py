"""A lock for each part of an output folder, so that one process writes it."""

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
    """Holds one part (number from 1, count) of a folder while the ``with`` block runs.

    This is a lock of the system (flock) on a file; the system ends it with the process, a killed one included. Other
    processes may hold other parts of the same count. Parts of another count would overlap and are refused.

    On a network file system these locks hold between machines if the server supports them (NFS 4, or 3 with lockd;
    Lustre mounted with flock). If the system reports that it has no locks, extraction continues with a warning (on
    Windows without one): two processes may then do the same work, but neither damages a shard, since each writes to a
    file of its own and renames it when it is complete. Some file systems accept locks that hold on one machine only,
    which cannot be detected: do not start a part twice there.

    Raises:
        LockedError: another process holds this part, or a part of another count.
    """
    number, count = part
    path = folder / f".lock-{number}-of-{count}"
    file = _acquire(path)
    if file is None:
        where = "to" if count == 1 else f"the part {number}/{count} of"
        raise LockedError(f"Another process is writing {where} {str(folder)!r}. Wait for it, or end it.")
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


def _acquire(path: Path) -> IO[bytes] | None:
    """The file, locked; None if another process holds it."""
    while True:
        file = open(path, "ab")  # noqa: SIM115  # closing it ends the lock
        if not _flock(file):
            file.close()
            return None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            return file
        file.close()  # its holder has deleted it meanwhile


def _is_held(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return not _flock(file)
    except FileNotFoundError:
        return False


def _flock(file: IO[bytes]) -> bool:
    """Whether this process got the lock, or the system has no locks."""
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
