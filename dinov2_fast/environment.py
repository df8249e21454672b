"""The environment variables dinov2_fast reads, in one place.

``DINOV2_FAST_BACKEND``   which implementation of an op to use, see :mod:`dinov2_fast.backends`.
``DINOV2_FAST_CACHE``     folder for downloaded checkpoints, default ``~/.cache/dinov2_fast``.
``XFORMERS_DISABLED``     the reference's variable: set to anything, no xformers implementation is used.
"""

from __future__ import annotations

import os
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
