"""Files that are complete or absent: they are written under a temporary name in the same folder, and then renamed.

The temporary name is ``.NAME.PLACE-PID-RANDOM.part``. It identifies the process, so that a file that a killed process
left can be told from one that another process is writing.
"""

from __future__ import annotations

import hashlib
import os
import platform
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

ENDING = ".part"
SECONDS_TO_KEEP = 86_400  # a file that has not grown for so long is left over, whatever its process


@contextmanager
def whole_file(path: Path, *, keep_existing: bool = False) -> Iterator[IO[bytes]]:
    """A temporary file that is written to the disk and renamed to `path` if the ``with`` block succeeds.

    With `keep_existing` a file that is at `path` by then stays as it is.
    """
    part = part_of(path)
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not (keep_existing and _link(part, path)):
            os.replace(part, path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # errors of writing do not name the file
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)


def _link(part: Path, path: Path) -> bool:
    """Gives a file a second name unless that name is taken; False on a file system without links."""
    try:
        with suppress(FileExistsError):
            os.link(part, path)  # fails if the file exists, unlike a rename
    except OSError:
        return False
    return True


def part_of(path: Path) -> Path:
    """A new temporary path for a file that will be renamed to `path`."""
    return path.with_name(f".{path.name}.{_place()}-{os.getpid()}-{uuid.uuid4().hex[:12]}{ENDING}")


def is_left_over(part: Path) -> bool:
    """Whether no process writes this temporary file any more."""
    place, _, rest = part.name.removesuffix(ENDING).rpartition(".")[2].partition("-")
    pid = rest.partition("-")[0]
    if place == _place() and pid.isdecimal() and not _is_running(int(pid)):
        return True
    try:
        return time.time() - part.stat().st_mtime > SECONDS_TO_KEEP
    except FileNotFoundError:
        return False


def _place() -> str:
    """An id of the machine and, on Linux, the container: the same for all processes that can see each other."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{platform.node()} {namespace}".encode()).hexdigest()[:8]


def _is_running(pid: int) -> bool:
    if os.name != "posix":
        return True  # on Windows os.kill would end the process
    try:
        with suppress(PermissionError, OverflowError):
            os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Writes a rename to the disk, if the system can open folders."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
