"""Leaves these cases out unless they are asked for: ``python -m pytest tests/benchmarks --benchmark-only``."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark looks at what it would run
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("benchmark_only", False):
        return
    here = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    config.hook.pytest_deselected(items=here)
    items[:] = [item for item in items if item not in here]
