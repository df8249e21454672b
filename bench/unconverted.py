"""The ops that `dinov2_fast.backends` still dispatches, as forms: to be deleted with it."""

from __future__ import annotations

from dinov2_fast import backends
from dinov2_fast.ops import dispatch
from dinov2_fast.ops.dispatch import Implementation

FUNCTIONS = {
}


def implementations(name: str) -> list[Implementation]:
    old = backends.ops()[FUNCTIONS[name]].implementations
    return [Implementation(i.backend, i.function, i.refuses, i.devices, elsewhere=i.elsewhere) for i in old]


def op_names() -> list[str]:
    """The names of all ops."""
    return sorted({*dispatch.names(), *backends.words()})
