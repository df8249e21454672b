"""The folder of a pretraining run: which of its checkpoints is the newest that is as it was written.

    RUN/checkpoint-00012500/
        teacher.safetensors    the teacher's backbone, in the keys of the reference
        config.json            what its tensors do not tell: heads, image size, way of resampling positions
        state.json             the size and the CRC-32 of each file, and all that `dinov2_fast.pretraining` needs

A checkpoint gets its name when it is complete. Until then it is called ``.checkpoint-00012500.part``.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Collection
from pathlib import Path

from dinov2_fast.errors import WeightsError
from dinov2_fast.logs import logger

STATE = "state.json"
TEACHER = "teacher.safetensors"
CONFIG = "config.json"
PARTS = ".checkpoint-*.part"  # checkpoints that are being written, or that a killed process left
_NAME = re.compile(r"checkpoint-\d{8,}")


def checkpoint_folder(run: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return run / f"checkpoint-{step:08d}"


def part_of(folder: Path) -> Path:
    """The folder in which a checkpoint is until it is complete."""
    return folder.with_name(f".{folder.name}.part")


def find_checkpoints(run: Path) -> list[Path]:
    """The checkpoints in the folder of a run, the oldest first. They may be damaged."""
    if not run.is_dir():
        return []
    found = [path for path in run.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def newest_checkpoint(run: Path, names: Collection[str] | None = None) -> Path | None:
    """The newest checkpoint whose files are as they were written; None if there are no checkpoints.

    Args:
        run: the folder of a run; it need not exist.
        names: the files that are looked at, all by default. They are read whole. A damaged checkpoint is named in a
            warning, and the one before it is taken.

    Raises:
        WeightsError: there are checkpoints, and all are damaged.
    """
    reasons = []
    for folder in reversed(find_checkpoints(run)):
        reason = find_damage(folder, names)
        if reason is None:
            return folder
        reasons.append(f"{folder} is damaged: {reason}")
        logger.warning("%s. It is not used.", reasons[-1])
    if reasons:
        raise WeightsError(
            f"No checkpoint of {run} can be used:\n  - "
            + "\n  - ".join(reasons)
            + "\nCheck the disk. If the files are "
            "lost, delete these folders."
        )
    return None


def find_teacher(folder: Path) -> Path | None:
    """The file of the newest teacher in the folder of a run or of a checkpoint; None if it is neither.

    Raises:
        WeightsError: all checkpoints of the run are damaged, or its first one is not complete.
    """
    newest = newest_checkpoint(folder, (TEACHER, CONFIG))
    if newest is None and any(folder.glob(PARTS)):
        raise WeightsError(
            f"{folder} holds a pretraining run whose first checkpoint is not complete. Wait until it is, or start the "
            "same run again if it has ended."
        )
    newest = newest or folder
    return newest / TEACHER if all((newest / name).is_file() for name in (TEACHER, CONFIG, STATE)) else None


def find_damage(folder: Path, names: Collection[str] | None = None) -> str | None:
    """What is wrong with the files of a checkpoint, or with those of these names; None if nothing is."""
    try:
        files = json.loads((folder / STATE).read_text(encoding="utf-8"))["files"]
        for name in files if names is None else names:
            size, crc = files[name]["bytes"], files[name]["crc32"]
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, not {size}"
            if _crc32(folder / name) != crc:
                return f"{name} has other bytes than were written"
    except OSError as error:
        return f"{Path(str(error.filename)).name} cannot be read ({error.strerror})"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"{STATE} does not describe it ({error!r})"
    return None


def _crc32(path: Path) -> int:
    crc, buffer = 0, memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            crc = zlib.crc32(buffer[:count], crc)
    return crc
