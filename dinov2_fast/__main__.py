"""``python -m dinov2_fast`` is the same as ``dinov2-fast``."""

import sys

from dinov2_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
