"""The environment variables dinov2_fast reads, and the one that its command line sets, in one place.

``DINOV2_FAST_BACKEND``   which implementation of an op to use, see :mod:`dinov2_fast.ops.dispatch`.
``DINOV2_FAST_CACHE``     folder for downloaded checkpoints, default ``~/.cache/dinov2_fast``.
``XFORMERS_DISABLED``     the reference's variable: set to anything, no xformers implementation is used.
``OMP_WAIT_POLICY``       OpenMP's, see :func:`use_passive_openmp_threads`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def backend_setting() -> str:
    """``DINOV2_FAST_BACKEND``, empty when unset."""
    return os.environ.get("DINOV2_FAST_BACKEND", "")


def xformers_disabled() -> bool:
    """True if ``XFORMERS_DISABLED`` is set to any value, as the reference reads it."""
    return "XFORMERS_DISABLED" in os.environ


def cache_dir() -> Path:
    """Folder of downloaded checkpoints (``DINOV2_FAST_CACHE``); it need not exist."""
    setting = os.environ.get("DINOV2_FAST_CACHE")
    return Path(setting).expanduser() if setting else Path.home() / ".cache" / "dinov2_fast"


def use_passive_openmp_threads() -> None:
    """Has torch's threads sleep between the parts that they compute together, unless the user set ``OMP_WAIT_POLICY``.

    By default they spin, on the cores that processes for decoding need. OpenMP reads this once: where torch is loaded,
    it is too late, and nothing is done.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
