"""``python -m dinov2_fast`` is the same as ``dinov2-fast``."""

import os
import signal
import sys
from typing import Any


def main() -> int:
    """Runs the command line; Ctrl-C and SIGTERM end the process at once while the package is imported."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, _exit)
    from dinov2_fast.cli import main

    return main()


def _exit(*_: Any) -> None:
    """Exits without an exception, which a library in the middle of its import would turn into another error."""
    os.write(2, b"dinov2-fast: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
