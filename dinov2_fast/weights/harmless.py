"""Harmless objects that training scripts save beside weights: settings, dates, numpy scalars. They are not loaded.

`torch.load` with `weights_only=True` refuses a file that holds an object it does not know. For the classes named below
it gets a stand-in from this file, which keeps nothing. The real classes are neither imported nor called.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class _LeftOut:
    """Stands for an object, whatever its arguments and state."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _PlainDict:
    """Stands for a subclass of dict and makes a dict, whose weights are kept."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return {}


class _PlainList:
    """Stands for a kind of list and makes a list."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return []


_NAMES = {
    "argparse": "Namespace",
    "types": "SimpleNamespace",
    "builtins": "bool dict float frozenset int list range slice str tuple",
    "datetime": "date datetime time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "numpy": "bool bool_ dtype float16 float32 float64 int32 int64 ndarray uint8",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy._core.multiarray": "_reconstruct scalar",
    "omegaconf.base": "ContainerMetadata Metadata",
    "omegaconf.dictconfig": "DictConfig",
    "omegaconf.listconfig": "ListConfig",
    "omegaconf.nodes": "AnyNode",
    "pathlib": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
    "pathlib._local": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
    "typing": "Any",
    "uuid": "UUID",
}
_STAND_INS: dict[str, Any] = {
    **{f"{module}.{name}": _LeftOut for module, names in _NAMES.items() for name in names.split()},
    "collections.deque": _PlainList,
    "collections.defaultdict": _PlainDict,
    "lightning.fabric.utilities.data.AttributeDict": _PlainDict,
    "lightning_fabric.utilities.data.AttributeDict": _PlainDict,
    "pytorch_lightning.utilities.parsing.AttributeDict": _PlainDict,
}
_one_at_a_time = threading.Lock()  # torch has one list of allowed names for the whole process


def is_harmless(name: str | None) -> bool:
    """Whether objects of the class `name` may be ignored: "argparse.Namespace", or "dict" as torch names builtins."""
    return name in _STAND_INS or f"builtins.{name}" in _STAND_INS


@contextmanager
def ignoring_harmless_objects() -> Iterator[None]:
    """A context in which `torch.load(…, weights_only=True)` accepts files with harmless objects and ignores those."""
    with _one_at_a_time, torch.serialization.safe_globals([(stand, name) for name, stand in _STAND_INS.items()]):
        yield
