"""Fixtures of the tests of the ops."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def compiler(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[None]:
    """Triton's compiler, with a cache for this test run that its workers share, unless the environment names one."""
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.fail("Tests marked aot compile kernels: run them in a process without TRITON_INTERPRET.")
    base = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        base = base.parent
    with triton.knobs.cache.scope():
        if "TRITON_CACHE_DIR" not in os.environ:
            triton.knobs.cache.dir = str(base / "triton")
        yield
