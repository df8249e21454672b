"""Files that are there whole or not at all: written under another name beside their place, and renamed.

That name is ``.NAME.PLACE-PID-RANDOM.part``: it says which process writes the file, so that what a killed process left
can be told from what another one is writing.
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
SECONDS_TO_KEEP = 86_400  # in which a file of another machine, or of a process whose number is in use, grows no more


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file beside `path`, which is on the disk and takes its place when the ``with`` block ends well."""
    part = part_of(path)
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # while it is written, nothing names the file
    finally:
        part.unlink(missing_ok=True)
    _sync_folder(path.parent)


def part_of(path: Path) -> Path:
    """A new name for what this process writes before it takes the place of `path`."""
    return path.with_name(f".{path.name}.{_place()}-{os.getpid()}-{uuid.uuid4().hex[:12]}{ENDING}")


def is_left_over(part: Path) -> bool:
    """Whether nobody writes this temporary file any more."""
    place, _, rest = part.name.removesuffix(ENDING).rpartition(".")[2].partition("-")
    pid = rest.partition("-")[0]
    if place == _place() and pid.isdecimal() and not _is_running(int(pid)):
        return True
    try:
        return time.time() - part.stat().st_mtime > SECONDS_TO_KEEP
    except FileNotFoundError:
        return False


def _place() -> str:
    """The same for all processes that can see each other: of one machine, and of one container on it."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{platform.node()} {namespace}".encode()).hexdigest()[:8]


def _is_running(pid: int) -> bool:
    if os.name != "posix":
        return True  # there the question below would be an order
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _sync_folder(folder: Path) -> None:
    """Puts a rename on the disk, where the system can open folders."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
