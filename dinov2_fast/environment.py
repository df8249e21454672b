"""The environment variables that dinov2_fast reads, and the one that its command line sets.

``DINOV2_FAST_BACKEND``   which implementation of an op to use; see :mod:`dinov2_fast.ops.dispatch`.
``DINOV2_FAST_CACHE``     folder of the official checkpoints, by default ``~/.cache/dinov2_fast`` (the hub has its own).
``XFORMERS_DISABLED``     the reference's variable: if it is set to any value, xformers is not used.
``LOCAL_RANK``            torchrun's variable; torch.distributed itself reads its others.
``OMP_WAIT_POLICY``       OpenMP's variable; see :func:`use_passive_openmp_threads`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def backend_setting() -> str:
    """``DINOV2_FAST_BACKEND``, or "" if it is not set."""
    return os.environ.get("DINOV2_FAST_BACKEND", "")


def xformers_disabled() -> bool:
    """Whether ``XFORMERS_DISABLED`` is set, to any value, as in the reference."""
    return "XFORMERS_DISABLED" in os.environ


def cache_dir() -> Path:
    """Folder of the official checkpoint files (``DINOV2_FAST_CACHE``); it need not exist."""
    setting = os.environ.get("DINOV2_FAST_CACHE")
    return Path(setting).expanduser() if setting else Path.home() / ".cache" / "dinov2_fast"


def local_rank() -> int | None:
    """``LOCAL_RANK``, the number of this process among those of torchrun on its machine; None without torchrun."""
    setting = os.environ.get("LOCAL_RANK")
    return None if setting is None else int(setting)


def local_world_size() -> int:
    """``LOCAL_WORLD_SIZE``, the number of torchrun's processes on this machine; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def use_passive_openmp_threads() -> None:
    """Makes torch's threads sleep while they wait for work, unless the user has set ``OMP_WAIT_POLICY``.

    By default they spin and occupy the cores that processes for decoding need. OpenMP reads the variable once, when
    torch is loaded, so afterwards this function does nothing.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
