"""Images that several tests of extraction share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def plain(tmp_path: Path) -> list[str]:
    """Nine images."""
    random = np.random.default_rng(0)
    files = []
    for index in range(9):
        files.append(str(tmp_path / f"{index}.png"))
        Image.fromarray(random.integers(0, 25 * (index + 1), (40 + index, 90, 3), dtype=np.uint8)).save(files[-1])
    return files
