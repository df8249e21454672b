"""``python -m dinov2_fast`` is the same as ``dinov2-fast``."""

import os
import signal
import sys
from typing import Any


def main() -> int:
    """Runs the command line. While its modules are imported, Ctrl-C and SIGTERM end the process at once."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, _leave)
    from dinov2_fast.cli import main

    return main()


def _leave(*_: Any) -> None:
    """Ends the process without an exception, which a library could turn into another error during its import."""
    os.write(2, b"dinov2-fast: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
