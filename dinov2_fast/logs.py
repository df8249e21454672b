"""The package's logger, and warnings that are logged once."""

import logging
from functools import cache

logger = logging.getLogger("dinov2_fast")


@cache
def log_once(message: str) -> None:
    """Logs a warning the first time it is called with this message in a process."""
    logger.warning(message)
