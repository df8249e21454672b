"""Fixtures: models of other libraries, and what their engines answered."""

from __future__ import annotations

from typing import Any

import pytest

from dinov2_fast.inference import Engine
from tests.helpers.library_models import KINDS, SOME, LibraryModel, needs


@pytest.fixture(params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> LibraryModel:
    needs(request.param)
    return request.param


@pytest.fixture(params=SOME, ids=str)
def some(request: pytest.FixtureRequest) -> LibraryModel:
    needs(request.param)
    return request.param


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods of engines that were called."""
    calls: list[str] = []
    call = Engine._call

    def spy(engine: Engine, method: str, args: Any, kwargs: Any) -> Any:
        calls.append(method)
        return call(engine, method, args, kwargs)

    monkeypatch.setattr(Engine, "_call", spy)
    return calls
