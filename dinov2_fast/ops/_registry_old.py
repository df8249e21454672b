"""The registry of ops that are not converted yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dinov2_fast import backends
from dinov2_fast.backends import device_of
from dinov2_fast.ops import _registry
from dinov2_fast.ops._registry import *  # noqa: F403
from dinov2_fast.ops._registry import (  # noqa: F401
    _capability,
    _extension_is_absent,
    _extension_runs_on,
    _interprets,
    _is_exporting,
    _refuses_any_kernel,
)


def triton(
    function: Callable[..., Any], refuses: Callable[..., str | None] = lambda *args: None, trains: bool = True
) -> backends.Implementation:
    """The `triton` implementation of an op; `refuses` holds what this kernel cannot do beside what none can."""

    def reason(*args: Any, **kwargs: Any) -> str | None:
        if not _registry.TRITON_IS_INSTALLED:
            return "needs triton, which is not installed"
        return _registry._refuses_any_kernel(device_of(args)) or refuses(*args, **kwargs)

    return backends.Implementation("triton", function, reason, ("cuda",), _interprets, trains)


def cuda(
    function: Callable[..., Any], refuses: Callable[..., str | None] = lambda *args: None, trains: bool = True
) -> backends.Implementation:
    """The `cuda` implementation of an op, whose launches are the extension's; `refuses` as for :func:`triton`."""

    def reason(*args: Any, **kwargs: Any) -> str | None:
        absent = _registry._extension_is_absent()
        if absent is not None:
            return f"needs the CUDA extension, which is not available ({absent})"
        return _registry._refuses_any_kernel(device_of(args)) or refuses(*args, **kwargs)

    return backends.Implementation("cuda", function, reason, ("cuda",), _extension_runs_on, trains)


def torch_and_triton(
    reference: Callable[..., Any],
    kernel: Callable[..., Any],
    refuses: Callable[..., str | None] = lambda *args: None,
    trains: bool = True,
) -> tuple[backends.Implementation, backends.Implementation]:
    """The implementations of an op that has no others. torch stands first: no kernel has run on a GPU yet."""
    return backends.Implementation("torch", reference, trains=trains), triton(kernel, refuses, trains)
